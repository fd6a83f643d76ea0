"""Dialogues of single clips: what holds for all of them."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mal_adapter.errors import ConfigError
from mal_adapter.ser.clips import Clip, ClipCorpus, read_clips
from mal_adapter.ser.corpora import read_manifests
from mal_adapter.ser.labels import LabelSet
from mal_adapter.ser.simulation import PRESETS, Simulation, SimulationConfig, simulate
from mal_adapter.ser.simulation.mood import persistence
from tests.ser.made_clips import make_ravdess, make_savee

FOUR = LabelSet(("neutral", "happy", "angry", "sad"))


def made_corpus(
    name: str = "made", speakers: int = 24, emotions: int = 4, takes: int = 12, *, sexes: bool = True
) -> ClipCorpus:
    """Every speaker says the same sentences in each emotion; the first ones are women."""
    clips = [
        Clip(Path(f"/{name}/{s}/{e}_{t}.wav"), f"{name}-{s}", FOUR.names[e], "fm"[s % 2] if sexes else None, f"t{t}")
        for s in range(speakers)
        for e in range(emotions)
        for t in range(takes)
    ]
    return ClipCorpus(name, tuple(clips))


def audio_of(dialogues: Any) -> list[Path]:
    return [turn.audio for dialogue in dialogues for turn in dialogue.utterances]


def speakers_of(dialogues: Any) -> set[str]:
    return {turn.speaker for dialogue in dialogues for turn in dialogue.utterances}


configs = st.builds(
    lambda preset, **changes: SimulationConfig.preset(preset, **changes),
    preset=st.sampled_from(sorted(PRESETS)),
    dialogues=st.integers(1, 30),
    eval_dialogues=st.integers(0, 10),
    speakers=st.just(2),
    turns=st.integers(6, 12),
    turn_taking=st.sampled_from(["alternating", "random"]),
    change=st.floats(0.5, 1),
    neutral_start=st.booleans(),
    host_share=st.sampled_from([0.0, 0.25]),
    dev_share=st.sampled_from([0.0, 0.25]),
    disjoint_texts=st.booleans(),
    seed=st.integers(0, 2**40),
    speaker_persistence=st.none(),  # the fit is tested by itself, it takes a second
    dialogue_persistence=st.none(),
)


@settings(max_examples=40, deadline=None)
@given(config=configs)
def test_no_clip_twice_and_no_speaker_in_two_splits(config: SimulationConfig):
    made = simulate([made_corpus(takes=24), made_corpus("other", speakers=16, takes=24)], config)
    seen: dict[str, str] = {}
    texts: dict[tuple[str, str], str] = {}
    for split, dialogues in made.splits.items():
        for dialogue in dialogues:
            audio = audio_of([dialogue])
            assert len(set(audio)) == len(audio)
            assert len(audio) == (1 if split == "host" else config.turns)
            assert len({path.parts[1] for path in audio}) == 1  # one corpus
            assert len(speakers_of([dialogue])) <= (1 if split == "host" else config.speakers)
        for speaker in speakers_of(dialogues):
            assert seen.setdefault(speaker, split) == split
        if config.disjoint_texts:
            for path in audio_of(dialogues):
                assert texts.setdefault((path.parts[1], path.stem.split("_")[1]), split) == split
    assert len(made.splits["train"]) == config.dialogues
    wanted = {"train", *(["host"] if config.host_share else [])}
    if config.eval_dialogues:
        wanted |= {"test", *(["dev"] if config.dev_share else [])}
    assert set(made.splits) == wanted


@settings(max_examples=15, deadline=None)
@given(config=configs)
def test_the_same_seed_gives_the_same_bytes(config: SimulationConfig, tmp_path_factory: pytest.TempPathFactory):
    folders = [tmp_path_factory.mktemp("made") for _ in range(2)]
    for folder in folders:
        simulate([made_corpus(takes=24)], config).write(folder)
    first, second = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    assert first == second
    assert json.loads(first["simulation.json"])["config"]["seed"] == config.seed


def test_another_seed_gives_other_dialogues():
    made = [simulate([made_corpus()], SimulationConfig(seed=seed, dialogues=20)) for seed in (0, 1)]
    assert audio_of(made[0].splits["train"]) != audio_of(made[1].splits["train"])


@pytest.mark.parametrize("turn_taking", ["alternating", "random"])
@pytest.mark.parametrize(
    ("speaker", "dialogue"), [(0.65, 0.55), (0.8, None), (None, 0.6), (0.5, 0.4), (0.9, 0.85), (0.45, 0.4)]
)
@pytest.mark.parametrize("neutral_start", [False, True])
def test_emotions_persist_as_asked(speaker, dialogue, neutral_start, turn_taking):
    config = SimulationConfig(
        dialogues=600,
        turns=12,
        turn_taking=turn_taking,
        neutral_start=neutral_start,
        speaker_persistence=speaker,
        dialogue_persistence=dialogue,
    )
    made = simulate([made_corpus(takes=12)], config)
    turns = [[(turn.speaker, turn.emotion) for turn in one.utterances] for one in made.splits["train"]]
    found = persistence(turns)
    for asked, measured in zip((speaker, dialogue), found, strict=True):
        assert asked is None or abs(asked - measured) < 0.04
    assert made.record["splits"]["train"]["persistence"] == {
        "speaker": round(found.speaker, 4),
        "dialogue": round(found.dialogue, 4),
    }


def test_without_persistence_emotions_repeat_by_chance_and_are_even():
    config = SimulationConfig(dialogues=1000, neutral_start=False)
    made = simulate([made_corpus(takes=30)], config)
    kept = made.record["splits"]["train"]["persistence"]
    assert kept["speaker"] == pytest.approx(0.25, abs=0.03)
    assert kept["dialogue"] == pytest.approx(0.25, abs=0.03)
    counts = made.record["splits"]["train"]["emotions"].values()
    assert max(counts) / min(counts) < 1.1


def test_the_presets(tmp_path: Path):
    voices, mood = (simulate([made_corpus()], SimulationConfig.preset(name, dialogues=300)) for name in PRESETS)
    for dialogue in voices.splits["train"]:
        assert [turn.emotion for turn in dialogue.utterances[:2]] == ["neutral", "neutral"]
    kept = mood.record["splits"]["train"]["persistence"]
    assert kept["speaker"] == pytest.approx(0.65, abs=0.04)
    assert kept["dialogue"] == pytest.approx(0.55, abs=0.04)
    with pytest.raises(ConfigError, match="known are voices, mood"):
        SimulationConfig.preset("moods")
    with pytest.raises(ConfigError, match="no field 'turn'"):
        SimulationConfig.preset("mood", turn=3)


@pytest.mark.parametrize("speakers", [1, 2, 3])
def test_who_speaks(speakers: int):
    alternating = simulate([made_corpus()], SimulationConfig(dialogues=30, turns=9, speakers=speakers))
    for dialogue in alternating.splits["train"]:
        names = [turn.speaker for turn in dialogue.utterances]
        assert len(set(names)) == speakers
        assert names == names[:speakers] * (9 // speakers) + names[: 9 % speakers]
    config = SimulationConfig(dialogues=400, turns=9, speakers=speakers, turn_taking="random", change=0.4)
    random = simulate([made_corpus()], config)
    pairs = [
        first.speaker != second.speaker
        for dialogue in random.splits["train"]
        for first, second in zip(dialogue.utterances, dialogue.utterances[1:], strict=False)
    ]
    assert sum(pairs) / len(pairs) == pytest.approx(0.4 if speakers > 1 else 0, abs=0.03)


def test_speakers_and_clips_are_used_equally_often():
    made = simulate([made_corpus(speakers=16, takes=6)], SimulationConfig(dialogues=240, neutral_start=False))
    in_dialogues = Counter(speaker for dialogue in made.splits["train"] for speaker in speakers_of([dialogue])).values()
    assert max(in_dialogues) - min(in_dialogues) <= 1
    uses = Counter(audio_of(made.splits["train"]))
    assert len(uses) == made.record["splits"]["train"]["clips"] == len(speakers_of(made.splits["train"])) * 24
    by_speaker_and_emotion: dict[tuple[str, str], list[int]] = {}
    for path, count in uses.items():
        by_speaker_and_emotion.setdefault((path.parts[2], path.stem[0]), []).append(count)
    assert all(max(counts) - min(counts) <= 2 for counts in by_speaker_and_emotion.values())


@pytest.mark.parametrize("folds", [2, 3, 5])
def test_each_speaker_is_tested_in_one_fold_and_the_host_has_the_same_in_all(folds: int):
    corpus = made_corpus(speakers=40)
    config = {"folds": folds, "host_share": 0.25, "dialogues": 60, "eval_dialogues": 60}
    made = [simulate([corpus], SimulationConfig(**config, fold=fold)) for fold in range(folds)]
    hosts = {frozenset(one.record["splits"]["host"]["speakers"]) for one in made}
    assert len(hosts) == 1
    assert len(next(iter(hosts))) == 10
    tested = [speaker for one in made for speaker in one.record["splits"]["test"]["speakers"]]
    assert sorted(tested) == sorted({clip.speaker for clip in corpus.clips} - next(iter(hosts)))
    for one in made:
        for split in one.record["splits"].values():
            women = sum(int(name.split("-")[1]) % 2 == 0 for name in split["speakers"])
            assert abs(2 * women - len(split["speakers"])) <= 2  # as many men


def test_sentences_that_tell_the_emotion_are_in_one_split(tmp_path: Path):
    corpus = read_clips("savee", make_savee(tmp_path))
    config = SimulationConfig(test_share=0.5, dev_share=0, dialogues=20, eval_dialogues=20, turns=6)
    made = simulate([corpus], config)
    texts = [{path.stem for path in audio_of(made.splits[split])} for split in ("train", "test")]
    assert texts[0] & texts[1] == set()
    assert (
        "savee: 126 clips are left out because their sentence, spoken in one emotion only," in made.record["notes"][0]
    )
    assert {text[:2].rstrip("0") for text in texts[0]} == {"a", "d", "f", "h", "n", "sa", "su"}


def test_ravdess_as_a_user_reads_it(tmp_path: Path):
    corpus = read_clips("ravdess", make_ravdess(tmp_path / "RAVDESS"))
    labels = LabelSet(("neutral", "happy", "angry", "sad"), {"calm": "neutral"})
    made = simulate([corpus], SimulationConfig.preset("mood", dialogues=50, eval_dialogues=10), labels)
    made.write(tmp_path / "made")
    read = read_manifests(tmp_path / "made")
    assert list(read.splits) == ["train", "dev", "test"]
    assert read.report.complete
    assert set(read.labels) == set(labels)
    assert read.splits["train"] == made.splits["train"]
    assert "192 fear" in made.record["notes"][0]


def test_an_earlier_simulation_is_replaced_and_anything_else_is_not(tmp_path: Path):
    simulate([made_corpus()], SimulationConfig(dialogues=3, host_share=0.25)).write(tmp_path)
    again = simulate([made_corpus()], SimulationConfig(dialogues=3, eval_dialogues=0))
    again.write(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"train.jsonl", "simulation.json"}
    (tmp_path / "simulation.json").unlink()
    with pytest.raises(ConfigError, match="not a simulation's"):
        again.write(tmp_path)
    assert (tmp_path / "train.jsonl").exists()


@pytest.mark.parametrize(
    ("corpus", "config", "message"),
    [
        (made_corpus(speakers=2), {}, "has no corpus with 2 speakers"),
        (made_corpus(speakers=8), {"test_share": 0.01}, "test has no corpus.*eval_dialogues to 0"),
        (made_corpus(speakers=8), {"dev_share": 0.01}, "dev has no corpus.*dev_share to 0"),
        (made_corpus(takes=1), {"turns": 20}, "10 clips of each"),
        (made_corpus(), {"speaker_persistence": 0.1}, "0.1 with 4 emotions.*nearest"),
        (made_corpus(), {"speaker_persistence": 0.3, "dialogue_persistence": 0.9}, "raises the other"),
    ],
)
def test_what_can_not_be_had(corpus: ClipCorpus, config: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        simulate([corpus], SimulationConfig(**config))


def test_labels_and_corpora_that_do_not_fit():
    with pytest.raises(ConfigError, match="other name 'neutral'"):
        simulate([made_corpus()], labels=LabelSet(("happy", "sad")))
    with pytest.raises(ConfigError, match=r"'bored'; the emotions that occur are angry, happy, neutral, sad"):
        simulate([made_corpus()], labels=LabelSet(("neutral", "bored")))
    with pytest.raises(ConfigError, match="different names"):
        simulate([made_corpus(), made_corpus()])
    with pytest.raises(ConfigError, match="two or more"):
        simulate([made_corpus(emotions=1)])


def test_a_speaker_with_few_of_the_emotions_is_left_out():
    whole = made_corpus(speakers=12)
    clips = [clip for clip in whole.clips if clip.speaker != "made-3" or clip.emotion in ("sad", "angry")]
    made: Simulation = simulate([ClipCorpus("made", tuple(clips))], SimulationConfig(dialogues=40))
    assert "made-3" not in {name for split in made.splits.values() for name in speakers_of(split)}
    assert any("1 speakers of made" in note for note in made.record["notes"])


@pytest.mark.parametrize(
    "wrong",
    [
        {"dialogues": 0},
        {"turns": 1},
        {"turns": 2.5},
        {"seed": True},
        {"change": 1.1},
        {"host_share": 1},
        {"speaker_persistence": -0.1},
        {"dialogue_persistence": float("nan")},
        {"turn_taking": "both"},
        {"folds": 3},
        {"fold": 0},
        {"folds": 3, "fold": 3},
        {"folds": 1, "fold": 0},
    ],
)
def test_wrong_configurations(wrong: dict[str, Any]):
    with pytest.raises(ConfigError):
        SimulationConfig(**wrong)
