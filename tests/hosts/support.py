"""The tables of docs/hosts.md, made from what detection finds and what the tests know about each host.

python -m tests.hosts.support            # updates docs/hosts.md; a test fails when that is needed
"""

import ast
import dataclasses
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from mal_adapter.errors import HostError
from mal_adapter.hosts import HostSpec
from mal_adapter.hosts.host import detect_host
from mal_adapter.hosts.registry import REGISTRY
from mal_adapter.hosts.remote_code import REMOTE
from mal_adapter.ser.recognizer.scoring import LabelScorer, continuation
from tests.hosts.builders import ADDITIVE_HOSTS, HOSTS, TinyHost
from tests.hosts.remote import REMOTE_HOSTS
from tests.hosts.remote.base import RemoteHost
from tests.hosts.remote.step_audio_2 import STEP_AUDIO_2
from tests.hosts.remote.ultravox import ULTRAVOX
from tests.hosts.spelling import ByLetter

PAGE = Path(__file__).parents[2] / "docs" / "hosts.md"
OLDEST = {
    "gemma3n",
    "granite_speech",
    "kyutai_speech_to_text",
    "phi4_multimodal",
    "qwen2_5_omni_thinker",
    "qwen2_audio",
    "qwen3_omni_moe_thinker",
    "voxtral",
}
"""The families that transformers 4.57 has."""

WITH_LABEL_SCORES = (ULTRAVOX, STEP_AUDIO_2)
"""The remote code that runs the tests of the families, including those of label scores."""


def family_row(host: TinyHost) -> str:
    model = host.build()
    spec = detect_host(model)
    everywhere = spec.audio_positions == "every"
    return _row(
        f"`{host.name}`",
        f"`{spec.layers}`",
        "every position" if everywhere else "the placeholder id",
        "—" if everywhere else "found" if spec.merges_embeds else "need `audio_mask`",
        "no" if everywhere else "yes",
        _can(host, "static_cache"),
        _can(host, "checkpointing"),
        _labels(host, model),
        "yes" if host.name in OLDEST else "no",
    )


def families() -> Iterator[str]:
    yield _row(
        "model_type",
        "decoder layers",
        "audio is at",
        "positions in `inputs_embeds` with features",
        "beams",
        "static cache",
        "gradient checkpointing",
        "labels of several tokens",
        "in 4.57",
    )
    yield _row(*["---"] * 9)
    yield from map(family_row, sorted((HOSTS | ADDITIVE_HOSTS).values(), key=lambda host: host.name))


def remote() -> Iterator[str]:
    yield _row("model", "`config.model_type`", "decoder layers", "audio is at", "labels of several tokens")
    yield _row(*["---"] * 5)
    for name, host in REMOTE_HOSTS.items():
        registered = REMOTE.get(host.name)
        mask = registered and registered.find_mask
        positions = inspect.getdoc(mask).splitlines()[0].partition(": ")[2] if mask else "your `audio_mask`"
        yield _row(
            name,
            f"`{host.name}`" if registered else "none",
            f"`{host.layers_path}`",
            positions,
            _labels(host, host.build()),
        )


def registry() -> Iterator[str]:
    for model_type, spec in sorted(REGISTRY.items()):
        if model_type in HOSTS or model_type in ADDITIVE_HOSTS or model_type in REMOTE:
            yield f"- `{model_type}`: `HostSpec({_fields(spec)})`"


def traps() -> Iterator[str]:
    """All tests that are named after a trap."""
    tests = PAGE.parents[1] / "tests"
    found = []
    for path in tests.rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and (named := re.match(r"test_trap_(\d\d)_(.*)", node.name)):
                found.append((int(named[1]), named[2].replace("_", " "), path.relative_to(tests.parent).as_posix()))
    for number, title, path in sorted(found):
        yield f"{number}. {title} (`{path}`)"


def page(text: str) -> str:
    """The page's text with all generated parts made again; a part starts with a comment that names its function."""

    def made(match: re.Match[str]) -> str:
        return "\n".join([match[1], "", *_PARTS[match[2]](), "", "<!-- end -->"])

    return re.sub(r"(<!-- made: (\w+) -->)\n.*?<!-- end -->", made, text, flags=re.S)


_PARTS = {"families": families, "remote": remote, "registry": registry, "traps": traps}


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _can(host: TinyHost, capability: str) -> str:
    return "the host can't" if capability in host.cannot else "yes"


def _labels(host: TinyHost, model: torch.nn.Module) -> str:
    """How the tokens after a label's first one are scored; `behaviour/test_label_scores.py` checks the scores."""
    try:
        LabelScorer(ByLetter.tokenizer, ("a", "bc"), "", []).check_host(model)
    except HostError:
        return "refused"
    if isinstance(host, RemoteHost) and host not in WITH_LABEL_SCORES:
        return "—"
    inputs, _ = host.make_inputs(model, [[4]])
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    return continuation(cache, inputs["input_ids"].shape[1])


def _fields(spec: HostSpec) -> str:
    values = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
    return ", ".join(f"{n}={getattr(v, '__name__', repr(v))}" for n, v in values.items() if v is not None)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
