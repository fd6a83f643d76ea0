"""The cost of saving and loading a session, relative to writing an utterance into it.

python -m tests.benchmarks.stores            # one thread; needs redis-server on the PATH for its row
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from mal_adapter import MemoryAdapter, MemoryConfig, MemoryState
from mal_adapter.stores import FolderStore, InMemoryStore, RedisStore, SessionStore
from tests.stores.servers import RedisServer

HIDDEN_SIZE, TOKENS, ROUNDS = 3584, 250, 30  # Qwen2-Audio's width; ten seconds of audio


def milliseconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return 1000 * (time.perf_counter() - start)


@torch.inference_mode()
def measure(stores: dict[str, SessionStore]) -> dict[str, list[float]]:
    """Times of a write, and of each store's put and get, interleaved."""
    torch.manual_seed(0)
    adapter = MemoryAdapter(MemoryConfig(hidden_size=HIDDEN_SIZE)).eval()
    utterance = torch.randn(1, TOKENS, HIDDEN_SIZE)
    state = adapter.write(adapter.initial_state(), utterance).map(torch.clone)
    versions: dict[str, str | None] = dict.fromkeys(stores)
    times: dict[str, list[float]] = {}

    def note(name: str, action: Callable[[], object]) -> None:
        times.setdefault(name, []).append(milliseconds(action))

    def put(name: str) -> None:
        versions[name] = stores[name].put("call", state, versions[name])

    print(f"state: {state.nbytes / 1e6:.2f} MB; write: {TOKENS} tokens of width {HIDDEN_SIZE}; medians of {ROUNDS}")
    for _ in range(ROUNDS):
        note("write", lambda: adapter.write(state, utterance))
        note("to_bytes", state.to_bytes)
        data = state.to_bytes()
        note("from_bytes", lambda data=data: MemoryState.from_bytes(data))
        for name, store in stores.items():
            note(f"{name} put", lambda name=name: put(name))
            note(f"{name} get", lambda store=store: store.get("call"))
    return times


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="mal") as folder:
        server = RedisServer(Path(folder), "--save", "").start()
        stores = {
            "memory": InMemoryStore(),
            "folder": FolderStore(f"{folder}/sessions"),
            "redis": RedisStore(server.url),
        }
        times = measure(stores)
        server.kill()
    write = statistics.median(times["write"])
    for name, measured in times.items():
        low, median, high = statistics.quantiles(measured, n=4)
        print(f"{name:12} {median:8.3f} ms ({low:.3f} … {high:.3f})  {median / write:6.3f} of a write")


if __name__ == "__main__":
    main()
