"""`ServedRecognizer` and `mal-adapter serve --engine vllm` on the package's pair in shapes that vLLM takes."""

from __future__ import annotations

import os
import random
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mal_adapter.demo import ADAPTER_FOLDER, HOST_FOLDER
from mal_adapter.demo.dialogues import make_dialogue, write_wavs
from mal_adapter.errors import ConfigError, HostError, LabelError, SessionConflictError, SessionError
from mal_adapter.ser import Dialogue, EmotionRecognizer, Failure, Prediction
from mal_adapter.vllm import ServedRecognizer

httpx = pytest.importorskip("httpx")
TOLERANCE = 1e-4
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    runpy.run_path(str(ROOT / "examples" / "vllm_host.py"))["write"](folder / "adapter", folder / "host")
    return folder


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> list[Dialogue]:
    return write_wavs([make_dialogue("test", seed=7, index=i) for i in range(3)], tmp_path_factory.mktemp("wavs"))


@pytest.fixture(scope="module")
def local(pair: Path) -> EmotionRecognizer:
    return EmotionRecognizer.from_pretrained(pair / "adapter", pair / "host")


@pytest.fixture(scope="module")
def url(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pytest.importorskip("vllm")
    from tests.vllm.servers import installed

    folder = tmp_path_factory.mktemp("served")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    environment["PYTHONPATH"] = f"{installed(folder / 'installed')}:{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    environment["MAL_ADAPTER_STORE"] = str(folder / "sessions")
    command = [sys.executable, "-m", "mal_adapter.cli", "serve", "--engine", "vllm", "--port", str(port)]
    command += ["--adapter", str(pair / "adapter"), "--dtype", "float32", "--", "--max-model-len", "1024"]
    command += ["--max-num-seqs", "16", "--enforce-eager", "--kv-cache-memory-bytes", str(2**26), "--api-key", "secret"]
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(300):
            if process.poll() is not None:
                break
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.4)
        assert process.poll() is None, (folder / "log.txt").read_text()[-4000:]
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def served(url: str, pair: Path) -> Iterator[ServedRecognizer]:
    with ServedRecognizer(url, pair / "adapter", api_key="secret") as served:
        yield served


def apart(a: Prediction | Failure, b: Prediction | Failure) -> float:
    assert isinstance(a, Prediction)
    assert isinstance(b, Prediction)
    assert list(a.probabilities) == list(b.probabilities)
    return max(abs(a.probabilities[label] - b.probabilities[label]) for label in a.probabilities)


def test_the_pair_in_other_shapes_has_the_same_answers(local: EmotionRecognizer, calls: list[Dialogue]):
    shipped = EmotionRecognizer.from_pretrained(ADAPTER_FOLDER, HOST_FOLDER)
    for call in calls:
        for a, b in zip(shipped.recognize(call), local.recognize(call), strict=True):
            assert apart(a, b) <= 1e-5


def test_served_answers_equal_local_ones(served: ServedRecognizer, local: EmotionRecognizer, calls: list[Dialogue]):
    assert (served.labels, served.prompt) == (local.labels, local.prompt)
    with ThreadPoolExecutor(len(calls)) as threads:  # beside each other in the engine's steps
        answers = list(threads.map(lambda call: list(served.recognize(call)), calls))
    for call, got in zip(calls, answers, strict=True):
        assert max(map(apart, got, local.recognize(call))) <= TOLERANCE
        found = served.session(call.dialogue_id)
        assert found is not None
        assert (found["utterances"], found["next_turn"]) == (len(call.utterances),) * 2


@pytest.mark.parametrize(
    ("labels", "end_ids"),
    [
        (("unhappy", "very calm", "frustrated"), ()),
        (("sad", "sadness", "calm"), (2,)),
        (("sad", "sadness", "ok"), (2, 1)),
    ],
)
def test_labels_of_several_tokens(
    url: str, pair: Path, calls: list[Dialogue], labels: tuple[str, ...], end_ids: tuple[int, ...]
):
    local = EmotionRecognizer.from_pretrained(pair / "adapter", pair / "host", labels=labels)
    if end_ids:
        local._scorer.end_ids = list(end_ids)
    with ServedRecognizer(url, pair / "adapter", api_key="secret", labels=labels, end_ids=end_ids) as served:
        got = list(served.recognize(calls[0], "-".join(labels) + str(end_ids)))
        for a, b in zip(got, local.recognize(calls[0]), strict=True):
            assert apart(a, b) <= TOLERANCE
        found = served.session("-".join(labels) + str(end_ids))
        assert found is not None
        assert found["utterances"] == len(calls[0].utterances)  # once each, though a label took a request


def test_labels_that_only_the_end_distinguishes_need_end_ids(url: str, pair: Path):
    with pytest.raises(LabelError, match="end_ids"):
        ServedRecognizer(url, pair / "adapter", api_key="secret", labels=["sad", "sadness"])


def test_a_turn_that_is_sent_again_is_written_once(served: ServedRecognizer, calls: list[Dialogue]):
    first, second, third = calls[0].utterances[:3]
    served.answer(first, "again", 0)
    once = served.answer(second, "again", 1)
    assert apart(served.answer(second, "again", 1), once) <= 1e-6
    assert apart(served.answer(second, None), once) > 0.01  # the memory matters
    for turn in (0, 3, 7):
        with pytest.raises(SessionConflictError, match="turn 2 is due"):
            served.answer(third, "again", turn)
    found = served.session("again")
    assert found is not None
    assert found["utterances"] == 2
    with pytest.raises(SessionError, match="give both"):
        served.answer(third, "again")


def test_refusals_are_typed(served: ServedRecognizer, url: str, pair: Path, calls: list[Dialogue], tmp_path: Path):
    with pytest.raises(ConfigError, match="80"):
        served.answer(calls[0].utterances[0], "a" * 81, 0)
    with pytest.raises(ConfigError, match="401"):
        ServedRecognizer(url, pair / "adapter", api_key="wrong")
    with pytest.raises(HostError, match="does not answer"):
        ServedRecognizer("http://127.0.0.1:9", pair / "adapter")
    assert served.session("no such session") is None
    (tmp_path / "no.wav").write_bytes(b"no sound")
    wavs = [tmp_path / "no.wav", calls[0].utterances[0].audio]
    kinds = [type(result) for result in served.recognize(Dialogue.from_files(wavs), "one damaged")]
    assert kinds == [Failure, Prediction]


def chat(served: ServedRecognizer, call: Dialogue, **others: Any) -> Any:
    from mal_adapter.ser.recognizer.audio import load_waveform

    message = served._message(load_waveform(call.utterances[0]))
    body = {"model": served.model, "messages": [message], "max_completion_tokens": 1, **others}
    return served._client.post("/v1/chat/completions", json=body)


def test_bad_requests_are_answered_400_and_the_engine_lives_on(served: ServedRecognizer, calls: list[Dialogue]):
    call, generator = calls[0], random.Random(0)
    for extra, others, advice in (
        ({"session_id": "n"}, {"n": 2, "temperature": 1}, "n=1"),
        ({"turn": 1}, {}, "session_id"),
        ({"session_id": ""}, {}, "non-empty"),
        ({"session_id": "n", "turn": -1}, {}, "0 for the first"),
    ):
        reply = chat(served, call, vllm_xargs=extra, **others)
        assert reply.status_code == 400
        assert advice in reply.json()["error"]["message"]
    assert chat(served, call).status_code == 200  # without a session, and without memory
    values: list[Any] = ["", -1, 1.5, 2**63, True, [], ["a"], {"a": 1}, "a" * 10_000, "\0", "é" * 50, "a\nb"]
    for _ in range(36):
        extra = {"session_id": generator.choice(values), "turn": generator.choice(values)}
        assert chat(served, call, vllm_xargs=extra).status_code == 400, extra
    for path in ("%00", "..%2f..%2fetc", "a" * 3000, "%ff"):
        assert 400 <= served._client.get(f"/v1/sessions/{path}").status_code < 500
    served.answer(call.utterances[0], "after all that", 0)
    assert served._client.get("/v1/sessions-stats").json()["errors"] == 0


def test_routes_and_metrics(served: ServedRecognizer, calls: list[Dialogue]):
    served.answer(calls[1].utterances[0], "r1", 0)
    client = served._client
    assert client.post("/v1/sessions/r1/fork", params={"to": "r2"}).status_code == 200
    a, b = (served.answer(calls[1].utterances[1], session, 1) for session in ("r1", "r2"))
    assert apart(a, b) <= 1e-6
    assert {"r1", "r2"} <= set(client.get("/v1/sessions").json()["sessions"])
    assert client.delete("/v1/sessions/r2").status_code == 200
    assert served.session("r2") is None
    writes = client.get("/v1/sessions-stats").json()["writes"]
    for _ in range(40):
        text = client.get("/metrics").text
        if (found := re.search(r"^mal_adapter_writes_total (\S+)", text, re.M)) and float(found[1]) == writes:
            return
        time.sleep(0.25)
    raise AssertionError(f"{found} is not {writes}")
