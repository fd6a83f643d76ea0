"""`ServedRecognizer` and `mal-adapter serve --engine vllm` on the package's pair in shapes that vLLM takes."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mal_adapter.demo import ADAPTER_FOLDER, HOST_FOLDER
from mal_adapter.errors import ConfigError, HostError, LabelError, SessionConflictError, SessionError
from mal_adapter.ser import Dialogue, EmotionRecognizer, Failure, Prediction
from mal_adapter.vllm import ServedRecognizer

httpx = pytest.importorskip("httpx")
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def local(pair: Path) -> EmotionRecognizer:
    return EmotionRecognizer.from_pretrained(pair / "adapter", pair / "host")


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
