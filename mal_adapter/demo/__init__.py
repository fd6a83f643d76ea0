"""The controlled benchmark: synthetic voices in dialogues, a tiny Qwen2-Audio trained on them, and its memory.

Everything here is made from seeds; nothing is downloaded.
"""

from typing import TYPE_CHECKING

from mal_adapter.demo.shipped import ADAPTER_FOLDER, EMOTIONS, FILES_FOLDER, HOST_FOLDER, LAYER_IDX, PROMPT
from mal_adapter.lazy import lazy_names

if TYPE_CHECKING:
    from mal_adapter.demo.dialogues import make_dialogue, make_dialogues, write_wavs

__all__ = [
    "ADAPTER_FOLDER",
    "EMOTIONS",
    "FILES_FOLDER",
    "HOST_FOLDER",
    "LAYER_IDX",
    "PROMPT",
    "make_dialogue",
    "make_dialogues",
    "write_wavs",
]

if not TYPE_CHECKING:  # a checker that saw this function would take every misspelt name for an Any
    __getattr__ = lazy_names(
        __name__, dict.fromkeys(["make_dialogue", "make_dialogues", "write_wavs"], "demo.dialogues")
    )
