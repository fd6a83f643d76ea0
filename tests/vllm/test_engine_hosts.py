"""Other families than Qwen2-Audio in a real engine: queued at once, they answer as in transformers one by one."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from mal_adapter import attach_memory
from tests.vllm.engines import Ask, Engine, apart, assert_same, dense, for_transformers, start, through_transformers
from tests.vllm.hosts import save_adapter, save_audio_flamingo
from tests.vllm.omni import save_omni, scene
from tests.vllm.voxtral import save_voxtral, voxtral_for_transformers, voxtral_for_vllm

pytest.importorskip("vllm")

ASKS = [Ask(f"call-{i % 3}", (i,), turn=i // 3, seconds=0.3 + 0.1 * (i % 4)) for i in range(12)]
OTHERS = [Ask(None, (1,)), Ask("odd", (1,)), Ask("odd", ()), Ask(None, ()), Ask("odd", (2,)), Ask("odd", (3,))]
CLIPS = [Ask("odd", (4, 5)), Ask("odd", (6,)), Ask("odd", (7, 8, 9))]


def check(
    engine: Engine,
    host: tuple[Any, Any],
    adapter: Path,
    inputs: Callable[[Any, Ask], Any] = for_transformers,
    *,
    clips: bool = True,
) -> None:
    """Answers and states of dialogues, and of requests without one, without audio and with several clips; then those
    of a fresh adapter, which change no bit."""
    asks = [*ASKS, *OTHERS, *(CLIPS if clips else ())]
    answers = engine.answer(asks)
    expected, states = through_transformers(host, adapter, asks, inputs)
    assert_same(answers, expected)
    assert sorted(states) == ["call-0", "call-1", "call-2", "odd"]
    for session, state in states.items():
        held = engine.memory.sessions.states[session]
        assert (int(held.utterances), int(held.tokens)) == (int(state.utterances), int(state.tokens))
        assert_same(list(held.weights), list(state.weights))
    written = sum(ask.session is not None and bool(ask.clips) for ask in asks)
    counters = engine.counters
    assert (counters.reads, counters.writes, counters.split, counters.errors) == (written, written, 0, 0)

    bare = engine.answer([Ask(None, ask.clips, seconds=ask.seconds) for ask in ASKS])
    assert apart(answers[: len(ASKS)], bare) > 0.1
    with torch.no_grad():
        engine.memory.adapter.readout_out.weight.zero_()  # as of a fresh adapter
    fresh = engine.answer([Ask(f"fresh-{i % 3}", ask.clips, seconds=ask.seconds) for i, ask in enumerate(ASKS)])
    assert counters.writes == written + len(ASKS)
    assert all(map(torch.equal, fresh, bare))


def load(host: Path) -> tuple[Any, Any]:
    from mal_adapter.ser.loading import load_host

    return load_host(str(host), dtype="float32")


def test_audio_flamingo_3(tmp_path: Path):
    host = save_audio_flamingo(tmp_path / "host")
    adapter = save_adapter(tmp_path / "adapter", "audioflamingo3")
    engine = start(host, adapter)
    try:
        check(engine, load(host), adapter, clips=False)  # vLLM takes one in a prompt of this family
    finally:
        engine.stop()


def test_voxtral(tmp_path: Path):
    """vLLM loads Mistral's files of it, and transformers its own."""
    loaded = load(save_voxtral(tmp_path / "host"))
    adapter = save_adapter(tmp_path / "adapter", "voxtral")
    inputs = partial(voxtral_for_vllm, loaded[1])
    engine = start(tmp_path / "host", adapter, inputs=inputs, max_model_len=2048)
    try:
        check(engine, loaded, adapter, voxtral_for_transformers)
    finally:
        engine.stop()


@pytest.fixture(scope="module")
def omni(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"transformers needs torchvision for the processor of Qwen2.5-Omni: {error}")
    return save_omni(tmp_path_factory.mktemp("omni") / "host")


def test_qwen2_5_omni(omni: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, processor = load(omni)
    adapter = save_adapter(tmp_path / "adapter", "qwen2_5_omni_thinker")
    engine = start(omni, adapter, limit_mm_per_prompt={"audio": 3, "image": 1, "video": 1})
    try:
        check_scenes(engine, model, processor, adapter, monkeypatch)
        engine.reset()
        check(engine, (model, processor), adapter)
    finally:
        engine.stop()


def check_scenes(engine: Engine, model: Any, processor: Any, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures and films beside the sound of an utterance, and sound whose tokens are among those of a film."""
    runner = engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner
    host, positions = type(runner.get_model()), []

    def recorded(*args: Any, method: Any = host.get_mrope_input_positions, **kwargs: Any) -> Any:
        positions.append(method(*args, **kwargs))
        return positions[-1]

    monkeypatch.setattr(host, "get_mrope_input_positions", recorded)
    scenes = [scene(*parts) for parts in (("image", "audio"), ("audio", "video"), ("image",), ("both",), ("audio",))]
    params = [engine.params(Ask("scenes", ())) for _ in scenes]
    outputs = engine.llm.generate([scene.for_vllm() for scene in scenes], params, use_tqdm=False)
    answers = [dense(output.outputs[0].logprobs[0]) for output in outputs]
    with attach_memory(model, adapter=adapter) as memory:
        expected = []
        for made, output, (where, _) in zip(scenes, outputs, positions, strict=True):
            inputs = made.for_transformers(processor)
            assert inputs["input_ids"][0].tolist() == list(output.prompt_token_ids)
            if made.together:  # vLLM 0.32 and transformers 5.19 number the tokens of a film with sound differently
                inputs["position_ids"] = where[:, None]
            with torch.no_grad(), memory.session("scenes"):
                expected.append(model(**inputs).logits[0, -1].log_softmax(-1))
        state = memory.states["scenes"]
    assert_same(answers, expected)
    held = engine.memory.sessions.states["scenes"]
    assert (int(held.utterances), int(held.tokens)) == (int(state.utterances), int(state.tokens))
    assert int(held.utterances) == 4
    assert_same(list(held.weights), list(state.weights))
