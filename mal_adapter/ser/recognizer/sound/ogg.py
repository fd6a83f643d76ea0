"""OGG: pages that are damaged or missing.

libogg leaves out a page whose checksum is wrong. libsndfile reads a file without its last page as if it were complete.
Format: RFC 3533.
"""

import struct
import zlib
from typing import BinaryIO

from mal_adapter.ser.recognizer.sound.source import DamagedSoundError, read_at

__all__ = ["check_ogg"]

_AUDIO = (b"\x01vorbis", b"OpusHead", b"\x7fFLAC", b"Speex   ")
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
_FIRST, _LAST = 2, 4  # flags of a page


def check_ogg(file: BinaryIO, start: int, end: int) -> None:
    """Check all pages.

    Args:
        file: Opened in binary mode.
        start: Offset of the first page.
        end: End of the file.

    Raises:
        DamagedSoundError: A page is damaged or missing, such as the last one, or there is more than one stream of
            sound.
    """
    numbers: dict[int, int] = {}
    at, sound, ended = start, None, False
    while at < end:
        head = read_at(file, at, 27)
        if head[:4] != b"OggS":
            if ended and b"OggS" not in read_at(file, at, 1 << 16):
                return  # a tag, added by another program
            raise DamagedSoundError(f"the file is damaged: there is no OGG page at byte {at}; copy it again")
        if len(head) < 27:
            break
        flags, _, serial, number, checksum, segments = struct.unpack("<BqIIIB", head[5:27])
        lacing = file.read(segments)
        body = file.read(sum(lacing))
        if len(lacing) < segments or len(body) < sum(lacing):
            break
        page = head[:22] + bytes(4) + head[26:] + lacing + body
        if _checksum(page) != checksum:
            raise DamagedSoundError(
                f"the file is damaged: the OGG page at byte {at} has a wrong checksum; copy it again"
            )
        if flags & _FIRST and body.startswith(_AUDIO):
            if sound is not None:
                raise DamagedSoundError(
                    "the file has more than one OGG stream, and only the first would be read; convert it to one, "
                    "for example with ffmpeg -i in.ogg out.wav"
                )
            sound = serial
        if number != numbers.get(serial, -1) + 1 and serial in numbers:
            raise DamagedSoundError(f"the file is damaged: OGG pages before byte {at} are missing; copy it again")
        numbers[serial] = number
        ended = ended or (serial == sound and bool(flags & _LAST))
        at += len(page)
    if sound is None:
        raise DamagedSoundError("this OGG file has no sound that can be read; convert it to WAV, FLAC, OGG or MP3")
    if not ended:
        raise DamagedSoundError("the file is cut short: its last OGG page is missing; copy it again")


def _checksum(page: bytes) -> int:
    """CRC-32 in OGG's order of bits: that of zlib, over bytes whose bits are reversed."""
    crc = zlib.crc32(page.translate(_REVERSED), 0xFFFF_FFFF) ^ 0xFFFF_FFFF
    return int.from_bytes(crc.to_bytes(4, "little").translate(_REVERSED), "big")
