"""A dialogue of WAV files, sent to vLLM with the OpenAI client: its labels' probabilities, one line per file.

    python examples/openai_client.py turn1.wav turn2.wav

The server is started as docs/serving.md says. For labels of one token each, among the 20 likeliest;
`mal_adapter.vllm.ServedRecognizer` has no such limits.
"""

import argparse
import base64
import math
import os
import time
from pathlib import Path

from openai import OpenAI

LABELS = ["neutral", "happy", "angry", "sad"]

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("files", type=Path, nargs="+", help="in the order spoken")
parser.add_argument("--url", default="http://localhost:8000/v1", help="(default: %(default)s)")
options = parser.parse_args()
client = OpenAI(base_url=options.url, api_key=os.environ.get("OPENAI_API_KEY", "none"))  # vllm serve --api-key
session = f"call {time.time()}"
for turn, path in enumerate(options.files):
    audio = {"data": base64.b64encode(path.read_bytes()).decode(), "format": "wav"}
    parts = [{"type": "input_audio", "input_audio": audio}, {"type": "text", "text": "How does the speaker feel?"}]
    answer = client.chat.completions.create(
        model="host",
        messages=[{"role": "user", "content": parts}],
        max_completion_tokens=1,
        logprobs=True,
        top_logprobs=20,
        extra_body={"vllm_xargs": {"session_id": session, "turn": turn}},  # the memory
    )
    top = {entry.token: math.exp(entry.logprob) for entry in answer.choices[0].logprobs.content[0].top_logprobs}
    whole = sum(top[label] for label in LABELS)
    print(", ".join(f"{label} {top[label] / whole:.4f}" for label in LABELS))
