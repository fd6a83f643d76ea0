"""Who speaks when in a recording: from voice activity, or from a file that says it."""

from mal_adapter.ser.turns.turn import Turn, TurnSettings

__all__ = ["Turn", "TurnSettings"]
