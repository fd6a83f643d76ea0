"""Two dialogues side by side in vLLM, with a memory each: in one process, or at a server.

    python examples/vllm_host.py pair
    python examples/serve_vllm.py offline pair/host pair/adapter
    mal-adapter serve --engine vllm --adapter pair/adapter --dtype float32 -- --kv-cache-memory-bytes 100000000 &
    python examples/serve_vllm.py online http://localhost:8000 pair/adapter

Prints a line per utterance. offline queues all utterances at once: vLLM computes those of one dialogue in their order.
It needs vLLM; online needs httpx only.
"""

import argparse
import math
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

from mal_adapter import MemoryAdapter
from mal_adapter.demo.dialogues import make_dialogue, write_wavs
from mal_adapter.ser import Dialogue


def offline(host: str, adapter: str, calls: list[Dialogue]) -> None:
    from transformers import AutoProcessor
    from vllm import LLM, SamplingParams

    from mal_adapter.ser.recognizer.audio import load_waveform
    from mal_adapter.vllm import engine_args

    task = MemoryAdapter.from_pretrained(adapter).metadata.task
    processor = AutoProcessor.from_pretrained(host)
    content = [{"type": "audio"}, {"type": "text", "text": task["prompt"]}]
    message = {"role": "user", "content": content}
    prompt = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    # The labels of this adapter are one token each; ServedRecognizer takes labels of several.
    tokens = {label: processor.tokenizer(label).input_ids[0] for label in task["labels"]}

    # Without the last of these, vLLM takes nearly all memory.
    sizes = {"max_model_len": 1024, "max_num_seqs": 32, "kv_cache_memory_bytes": 100_000_000}
    llm = LLM(host, dtype="float32", **sizes, **engine_args(adapter))
    requests, params, names = [], [], []
    for turn in range(max(len(call.utterances) for call in calls)):
        for call in calls:
            if turn < len(call.utterances):
                sound = load_waveform(call.utterances[turn])
                requests.append({"prompt": prompt, "multi_modal_data": {"audio": [(sound, 16_000)]}})
                session = {"session_id": call.dialogue_id, "turn": turn}
                wanted = list(tokens.values())
                params.append(SamplingParams(max_tokens=1, logprob_token_ids=wanted, extra_args=session))
                names.append(f"{call.dialogue_id} {turn}")
    for name, output in zip(names, llm.generate(requests, params), strict=True):
        logprobs = output.outputs[0].logprobs[0]
        likely = {label: math.exp(logprobs[token].logprob) for label, token in tokens.items()}
        show(name, {label: value / sum(likely.values()) for label, value in likely.items()})


def online(url: str, adapter: str, calls: list[Dialogue]) -> None:
    from mal_adapter.vllm import ServedRecognizer

    def send(call: Dialogue) -> list[dict[str, float]]:
        new = f"{call.dialogue_id} {time.time()}"  # the server keeps the sessions of earlier runs
        return [result.probabilities for result in served.recognize(call, new)]

    with ServedRecognizer(url, adapter) as served, ThreadPoolExecutor(len(calls)) as threads:
        for call, answers in zip(calls, threads.map(send, calls), strict=True):
            for turn, probabilities in enumerate(answers):
                show(f"{call.dialogue_id} {turn}", probabilities)


def show(name: str, probabilities: dict[str, float]) -> None:
    print(f"{name}: " + ", ".join(f"{label} {value:.4f}" for label, value in probabilities.items()), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=["offline", "online"])
    parser.add_argument("place", help="the host's folder, or the server's URL")
    parser.add_argument("adapter", help="folder or Hub id")
    options = parser.parse_args()
    made = [make_dialogue("test", seed=7, index=index, turns=4) for index in range(2)]
    run = offline if options.mode == "offline" else online
    run(options.place, options.adapter, write_wavs(made, tempfile.mkdtemp()))
