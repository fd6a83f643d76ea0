"""MP3: counts the frames.

An MP3 file is a sequence of frames. The first may be a Xing or Info header with their number. The number is missing if
an encoder wrote to a pipe, and wrong if a file was cut or joined. Without it, libsndfile guesses the length from the
first frame's bit rate, and reads no more than that.
"""

import struct
from typing import BinaryIO, NamedTuple

from mal_adapter.ser.recognizer.sound.source import DamagedSoundError, read_at
from mal_adapter.ser.recognizer.sound.tags import end_without_tags, tag_size

__all__ = ["INDEXED", "is_mpeg", "measure_mpeg", "start_patches"]

INDEXED = 32
_DECODER_DELAY = 529
_BLOCK = 1 << 20
_HEADER_LIMIT = 1 << 16  # bytes that may come before the first frame, as in mpg123
_KBPS = {  # by (MPEG 1, layer)
    (True, 1): (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}


class MpegLength(NamedTuple):
    """The length of an MP3 file by its frames.

    Attributes:
        frames: Number of MPEG frames, without the Xing header.
        samples_per_frame: Per channel.
        sampling_rate: In Hz.
        declared: Number of frames by the Xing header; None without one.
        starts: Offset of every `INDEXED`th frame, the Xing header included.
        skipped: Samples of these frames, the Xing header included, that a decoder leaves out at the start.
        patches: Replacements that correct the Xing header's numbers of frames and bytes.
    """

    frames: int
    samples_per_frame: int
    sampling_rate: int
    starts: tuple[int, ...]
    declared: int | None = None
    skipped: int = 0
    patches: tuple[tuple[int, bytes], ...] = ()


class _Frame(NamedTuple):
    size: int
    samples: int
    rate: int
    side_info: int  # bytes between the header and a Xing tag, with the checksum
    checksum: int  # bytes of the checksum
    mpeg1: bool
    kind: int  # bits that all frames of one file share


def measure_mpeg(file: BinaryIO, start: int, end: int) -> MpegLength:
    """Count the frames.

    Args:
        file: Opened in binary mode.
        start: Offset after the ID3 tags.
        end: End of the file.

    Raises:
        DamagedSoundError: There are no frames, the last one is incomplete, or other bytes are between them.
    """
    end = end_without_tags(file, start, end)
    at = _first_frame(file, start, end)
    first = _parse(int.from_bytes(read_at(file, at, 4), "big"))
    assert first is not None
    count, starts = _count(file, at, end, first.kind)
    tag_at = at + 4 + first.side_info
    tag = read_at(file, tag_at, max(0, min(16, first.size - 4 - first.side_info)))
    if tag[:4] not in (b"Xing", b"Info") or len(tag) < 16:
        return MpegLength(count, first.samples, first.rate, starts)
    count -= 1
    skipped = first.samples + _delay(file, tag_at, tag[7])
    if not tag[7] & 1:
        return MpegLength(count, first.samples, first.rate, starts, skipped=first.samples)
    # A wrong number of bytes makes mpg123 print a warning.
    numbers = struct.pack(">II", count, end - at)[: 8 if tag[7] & 2 else 4]
    patches = ((tag_at + 8, numbers),) if numbers != tag[8 : 8 + len(numbers)] else ()
    declared = struct.unpack(">I", tag[8:12])[0]
    return MpegLength(count, first.samples, first.rate, starts, declared, skipped, patches)


def is_mpeg(file: BinaryIO, start: int, end: int) -> bool:
    """Whether two MPEG frames follow each other near the start."""
    return _find(file, start, min(end, start + _HEADER_LIMIT), None, end) is not None


def start_patches(file: BinaryIO, at: int) -> tuple[tuple[int, bytes], ...]:
    """Replacements with which a decoder can start at a frame in the middle of a file.

    A frame may use up to 511 bytes (255 in MPEG 2) of the frames before it. Without them mpg123 prints an error. So the
    first frames are changed: they claim to use all bytes that there are, and to have no sound.

    Args:
        file: Opened in binary mode.
        at: Offset of a frame.

    Returns:
        (offset, bytes that replace those of the file).
    """
    patches = []
    before = 0
    while (frame := _parse(int.from_bytes(read_at(file, at, 4), "big"))) is not None:
        bits = 9 if frame.mpeg1 else 8
        if before >= 1 << bits:
            break
        bare = frame.side_info - frame.checksum
        side_info = min(before, (1 << bits) - 1) << 8 * bare - bits
        patches.append((at + 4 + frame.checksum, side_info.to_bytes(bare, "big")))
        before += frame.size - 4 - frame.side_info
        at += frame.size
    return tuple(patches)


def _delay(file: BinaryIO, tag_at: int, flags: int) -> int:
    """Samples of the delays of encoder and decoder. mpg123 leaves them out if a Xing header has LAME's part."""
    lame_at = tag_at + 8 + 4 * (flags & 1) + 4 * (flags >> 1 & 1) + 100 * (flags >> 2 & 1) + 4 * (flags >> 3 & 1)
    delays = read_at(file, lame_at + 21, 2)
    return (delays[0] << 4 | delays[1] >> 4) + _DECODER_DELAY


def _count(file: BinaryIO, at: int, end: int, kind: int) -> tuple[int, tuple[int, ...]]:
    """(Number of frames, offsets of every `INDEXED`th)."""
    count = 0
    starts: list[int] = []
    known: dict[bytes, int] = {}  # sizes by header: there are few different ones
    block_start, block = at, b""
    while at + 4 <= end:
        offset = at - block_start
        head = block[offset : offset + 4]
        if len(head) < 4:
            block_start, block, offset = at, read_at(file, at, _BLOCK), 0
            head = block[:4]
            if len(head) < 4:
                break
        size = known.get(head)
        if size is None:
            frame = _parse(int.from_bytes(head, "big"))
            if frame is None or frame.kind != kind:
                skipped = tag_size(file, at, end)
                if skipped == 0:
                    _check_rest(file, at, end, kind)
                    return count, tuple(starts)
                at += skipped
                continue
            size = known[head] = frame.size
        if at + size > end:
            raise DamagedSoundError(
                f"the file is cut short: it ends within a frame, after {end - at} of {size} bytes; copy it again"
            )
        if count % INDEXED == 0:
            starts.append(at)
        at += size
        count += 1
    if 0 < end - at < 4 and read_at(file, at, 1) == b"\xff":
        raise DamagedSoundError("the file is cut short: it ends within the header of a frame; copy it again")
    return count, tuple(starts)


def _check_rest(file: BinaryIO, at: int, end: int, kind: int) -> None:
    """Raise an error if frames follow bytes that are not frames; without any, the sound ends before the bytes."""
    found = _find(file, at, end, kind)
    if found is not None:
        raise DamagedSoundError(
            f"the file is damaged: {found - at} bytes at {at} are no MP3 frame, but frames follow; convert it again"
        )


def _first_frame(file: BinaryIO, start: int, end: int) -> int:
    found = _find(file, start, min(end, start + _HEADER_LIMIT), None, end)
    if found is None:
        raise DamagedSoundError("no MP3 frame can be found in this file; convert it to WAV, FLAC, OGG or MP3")
    return found


def _find(file: BinaryIO, start: int, stop: int, kind: int | None, end: int | None = None) -> int | None:
    """The first offset at which two frames of one kind follow each other, or one frame ends the file."""
    end = stop if end is None else end
    while start < stop:
        block = read_at(file, start, min(_BLOCK, stop - start) + 3)
        at = -1
        while 0 <= (at := block.find(b"\xff", at + 1)) < len(block) - 3:
            frame = _parse(int.from_bytes(block[at : at + 4], "big"))
            if frame is None or kind not in (None, frame.kind):
                continue
            after = start + at + frame.size
            following = _parse(int.from_bytes(read_at(file, after, 4), "big")) if after + 4 <= end else None
            if (following is not None and following.kind == frame.kind) or (kind is None and after == end):
                return start + at
        start += _BLOCK
    return None


def _parse(header: int) -> _Frame | None:
    version, layer_code = header >> 19 & 3, header >> 17 & 3
    kbps_code, rate_code = header >> 12 & 15, header >> 10 & 3
    if header >> 21 != 0x7FF or version == 1 or layer_code == 0 or kbps_code in (0, 15) or rate_code == 3:
        return None
    mpeg1, layer = version == 3, 4 - layer_code
    rate = (44_100, 48_000, 32_000)[rate_code] >> {3: 0, 2: 1, 0: 2}[version]
    samples = {1: 384, 2: 1152, 3: 1152 if mpeg1 else 576}[layer]
    padding = header >> 9 & 1
    bits = _KBPS[mpeg1, layer][kbps_code] * 1000
    size = (12 * bits // rate + padding) * 4 if layer == 1 else samples // 8 * bits // rate + padding
    mono = header >> 6 & 3 == 3
    side_info = (17 if mono else 32) if mpeg1 else (9 if mono else 17)
    checksum = 0 if header >> 16 & 1 else 2
    return _Frame(size, samples, rate, side_info + checksum, checksum, mpeg1, header & 0x001E_0C00)
