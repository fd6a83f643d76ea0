"""Recognition: from the sound of a dialogue to one emotion per utterance."""

from typing import TYPE_CHECKING

from mal_adapter.lazy import lazy_names

if TYPE_CHECKING:
    from mal_adapter.ser.recognizer.recognizer import EmotionRecognizer
    from mal_adapter.ser.recognizer.results import Failure, Prediction

__all__ = ["EmotionRecognizer", "Failure", "Prediction"]

if not TYPE_CHECKING:  # a checker that saw this function would take every misspelt name for an Any
    __getattr__ = lazy_names(
        __name__,
        {
            "EmotionRecognizer": "ser.recognizer.recognizer",
            "Failure": "ser.recognizer.results",
            "Prediction": "ser.recognizer.results",
        },
    )
