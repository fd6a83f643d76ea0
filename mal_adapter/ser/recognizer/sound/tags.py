"""ID3, Lyrics3 and APE tags, which may be before and after sound of any format."""

import struct
from typing import BinaryIO

from mal_adapter.ser.recognizer.sound.source import read_at

__all__ = ["end_without_tags", "start_without_tags", "tag_size"]


def start_without_tags(file: BinaryIO, end: int) -> int:
    """The offset of the sound, after ID3v2 tags."""
    at = 0
    while at < end and read_at(file, at, 3) == b"ID3" and (size := tag_size(file, at, end)):
        at += size
    return min(at, end)


def tag_size(file: BinaryIO, at: int, end: int) -> int:
    """The size of an ID3 tag at an offset; 0 if there is none."""
    head = read_at(file, at, 10)
    if head[:3] == b"TAG" and end - at >= 128:
        return 128
    if head[:3] != b"ID3" or len(head) < 10 or max(head[6:10]) > 0x7F:
        return 0
    return 10 + _synchsafe(head[6:10]) + (10 if head[5] & 0x10 else 0)


def _synchsafe(digits: bytes) -> int:
    return digits[0] << 21 | digits[1] << 14 | digits[2] << 7 | digits[3]


def end_without_tags(file: BinaryIO, start: int, end: int) -> int:
    """The end of the file without ID3v1, Lyrics3 and APE tags."""
    while end - start >= 128:
        tail = read_at(file, max(start, end - 128), 128)
        if tail[:3] == b"TAG":
            end -= 128
        elif tail[-9:] == b"LYRICS200" and tail[-15:-9].isdigit():
            end -= 15 + int(tail[-15:-9])
        elif tail[-32:-24] == b"APETAGEX":
            size, _, flags = struct.unpack("<III", tail[-20:-8])
            end -= size + (32 if flags & 0x8000_0000 else 0)
        elif tail[-10:-7] == b"3DI" and max(tail[-4:]) < 0x80:
            end -= 20 + _synchsafe(tail[-4:])
        else:
            break
    return max(start, end)
