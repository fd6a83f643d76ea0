"""The package's host and its sounds, for the tests of the server."""

from collections.abc import Iterator
from typing import Any

import pytest

from mal_adapter import AttachedMemory, attach_memory
from mal_adapter.demo import ADAPTER_FOLDER, EMOTIONS, HOST_FOLDER, PROMPT
from mal_adapter.demo.dialogues import make_dialogues, write_wavs
from mal_adapter.ser.loading import load_host
from mal_adapter.ser.recognizer import EmotionRecognizer
from mal_adapter.stores import SessionStore


@pytest.fixture(scope="package")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Six dialogues of four utterances, with sound files."""
    return write_wavs(list(make_dialogues("test", seed=11, count=6, turns=4)), tmp_path_factory.mktemp("spoken"))


@pytest.fixture(scope="package")
def loaded() -> tuple[Any, Any]:
    return load_host(str(HOST_FOLDER))


@pytest.fixture
def recognizer_on(loaded: tuple[Any, Any]) -> Iterator[Any]:
    """Makes a recogniser on a store; one at a time."""
    attached: list[AttachedMemory] = []

    def make(store: SessionStore | None = None) -> EmotionRecognizer:
        while attached:
            attached.pop().detach()
        attached.append(memory := attach_memory(loaded[0], adapter=ADAPTER_FOLDER, store=store))
        return EmotionRecognizer(*loaded, memory, EMOTIONS, PROMPT)

    yield make
    while attached:
        attached.pop().detach()
