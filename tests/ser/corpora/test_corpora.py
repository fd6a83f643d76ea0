"""Corpora: the layouts as they are published, with the faults that they are known to have."""

import contextlib
import csv
import json
import os
import warnings

import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mal_adapter.errors import CorpusError, IncompleteCorpusWarning
from mal_adapter.ser.corpora import (
    Counts,
    meld,
    read_corpus,
    read_emorynlp,
    read_iemocap,
    read_m3ed,
    read_manifests,
    read_meld,
)
from mal_adapter.ser.corpora.corpus import CorpusReport
from mal_adapter.ser.dialogue import Dialogue, Utterance, write_manifest
from mal_adapter.ser.labels import DEMO, EMORYNLP, IEMOCAP_4, IEMOCAP_6, M3ED, MELD, LabelSet

HEADER = ["Sr No.", "Utterance", "Speaker", "Emotion", "Sentiment", "Dialogue_ID", "Utterance_ID"]
HEADER += ["Season", "Episode", "StartTime", "EndTime"]
FOLDERS = {"train": "train_splits", "dev": "dev_splits_complete", "test": "output_repeated_splits_test"}
TABLES = {"train": "train_sent_emo.csv", "dev": "dev_sent_emo.csv", "test": "test_sent_emo.csv"}


def clip(path, samples=160):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, [0.1] * samples, 16_000, format="WAV")
    return path


def table(path, rows, header=HEADER, encoding="utf-8", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding=encoding) as file:
        csv.writer(file, **options).writerows([header, *rows])


def meld_row(dialogue, utterance, text="Hi", speaker="Ross", emotion="joy", start="00:20:57,256", end="0:20:59.256"):
    return [1, text, speaker, emotion, "positive", dialogue, utterance, 4, 7, start, end]


def turns(corpus, split):
    return [(turn.dialogue_id, turn.utterance_id) for d in corpus.splits[split] for turn in d.utterances]


@pytest.fixture
def meld_root(tmp_path):
    """Three splits which number their dialogues alike; rows are shuffled."""
    for split, name in TABLES.items():
        table(tmp_path / name, [meld_row(10, 0), meld_row(2, 10), meld_row(2, 9, emotion="Neutral")])
        for stem in ("dia10_utt0", "dia2_utt10", "dia2_utt9"):
            clip(tmp_path / FOLDERS[split] / f"{stem}.wav")
    return tmp_path


def test_meld_in_dialogue_order_with_ids_unique_across_splits(meld_root):
    with pytest.warns(IncompleteCorpusWarning, match="train has 2 dialogues, published are 1038"):
        corpus = read_meld(meld_root)
    assert list(corpus.splits) == ["train", "dev", "test"]
    for split in corpus.splits:
        assert turns(corpus, split) == [(f"{split}/2", "9"), (f"{split}/2", "10"), (f"{split}/10", "0")]
        assert {turn.audio.parent.name for d in corpus.splits[split] for turn in d.utterances} == {FOLDERS[split]}
    first = corpus.splits["dev"][0].utterances[0]
    assert (first.emotion, first.speaker, first.text, first.start_s) == ("neutral", "Ross", "Hi", None)
    assert corpus.report.found["total"] == Counts(6, 9, 9)


@pytest.mark.filterwarnings("ignore::mal_adapter.errors.IncompleteCorpusWarning")
def test_a_clip_that_one_split_lacks_is_not_taken_from_another(meld_root):
    (meld_root / "train_splits" / "dia2_utt9.wav").unlink()
    clip(meld_root / "dia2_utt9.wav")  # of no split
    corpus = read_meld(meld_root)
    assert turns(corpus, "train") == [("train/2", "10"), ("train/10", "0")]
    assert corpus.report.left_out == {"train/dia2_utt9": "there is no such clip"}
    assert corpus.report.found["train"] == Counts(2, 3, 3)


@pytest.mark.filterwarnings("ignore::mal_adapter.errors.IncompleteCorpusWarning")
@pytest.mark.parametrize(
    "folder",
    ["train/train_splits", "audio/train", "MELD.Raw/MELD_train_wavs", "dev_test/Train-16k", "my test/train_wav"],
)
def test_meld_clips_are_found_in_folders_that_name_the_split(tmp_path, folder):
    table(tmp_path / "train" / "train_sent_emo.csv", [meld_row(0, 0)])
    clip(tmp_path / folder / "dia0_utt0.wav")
    assert turns(read_meld(tmp_path), "train") == [("train/0", "0")]


@pytest.mark.filterwarnings("ignore::mal_adapter.errors.IncompleteCorpusWarning")
def test_the_format_that_decodes_best_is_used_and_mp4_is_accepted(tmp_path):
    table(tmp_path / "train_sent_emo.csv", [meld_row(0, 0), meld_row(0, 1)])
    clip(tmp_path / "train" / "wav" / "dia0_utt0.wav")
    for stem in ("dia0_utt0", "dia0_utt1"):
        clip(tmp_path / "train" / f"{stem}.mp4")
    (tmp_path / "train" / "._dia0_utt1.wav").write_bytes(b"\0\5\x16\7macOS")
    (tmp_path / "._train_sent_emo.csv").write_bytes(b"\0\5\x16\7macOS")
    names = [turn.audio.name for turn in read_meld(tmp_path).splits["train"][0].utterances]
    assert names == ["dia0_utt0.wav", "dia0_utt1.mp4"]


@pytest.mark.filterwarnings("ignore::mal_adapter.errors.IncompleteCorpusWarning")
def test_clips_with_unusable_audio_are_left_out_with_the_reason(tmp_path):
    table(tmp_path / "dev_sent_emo.csv", [meld_row(0, n) for n in range(4)] + [meld_row(1, 0), meld_row(110, 7)])
    folder = tmp_path / "dev_splits_complete"
    clip(folder / "dia0_utt0.wav")
    clip(folder / "dia0_utt1.wav", samples=0)
    (folder / "dia0_utt2.mp4").write_bytes(b"")
    (folder / "dia0_utt3.wav").write_bytes(b"RIFF rubbish")
    corpus = read_meld(tmp_path)
    assert turns(corpus, "dev") == [("dev/0", "0")]  # dialogue 1 has nothing left
    assert corpus.report.left_out == {
        "dev/dia0_utt1": "the file has no samples",
        "dev/dia0_utt2": "the file is empty",
        "dev/dia0_utt3": "the file can not be read as audio",
        "dev/dia1_utt0": "there is no such clip",
        "dev/dia110_utt7": "the release has no such clip",
    }
    assert "dev/dia110_utt7: the release has no such clip (known)" in str(corpus.report)
    assert "dia110" not in corpus.report.summary()


def test_the_two_clips_that_the_release_lacks_give_no_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(meld, "PUBLISHED", {"train": Counts(2, 2, 2), "dev": Counts(1, 1, 1), "test": Counts(1, 1, 1)})
    for split, name in TABLES.items():
        table(tmp_path / name, [meld_row(0, 0)] + [meld_row(125, 3)] * (split == "train"))
        clip(tmp_path / FOLDERS[split] / "dia0_utt0.wav")
    clip(tmp_path / FOLDERS["train"] / "dia125_utt3.mp4")  # it is there, but damaged
    corpus = read_meld(tmp_path)
    assert corpus.report.complete
    assert corpus.report.summary() == "complete"
    assert corpus.report.left_out == {"train/dia125_utt3": "the clip is damaged in the release"}


@pytest.mark.filterwarnings("ignore::mal_adapter.errors.IncompleteCorpusWarning")
@pytest.mark.parametrize(
    ("text", "encoding"),
    [("You’re…", "utf-8-sig"), ("You’re…", "cp1252"), ("You\x92re\x85", "utf-8"), ("Youâ€™reâ€¦", "utf-8")],
)
def test_windows_punctuation_is_repaired(tmp_path, text, encoding):
    table(tmp_path / "test_sent_emo.csv", [meld_row(0, 0, text=text)], encoding=encoding)
    clip(tmp_path / "test" / "dia0_utt0.wav")
    assert read_meld(tmp_path).splits["test"][0].utterances[0].text == "You’re…"


@pytest.mark.filterwarnings("ignore::mal_adapter.errors.IncompleteCorpusWarning")
def test_more_columns_in_another_order_quotes_line_ends_and_odd_times(tmp_path):
    header = ["Extra", *reversed(HEADER), " Unnamed"]
    rows = [
        ["x", *reversed(meld_row(0, 0, text='He said "no",\nand left', start="0:20:57.256", end="nonsense")), ""],
        ["x", *reversed(meld_row(0, "1.0", text="", speaker="", emotion="")), ""],
    ]
    table(tmp_path / "train_sent_emo.csv", rows, [name.upper() for name in header], lineterminator="\r\n")
    for n in range(2):
        clip(tmp_path / "train" / f"dia0_utt{n}.wav")
    first, second = read_meld(tmp_path).splits["train"][0].utterances
    assert first.text == 'He said "no",\nand left'
    assert (second.text, second.speaker, second.emotion) == (None, "unknown", None)


def test_unknown_labels_and_repeated_rows_are_noted(tmp_path):
    rows = [meld_row(0, 0), meld_row(0, 0, text="again"), meld_row(0, 1, emotion="bored")]
    table(tmp_path / "train_sent_emo.csv", rows)
    for n in range(2):
        clip(tmp_path / "train" / f"dia0_utt{n}.wav")
    with pytest.warns(IncompleteCorpusWarning) as caught:
        corpus = read_meld(tmp_path)
    assert [turn.emotion for turn in corpus.splits["train"][0].utterances] == ["joy", None]
    message = str(caught[0].message)
    assert "'bored' (1)" in message
    assert "1 rows of train are repeated, of which the first is kept: train/0/0" in message
    assert "the split dev is missing: there is no dev_sent_emo.csv" in message


@pytest.mark.filterwarnings("ignore::mal_adapter.errors.IncompleteCorpusWarning")
def test_emotions_outside_another_label_set_are_context_without_a_note(meld_root):
    corpus = read_meld(meld_root, LabelSet(("neutral", "anger")))
    assert [turn.emotion for turn in corpus.splits["dev"][0].utterances] == ["neutral", None]
    assert corpus.report.notes == ()
    assert not any("labelled" in sentence for sentence in corpus.report.deviations)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2\n", "the column 'Utterance' is missing; expected Utterance, Speaker, .*, got a, b"),
        ("", "the column 'Utterance' is missing"),
        (",".join(HEADER) + "\n1,Hi,Ross\n", "line 2: 3 columns, expected 11"),
        (",".join(HEADER) + "\n1,Hi,Ross,joy,positive,x,0,4,7,,\n", "must be whole numbers, got 'x' and '0'"),
    ],
)
def test_a_table_of_another_format_is_named(tmp_path, content, message):
    (tmp_path / "train_sent_emo.csv").write_text(content)
    with pytest.raises(CorpusError, match=rf"train_sent_emo\.csv.*{message}"):
        read_meld(tmp_path)


def test_a_wrong_folder_says_what_was_looked_for(tmp_path):
    (tmp_path / "a.txt").touch()
    with pytest.raises(CorpusError, match=r"train_sent_emo\.csv, .* and found none \(1 other files are there\)"):
        read_meld(tmp_path)
    with pytest.raises(CorpusError, match=r"Session1/dialog/EmoEvaluation"):
        read_iemocap(tmp_path)
    with pytest.raises(CorpusError, match=r"emorynlp_train_final\.csv.*emotion-detection-trn\.json"):
        read_emorynlp(tmp_path)
    with pytest.raises(CorpusError, match=r"annotation\.json"):
        read_m3ed(tmp_path)
    with pytest.raises(CorpusError, match=r"looked for \*\.jsonl"):
        read_manifests(tmp_path)
    for reader in (read_meld, read_iemocap, read_emorynlp, read_m3ed):
        with pytest.raises(CorpusError, match="there is no such folder"):
            reader(tmp_path / "nowhere")
    table(tmp_path / "train_sent_emo.csv", [meld_row(0, 0)])
    with pytest.raises(CorpusError, match=r"no utterance has audio; looked for dia0_utt0\.wav.*train_splits"):
        read_meld(tmp_path)


@pytest.mark.filterwarnings("ignore::mal_adapter.errors.IncompleteCorpusWarning")
def test_links_are_followed_but_not_in_circles(meld_root, tmp_path_factory):
    other = tmp_path_factory.mktemp("linked")
    os.symlink(meld_root, other / "data")
    os.symlink(meld_root, meld_root / "self")
    assert len(read_meld(other).splits["train"]) == 2


@pytest.mark.slow
def test_meld_with_all_rows_is_complete(tmp_path):
    source = clip(tmp_path / "one.wav")
    for split, (dialogues, utterances) in {"train": (1038, 9989), "dev": (114, 1109), "test": (280, 2610)}.items():
        ids = [(n % dialogues, n // dialogues) for n in range(utterances)]
        table(tmp_path / TABLES[split], [meld_row(*pair) for pair in ids])
        folder = tmp_path / FOLDERS[split]
        folder.mkdir()
        for dialogue, utterance in ids:
            os.link(source, folder / f"dia{dialogue}_utt{utterance}.wav")
    report = read_meld(tmp_path).report
    assert report.complete
    assert report.found["total"] == Counts(1432, 13708, 13708)


# IEMOCAP

LABELS = ["neu", "hap", "exc", "fru", "xxx", "sur"]


def iemocap(root, session, dialogue, labels=LABELS, transcript=True):
    """Utterances are written in the reverse order of their times; F and M alternate."""
    base = root / f"Session{session}"
    lines, texts = ["% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]", ""], []
    for n, label in enumerate(labels):
        name = f"{dialogue}_{'FM'[n % 2]}{n // 2:03d}"
        lines.insert(2, f"[{n}.2901 - {n + 1}.2357]\t{name}\t{label}\t[2.5000, 2.5000, 2.5000]\nC-E2:\tNeutral;\t()")
        texts.append(f"{name} [00{n}.2901-00{n + 1}.2357]: Words {n}.\nM: not an utterance")
        clip(base / "sentences" / "wav" / dialogue / f"{name}.wav")
    for folder in ("EmoEvaluation", "transcriptions", "EmoEvaluation/Categorical"):
        (base / "dialog" / folder).mkdir(parents=True, exist_ok=True)
    (base / "dialog" / "EmoEvaluation" / f"{dialogue}.txt").write_text("\n".join(lines))
    (base / "dialog" / "EmoEvaluation" / f"._{dialogue}.txt").write_bytes(b"\0\5\x16\7macOS")
    (base / "dialog" / "EmoEvaluation" / "Categorical" / f"{dialogue}_e2_cat.txt").write_text("other format")
    if transcript:
        (base / "dialog" / "transcriptions" / f"{dialogue}.txt").write_text("\n".join(texts))


@pytest.fixture
def iemocap_root(tmp_path):
    for session in range(1, 6):
        iemocap(tmp_path / "IEMOCAP_full_release", session, f"Ses0{session}F_impro01")
        iemocap(tmp_path / "IEMOCAP_full_release", session, f"Ses0{session}M_script01_1", transcript=False)
    return tmp_path


@pytest.mark.filterwarnings("ignore::mal_adapter.errors.IncompleteCorpusWarning")
def test_iemocap_by_session_in_order_of_time_with_context(iemocap_root):
    corpus = read_iemocap(iemocap_root)  # the folder above will do
    assert list(corpus.splits) == [f"session{n}" for n in range(1, 6)]
    first, second = corpus.splits["session1"]
    assert [turn.utterance_id[-4:] for turn in first.utterances] == ["F000", "M000", "F001", "M001", "F002", "M002"]
    assert [turn.emotion for turn in first.utterances] == ["neutral", "happy", "happy", None, None, None]
    assert [turn.speaker for turn in first.utterances][:2] == ["Ses01F", "Ses01M"]
    assert [turn.text for turn in first.utterances][:2] == ["Words 0.", "Words 1."]
    assert {turn.text for turn in second.utterances} == {None}
    assert corpus.report.notes == ()  # every code is known
    six = read_iemocap(iemocap_root / "IEMOCAP_full_release", IEMOCAP_6).splits["session1"][0]
    assert [turn.emotion for turn in six.utterances] == ["neutral", "happy", "excited", "frustrated", None, None]


@pytest.mark.filterwarnings("ignore::mal_adapter.errors.IncompleteCorpusWarning")
def test_a_windows_ellipsis_does_not_end_a_line_of_a_transcript(iemocap_root):
    path = iemocap_root / "IEMOCAP_full_release/Session1/dialog/transcriptions/Ses01F_impro01.txt"
    path.write_bytes(path.read_bytes().replace(b"Words 0.", b"Well\x85 words\x85"))
    assert read_iemocap(iemocap_root).splits["session1"][0].utterances[0].text == "Well… words…"


@pytest.mark.filterwarnings("ignore::mal_adapter.errors.IncompleteCorpusWarning")
def test_iemocap_folds_leave_one_session_out(iemocap_root):
    folds = list(read_iemocap(iemocap_root).folds())
    assert [held_out for held_out, _, _ in folds] == [f"session{n}" for n in range(1, 6)]
    for held_out, train, test in folds:
        assert (len(train), len(test)) == (8, 2)
        assert {d.dialogue_id[:5] for d in test} == {f"Ses0{held_out[-1]}"}
        assert not {d.dialogue_id for d in train} & {d.dialogue_id for d in test}


def test_iemocap_counts_are_checked_and_missing_sessions_named(iemocap_root):
    with pytest.warns(IncompleteCorpusWarning, match="session1 has 6 labelled utterances, published are 1085"):
        report = read_iemocap(iemocap_root).report
    assert "total has 10 dialogues, published are 151" in report.deviations
    assert "total has 30 labelled utterances, published are 5531" in report.deviations
    with pytest.warns(IncompleteCorpusWarning, match="total has 40 labelled utterances, published are 7380"):
        read_iemocap(iemocap_root, IEMOCAP_6)
    release = iemocap_root / "IEMOCAP_full_release"
    (release / "Session3").rename(release / "Session 3")
    (release / "Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_F000.wav").unlink()
    with pytest.warns(IncompleteCorpusWarning, match="session3 is missing.*1 utterances are left out: session1/Ses01F"):
        assert read_iemocap(iemocap_root).report.deviations == ()  # nothing to compare with


def test_iemocap_evaluation_without_lines_is_an_error(tmp_path):
    iemocap(tmp_path, 1, "Ses01F_impro01")
    (tmp_path / "Session1/dialog/EmoEvaluation/Ses01F_impro02.txt").write_text("nothing")
    with pytest.raises(CorpusError, match=r"Ses01F_impro02\.txt: there is no line such as"):
        read_iemocap(tmp_path)


# EmoryNLP

EMORY = ["Utterance", "Speaker", "Emotion", "Scene_ID", "Utterance_ID", "Season", "Episode", "Start_Time", "End_Time"]


@pytest.mark.filterwarnings("ignore::mal_adapter.errors.IncompleteCorpusWarning")
def test_emorynlp_from_csv(tmp_path):
    rows = [
        ["Thanks, Rach", "['Ross Geller', 'Joey Tribbiani']", "Powerful", 2, 10, 1, 15, "00:00:05.171", "00:00:07.423"],
        ["Coffee.", "['Rachel Green']", "Neutral", 2, 9, 1, 15, "00:00:03.795", "00:00:05.004"],
        ["Hm.", "Gunther", "Mad", 2, 1, 1, 2, "", ""],
    ]
    table(tmp_path / "emorynlp_dev_final.csv", rows, EMORY)
    for name in ("sea1_ep15_sc2_utt10", "sea1_ep15_sc2_utt9", "sea1_ep2_sc2_utt1"):
        clip(tmp_path / "emorynlp_dev_splits" / f"{name}.mp4")
    corpus = read_emorynlp(tmp_path)
    assert turns(corpus, "dev") == [("s01_e02_c02", "u001"), ("s01_e15_c02", "u009"), ("s01_e15_c02", "u010")]
    turn = corpus.splits["dev"][1].utterances[1]
    assert (turn.speaker, turn.emotion) == ("Ross Geller, Joey Tribbiani", "powerful")
    assert corpus.labels == EMORYNLP
    assert corpus.report.deviations == ()  # no numbers are published for the CSVs


def emory_json(emotion="Joyful"):
    def turn(n, **fields):
        ids = {"utterance_id": f"s01_e02_c01_u{n:03d}", "speakers": ["Phoebe Buffay"], "tokens": [["Oh"]]}
        return {**ids, "transcript": "Oh, yeah!", "emotion": emotion, **fields}

    utterances = [turn(2), turn(1, speakers=[], transcript=""), turn(3)]
    return {"episodes": [{"episode_id": "s01_e02", "scenes": [{"scene_id": "s01_e02_c01", "utterances": utterances}]}]}


def test_emorynlp_from_json(tmp_path):
    (tmp_path / "emotion-detection-trn.json").write_text(json.dumps(emory_json()))
    for n in (1, 2):
        clip(tmp_path / f"sea1_ep2_sc1_utt{n}.wav")
    with pytest.warns(IncompleteCorpusWarning, match=r"train has 1 dialogues, published are 713.*sea1_ep2_sc1_utt3"):
        corpus = read_emorynlp(tmp_path)
    assert turns(corpus, "train") == [("s01_e02_c01", "u001"), ("s01_e02_c01", "u002")]
    first, second = corpus.splits["train"][0].utterances
    assert (first.speaker, first.text) == ("unknown", None)
    assert (second.speaker, second.text, second.emotion) == ("Phoebe Buffay", "Oh, yeah!", "joyful")


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"episodes": [{}]}', '{"episodes": [{"scenes": [{"utterances": [3]}]}]}']
)
def test_emorynlp_json_of_another_format_is_named(tmp_path, content):
    (tmp_path / "emotion-detection-tst.json").write_text(content)
    with pytest.raises(CorpusError, match=r"emotion-detection-tst\.json: (this is not JSON|expected episodes)"):
        read_emorynlp(tmp_path)


# M3ED


def m3ed(root, series):
    """Two utterances in the wrong order per series."""
    annotation = {}
    for name in series:
        dialog = {
            f"{name}_1_{n}": {
                "StartTime": "00:01:02:05", "EndTime": "00:01:03:20", "Text": "好的", "Speaker": "AB"[n % 2],
                "EmoAnnotation": {"EmoAnnotator1": "Sad", "final_mul_emo": "Sad,Fear", "final_main_emo": "Sad"},
            }
            for n in (10, 9)
        }  # fmt: skip
        annotation[name] = {f"{name}_1": {"SpeakerInfo": {"A": {"Name": "x"}}, "Dialog": dialog}}
        clip(root / "modality_speech" / f"A_{name}_1_10.wav")
        clip(root / "modality_speech" / f"B_{name}_1_9.wav", samples=0 if name == "fendou" else 160)
    (root / "annotation.json").write_text(json.dumps(annotation, ensure_ascii=False), encoding="utf-8")


def test_m3ed_splits_by_series(tmp_path):
    m3ed(tmp_path, ["fendou", "jinhun", "wojv", "elsewhere"])
    (tmp_path / "splitInfo").mkdir()
    for split, names in {"train": "fendou", "val": "jinhun\n", "test": "wojv\nnotthere"}.items():
        (tmp_path / "splitInfo" / f"movie_list_{split}.txt").write_text(names)
    with pytest.warns(IncompleteCorpusWarning) as caught:
        corpus = read_m3ed(tmp_path)
    message = str(caught[0].message)
    assert "1 series are in no split: elsewhere" in message
    assert "total has 3 dialogues, published are 990" in message
    assert "train/B_fendou_1_9 (the file has no samples)" in message
    assert turns(corpus, "dev") == [("jinhun_1", "jinhun_1_9"), ("jinhun_1", "jinhun_1_10")]
    assert turns(corpus, "train") == [("fendou_1", "fendou_1_10")]
    turn = corpus.splits["test"][0].utterances[0]
    assert (turn.speaker, turn.emotion, turn.text, turn.start_s) == ("B", "sad", "好的", None)
    assert corpus.labels == M3ED


@pytest.mark.parametrize("content", ["[]", '{"a": {"a_1": {}}}', '{"a": {"a_1": {"Dialog": {"a_1_1": {}}}}}'])
def test_m3ed_of_another_format_is_named(tmp_path, content):
    (tmp_path / "annotation.json").write_text(content)
    with pytest.raises(CorpusError, match="movie_list_train"):
        read_m3ed(tmp_path)
    (tmp_path / "movie_list_train.txt").write_bytes("a\n好".encode("gbk"))
    with pytest.raises(CorpusError, match=r"annotation\.json: expected series -> dialogue"):
        read_m3ed(tmp_path)


# Manifests, and reading by name


@pytest.fixture
def manifests(tmp_path):
    for split, emotions in {"train": ["sad", "neutral"], "dev": ["neutral", None], "extra": ["fru"]}.items():
        audio = [clip(tmp_path / "wav" / f"{split}{n}.wav") for n in range(len(emotions))]
        pairs = zip(audio, emotions, strict=True)
        made = tuple(Utterance(split, str(n), "A", a, emotion=e) for n, (a, e) in enumerate(pairs))
        write_manifest([Dialogue(split, made)], tmp_path / f"{split}.jsonl")
    return tmp_path


def test_a_folder_of_manifests_is_a_corpus(manifests):
    corpus = read_corpus(manifests)
    assert list(corpus.splits) == ["train", "dev", "extra"]
    assert list(corpus.labels) == ["fru", "neutral", "sad"]
    assert corpus.report.complete
    with pytest.warns(IncompleteCorpusWarning, match=r"'fru' \(1\)"):
        assert read_corpus(manifests, labels=IEMOCAP_4).splits["extra"][0].utterances[0].emotion is None


def test_one_manifest_is_one_split(manifests):
    corpus = read_corpus(manifests / "train.jsonl", labels=DEMO)
    assert [turn.emotion for turn in corpus.splits["train"][0].utterances] == ["sad", "neutral"]
    (manifests / "wav" / "train0.wav").unlink()
    with pytest.warns(IncompleteCorpusWarning, match="train/train/0"):
        assert turns(read_corpus(manifests / "train.jsonl"), "train") == [("train", "1")]
    with pytest.raises(CorpusError, match="the emotions that occur are"):
        read_corpus(manifests / "extra.jsonl")


def test_a_dialogue_in_two_splits_is_noted(manifests):
    (manifests / "dev.jsonl").write_bytes((manifests / "train.jsonl").read_bytes())
    with pytest.warns(
        IncompleteCorpusWarning, match=r"1 dialogue ids are in more than one split: train \(train and dev"
    ):
        read_corpus(manifests)


def test_a_corpus_by_name(meld_root):
    with pytest.warns(IncompleteCorpusWarning):
        corpus = read_corpus("MELD", meld_root)
    assert (corpus.name, corpus.labels) == ("MELD", MELD)
    with pytest.raises(CorpusError, match="needs the folder"):
        read_corpus("meld")
    with pytest.raises(CorpusError, match="there is no corpus 'melt'; known are meld, iemocap, emorynlp and m3ed"):
        read_corpus("melt", meld_root)


def test_a_corpus_is_read_only(manifests):
    corpus = read_corpus(manifests)
    with pytest.raises(TypeError):
        corpus.splits["train"] = ()
    with pytest.raises(AttributeError):
        corpus.name = "x"


def test_a_long_list_is_cut():
    left_out = {f"train/{n}": "there is no such clip" for n in range(9)}
    report = CorpusReport({"train": Counts(1, 9, 9)}, left_out=left_out)
    assert report.summary().endswith("train/4 (there is no such clip) and 4 more")
    assert len(str(report).splitlines()) == 11


# Rubbish

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def reads_or_says_why(reader, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", IncompleteCorpusWarning)
        with contextlib.suppress(CorpusError):
            assert reader(folder).splits


@given(content=st.binary(max_size=80), good_header=st.booleans())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_random_table_is_a_corpus_error(content, good_header, tmp_path):
    header = ",".join(HEADER).encode() + b"\n1,Hi,Ross,joy,positive,0,0,4,7,,\n"
    (tmp_path / "train_sent_emo.csv").write_bytes(header * good_header + content)
    (tmp_path / "emorynlp_dev_final.csv").write_bytes(content)
    reads_or_says_why(read_meld, tmp_path)
    reads_or_says_why(read_emorynlp, tmp_path)


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_json_of_another_shape_is_a_corpus_error(data, tmp_path):
    """One value of a good file is replaced by anything."""
    annotation = {
        "s": {"s_1": {"Dialog": {"s_1_1": {"Speaker": "A", "Text": "x", "EmoAnnotation": {"final_main_emo": "Sad"}}}}}
    }
    for name, content in {"annotation.json": annotation, "emotion-detection-trn.json": emory_json()}.items():
        content = json.loads(json.dumps(content))
        place, keys = content, []
        while isinstance(place, (dict, list)) and place:
            keys.append(data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place)))))
            parent, place = place, place[keys[-1]]
            if data.draw(st.integers(0, 3)) == 0:
                break
        parent[keys[-1]] = data.draw(anything)
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "movie_list_train.txt").write_text("s")
    clip(tmp_path / "A_s_1_1.wav")
    clip(tmp_path / "sea1_ep2_sc1_utt1.wav")
    reads_or_says_why(read_m3ed, tmp_path)
    reads_or_says_why(read_emorynlp, tmp_path)
