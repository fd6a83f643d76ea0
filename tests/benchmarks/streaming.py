"""Delays of live streams: a server process, and callers who speak at the same time in real time, as telephones do.

python -m tests.benchmarks.streaming                       # 50 callers, a minute; 8 kHz µ-law in blocks of 20 ms
python -m tests.benchmarks.streaming --callers 8 --seconds 20

Every caller's turns are compared with those of the same call alone. The delay is from the end of the voice to the
answer, by the server's clock; `at the caller` is the same by the caller's clock, from when the end of the voice was
sent. Other processes make both longer: the share of all cores that they took is printed. Needs espeak-ng.
"""

import argparse
import asyncio
import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from websockets.asyncio.client import connect

from tests.benchmarks.serving import busy_s, cpu_s, server
from tests.ser.live.calls import make_call, mulaw

RATE, BLOCK = 8_000, 160
FINISH = json.dumps({"type": "finish"})
COMPARED = ("utterance", "speaker", "channel", "start_s", "end_s", "overlaps", "emotion")


class Received(NamedTuple):
    """What a caller got: its messages, and by its own clock, how long after the end of the voice each turn came."""

    messages: list[dict[str, Any]]
    delays_s: list[float]
    late_s: float
    """How far behind real time the caller was at most."""

    @property
    def turns(self) -> list[dict[str, Any]]:
        return [message for message in self.messages if message["type"] == "turn"]


async def speak(port: int, name: str, data: bytes, wait_s: float, *, real_time: bool) -> Received:
    """Send a call, and listen."""
    await asyncio.sleep(wait_s)
    url = f"ws://127.0.0.1:{port}/sessions/{name}/stream?encoding=mulaw&sampling_rate={RATE}"
    messages: list[dict[str, Any]] = []
    delays_s: list[float] = []
    late_s, clock = 0.0, asyncio.get_running_loop().time
    async with connect(url, compression=None, open_timeout=60) as socket:
        began = clock()

        async def listen() -> None:
            async for message in socket:
                messages.append(json.loads(message))
                if messages[-1]["type"] == "turn":
                    voice_end_s = messages[-1]["end_s"] - 0.1  # without its padding
                    delays_s.append(clock() - began - voice_end_s)

        listening = asyncio.create_task(listen())
        for number, place in enumerate(range(0, len(data), BLOCK), start=1):
            await socket.send(data[place : place + BLOCK])
            if real_time:
                left_s = began + number * BLOCK / RATE - clock()
                late_s = max(late_s, -left_s)
                await asyncio.sleep(max(0.0, left_s))
        await socket.send(FINISH)
        await listening
    return Received(messages, delays_s, late_s)


async def all_speak(port: int, calls: Sequence[bytes], callers: int) -> list[Received]:
    names = [f"call-{number}" for number in range(callers)]
    # They begin within one second, and not at the same moment.
    tasks = [
        speak(port, name, calls[number % len(calls)], number / callers, real_time=True)
        for number, name in enumerate(names)
    ]
    return await asyncio.gather(*tasks)


async def each_alone(port: int, calls: Sequence[bytes]) -> list[Received]:
    return [await speak(port, f"alone-{number}", data, 0.0, real_time=False) for number, data in enumerate(calls)]


def same(received: Received, alone: Received) -> bool:
    """Whether a caller's turns are those of the same call alone."""
    return len(received.turns) == len(alone.turns) and all(
        all(one[key] == other[key] for key in COMPARED)
        and all(abs(one["probabilities"][label] - p) < 1e-4 for label, p in other["probabilities"].items())
        for one, other in zip(received.turns, alone.turns, strict=True)
    )


def peak_mib(process_id: int) -> float:
    """The most memory that a process has had; Linux only."""
    lines = Path(f"/proc/{process_id}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def measure(callers: int, seconds: float, different: int) -> dict[str, Any]:
    """Figures of one run."""
    turns = max(2, round(seconds / 3.2))
    calls = [mulaw(make_call(turns=turns, seed=seed, channels=1)[0][:, 0]) for seed in range(different)]
    calls = [data[: round(seconds * RATE)] for data in calls]
    with server("--max-streams", str(callers + 1)) as (process_id, port):
        alone = asyncio.run(each_alone(port, calls))
        before, began = (cpu_s(process_id), time.process_time(), busy_s()), time.monotonic()
        load = os.getloadavg()[0]
        received = asyncio.run(all_speak(port, calls, callers))
        elapsed_s = time.monotonic() - began
        after = (cpu_s(process_id), time.process_time(), busy_s())
        memory_mib = peak_mib(process_id)
    server_s, client_s, all_s = (end - start for end, start in zip(after, before, strict=True))
    audio_s = sum(len(calls[number % different]) for number in range(callers)) / RATE
    found = [turn for one in received for turn in one.turns]
    # The last turn's pause may be cut short by the end of the call.
    delays = [turn["delay_s"] for one in received for turn in one.turns[:-1]]
    outside = [delay for one in received for delay in one.delays_s[:-1]]
    return {
        "callers": callers,
        "seconds": seconds,
        "turns": len(found),
        "expected": sum(len(alone[number % different].turns) for number in range(callers)),
        "errors": sum(message["type"] == "error" for one in received for message in one.messages),
        "same": sum(same(one, alone[number % different]) for number, one in enumerate(received)),
        "delay_s": {"median": statistics.median(delays), "95%": percentile(delays, 0.95), "most": max(delays)},
        "at_the_caller_s": {"median": statistics.median(outside), "95%": percentile(outside, 0.95)},
        "callers_late_s": max(one.late_s for one in received),
        "server_cpu_per_stream_s": server_s / audio_s,
        "server_cores": server_s / elapsed_s,
        "callers_cores": client_s / elapsed_s,
        "others": max(0.0, all_s - server_s - client_s) / elapsed_s / (os.cpu_count() or 1),
        "load_before": load,
        "server_peak_mib": memory_mib,
    }


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--callers", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each call")
    parser.add_argument("--different", type=int, default=10, help="calls; the callers share them")
    options = parser.parse_args()
    found = measure(options.callers, options.seconds, min(options.different, options.callers))
    print(json.dumps(found, indent=2))
    ok = found["turns"] == found["expected"] and found["same"] == found["callers"] and not found["errors"]
    print("nothing is lost, and nothing is mixed" if ok else "TURNS ARE LOST OR MIXED")
    raise SystemExit(0 if ok else 1)


if __name__ == "__main__":
    main()
