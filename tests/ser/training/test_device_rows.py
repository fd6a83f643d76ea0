"""Cached activations on the device: read from disk once, up to the budget."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from mal_adapter.ser.training.device_rows import DeviceRows, free_bytes

CPU = torch.device("cpu")


@given(
    sizes=st.dictionaries(st.integers(0, 5), st.integers(1, 40), min_size=1),
    budget=st.integers(0, 500),
    asked=st.lists(st.integers(0, 5), max_size=30),
)
def test_what_fits_is_read_once_and_the_rest_at_each_use(sizes, budget, asked):
    rows, read = DeviceRows(CPU, budget), []
    held: set[int] = set()
    for key in asked:
        if key not in sizes:
            continue

        def load(key: int = key) -> dict[str, torch.Tensor]:
            read.append(key)
            return {"hidden": torch.full((sizes[key],), float(key))}

        before = len(read)
        assert torch.equal(rows.get(key, load)["hidden"], torch.full((sizes[key],), float(key)))
        assert (len(read) == before) == (key in held)
        if key not in held and sum(4 * sizes[k] for k in held) + 4 * sizes[key] <= budget:
            held.add(key)
    assert rows.nbytes == sum(4 * sizes[key] for key in held) <= budget
    for key in range(6):  # held or not
        rows.forget(key)
        held.discard(key)
        assert rows.nbytes == sum(4 * sizes[k] for k in held)


def test_nothing_is_held_where_the_files_are_in_memory_anyway():
    assert free_bytes(CPU) == 0
