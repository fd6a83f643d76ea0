"""Two processes have the gradients and weights of one process, from the same batches."""

import json
import multiprocessing
import os
import socket

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file

from mal_adapter.ser.dialogue import Dialogue
from tests.ser.training_world import make_dialogues, run

CHANGES = {"batch_size": 3, "side_by_side": 2, "epochs": 2, "class_weights": "balanced", "lora_rank": 1}
NO_DROPOUT = 0.0


def free_port():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def one_of_two(rank, port, output, train, dev, changes):
    torch.set_num_threads(1)
    # The environment that `accelerate launch --cpu --num_processes 2` gives each process.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT=str(port), ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")
    _, report = run(output, train, dev, dropout=NO_DROPOUT, **changes)
    assert report["processes"] == 2


def on_one_and_on_two(tmp_path, train, dev, changes):
    """The report of one process, the report of two, and both last checkpoints' tensors."""
    _, report = run(tmp_path / "one", train, dev, dropout=NO_DROPOUT, **changes)
    multiprocessing.set_forkserver_preload([__name__, run.__module__])
    arguments = (free_port(), tmp_path / "two", train, dev, changes)
    mp.start_processes(one_of_two, arguments, nprocs=2, start_method="forkserver")
    of_two = json.loads((tmp_path / "two" / "training.json").read_text())
    tensors = [load_file(tmp_path / name / "checkpoint" / "training.safetensors") for name in ("one", "two")]
    assert tensors[0].keys() == tensors[1].keys()
    return report, of_two, *tensors


def test_two_processes_have_the_gradient_of_one(tmp_path):
    """After a single step, AdamW's first moment is a tenth of the gradient."""
    train = make_dialogues(tmp_path / "train")
    _, _, one, two = on_one_and_on_two(tmp_path, train, [], CHANGES | {"batch_size": 6, "epochs": 1})
    moments = {name: tensor for name, tensor in one.items() if name.startswith("optimizer.exp_avg.")}
    largest = max(tensor.norm() for tensor in moments.values())
    assert largest > 0
    for name, tensor in moments.items():
        assert (two[name] - tensor).norm() <= 1e-4 * tensor.norm() + 1e-6 * largest, name


@pytest.mark.slow
def test_two_processes_end_with_the_weights_of_one(tmp_path):
    """In batches of three dialogues of different lengths, one process has two and the other has one. The last batch is
    a single dialogue, so that the second process has none."""
    train = make_dialogues(tmp_path / "train", (4, 2, 3, 5, 3, 2, 2))
    train[6] = Dialogue(train[6].dialogue_id, train[6].utterances[:1])
    dev = make_dialogues(tmp_path / "dev", (3, 2, 2), "dev")
    train[5].utterances[0].audio.unlink()
    report, of_two, one, two = on_one_and_on_two(tmp_path, train, dev, CHANGES)
    for name, tensor in one.items():
        # AdamW divides by the root of what may be rounding alone, so parameters differ by more than gradients do.
        torch.testing.assert_close(
            two[name], tensor, rtol=2e-3, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert of_two["left_out"] == report["left_out"]
    for ours, theirs in zip(report["epochs"], of_two["epochs"], strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-3)
        assert theirs["utterances"] == ours["utterances"]
        assert theirs["dev"] == pytest.approx(ours["dev"], rel=1e-3)
