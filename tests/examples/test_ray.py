"""examples/ray_serve.py: two replicas behind Ray Serve's sticky router, over one real Redis."""

import os
import runpy
import secrets
import signal
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest

from mal_adapter.demo import ADAPTER_FOLDER
from mal_adapter.demo.dialogues import make_dialogues, write_wavs
from mal_adapter.ser import EmotionRecognizer, Prediction
from mal_adapter.ser.dialogue import Dialogue
from tests.stores.servers import RedisServer, free_port, wait_until

ray = pytest.importorskip("ray", reason="Ray is in no extra: pip install 'ray[serve]==2.60.*'")
from ray import serve  # noqa: E402
from ray.serve.context import _get_global_client  # noqa: E402

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SESSIONS, UTTERANCES = 8, 7


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory: pytest.TempPathFactory) -> list[Dialogue]:
    made = list(make_dialogues("test", seed=23, count=SESSIONS, turns=UTTERANCES))
    return write_wavs(made, tmp_path_factory.mktemp("wav"))


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="mal") as folder, pytest.MonkeyPatch.context() as patch:  # for short paths
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex())  # or Ray would write one to the home folder
        database = RedisServer(Path(folder), "--save", "").start()
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}},
            _temp_dir=f"{folder}/ray",
        )
        try:
            example = runpy.run_path(str(ROOT / "examples" / "ray_serve.py"))
            serve.start(http_options={"port": (port := free_port())})
            serve.run(example["replicas"](example["Options"](store=database.url)), name="calls")
            yield f"http://127.0.0.1:{port}"
        finally:
            serve.shutdown()
            ray.shutdown()
            database.kill()


def session_of(dialogue: Dialogue) -> str:
    return f"calls/{dialogue.dialogue_id}"


def processes() -> dict[str, int]:
    """The process ids of the replicas that are ready; what `serve status` prints has no ids."""
    details = _get_global_client().get_serve_details()
    replicas = details["applications"]["calls"]["deployments"]["mal_adapter"]["replicas"]
    return {each["replica_id"]: each["pid"] for each in replicas if each["state"] == "RUNNING"}


@pytest.fixture(scope="module")
def expected(dialogues: list[Dialogue]) -> dict[str, list[dict[str, float]]]:
    """The probabilities of each session's utterances, by a recogniser in this process."""
    local = EmotionRecognizer.from_pretrained(ADAPTER_FOLDER)
    found: dict[str, list[dict[str, float]]] = {dialogue.dialogue_id: [] for dialogue in dialogues}
    for number in range(UTTERANCES):
        for dialogue, result in zip(
            dialogues, local.answer([each.utterances[number] for each in dialogues]), strict=True
        ):
            assert isinstance(result, Prediction)
            found[dialogue.dialogue_id].append(result.probabilities)
    return found


def post(url: str, session: str, body: bytes | Iterator[bytes]) -> httpx.Response:
    path = f"{url}/sessions/{quote(session, safe='')}/utterances"
    return httpx.post(path, content=body, headers={"x-session-id": session}, timeout=120)


def test_sessions_stick_to_a_replica_and_continue_at_another_when_it_dies(
    url: str, dialogues: list[Dialogue], expected: dict[str, list[dict[str, float]]]
):
    def send(number: int) -> list[str]:
        """Sends an utterance of each session, all at once; checks the answers, and returns their replicas."""

        def send_to(dialogue: Dialogue) -> str:
            answer = post(url, session_of(dialogue), dialogue.utterances[number].audio.read_bytes())
            assert answer.status_code == 200, answer.text
            said = answer.json()
            assert (said["session"], said["utterance"], said["saved"]) == (session_of(dialogue), number + 1, True)
            assert said["probabilities"] == pytest.approx(expected[dialogue.dialogue_id][number], abs=1e-5)
            return str(answer.headers["x-replica"])

        with ThreadPoolExecutor(SESSIONS) as pool:
            return list(pool.map(send_to, dialogues))

    first = send(0)
    for number in range(1, 5):
        assert send(number) == first
    before = processes()
    assert len(before) == 2
    assert set(first) <= before.keys()
    # Without the header, requests go anywhere.
    assert {httpx.get(f"{url}/health").headers["x-replica"] for _ in range(40)} == before.keys()

    dead, resume = first[0], threading.Event()

    def stalled() -> Iterator[bytes]:
        yield body[:1000]
        resume.wait()
        yield body[1000:]

    body = dialogues[0].utterances[5].audio.read_bytes()
    with ThreadPoolExecutor(1) as pool:
        cut = pool.submit(post, url, session_of(dialogues[0]), stalled())
        health = {"x-session-id": session_of(dialogues[0])}
        wait_until(lambda: httpx.get(f"{url}/health", headers=health).json()["pending"] == 1)
        os.kill(before[dead], signal.SIGKILL)
        moved = send(5)
        resume.set()
        assert cut.result().status_code == 500  # Ray's; the utterance was not processed, and `send` has sent it again
    assert dead not in moved
    assert all(now == then for now, then in zip(moved, first, strict=True) if then != dead)

    wait_until(lambda: len(processes()) == 2 and dead not in processes(), seconds=120)
    assert set(send(6)) <= processes().keys()  # the new replica continues some sessions of both
