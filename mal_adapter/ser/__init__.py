"""Conversational speech emotion recognition on a host with a memory.

from mal_adapter.ser.dialogue import read_manifest
from mal_adapter.ser.loading import load_host
from mal_adapter.ser.recognizer import EmotionRecognizer
"""

__all__ = [
    "audio",
    "corpora",
    "dialogue",
    "evaluation",
    "labels",
    "loading",
    "metrics",
    "recognizer",
    "report",
    "training",
]
