"""A run that is killed at any moment and resumed ends with the same bits as an uninterrupted run."""

import multiprocessing
import random
import signal

import pytest
import torch

from mal_adapter.ser.training.checkpoint import Progress, load_checkpoint, save_checkpoint
from tests.ser.training_world import make_dialogues, run, run_until_killed

CHANGES = {"lora_rank": 1}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Dialogues, one of them with a missing sound file, and the files of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("world")
    train, dev = make_dialogues(folder / "train"), make_dialogues(folder / "dev", (2,), "dev")
    train[0].utterances[1].audio.unlink()
    _, report = run(folder / "uninterrupted", train, dev, **CHANGES)
    return train, dev, report, files_of(folder / "uninterrupted")


def files_of(output):
    """The bytes of all files that a run has written."""
    return {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*") if path.is_file()}


def kill_and_resume(world, output, moments):
    """Resume and kill the run at each of `moments`, counted from its resumption; then resume it to its end. Return the
    number of kills that came before the end."""
    train, dev, report, expected = world
    multiprocessing.set_forkserver_preload([run.__module__])
    context = multiprocessing.get_context("forkserver")
    kills = 0
    for moment in moments:
        process = context.Process(target=run_until_killed, args=(output, train, dev, moment, CHANGES))
        process.start()
        process.join(120)
        assert process.exitcode in (0, -signal.SIGKILL)
        kills += process.exitcode == -signal.SIGKILL
    _, resumed = run(output, train, dev, resume=True, **CHANGES)
    assert resumed == report
    # Leftovers of a killed save_pretrained have other names.
    found = {
        name: data for name, data in files_of(output).items() if not name.startswith((".saving.", ".mal_adapter-"))
    }
    assert found.keys() == expected.keys()
    for name, data in found.items():
        assert data == expected[name], name
    return kills


def test_a_run_killed_three_times_ends_as_if_uninterrupted(world, tmp_path):
    assert kill_and_resume(world, tmp_path, [9, 14, 7]) == 3


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_run_killed_at_random_moments_ends_as_if_uninterrupted(world, tmp_path, seed):
    moments = [random.Random(seed).randint(1, 25) for _ in range(4)]
    assert kill_and_resume(world, tmp_path, moments) >= 2


def test_resuming_a_finished_run_changes_nothing(world, tmp_path):
    train, dev, report, expected = world
    for name, data in expected.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    _, again = run(tmp_path, train, dev, resume=True, **CHANGES)
    assert again == report
    assert files_of(tmp_path) == expected


def test_a_checkpoint_restores_every_bit(tmp_path):
    torch.manual_seed(0)

    def make():
        layer = torch.nn.Linear(3, 2)
        parameters = dict(layer.named_parameters())
        return layer, parameters, torch.optim.AdamW(parameters.values(), lr=0.1)

    layer, parameters, optimizer = make()
    for _ in range(2):
        layer(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
    progress = Progress(
        {"labels": ["a", "b"]}, epoch=1, step=2, loss=0.1 + 0.2, weight=1 / 3, utterances=5, best_epoch=1
    )
    best = {name: torch.randn_like(p) for name, p in parameters.items()}
    save_checkpoint(tmp_path / "c", progress, parameters, best, optimizer)
    _, others, other = make()
    loaded, loaded_best = load_checkpoint(tmp_path / "c", progress.run, others, other)
    assert loaded == progress
    assert all(torch.equal(loaded_best[name], tensor) for name, tensor in best.items())
    for name, parameter in parameters.items():
        assert torch.equal(others[name], parameter)
        for key, value in optimizer.state[parameter].items():
            assert torch.equal(other.state[others[name]][key], value)
            assert other.state[others[name]][key].dtype == value.dtype
