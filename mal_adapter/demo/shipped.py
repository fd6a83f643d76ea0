"""What the package ships for the demo: a tiny host, its memory, and the task that both were trained for."""

from __future__ import annotations

from pathlib import Path

__all__ = ["ADAPTER_FOLDER", "EMOTIONS", "FILES_FOLDER", "HOST_FOLDER", "LAYER_IDX", "PROMPT"]

#: The host's answers, in the order of every probability vector in the demo.
EMOTIONS: tuple[str, ...] = ("neutral", "happy", "angry", "sad")

#: The question that follows the audio. The audio comes first, so its hidden states do not depend on the question.
PROMPT = "How does the speaker feel?"

#: Index of the decoder layer at which the shipped adapter reads and writes (counted from 0).
LAYER_IDX = 1

#: The folder of both trained folders.
FILES_FOLDER = Path(__file__).parent / "files"
#: The tiny Qwen2-Audio, a checkpoint like any other.
HOST_FOLDER = FILES_FOLDER / "host"
#: Its memory, an adapter like any other.
ADAPTER_FOLDER = FILES_FOLDER / "adapter"
