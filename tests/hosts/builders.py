"""The families under test: every literal of `families/` that this version of transformers has.

host = HOSTS["qwen2_audio"]
model = host.build(num_layers=2)
inputs, audio_mask = host.make_inputs(model, [[4], [3, 5]], padding_side="left")
model(**inputs).logits                      # (2, seq_len, VOCAB_SIZE)
"""

import importlib
import pkgutil

from tests.hosts import families
from tests.hosts.additive import AdditiveHost
from tests.hosts.tiny import AUDIO_TOKEN_ID, VOCAB_SIZE, WIDTH, PlainHost, Prompt, TinyHost

__all__ = [
    "ADDITIVE_HOSTS",
    "AUDIO_TOKEN_ID",
    "FAMILIES",
    "HOSTS",
    "VOCAB_SIZE",
    "WIDTH",
    "AdditiveHost",
    "PlainHost",
    "Prompt",
    "TinyHost",
]


def _literals() -> dict[str, TinyHost]:
    found = {}
    for info in pkgutil.iter_modules(families.__path__, families.__name__ + "."):
        values = vars(importlib.import_module(info.name)).values()
        found |= {value.name: value for value in values if isinstance(value, TinyHost)}
    return found


FAMILIES = _literals()
"""All families by name, also those of other versions of transformers."""

ADDITIVE_HOSTS = {name: host for name, host in FAMILIES.items() if host.exists and isinstance(host, AdditiveHost)}
"""Those that add audio to every position."""

HOSTS = {name: host for name, host in FAMILIES.items() if host.exists and name not in ADDITIVE_HOSTS}
"""Those that replace placeholders by audio."""
