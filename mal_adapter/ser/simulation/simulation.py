"""The dialogues of a simulation, and writing them as manifests."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mal_adapter.errors import ConfigError
from mal_adapter.ser.dialogue import Dialogue, write_manifest
from mal_adapter.serialization.atomic import folder_problem, write_atomically

__all__ = ["RECORD", "Simulation", "check_folder"]

#: The file beside the manifests that says how they were made.
RECORD = "simulation.json"


@dataclass(frozen=True)
class Simulation:
    """Dialogues made of single clips. `print(simulation)` shows a table.

    Args:
        splits: Split -> dialogues: train; dev and test if they have speakers; host with one utterance per dialogue.
        record: What `simulation.json` says: the library's version, the configuration with its seed, labels, corpora
            with what was left out of them, and of each split the speakers, counts, and how emotions persist.
    """

    splits: Mapping[str, tuple[Dialogue, ...]]
    record: Mapping[str, Any]

    def write(self, folder: str | Path) -> None:
        """Write a manifest per split, `train.jsonl` and so on, and `simulation.json`. The sound stays where it is.

        The same simulation gives the same bytes. The manifests of an earlier simulation in the folder are replaced.

        Raises:
            ConfigError: The folder has manifests that are no simulation's, or can't be written to.
        """
        folder = Path(folder)
        check_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for earlier in folder.glob("*.jsonl"):  # a mixture of two simulations could have a speaker in two splits
            earlier.unlink()
        text = json.dumps(self.record, indent=2, ensure_ascii=False, sort_keys=False) + "\n"
        write_atomically(folder / RECORD, text.encode("utf-8", "backslashreplace"))
        for split, dialogues in self.splits.items():
            write_manifest(dialogues, folder / f"{split}.jsonl")

    def __str__(self) -> str:
        heads = (("speakers", 9), ("clips", 8), ("dialogues", 11), ("utterances", 12), ("same speaker", 14))
        lines = [f"{'split':<8}" + "".join(f"{head:>{wide}}" for head, wide in heads) + f"{'same dialogue':>15}"]
        for name, split in self.record["splits"].items():
            kept = split["persistence"]
            shown = [f"{kept[kind]:.2f}" if kept[kind] is not None else "" for kind in ("speaker", "dialogue")]
            lines.append(
                f"{name:<8}{len(split['speakers']):>9}{split['clips']:>8}{split['dialogues']:>11}"
                f"{split['utterances']:>12}{shown[0]:>14}{shown[1]:>15}"
            )
        return "\n".join([*lines, *(f"- {note}" for note in self.record["notes"])])


def check_folder(folder: Path) -> None:
    """Raise ConfigError unless manifests can be written to a folder without destroying what is no simulation's."""
    if problem := folder_problem(folder):
        raise ConfigError(f"{folder}: {problem}")
    if any(folder.glob("*.jsonl")) and not (folder / RECORD).exists():
        raise ConfigError(
            f"{folder} has manifests but no {RECORD}, so they are not a simulation's; give another folder"
        )
