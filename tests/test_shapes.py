"""Shapes in annotations are no mere words here: a tensor of another shape or dtype is an error where it comes in.

`tests/conftest.py` switches this on for the whole suite; a user's process has none of it.
"""

import subprocess
import sys

import pytest
import torch
from jaxtyping import TypeCheckError

from mal_adapter import MemoryState
from mal_adapter.hooks.plan import plan_audio
from mal_adapter.memory.chunk import advance, split_chunks
from mal_adapter.memory.gates import ChunkScalars, Gates
from mal_adapter.memory.titans import write
from mal_adapter.ser.recognizer.inputs import Prepared

HIDDEN = torch.zeros(2, 5, 8)


def test_what_fits_goes_through():
    plan = plan_audio(torch.tensor([[True, False, True, False, False]] * 2), HIDDEN.device)
    assert plan is not None
    assert plan.gather(HIDDEN).shape == (4, 8)
    assert plan.scatter(HIDDEN, torch.ones(4, 8)).sum(-1).tolist() == [[8, 0, 8, 0, 0]] * 2


@pytest.mark.parametrize(
    "mask", [torch.ones(2, 5), torch.ones(10).bool(), torch.ones(2, 5, 1).bool()], ids=["dtype", "one", "three"]
)
def test_a_mask_of_another_dtype_or_other_dimensions_is_an_error(mask: torch.Tensor):
    with pytest.raises(TypeCheckError, match="mask"):
        plan_audio(mask, HIDDEN.device)


@pytest.mark.parametrize("tokens", [torch.zeros(3, 7), torch.zeros(3, 8).int(), torch.zeros(2, 3, 8)])
def test_so_are_tokens_that_are_not_those_of_the_hidden_states(tokens: torch.Tensor):
    plan = plan_audio(torch.tensor([[True, False, True, False, False], [True] + [False] * 4]), HIDDEN.device)
    assert plan is not None
    with pytest.raises(TypeCheckError, match="tokens"):
        plan.scatter(HIDDEN, tokens)


def test_so_are_a_state_and_a_dataclass_whose_tensors_do_not_belong_together():
    layers, counter = (torch.zeros(2, 1, 4, 4),), torch.zeros(2, dtype=torch.int64)
    MemoryState(layers, layers, counter, counter, counter)
    with pytest.raises(TypeCheckError, match="tokens"):
        MemoryState(layers, layers, counter, counter[:1], counter)
    with pytest.raises(TypeCheckError, match="audio_mask"):
        Prepared({}, {}, {}, torch.zeros(2, 5))


def test_so_are_values_that_are_not_as_many_as_keys():
    initial, state, keys = (torch.zeros(2, 4, 4),), (torch.zeros(1, 2, 4, 4),), torch.zeros(1, 2, 6, 4)
    gates, mask = Gates(*torch.zeros(3, 1, 2, 6)), torch.ones(1, 6, dtype=torch.bool)
    write(initial, state, state, keys, keys, gates, mask, 3)
    with pytest.raises(TypeCheckError, match="values"):
        write(initial, state, state, keys, keys[:, :, :5], gates, mask, 3)


def test_rows_and_heads_in_one_dimension_are_one_name():
    """`rows·heads` is an identifier to Python, so it binds like any other, not an expression of two names."""
    initial, memory, keys = torch.zeros(2, 1, 4, 4), torch.zeros(6, 1, 2, 4, 4), torch.zeros(6, 3, 4)
    scalars = ChunkScalars(torch.zeros(6, 1, 3, 3), *torch.zeros(3, 6, 1, 1, 1))
    (chunk,) = split_chunks(keys, keys, scalars)
    advance(initial, memory, chunk)
    with pytest.raises(TypeCheckError, match="rows·heads=6"):
        split_chunks(keys, keys[:2], scalars)


def test_a_users_process_checks_nothing():
    code = (
        "import sys, torch; from mal_adapter.hooks.plan import plan_audio; "
        "plan_audio(torch.ones(2, 5).int(), torch.device('cpu')); sys.exit('beartype' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
