"""vLLM's throughput with a memory against without one, on the same requests, on a CPU.

    python tests/benchmarks/vllm_engine.py            # in the environment of .ci/vllm; a minute or two

Two engines, each in a process of its own, run the same requests in turn: with the memory, and without it but with the
flags that the memory needs. Each round has new sound, so that no cache has the answer. A
round is 32 utterances, two of each of 16 dialogues, all queued at once, with three tokens of answer. Printed are
requests per second by the CPU time and by the clock (medians of the rounds), and the ratios (medians of the rounds').
"""

from __future__ import annotations

import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DIALOGUES, TURNS, ROUNDS = 16, 2, 7
ENGINES = ("memory", "without")


def serve_rounds(kind: str, pair: Path) -> None:
    """Run a round for each line of stdin, and print its times."""
    import numpy as np
    from vllm import LLM, SamplingParams

    from mal_adapter.demo.dialogues import make_dialogue, write_wavs
    from mal_adapter.ser.recognizer.audio import load_waveform
    from mal_adapter.vllm import engine_args

    arguments = engine_args(pair / "adapter")
    if kind == "without":
        for name in ("worker_cls", "additional_config", "logits_processors"):
            arguments.pop(name, None)
    sizes = {"max_model_len": 1024, "max_num_seqs": 32, "max_num_batched_tokens": 4096, "kv_cache_memory_bytes": 2**27}
    llm = LLM(str(pair / "host"), dtype="float32", enforce_eager=True, **sizes, **arguments)
    made = [make_dialogue("test", seed=7, index=i, turns=TURNS) for i in range(DIALOGUES)]
    calls = write_wavs(made, tempfile.mkdtemp())
    sounds = [[load_waveform(utterance) for utterance in call.utterances] for call in calls]
    prompt = "<|im_start|>user\n<|audio_bos|><|AUDIO|><|audio_eos|>\nHow does the speaker feel?<|im_end|>\n"
    prompt += "<|im_start|>assistant\n"
    print("ready", flush=True)
    for number, _ in enumerate(sys.stdin):
        noise = np.random.default_rng(number)
        requests, params = [], []
        for turn in range(TURNS):
            for dialogue in range(DIALOGUES):
                sound = sounds[dialogue][turn]
                sound = sound + noise.normal(0, 1e-4, len(sound)).astype(np.float32)
                requests.append({"prompt": prompt, "multi_modal_data": {"audio": [(sound, 16_000)]}})
                extra = {"session_id": f"{number}-{dialogue}", "turn": turn} if kind == "memory" else None
                params.append(SamplingParams(max_tokens=3, temperature=0, ignore_eos=True, extra_args=extra))
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        llm.generate(requests, params, use_tqdm=False)
        cpu_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - wall_s
        if kind == "memory":
            stats = llm.collective_rpc("mal_adapter", args=("stats",))[0][1]
            assert stats["writes"] == (number + 1) * len(requests), stats
        print(json.dumps([cpu_s, wall_s]), flush=True)


def main() -> None:
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    environment |= {"OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    with tempfile.TemporaryDirectory() as folder:
        pair = Path(folder)
        runpy.run_path(str(ROOT / "examples" / "vllm_host.py"))["write"](pair / "adapter", pair / "host")
        children = {}
        for kind in ENGINES:
            command = [sys.executable, __file__, kind, folder]
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            children[kind] = subprocess.Popen(command, env=environment, **pipes)
            wait_for(children[kind], "ready")
        times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in ENGINES}
        for number in range(ROUNDS + 1):
            for kind in ENGINES if number % 2 else ENGINES[::-1]:
                process = children[kind]
                print("go", file=process.stdin, flush=True)
                cpu_s, wall_s = json.loads(wait_for(process, "["))
                if number:  # the first round warms up
                    times[kind].append((cpu_s, wall_s))
        for process in children.values():
            process.stdin.close()
            process.wait(60)
    report(times)


def wait_for(process: subprocess.Popen[str], start: str) -> str:
    assert process.stdout is not None
    for line in process.stdout:  # vLLM prints lines of its own
        if line.startswith(start):
            return line
    raise RuntimeError(f"{process.args} ended with {process.wait()}")


def report(times: dict[str, list[tuple[float, float]]]) -> None:
    count = DIALOGUES * TURNS
    for kind, rounds in times.items():
        per_s = [count / statistics.median(column) for column in zip(*rounds, strict=True)]
        print(f"{kind:<12} {per_s[0]:6.1f} requests per CPU second, {per_s[1]:6.1f} per second")
    for kind in ENGINES[1:]:
        pairs = list(zip(times["memory"], times[kind], strict=True))
        ratios = [[other[i] / memory[i] for memory, other in pairs] for i in (0, 1)]
        shown = ", ".join(
            f"{statistics.median(r):.3f} ({min(r):.3f} to {max(r):.3f}) by {name}"
            for r, name in zip(ratios, ("CPU time", "the clock"), strict=True)
        )
        print(f"throughput with memory / {kind}: {shown}")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        serve_rounds(sys.argv[1], Path(sys.argv[2]))
    else:
        main()
