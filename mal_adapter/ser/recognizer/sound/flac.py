"""FLAC: the number of samples, from the last frame.

The header's number is 0 if an encoder wrote to a pipe, and can be wrong. libsndfile reads no more than that number.
Format: RFC 9639.
"""

import struct
from typing import BinaryIO, NamedTuple

from mal_adapter.ser.recognizer.sound.source import DamagedSoundError, read_at

__all__ = ["measure_flac"]

_BLOCK_SIZES = {1: 192} | {code: 576 << code - 2 for code in range(2, 6)}
_BLOCK_SIZES |= {code: 256 << code - 8 for code in range(8, 16)}
_LARGEST_FRAME = 1 << 21  # in bytes: 65535 samples of eight channels with 32 bits
_STEP = 1 << 14
_TRIED = 3  # how many places that look like the header of the last frame are checked


class FlacLength(NamedTuple):
    """The length of a FLAC file by its header and by its last frame.

    Attributes:
        declared: Samples per channel by the header; 0 if unknown.
        found: Samples per channel up to the end of the last frame.
        end: Where the frames end; tags may follow.
        total_at: Offset of the byte that holds the upper bits of the header's number.
        first_byte: That byte, with the number's bits cleared.
    """

    declared: int
    found: int
    end: int
    total_at: int
    first_byte: int

    @property
    def patches(self) -> tuple[tuple[int, bytes], ...]:
        """Replacements that clear the header's number, so that libFLAC reads to the end."""
        return ((self.total_at, bytes([self.first_byte, 0, 0, 0, 0])),)


def measure_flac(file: BinaryIO, start: int, end: int) -> FlacLength:
    """Find the last frame.

    Args:
        file: Opened in binary mode.
        start: Offset of b"fLaC"; ID3 tags may come before it.
        end: End of the frames; ID3 tags may follow.

    Raises:
        DamagedSoundError: The header or the last frame is incomplete.
    """
    info = read_at(file, start + 4, 38)
    if len(info) < 38 or info[0] & 0x7F != 0:
        raise DamagedSoundError("the header of this FLAC file is damaged; copy it again")
    largest_block = struct.unpack(">H", info[6:8])[0]
    packed = int.from_bytes(info[14:22], "big")
    declared = packed & (1 << 36) - 1
    frames_start = _skip_metadata(file, start + 4, end)
    begin, found, complete = _last_frame(file, frames_start, end, largest_block)
    if not complete:
        rate = packed >> 44 or 1
        raise DamagedSoundError(
            f"the file is cut short: it ends within the frame that begins at {begin / rate:.2f} s; copy it again"
        )
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


def _last_frame(file: BinaryIO, start: int, end: int, largest_block: int) -> tuple[int, int, bool]:
    """The last frame: (number of its first sample, number after its last sample, whether it is complete)."""
    stop, tail, last, tried = end, b"", None, 0
    while stop > start and tried < _TRIED and len(tail) < _LARGEST_FRAME:
        first = max(start, stop - _STEP)
        at = stop - first + 16  # a header may begin in this step and end in the next
        tail = read_at(file, first, stop - first) + tail
        while tried < _TRIED and (at := tail.rfind(b"\xff", 0, at)) >= 0:
            samples = _samples_of_frame(tail[at : at + 16], largest_block)
            if samples is not None:
                if _crc16(tail[at:]) == 0:
                    return (*samples, True)
                last, tried = last or samples, tried + 1
        stop = first
    return (0, 0, True) if last is None else (*last, False)


def _samples_of_frame(head: bytes, largest_block: int) -> tuple[int, int] | None:
    """(Number of a frame's first sample, number after its last); None if `head` is not a frame's header."""
    if len(head) < 6 or head[1] & 0xFE != 0xF8 or head[3] & 1:
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
    first = number if head[1] & 1 else number * largest_block
    return first, first + size


def _crc8(data: bytes) -> int:
    crc = 0
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc << 1 ^ 0x07) & 0xFF if crc & 0x80 else crc << 1
    return crc


def _crc16(data: bytes) -> int:
    """The checksum of data. It is 0 for a frame with its own checksum, also with zeros after it."""
    crc = 0
    for byte in data:
        crc = (crc << 8 & 0xFFFF) ^ _CRC16[crc >> 8 ^ byte]
    return crc


def _crc16_of(byte: int) -> int:
    crc = byte << 8
    for _ in range(8):
        crc = (crc << 1 ^ 0x8005 if crc & 0x8000 else crc << 1) & 0xFFFF
    return crc


_CRC16 = [_crc16_of(byte) for byte in range(256)]
