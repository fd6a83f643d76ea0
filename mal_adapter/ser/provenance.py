"""The dialogues and the library versions that a figure was measured with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from mal_adapter.ser.dialogue import Dialogue
from mal_adapter.serialization.versions import installed_version

__all__ = ["digest_of", "versions"]

_PACKAGES = ("mal-adapter", "torch", "transformers", "accelerate", "peft", "numpy", "scikit-learn")


def digest_of(*splits: Sequence[Dialogue]) -> str:
    """A digest of the dialogues' ids and labels; not of their sound, whose files may have moved."""
    ids = [
        [[d.dialogue_id, *([u.utterance_id, u.emotion] for u in d.utterances)] for d in dialogues]
        for dialogues in splits
    ]
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def versions() -> dict[str, str | None]:
    """The versions of the packages on which figures may depend."""
    return {package: installed_version(package) for package in _PACKAGES}
