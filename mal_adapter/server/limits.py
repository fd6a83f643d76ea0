"""What one server accepts, and how long it waits."""

import math
from dataclasses import dataclass

from mal_adapter.errors import ConfigError
from mal_adapter.memory.config import check_integer

__all__ = ["Limits"]


@dataclass
class Limits:
    """The limits of a server. They are read at each request, so a running server may be given others.

    Args:
        max_bytes: Of one body.
        max_audio_s: Seconds of one utterance.
        max_pending: Requests at once, including waiting ones.
        timeout_s: Seconds of the upload and the wait for the model.
        batch: Utterances of different sessions in one forward.
        wait_ms: Milliseconds that an utterance waits for others, unless the batch is full before.
        drain_s: Seconds that running requests have after SIGTERM.
        max_streams: Live streams at once.
        max_stream_s: Seconds of sound of one live stream.
        max_message_bytes: Of one message of a live stream.
        idle_s: Seconds after which a live stream without a message is ended.

    Raises:
        ConfigError: A limit is not a positive number; `wait_ms` may be 0.

    Example:
        >>> Limits(timeout_s=-1)
        Traceback (most recent call last):
        ...
        mal_adapter.errors.ConfigError: timeout_s=-1 is not a positive number
    """

    max_bytes: int = 10 * 2**20
    max_audio_s: float = 30.0
    max_pending: int = 64
    timeout_s: float = 30.0
    batch: int = 8
    wait_ms: float = 5.0
    drain_s: float = 30.0
    max_streams: int = 64
    max_stream_s: float = 4 * 3600.0
    max_message_bytes: int = 256 * 2**10
    idle_s: float = 60.0

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_pending", "batch", "max_streams", "max_message_bytes"):
            check_integer(name, getattr(self, name), 1)
        for name in ("max_audio_s", "timeout_s", "drain_s", "wait_ms", "max_stream_s", "idle_s"):
            value: object = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not number or float(value) < 0 or (value == 0 and name != "wait_ms"):  # type: ignore[arg-type]
                raise ConfigError(f"{name}={value!r} is not a positive number")
