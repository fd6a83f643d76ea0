"""Imports go one way, every module says what it offers, and looking at the package costs no seconds."""

import ast
import graphlib
import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import mal_adapter
from mal_adapter.errors import MissingDependencyError

ROOT = Path(mal_adapter.__file__).parents[1]
# Each may import only from those before it; "." is the package itself, whose names ser and demo use.
PLACES = """
errors extras lazy
serialization.versions serialization.text serialization.atomic serialization.strict_json serialization.tensors
serialization.metadata serialization.model_card serialization.adapter_folder serialization.hub serialization
memory.config memory.state memory.transfer memory.spans memory.gates32 memory.precision memory.gates memory.rule
memory.gate_start
memory.chunk
memory.fused.support memory.fused.parts memory.fused.scalars memory.fused.write_kernels memory.fused.write_backward
memory.fused.read_kernels memory.fused.commit_kernels memory.fused.ops memory.fused.trial memory.fused
memory.titans memory.recurrent memory.reference memory.commit memory.unwritten memory.projections
memory.half memory.answers
memory.hub_mixin
memory.adapter memory.ensemble memory
hosts.spec hosts.remote_code hosts.registry hosts.audio_mask hosts.detect hosts.host hosts
stores.base stores.folder_files stores.folder stores.redis_client stores.forking stores.in_memory
stores.redis_errors stores.redis stores stores.unsaved stores.states
hooks.torch_internals hooks.plan hooks.forward hooks.skipped hooks.session hooks.inside hooks.outside
hooks.compiled hooks.checkpointing hooks.blocks hooks.running hooks.wiring hooks
attach .
vllm.turns vllm.rows vllm.counters vllm.config vllm.checks vllm.layers vllm.op vllm.sessions vllm.utterances vllm.memory
vllm.control vllm.worker vllm.admission vllm.metrics vllm.routes
ser.loading ser.progress
ser.recognizer.scoring
ser.training.trainable ser.training.checkpoint
ser.evaluation.scores ser.evaluation.arms ser.evaluation.verdict
ser.names ser.labels
ser.training.config
ser.evaluation.colors ser.evaluation.drawing ser.evaluation.metrics ser.evaluation.plots
ser.paths ser.dialogue ser.provenance
ser.recognizer.results
ser.turns.turn ser.turns.overlaps
ser.turns.voice ser.turns.speech ser.turns.crosstalk ser.turns.detector ser.turns.shaping
ser.turns.files.span ser.turns.files.text ser.turns.files.columns
ser.turns.files.rttm ser.turns.files.textgrid ser.turns.files.elan ser.turns.files.subtitles ser.turns.files.audacity
ser.turns.files.table ser.turns.files.transcripts ser.turns.files.reading ser.turns.files
ser.training.summary
ser.suitability
ser.recognizer.sound ser.recognizer.sound.source ser.recognizer.sound.chunks ser.recognizer.sound.flac
ser.recognizer.sound.levels ser.recognizer.sound.ogg ser.recognizer.sound.tags ser.recognizer.sound.mpeg
ser.recognizer.sound.kept ser.recognizer.sound.layout ser.recognizer.sound.reader ser.recognizer.sound.ffmpeg
ser.recognizer.sound.opening
ser.recognizer.audio
ser.turns.blocks ser.turns.detect ser.turns
ser.recognizer.spectrum ser.recognizer.prompt ser.recognizer.inputs ser.recognizer.pretrained
ser.recognizer.lower_layers ser.recognizer.members
ser.timeline.timeline ser.timeline.writers.parts ser.timeline.writers.jsonl ser.timeline.writers.table
ser.timeline.writers.rttm ser.timeline.writers.webvtt ser.timeline.writers.srt ser.timeline.writers.textgrid
ser.timeline.writers.elan ser.timeline.writers
ser.timeline.split ser.timeline.request ser.timeline.make
ser.timeline.listening ser.timeline.page ser.timeline.output ser.timeline
ser.live.codecs ser.live.tracks ser.live.media_streams ser.live.history ser.live.turn_stream ser.live.arrivals
ser.live.stream ser.live
ser.recognizer.recognizer
ser.recognizer
ser.corpora.folder ser.corpora.corpus ser.corpora.manifests ser.corpora.emorynlp ser.corpora.iemocap
ser.corpora.m3ed ser.corpora.meld ser.corpora
ser.clips.clip ser.clips.schemes ser.clips.pattern ser.clips.reading ser.clips
ser.simulation.config ser.simulation.order ser.simulation.mood ser.simulation.splits ser.simulation.draw
ser.simulation.pools ser.simulation.simulation ser.simulation.simulate ser.simulation
ser.training.utterance_length ser.training.batch_scorer ser.training.device_rows ser.training.cached_host
ser.training.cached_recognizer ser.training.batches ser.training.loss
ser.training.step
ser.training.validation
ser.training.arguments ser.training.train ser.training.members ser.training
ser.evaluation.activations ser.evaluation.control ser.evaluation.arguments ser.evaluation.audit
ser.evaluation.evaluation ser.evaluation.report ser.evaluation
ser
vllm.client vllm
demo.shipped demo.voices demo.dialogues demo.run demo
server.limits server.refusals server.spaces server.keys server.tenant_store server.bodies server.batcher server.answers
server.metrics server.logs server.drain server.requests server.turns
server.watching server.stream_worker server.streams
server.service server.utterance_routes server.stream_keys server.stream_run server.stream_routes
server.session_routes server.probe_routes server.flush server.app server.start server
cli.output cli.data cli.failures cli.usage cli.options cli.adapters cli.demo cli.hosts cli.evaluate cli.predict
cli.serve_vllm cli.serve cli.simulate cli.states cli.recordings cli.turn_table cli.timeline cli.train cli cli.__main__
"""
ORDER = PLACES.split()


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


TREES = {module_name(path): ast.parse(path.read_text()) for path in sorted((ROOT / "mal_adapter").rglob("*.py"))}
PACKAGES = {name for name in TREES if any(other.startswith(f"{name}.") for other in TREES)}


def imports(name: str) -> list[tuple[str, str | None]]:
    """(module, name) of each import from mal_adapter anywhere in a module, within functions and `if` too; the name is
    None where a module itself is imported."""
    found: list[tuple[str, str | None]] = []
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            here = name.split(".")[: None if name in PACKAGES else -1]
            base = [*here[: len(here) - node.level + 1], node.module] if node.level else [node.module]
            module = ".".join(part for part in base if part)
            for alias in node.names:
                inside = f"{module}.{alias.name}"
                found.append((inside, None) if inside in TREES else (module, alias.name))
    return [(module, taken) for module, taken in found if module.split(".")[0] == "mal_adapter"]


def offered(name: str) -> list[str]:
    """A module's `__all__`."""
    for node in TREES[name].body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    raise AssertionError(f"{name} has no __all__")


def has(module: object, name: str) -> bool:
    """Whether a module offers a name; it may need an extra that is not installed here."""
    try:
        return hasattr(module, name)
    except MissingDependencyError:
        return name in ("MemoryWorker", "SessionAdmission") and importlib.util.find_spec("vllm") is None


def part(module: str) -> str:
    return module.removeprefix("mal_adapter").removeprefix(".") or "."


def test_every_module_has_a_place():
    assert sorted(ORDER) == sorted(part(name) for name in TREES)


@pytest.mark.parametrize("name", TREES)
def test_imports_go_one_way(name: str):
    before = ORDER[: ORDER.index(part(name)) + 1]
    upward = {part(module) for module, _ in imports(name)} - set(before)
    assert upward == set()


def test_no_module_imports_itself_through_others():
    graph = {name: {module for module, _ in imports(name)} - {name} for name in TREES}
    graphlib.TopologicalSorter(graph).prepare()  # raises with the circle


@pytest.mark.parametrize("name", [name for name in TREES if not name.endswith("__main__")])
def test_a_module_says_what_others_may_take(name: str):
    module = importlib.import_module(name)
    assert [n for n in offered(name) if not has(module, n) and f"{name}.{n}" not in TREES] == []
    undeclared = [(module, n) for module, n in imports(name) if n is not None and n not in offered(module)]
    assert undeclared == []


def fresh(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_package_is_looked_at_without_torch():
    assert (
        fresh("import sys, mal_adapter, mal_adapter.cli, mal_adapter.ser; print('torch' in sys.modules)") == "False\n"
    )


def test_attaching_is_imported_in_no_time():
    code = (
        "import sys, torch, transformers; before = set(sys.modules); from mal_adapter import attach_memory; "
        "print(*{m.split('.')[0] for m in sys.modules.keys() - before} - sys.stdlib_module_names)"
    )
    # Nothing of torch either: torch._dynamo alone takes as long to import as all the rest of it.
    assert set(fresh(code).split()) <= {"jaxtyping", "mal_adapter", "numpy", "safetensors", "wadler_lindig"}


def test_all_public_names_are_there():
    assert set(mal_adapter.__all__) <= set(dir(mal_adapter))
    assert mal_adapter.__version__ == importlib.metadata.version("mal-adapter")
    with pytest.raises(AttributeError, match="has no attribute 'attach_memories'"):
        mal_adapter.attach_memories  # noqa: B018
