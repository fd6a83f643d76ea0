"""The demo's recogniser, with its memory."""

from collections.abc import Iterator

import pytest

from mal_adapter.demo import ADAPTER_FOLDER, HOST_FOLDER
from mal_adapter.ser.recognizer import EmotionRecognizer


@pytest.fixture(scope="session")
def recognizer() -> Iterator[EmotionRecognizer]:
    made = EmotionRecognizer.from_pretrained(ADAPTER_FOLDER, HOST_FOLDER, device="cpu")
    yield made
    made.memory.detach()
