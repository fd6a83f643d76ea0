"""Rows of the flat batch, against a batch whose rows carry their request and position."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mal_adapter.errors import AudioMaskError
from mal_adapter.vllm.rows import audio_positions, inside, positions_of_step, rows_of_step
from tests.vllm.fakes import (
    CachedRequestData,
    MultiModalFeatureSpec,
    NewRequestData,
    PlaceholderRange,
    SamplingParams,
    SchedulerOutput,
)

COUNTS = st.integers(1, 9)


@st.composite
def steps(draw: st.DrawFn) -> tuple[SchedulerOutput, list[str], dict[str, torch.Tensor]]:
    """A step of some requests, new and old; the order of its batch; positions of audio within what is computed."""
    names = [f"r{i}" for i in range(draw(st.integers(1, 6)))]
    first = {name: draw(st.integers(0, 20)) for name in names}
    count = {name: draw(COUNTS) for name in names}
    new = [name for name in names if draw(st.booleans())]
    old = [name for name in names if name not in new]
    step = SchedulerOutput(
        [NewRequestData(name, [], SamplingParams(), first[name]) for name in new],
        CachedRequestData(old, [first[name] for name in old]),
        count,
    )
    audio = {}
    for name in names:
        computed = range(first[name], first[name] + count[name])
        if chosen := draw(st.sets(st.sampled_from(computed))):
            audio[name] = torch.tensor(sorted(chosen))
    return step, draw(st.permutations(names)), audio


@given(steps())
def test_rows_are_where_the_flat_batch_has_these_positions(drawn):
    step, order, audio = drawn
    computed = positions_of_step(step)
    flat = [(name, position) for name in order for position in computed[name]]
    rows = rows_of_step(order, computed, audio)
    assert rows.keys() == audio.keys()
    for name, positions in audio.items():
        assert [flat[row] for row in rows[name]] == [(name, int(position)) for position in positions]


@given(st.sets(st.integers(0, 30), min_size=1), st.integers(0, 30), st.integers(0, 30))
def test_what_is_inside_is_counted(positions: set[int], start: int, length: int):
    computed = range(start, start + length)
    found = inside(torch.tensor(sorted(positions)), computed)
    assert found.tokens == len(positions & set(computed))
    assert found.whole == (positions <= set(computed))


@given(st.lists(st.tuples(st.integers(0, 5), st.lists(st.booleans(), min_size=1, max_size=5)), max_size=4))
def test_audio_positions_of_several_clips(clips: list[tuple[int, list[bool]]]):
    features, expected, offset = [], [], 0
    for gap, embed in clips:
        offset += gap
        mask = None if all(embed) else torch.tensor(embed)
        features.append(MultiModalFeatureSpec("audio", PlaceholderRange(offset, len(embed), mask)))
        features.append(MultiModalFeatureSpec("image", PlaceholderRange(offset, len(embed))))
        expected += [offset + i for i, real in enumerate(embed) if real]
        offset += len(embed)
    found = audio_positions(reversed(features))
    assert (found is None and not expected) or found.tolist() == expected


@pytest.mark.parametrize("order", [[], ["a"], ["a", "b", "c"], ["a", "a"], ["a", "c"]])
def test_a_batch_of_other_requests_is_refused(order: list[str]):
    computed = {"a": range(0, 2), "b": range(0, 2)}
    with pytest.raises(AudioMaskError, match="another version of vLLM"):
        rows_of_step(order, computed, {"a": torch.tensor([0])})
