"""The samples of a stream, from the bytes of its messages: 16-bit PCM and G.711."""

from functools import cache

import numpy as np
import numpy.typing as npt
import soxr

from mal_adapter.errors import ConfigError

__all__ = ["ENCODINGS", "Decoder", "Resampler", "Samples"]

Samples = npt.NDArray[np.float32]
"""(frames, channels) float32 in [-1, 1)."""

#: Bytes per sample: 16-bit PCM, little endian; G.711 µ-law and A-law.
ENCODINGS = {"pcm16": 2, "mulaw": 1, "alaw": 1}


class Decoder:
    """Decodes a stream of messages. A message may end within a frame, whose rest then begins the next message.

    Args:
        encoding: "pcm16" (little endian), "mulaw" or "alaw".
        channels: Whose samples alternate.

    Raises:
        ConfigError: The encoding is not known, or there is no channel.

    Example:
        >>> decoder = Decoder("pcm16", channels=2)
        >>> decoder(b"\\x00\\x40\\x00").shape, decoder.left
        ((0, 2), 3)
        >>> decoder(b"\\xc0").tolist()
        [[0.5, -0.5]]
    """

    def __init__(self, encoding: str, channels: int = 1) -> None:
        if encoding not in ENCODINGS:
            raise ConfigError(f"the encoding {encoding!r} is not known; choose one of {', '.join(ENCODINGS)}")
        if channels < 1:
            raise ConfigError(f"a stream has at least one channel, got {channels}")
        self._table = None if encoding == "pcm16" else _table(encoding)
        self._channels = channels
        self._frame = ENCODINGS[encoding] * channels
        self._rest = b""

    @property
    def left(self) -> int:
        """How many bytes of an incomplete frame wait for the next message."""
        return len(self._rest)

    def __call__(self, message: bytes) -> Samples:
        """The frames that are complete with this message."""
        data = self._rest + message if self._rest else message
        whole = len(data) - len(data) % self._frame
        self._rest = data[whole:]
        if self._table is None:
            values = np.frombuffer(data, dtype="<i2", count=whole // 2).astype(np.float32) / np.float32(32768)
        else:
            values = self._table[np.frombuffer(data, dtype=np.uint8, count=whole)]
        return values.reshape(-1, self._channels)


class Resampler:
    """Resamples a stream. The samples are those of `soxr.resample` of the whole stream, whatever the blocks' sizes.

    Args:
        given: The rate of the stream, in Hz.
        wanted: The rate of the result, in Hz.
        channels: Of the stream.
    """

    def __init__(self, given: int, wanted: int, channels: int) -> None:
        self._stream = None if given == wanted else soxr.ResampleStream(given, wanted, channels, dtype="float32")
        self._channels = channels

    def __call__(self, block: Samples, *, last: bool = False) -> Samples:
        """(frames, channels) that are known now. They come some 20 to 120 ms later than the block, the rest with the
        last one."""
        if self._stream is None:
            return block
        resampled = self._stream.resample_chunk(block[:, 0] if self._channels == 1 else block, last=last)
        return np.asarray(resampled, dtype=np.float32).reshape(-1, self._channels)


@cache
def _table(encoding: str) -> npt.NDArray[np.float32]:
    """The sample of each byte, by the formulas of ITU-T G.711 in 16 bits."""
    code = np.arange(256, dtype=np.int32)
    if encoding == "mulaw":
        code = ~code & 0xFF
        magnitude = (((code & 0x0F) << 3) + 0x84 << (code >> 4 & 7)) - 0x84
        negative = code & 0x80 > 0
    else:
        code = code ^ 0x55
        exponent = code >> 4 & 7
        mantissa = ((code & 0x0F) << 4) + 8
        magnitude = np.where(exponent == 0, mantissa, mantissa + 0x100 << np.maximum(exponent - 1, 0))
        negative = code & 0x80 == 0
    table = np.where(negative, -magnitude, magnitude).astype(np.float32) / np.float32(32768)
    table.flags.writeable = False
    return table
