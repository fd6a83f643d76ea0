"""FLAC: the number of samples, from the last frame.

The header's number is 0 where an encoder wrote to a pipe, and can be wrong; libsndfile reads no more than it says.
Format: RFC 9639.
"""

import struct
from typing import BinaryIO, NamedTuple

from mal_adapter.ser.sound.source import DamagedSoundError, read_at

__all__ = ["FlacLength", "measure_flac"]

_BLOCK_SIZES = {1: 192, **{code: 576 << code - 2 for code in range(2, 6)}, **{code: 256 << code - 8 for code in range(8, 16)}}
_LARGEST_FRAME = 1 << 24  # in bytes; the header's field has 24 bits


class FlacLength(NamedTuple):
    """What the header and the last frame say.

    Attributes:
        declared: samples per channel by the header; 0 for unknown.
        found: samples per channel up to the end of the last frame.
        end: where the frames end; tags may follow.
        total_at: offset of the byte that holds the upper bits of the header's number.
        first_byte: that byte, with the number's bits cleared.
    """

    declared: int
    found: int
    end: int
    total_at: int
    first_byte: int

    @property
    def patches(self) -> tuple[tuple[int, bytes], ...]:
        """Clears the header's number, so that libFLAC reads to the end."""
        return ((self.total_at, bytes([self.first_byte, 0, 0, 0, 0])),)


def measure_flac(file: BinaryIO, start: int, end: int) -> FlacLength:
    """Finds the last frame.

    Args:
        file: opened in binary mode.
        start: of b"fLaC"; ID3 tags may come before it.
        end: of the frames; ID3 tags may follow it.

    Raises:
        DamagedSoundError: the header is incomplete, or there are no frames.
    """
    info = read_at(file, start + 4, 38)
    if len(info) < 38 or info[0] & 0x7F != 0:
        raise DamagedSoundError("the header of this FLAC file is damaged; copy it again")
    largest_block = struct.unpack(">H", info[6:8])[0]
    packed = int.from_bytes(info[14:22], "big")
    declared = packed & (1 << 36) - 1
    frames_start = _skip_metadata(file, start + 4, end)
    found = _end_of_last_frame(file, frames_start, end, largest_block, declared)
    return FlacLength(declared, found, end, start + 4 + 17, info[17] & 0xF0)


def _skip_metadata(file: BinaryIO, at: int, end: int) -> int:
    last = False
    while not last:
        head = read_at(file, at, 4)
        if len(head) < 4 or at >= end:
            raise DamagedSoundError("this FLAC file ends within its header; copy it again")
        last = bool(head[0] & 0x80)
        at += 4 + int.from_bytes(head[1:], "big")
    return at


def _end_of_last_frame(file: BinaryIO, start: int, end: int, largest_block: int, declared: int) -> int:
    """The number of the first sample after the last frame; 0 if there are no frames."""
    stop, kept = end, b""
    while stop > start and end - stop < _LARGEST_FRAME:
        first = max(start, stop - (1 << 16))
        window = read_at(file, first, stop - first) + kept
        at = len(window)
        while (at := window.rfind(b"\xff", 0, at)) >= 0:
            if at + 1 < len(window) and window[at + 1] & 0xFE == 0xF8:
                sample = _end_of_frame(window[at : at + 16], largest_block)
                if sample is not None:
                    return sample
        stop, kept = first, window[:16]
    return 0


def _end_of_frame(head: bytes, largest_block: int) -> int | None:
    """The number of the first sample after a frame; None where `head` is no frame's header."""
    if len(head) < 6 or head[3] & 1:
        return None
    block_code, rate_code = head[2] >> 4, head[2] & 0x0F
    length = 1 if head[4] < 0x80 else 8 - (head[4] ^ 0xFF).bit_length()
    if block_code == 0 or rate_code == 15 or head[4] & 0xC0 == 0x80 or head[4] == 0xFF:
        return None
    number = head[4] if length == 1 else head[4] & (0x7F >> length)
    for byte in head[5 : 4 + length]:
        if byte & 0xC0 != 0x80:
            return None
        number = number << 6 | byte & 0x3F
    at = 4 + length
    extra = {6: 1, 7: 2}.get(block_code, 0)
    size = int.from_bytes(head[at : at + extra], "big") + 1 if extra else _BLOCK_SIZES[block_code]
    at += extra + {12: 1, 13: 2, 14: 2}.get(rate_code, 0)
    if at >= len(head) or _crc8(head[:at]) != head[at]:
        return None
    return number + size if head[1] & 1 else number * largest_block + size


def _crc8(data: bytes) -> int:
    crc = 0
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc << 1 ^ 0x07) & 0xFF if crc & 0x80 else crc << 1
    return crc
