"""Live speech: blocks of a stream become turns with emotions while the call runs."""

from mal_adapter.ser.live.media_streams import MediaStream, StreamStart
from mal_adapter.ser.live.stream import EmotionStream, LiveEntry

__all__ = ["EmotionStream", "LiveEntry", "MediaStream", "StreamStart"]
