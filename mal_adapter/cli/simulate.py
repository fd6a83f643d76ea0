"""`mal-adapter simulate`."""

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mal_adapter.cli.options import CORPUS_PANEL, json_option
from mal_adapter.cli.output import note, print_json, print_line
from mal_adapter.cli.usage import as_typed, shown

if TYPE_CHECKING:
    from mal_adapter.ser.clips.clip import ClipCorpus
    from mal_adapter.ser.labels import LabelSet

__all__ = ["simulate"]

DIALOGUES, MOOD, SPLITS = "Dialogues", "Emotions", "Splits"


class Preset(str, Enum):
    """The presets of `SimulationConfig`."""

    voices = "voices"
    mood = "mood"


class TurnTaking(str, Enum):
    """Who speaks next."""

    alternating = "alternating"
    random = "random"


@shown(
    "Train and measure",
    (
        "Dialogues of RAVDESS in which emotions persist",
        "mal-adapter simulate ravdess --root RAVDESS --preset mood --output dialogues",
    ),
    (
        "Fold 0 of 3 over two corpora, four emotions, a third of the speakers for a host",
        "mal-adapter simulate ravdess=RAVDESS emodb=wav --output dialogues-0 \\\n"
        "--labels neutral,calm=neutral,happy,angry,sad \\\n"
        "--folds 3 --fold 0 --host-share 0.3",
    ),
    (
        "Your own clips, as calls/Anna/angry_017.wav",
        'mal-adapter simulate calls --pattern "{speaker}/{emotion}_{}.wav" \\\n--output dialogues',
    ),
)
def simulate(
    corpora: Annotated[
        list[str],
        typer.Argument(
            metavar="CLIPS...",
            help="ravdess, cremad, emodb, tess, savee or esd, with --root or as NAME=FOLDER; or, with --pattern, a "
            "folder or NAME=FOLDER.",
        ),
    ],
    *,
    root: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="The folder of the one named corpus.", rich_help_panel=CORPUS_PANEL),
    ] = None,
    pattern: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="The paths of the clips below a folder: {speaker}, {emotion}, if wanted {text}, {sex} and "
            "{intensity}, and {} for the rest; {speaker:2} has two characters. One for all folders, or NAME=PATTERN "
            "for each.",
            rich_help_panel=CORPUS_PANEL,
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help="The emotions to use; OTHER=A is another name of one, as in neutral,calm=neutral (default: all).",
            rich_help_panel=CORPUS_PANEL,
        ),
    ] = None,
    preset: Annotated[
        Preset,
        typer.Option(
            metavar="PRESET",
            help="voices (each speaker starts neutral, emotions are drawn at random) or mood (emotions persist "
            "about as in real conversations).",
            rich_help_panel=DIALOGUES,
        ),
    ] = Preset.voices,
    dialogues: Annotated[
        int, typer.Option(metavar="N", min=1, help="Dialogues to train on.", rich_help_panel=DIALOGUES)
    ] = 1000,
    eval_dialogues: Annotated[
        int, typer.Option(metavar="N", min=0, help="Dialogues of dev, and of test.", rich_help_panel=DIALOGUES)
    ] = 200,
    speakers: Annotated[
        int, typer.Option(metavar="N", min=1, help="Speakers per dialogue.", rich_help_panel=DIALOGUES)
    ] = 2,
    turns: Annotated[int, typer.Option(metavar="N", min=2, help="Turns per dialogue.", rich_help_panel=DIALOGUES)] = 10,
    turn_taking: Annotated[
        TurnTaking,
        typer.Option(metavar="HOW", help="alternating or random.", rich_help_panel=DIALOGUES),
    ] = TurnTaking.alternating,
    change: Annotated[
        float,
        typer.Option(
            metavar="P",
            min=0,
            max=1,
            help="Probability that the next turn is another speaker's, if the turn-taking is random.",
            rich_help_panel=DIALOGUES,
        ),
    ] = 0.7,
    neutral_start: Annotated[
        bool | None,
        typer.Option(
            help="Whether each speaker's first turn is neutral (default: the preset's).", rich_help_panel=MOOD
        ),
    ] = None,
    speaker_persistence: Annotated[
        float | None,
        typer.Option(
            metavar="P",
            min=0,
            max=1,
            help="Probability that a turn has the emotion of the same speaker's previous turn (default: the preset's).",
            rich_help_panel=MOOD,
        ),
    ] = None,
    dialogue_persistence: Annotated[
        float | None,
        typer.Option(
            metavar="P",
            min=0,
            max=1,
            help="Probability that a turn has the emotion of the dialogue's previous turn (default: the preset's).",
            rich_help_panel=MOOD,
        ),
    ] = None,
    test_share: Annotated[
        float, typer.Option(metavar="X", help="Share of the speakers in test.", rich_help_panel=SPLITS)
    ] = 0.25,
    folds: Annotated[
        int | None,
        typer.Option(
            metavar="K",
            min=2,
            help="Instead: deal the speakers to K folds, of which one is test.",
            rich_help_panel=SPLITS,
        ),
    ] = None,
    fold: Annotated[
        int | None, typer.Option(metavar="I", min=0, help="Which fold is test: 0 to K-1.", rich_help_panel=SPLITS)
    ] = None,
    dev_share: Annotated[
        float, typer.Option(metavar="X", help="Share of the other speakers in dev.", rich_help_panel=SPLITS)
    ] = 0.2,
    host_share: Annotated[
        float,
        typer.Option(
            metavar="X",
            help="Share of the speakers kept for training a host: host.jsonl, a clip per dialogue. The same in all "
            "folds.",
            rich_help_panel=SPLITS,
        ),
    ] = 0.0,
    disjoint_texts: Annotated[
        bool,
        typer.Option(
            "--disjoint-texts",
            help="No sentence in two splits, at the cost of clips. Without it, only sentences that tell the emotion "
            "are kept apart.",
            rich_help_panel=SPLITS,
        ),
    ] = False,
    seed: Annotated[
        int, typer.Option(metavar="N", min=0, help="The same seed gives the same bytes.", rich_help_panel=SPLITS)
    ] = 0,
    output: Annotated[
        Path,
        typer.Option(metavar="FOLDER", help="For a manifest per split, and simulation.json.", rich_help_panel="Output"),
    ],
    as_json: Annotated[
        bool,
        json_option("output, and the fields of simulation.json: mal_adapter, config, labels, corpora, notes, splits"),
    ] = False,
) -> None:
    """Make dialogues of single clips, as of corpora of acted emotions, and write their manifests.

    Speakers are in one split each. Such dialogues show whether a memory learns voices and moods from recordings; a gain
    on them is not yet a gain in conversation, because nobody answers anybody.
    """
    from mal_adapter.ser.simulation.config import SimulationConfig
    from mal_adapter.ser.simulation.simulate import simulate as simulated
    from mal_adapter.ser.simulation.simulation import check_folder

    optional = {
        "neutral_start": neutral_start,
        "speaker_persistence": speaker_persistence,
        "dialogue_persistence": dialogue_persistence,
    }
    config = SimulationConfig.preset(
        preset.value,
        **{name: value for name, value in optional.items() if value is not None},
        dialogues=dialogues,
        eval_dialogues=eval_dialogues,
        speakers=speakers,
        turns=turns,
        turn_taking=turn_taking.value,
        change=change,
        host_share=host_share,
        test_share=test_share,
        folds=folds,
        fold=fold,
        dev_share=dev_share,
        disjoint_texts=disjoint_texts,
        seed=seed,
    )
    label_set = _labels(labels)
    check_folder(output)
    simulation = simulated(_read(corpora, root, pattern or []), config, label_set)
    simulation.write(output)
    if as_json:
        print_json({"output": str(output), **simulation.record})
        return
    table, *notes = str(simulation).split("\n- ")
    print_line(table)
    for line in notes:
        note(line)
    print_line(f"saved in {output}")


def _labels(given: str | None) -> "LabelSet | None":
    """The label set of `a,b,other=a`."""
    from mal_adapter.ser.labels import LabelSet

    if given is None:
        return None
    parts = [part.partition("=") for part in as_typed(given).split(",")]
    return LabelSet(tuple(name for name, _, target in parts if not target), {n: t for n, _, t in parts if t})


def _read(given: list[str], root: Path | None, patterns: list[str]) -> "list[ClipCorpus]":
    from mal_adapter.errors import ConfigError
    from mal_adapter.ser.clips.reading import read_clips, read_pattern
    from mal_adapter.ser.clips.schemes import SCHEMES

    named = {
        name: text for name, equals, text in (each.partition("=") for each in patterns) if equals and "{" not in name
    }
    for_all = [each for each in patterns if each.partition("=")[0] not in named]
    if len(for_all) > 1:
        raise ConfigError(
            f"give one --pattern for all folders, or --pattern NAME=PATTERN for each; got {', '.join(patterns)}"
        )
    if root is not None:
        if len(given) != 1 or "=" in given[0]:
            raise ConfigError("--root is the folder of one named corpus; of several, give NAME=FOLDER for each")
        given = [f"{given[0]}={root}"]
    found = []
    for each in given:
        name, equals, folder = each.partition("=")
        if not equals:
            name, folder = "", each
        pattern = named.pop(name, None) or (for_all[0] if for_all and name.casefold() not in SCHEMES else None)
        if pattern is not None:
            found.append(read_pattern(folder, pattern, name or None))
        elif equals:
            found.append(read_clips(name, folder))
        elif each.casefold() in SCHEMES:
            raise ConfigError(f"{each} needs its folder: --root FOLDER, or {each}=FOLDER")
        else:
            raise ConfigError(
                f"{each} is no named corpus ({', '.join(SCHEMES)}); a folder of your own needs a --pattern"
            )
    if named:
        raise ConfigError(f"there is a pattern for {', '.join(named)}, but no corpus of this name")
    return found
