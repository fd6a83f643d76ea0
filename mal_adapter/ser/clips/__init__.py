"""Readers of corpora of single clips, which have no dialogues: acted emotions, one sound file per sentence.

from mal_adapter.ser.clips import read_clips
print(read_clips("ravdess", "RAVDESS"))

`mal_adapter.ser.simulation` makes dialogues of them.
"""

from mal_adapter.ser.clips.clip import Clip, ClipCorpus
from mal_adapter.ser.clips.reading import read_clips, read_pattern
from mal_adapter.ser.clips.schemes import SCHEMES

__all__ = ["SCHEMES", "Clip", "ClipCorpus", "read_clips", "read_pattern"]
