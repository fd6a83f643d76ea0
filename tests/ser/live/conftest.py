"""The package's host with its trained memory."""

from collections.abc import Iterator

import pytest

from mal_adapter.demo.run import load_demo
from mal_adapter.ser.recognizer import EmotionRecognizer


@pytest.fixture(scope="module")
def recognizer() -> Iterator[EmotionRecognizer]:
    model, processor, memory = load_demo()
    with memory:
        yield EmotionRecognizer(model, processor, memory)
