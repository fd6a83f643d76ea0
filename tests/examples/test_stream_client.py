"""examples/stream_client.py sends a recording and a pipe to a real server, and prints a line per turn."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.ser.live.calls import make_call
from tests.server.running import Command

EXAMPLE = Path(__file__).parents[2] / "examples" / "stream_client.py"
KEY = "the-secret-key-of-acme-0"
LINE = re.compile(
    r"^ +(\d+\.\d\d) – (\d+\.\d\d)  (\S+) +(neutral|happy|angry|sad) +[01]\.\d\d  after \d+\.\d\d s$", re.M
)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "keys.txt").write_text(f"acme {KEY}\n")
    command = Command(folder, "--api-keys", folder / "keys.txt").wait()
    yield command.port
    command.kill()


def run(
    port: int, *arguments: object, sound: bytes | None = None, key: str = KEY
) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, str(EXAMPLE), *map(str, arguments), "--url", f"ws://127.0.0.1:{port}"]
    environment = {**os.environ, "MAL_ADAPTER_API_KEY": key}
    return subprocess.run(command, input=sound, capture_output=True, timeout=120, env=environment)


def test_a_recording_with_a_speaker_per_channel(port: int, tmp_path: Path):
    call, said = make_call(16_000, turns=3)
    soundfile.write(tmp_path / "call.wav", call, 16_000)
    done = run(port, tmp_path / "call.wav", "--channels", "customer,agent", "--fast")
    assert done.returncode == 0, done.stderr.decode()
    printed = done.stdout.decode()
    found = LINE.findall(printed)
    assert [speaker for _, _, speaker, _ in found] == ["customer", "agent", "customer"]
    for (start, end, _, _), truth in zip(found, said, strict=True):
        assert float(start) == pytest.approx(truth.start_s - 0.1, abs=0.2)
        assert float(end) == pytest.approx(truth.end_s + 0.1, abs=0.2)
    assert printed.splitlines()[-1] == f"3 turns in {len(call) / 16_000:.1f} s (finished)"


def test_what_another_program_writes(port: int):
    call, said = make_call(16_000, turns=2, channels=1)
    sound = np.round(call * 32_767).astype("<i2").tobytes()
    printed = run(port, "-", "--session", "a pipe", sound=sound).stdout.decode()
    assert len(LINE.findall(printed)) == len(said)
    assert KEY not in printed


def test_a_wrong_key(port: int, tmp_path: Path):
    soundfile.write(tmp_path / "call.wav", np.zeros(16_000), 16_000)
    done = run(port, tmp_path / "call.wav", "--fast", key="nobody-knows-this-key")
    assert done.returncode != 0
    assert b"403" in done.stderr
