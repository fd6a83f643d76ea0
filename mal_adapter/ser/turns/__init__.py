"""Who speaks when in a recording: from voice activity, or from a file that says it."""

from typing import TYPE_CHECKING

from mal_adapter.lazy import lazy_names
from mal_adapter.ser.turns.turn import Turn, TurnSettings

if TYPE_CHECKING:
    from mal_adapter.ser.turns.detect import find_turns
    from mal_adapter.ser.turns.detector import SpeechDetector

__all__ = ["SpeechDetector", "Turn", "TurnSettings", "find_turns"]

if not TYPE_CHECKING:  # a checker that saw this function would take every misspelt name for an Any
    __getattr__ = lazy_names(
        __name__, {"SpeechDetector": "ser.turns.detector", "find_turns": "ser.turns.detect"}, extra="recordings"
    )
