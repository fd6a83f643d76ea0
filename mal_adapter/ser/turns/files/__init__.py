"""Files of turns that other tools write: readers for each format, and `read_turns` for all of them."""

from mal_adapter.ser.turns.files.reading import FORMATS, read_turns

__all__ = ["FORMATS", "read_turns"]
