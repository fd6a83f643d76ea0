"""A processor for tiny hosts, with a token per letter, to make a recogniser; the host makes the inputs."""

from typing import Any

import torch

from tests.hosts.tiny import AUDIO_TOKEN_ID

END_ID = 47


class _Letters:
    eos_token_id = END_ID
    unk_token_id = None

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [1 + ord(letter) % 40 for letter in text]}


class ByLetter:
    """The attributes of a processor that a recogniser needs when it is made."""

    audio_token = "<audio>"
    tokenizer = _Letters()

    def __call__(self, text: list[str], audio: Any, **options: Any) -> dict[str, torch.Tensor]:
        """The ids with one placeholder each, for the trial when a recogniser is made; it is no input of a host."""
        ids = [[AUDIO_TOKEN_ID, *self.tokenizer(each, add_special_tokens=False)["input_ids"]] for each in text]
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.ones(len(ids), len(ids[0]), dtype=torch.long)}
