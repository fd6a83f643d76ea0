"""A separate process that uses the Hub as a user would. HF_ENDPOINT is read when huggingface_hub is imported, which the
process of the tests has done already. One process runs many scripts, so torch is imported once.

client = Client(HF_ENDPOINT=hub.url, HF_HOME=folder)
client.run("result = MemoryAdapter.from_pretrained(name).metadata.layer_idx", name="alice/memory")
"""

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

__all__ = ["Client", "Raised"]

ROOT = Path(__file__).parent.parent.parent


class Raised(Exception):  # noqa: N818 -- it carries another process's error
    """What a script raised: `kinds` are the names of its classes, `cause` that of its cause."""

    def __init__(self, kinds: list[str], message: str, cause: str | None, trace: str) -> None:
        super().__init__(trace)
        self.kinds, self.message, self.cause = kinds, message, cause


class Client:
    """Runs scripts in a new Python process with `environment`, and without any token that is not in it."""

    def __init__(self, **environment: str) -> None:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        kept |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        # The client uploads through Xet where hf_xet is installed; this asks for the plain protocol, HTTP and LFS.
        kept |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.serialization.client"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**kept, **environment},
            text=True,
        )

    def run(self, script: str, **names: Any) -> Any:
        """Run `script` with the variables `names` and return the value of `result`. JSON values only.

        Raises:
            Raised: The script raised.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"script": script, "names": names}) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        if "raised" in answer:
            raise Raised(**answer["raised"])
        return answer["result"]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the output of a script must not mix with the answers
    for line in sys.stdin:
        request = json.loads(line)
        scope = dict(request["names"])
        try:
            exec(PRELUDE + request["script"], scope)
            answer = {"result": scope.get("result")}
        except BaseException as error:
            kinds = [kind.__name__ for kind in type(error).__mro__]
            cause = type(error.__cause__).__name__ if error.__cause__ else None
            message, trace = str(error), traceback.format_exc()
            answer = {"raised": {"kinds": kinds, "message": message, "cause": cause, "trace": trace}}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    os._exit(0)  # the exit of torch takes seconds


PRELUDE = """
from pathlib import Path
import torch
from huggingface_hub import HfApi, ModelCard
from mal_adapter import MemoryAdapter, attach_memory
from mal_adapter.serialization.metadata import AdapterMetadata
from tests.hosts.probes import random_adapter
"""

if __name__ == "__main__":
    serve()
