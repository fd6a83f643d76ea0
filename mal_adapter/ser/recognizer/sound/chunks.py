"""WAV, RF64, W64, AIFF, AU, CAF and NIST: the declared size of the samples against the size of the file.

libsndfile corrects wrong sizes silently. Of a file that was cut it reads what is left. Of a file whose header was
written too early it reads only what the header declares. So the headers are read here.
"""

import re
import struct
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from mal_adapter.ser.recognizer.sound.source import DamagedSoundError, read_at

__all__ = ["find_sample_bytes"]

#: Sizes of at least this much are placeholders of streams, if the file is smaller: ffmpeg writes 0xFFFFFFFF, sox and
#: espeak-ng about 0x7FFFF000, others 2**31 - 1 or 2**32 - 1 less the header.
PLACEHOLDER = 0x7FFF_F000
W64_RIFF = b"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\x00\x00"


class SampleBytes(NamedTuple):
    """Where the samples of a file are.

    Attributes:
        offset: Of the first byte.
        present: Number of bytes in the file.
        declared: Number of bytes by the header; `present` if the header does not give it.
        beyond: Number of bytes after the samples that are neither samples nor a known kind of metadata.
        patches: Replacements that make libsndfile read exactly these bytes.
        end: Where libsndfile should see the end of the file; None for its real end.
        frames: Number of frames by another field of the header; None if there is no such field.
    """

    offset: int
    present: int
    declared: int
    beyond: int = 0
    patches: tuple[tuple[int, bytes], ...] = ()
    end: int | None = None
    frames: int | None = None


class _Family(NamedTuple):
    first: int  # offset of the first chunk
    name_bytes: int
    size: str  # of struct
    counts_header: bool
    alignment: int
    samples: bytes  # name of the chunk with the samples
    skip: int  # bytes of that chunk before the samples


_RIFF = _Family(12, 4, "<I", False, 2, b"data", 0)
_RIFX = _RIFF._replace(size=">I")
_AIFF = _Family(12, 4, ">I", False, 2, b"SSND", 8)
_CAF = _Family(8, 4, ">q", False, 1, b"data", 4)
_W64 = _Family(40, 16, "<q", True, 8, b"data", 0)


class _Chunk(NamedTuple):
    name: bytes
    content: int
    size: int
    size_at: int


def find_sample_bytes(file: BinaryIO, file_size: int) -> SampleBytes | None:
    """Find the samples; None for other formats, and for a header without a chunk of samples."""
    head = read_at(file, 0, 40)
    if head[:4] in (b"RIFF", b"RF64") and head[8:12] == b"WAVE":
        return _of_chunks(file, file_size, _RIFF)
    if head[:4] == b"RIFX" and head[8:12] == b"WAVE":
        return _of_chunks(file, file_size, _RIFX)
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        return _of_chunks(file, file_size, _AIFF)
    if head[:4] == b"caff":
        return _of_chunks(file, file_size, _CAF)
    if head[:16] == W64_RIFF:
        return _of_chunks(file, file_size, _W64)
    if head[:4] in (b".snd", b"dns.") and len(head) >= 24:
        return _of_au(head, file_size)
    if head.startswith(b"NIST_1A"):
        return _of_nist(file, file_size)
    return None


def _chunks(file: BinaryIO, start: int, end: int, family: _Family) -> Iterator[_Chunk]:
    at, header = start, family.name_bytes + struct.calcsize(family.size)
    while at + header <= end:
        head = read_at(file, at, header)
        if len(head) < header:
            return
        (size,) = struct.unpack(family.size, head[family.name_bytes :])
        size -= header if family.counts_header else 0
        yield _Chunk(head[:4], at + header, size, at + family.name_bytes)
        if size < 0:
            return
        at += header + size
        at += -at % family.alignment


def _of_chunks(file: BinaryIO, file_size: int, family: _Family) -> SampleBytes | None:
    ds64: _Chunk | None = None
    frames: int | None = None
    found: _Chunk | None = None
    for chunk in _chunks(file, family.first, file_size, family):
        if chunk.name == b"ds64":
            ds64 = chunk
        if chunk.name == b"COMM" and family is _AIFF:
            (frames,) = struct.unpack(">I", read_at(file, chunk.content + 2, 4).rjust(4, b"\0"))
        if chunk.name == family.samples and found is None:
            found = chunk
            if not 0 <= chunk.size <= file_size:
                break
    if found is None:
        return None
    offset, declared = found.content + family.skip, found.size - family.skip
    size_at, size_format = found.size_at, family.size
    if ds64 is not None and found.size == 0xFFFF_FFFF:
        size_at, size_format = ds64.content + 8, "<Q"
        (declared,) = struct.unpack(size_format, read_at(file, size_at, 8).rjust(8, b"\0"))
    rest = max(0, file_size - offset)
    wide = struct.calcsize(size_format) == 8
    streamed = declared < 0 or declared > max(rest, 2**62 if wide else PLACEHOLDER - 1)
    if declared <= 0 and rest > 0 and not _is_chain(file, offset, file_size, family):
        streamed = True
    if streamed:
        size = rest + family.skip + (struct.calcsize(family.size) + family.name_bytes if family.counts_header else 0)
        patches = [(size_at, struct.pack(size_format, min(size, 2 ** (63 if wide else 32) - 1)))]
        return SampleBytes(offset, rest, rest, patches=tuple(patches), end=file_size if family is _W64 else None)
    declared = max(0, declared)
    end = offset + declared
    return SampleBytes(
        offset,
        min(declared, rest),
        declared,
        _beyond(file, end, file_size, family) if end < file_size else 0,
        end=min(end, file_size) if family is _W64 else None,  # libsndfile reads samples to the end of a W64 file
        frames=frames if frames not in (0, 0xFFFF_FFFF) else None,
    )


def _is_chain(file: BinaryIO, start: int, end: int, family: _Family) -> bool:
    """Whether chunks follow each other from here exactly to the end of the file."""
    last = start
    for chunk in _chunks(file, start, end, family):
        if chunk.size < 0 or not _is_name(chunk.name):
            return False
        last = chunk.content + chunk.size
    return last in (end, end - 1, end + 1) and last > start


def _is_name(name: bytes) -> bool:
    return all(32 <= byte < 127 for byte in name)


def _beyond(file: BinaryIO, start: int, end: int, family: _Family) -> int:
    """Count the bytes after the samples that are not chunks: the header may have been written too early. Zeros are
    padding, and ID3 tags are metadata."""
    best = end - start
    for first in {start, start + -start % family.alignment}:  # some writers leave out the padding of odd sizes
        at = first
        for chunk in _chunks(file, first, end, family):
            if not _is_name(chunk.name) or not 0 <= chunk.size <= end - chunk.content:
                break
            if chunk.name == family.samples and chunk.size > 0:
                raise DamagedSoundError(f"the file has more than one {family.samples.decode()} chunk; convert it again")
            at = chunk.content + chunk.size
        best = min(best, end - at)
    at = end - best
    if best <= 1 or read_at(file, at, 3) in (b"TAG", b"ID3") or _only_zeros(file, at, end):
        return 0
    return best


def _only_zeros(file: BinaryIO, start: int, end: int) -> bool:
    while start < end:
        block = read_at(file, start, min(1 << 20, end - start))
        if not block or block.count(0) < len(block):
            return not block
        start += len(block)
    return True


def _of_au(head: bytes, file_size: int) -> SampleBytes:
    order = ">" if head[:4] == b".snd" else "<"
    offset, declared = struct.unpack(order + "II", head[4:12])
    rest = max(0, file_size - offset)
    if declared == 0xFFFF_FFFF or (declared == 0 and rest > 0) or (declared >= PLACEHOLDER and declared > rest):
        return SampleBytes(offset, rest, rest, patches=((8, struct.pack(order + "I", min(rest, 2**32 - 1))),))
    return SampleBytes(offset, min(declared, rest), declared, max(0, rest - declared) if rest - declared > 1 else 0)


def _of_nist(file: BinaryIO, file_size: int) -> SampleBytes | None:
    text = read_at(file, 0, 4096)
    header = re.match(rb"NIST_1A\s+(\d{1,9})", text)
    numbers = dict(re.findall(rb"(sample_count|sample_n_bytes|channel_count) -i (\d{1,18})", text))
    if header is None or b"sample_count" not in numbers:
        return None
    offset = int(header[1])
    width = int(numbers.get(b"sample_n_bytes", 2)) * int(numbers.get(b"channel_count", 1))
    declared, rest = int(numbers[b"sample_count"]) * width, max(0, file_size - offset)
    # libsndfile reads samples to the end of a NIST file.
    end = min(file_size, offset + declared)
    return SampleBytes(offset, min(declared, rest), declared, max(0, rest - declared), end=end)
