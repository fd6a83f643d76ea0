"""The controlled benchmark: parametric voices in dialogues, a tiny Qwen2-Audio for them, and its memory adapter.

Everything here is made from seeds; nothing is downloaded. The names below are all that it takes to use the shipped
host: its folder, the adapter's folder, the question that it was trained on and its possible answers.
"""

from __future__ import annotations

from pathlib import Path

#: The host's answers, in the order of every probability vector in the demo.
EMOTIONS: tuple[str, ...] = ("neutral", "happy", "angry", "sad")

#: The question that follows the audio. The audio comes first, so its hidden states do not depend on the question.
PROMPT = "How does the speaker feel?"

#: Index of the decoder layer the shipped adapter reads and writes at (counted from 0).
LAYER_IDX = 1

#: The folder of all trained files in the package.
FILES_FOLDER = Path(__file__).parent / "files"
#: The tiny Qwen2-Audio, an ordinary checkpoint.
HOST_FOLDER = FILES_FOLDER / "host"
#: Its memory, an ordinary adapter.
ADAPTER_FOLDER = FILES_FOLDER / "adapter"

__all__ = ["ADAPTER_FOLDER", "EMOTIONS", "FILES_FOLDER", "HOST_FOLDER", "LAYER_IDX", "PROMPT"]
