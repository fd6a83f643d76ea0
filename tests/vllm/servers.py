"""A `vllm serve` of its own process, as a user starts it."""

from __future__ import annotations

import base64
import io
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import soundfile
import torch

import mal_adapter
from mal_adapter.vllm import engine_args, serve_flags
from tests.vllm.engines import Ask
from tests.vllm.hosts import QUESTION

__all__ = ["KEY", "Server", "installed"]

KEY = "secret"
ROOT = Path(mal_adapter.__file__).parents[1]


def installed(folder: Path) -> Path:
    """A folder for PYTHONPATH in which Python finds the entry points of this clone, and vLLM by its own name: its
    distribution for a CPU has another one, and then the vllm command does not know its version."""
    import vllm

    entries = re.findall(
        r'(?s)(\[project\.entry-points\."[^"]+"\]\n(?:\w+ = "[^"]+"\n)+)', (ROOT / "pyproject.toml").read_text()
    )
    text = "".join(re.sub(r'"', "", entry).replace("[project.entry-points.", "[") for entry in entries)
    assert "vllm.endpoint_plugins" in text
    for name, version in (("mal_adapter", "0"), ("vllm", f"{vllm.__version__.split('+')[0]}+cpu")):
        info = folder / f"{name}-{version.split('+')[0]}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n")
        if name == "mal_adapter":
            (info / "entry_points.txt").write_text(text)
    return folder


class Server:
    """Starts `vllm serve` and waits until it answers."""

    def __init__(self, host: Path, adapter: Path, folder: Path, **options: Any) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        path = f"{installed(folder / 'installed')}:{ROOT}"
        environment = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
        environment |= {"PYTHONPATH": path, "VLLM_PLUGINS": "mal_adapter", "VLLM_LOGGING_LEVEL": "INFO"}
        arguments = {
            **engine_args(adapter, **options),
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 1024,
            "max_num_batched_tokens": 4096,
            "max_num_seqs": 16,
            "kv_cache_memory_bytes": 2**26,
            "served_model_name": "host",
            "api_key": KEY,
            "port": port,
            "host": "127.0.0.1",
        }
        arguments.pop("logits_processors", None)  # it is an entry point there
        command = [str(Path(sys.executable).parent / "vllm"), "serve", str(host), *serve_flags(arguments)]
        self.log = folder / "log.txt"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        headers = {"Authorization": f"Bearer {KEY}"}
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=60)
        self._wait()

    def _wait(self) -> None:
        for _ in range(300):
            if self.process.poll() is not None:
                raise RuntimeError(self.log.read_text()[-4000:])
            try:
                if self.client.get("/health").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.4)
        self.stop()
        raise TimeoutError(self.log.read_text()[-4000:])

    def chat(self, ask: Ask, **others: Any) -> httpx.Response:
        """POST an utterance as a chat completion, with the log-probabilities of the 20 likeliest first tokens."""
        extra = {name: value for name, value in (("session_id", ask.session), ("turn", ask.turn)) if value is not None}
        content: list[dict[str, Any]] = [
            {"type": "input_audio", "input_audio": {"data": base64.b64encode(wav(samples)).decode(), "format": "wav"}}
            for samples in ask.audio
        ]
        body = {
            "model": "host",
            "messages": [{"role": "user", "content": [*content, {"type": "text", "text": QUESTION}]}],
            "max_completion_tokens": ask.tokens,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": 20,
            "return_tokens_as_token_ids": True,
            **({"vllm_xargs": extra} if extra else {}),
            **others,
        }
        return self.client.post("/v1/chat/completions", json=body)

    def answer(self, ask: Ask) -> dict[int, float]:
        """The log-probability of each of the 20 likeliest first tokens."""
        reply = self.chat(ask)
        assert reply.status_code == 200, reply.text
        top = reply.json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        return {int(entry["token"].removeprefix("token_id:")): entry["logprob"] for entry in top}

    def stop(self) -> None:
        self.client.close()
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def wav(samples: Any) -> bytes:
    """The bytes of a WAV file of these samples, without rounding."""
    data = io.BytesIO()
    soundfile.write(data, torch.as_tensor(samples).numpy(), 16_000, format="WAV", subtype="FLOAT")
    return data.getvalue()
