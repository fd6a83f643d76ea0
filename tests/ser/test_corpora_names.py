"""Corpora whose files came through other systems: letter case, formats, Unicode forms, copies."""

import csv
import json
import shutil
import unicodedata

import pytest
import soundfile

from mal_adapter.errors import CorpusError
from mal_adapter.ser.corpora import read_corpus, read_emorynlp, read_iemocap, read_m3ed, read_meld
from mal_adapter.ser.dialogue import Dialogue, Utterance, write_manifest
from mal_adapter.ser.labels import LabelSet

pytestmark = pytest.mark.filterwarnings("ignore::mal_adapter.errors.IncompleteCorpusWarning")
SUFFIXES = [".wav", ".WAV", ".Wav", ".Flac", ".OGG", ".mp3", ".M4A"]


def nfd(text):
    return unicodedata.normalize("NFD", text)


def clip(path, value=0.1):
    path.parent.mkdir(parents=True, exist_ok=True)
    formats = {".flac": "FLAC", ".ogg": "OGG", ".mp3": "MP3"}
    soundfile.write(path, [value] * 1600, 16_000, format=formats.get(path.suffix.lower(), "WAV"))
    return path


def table(path, header, row):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, row])


def make_meld(root, stem="dia0_utt0", suffix=".wav", emotion="joy"):
    header = ["Utterance", "Speaker", "Emotion", "Dialogue_ID", "Utterance_ID"]
    table(root / "train_sent_emo.csv", header, ["Hi", "Ross", emotion, 0, 0])
    clip(root / "train_splits" / f"{stem}{suffix}")
    return read_meld


def make_emorynlp(root, stem="sea1_ep2_sc3_utt4", suffix=".wav", emotion="Joyful"):
    header = ["Utterance", "Speaker", "Emotion", "Scene_ID", "Utterance_ID", "Season", "Episode"]
    table(root / "emorynlp_train_final.csv", header, ["Hi", "['Ross']", emotion, 3, 4, 1, 2])
    clip(root / "clips" / f"{stem}{suffix}")
    return read_emorynlp


def make_m3ed(root, stem="A_s_1_1", suffix=".wav", emotion="Happy"):
    turn = {"Speaker": "A", "Text": "好", "EmoAnnotation": {"final_main_emo": emotion}}
    root.mkdir(parents=True, exist_ok=True)
    content = json.dumps({"s": {"s_1": {"Dialog": {"s_1_1": turn}}}}, ensure_ascii=False)
    (root / "annotation.json").write_text(content, encoding="utf-8")
    (root / "movie_list_train.txt").write_text("s")
    clip(root / "modality_speech" / f"{stem}{suffix}")
    return read_m3ed


def make_iemocap(
    root,
    stem="Ses01F_impro01_F000",
    suffix=".wav",
    emotion="hap",
    evaluations="Session1/dialog/EmoEvaluation/Ses01F_impro01.txt",
    clips="Session1/sentences/wav/Ses01F_impro01",
):
    path = root / evaluations
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"[6.2901 - 8.2357]\tSes01F_impro01_F000\t{emotion}\t[2.5, 2.5, 2.5]\n", encoding="utf-8")
    clip(root / clips / f"{stem}{suffix}")
    return read_iemocap


MAKERS = [make_meld, make_emorynlp, make_m3ed, make_iemocap]


def the_utterance(corpus):
    (utterance,) = (u for dialogues in corpus.splits.values() for d in dialogues for u in d.utterances)
    return utterance


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("make", MAKERS)
def test_every_reader_finds_clips_of_every_format_in_every_letter_case(make, suffix, tmp_path):
    read = make(tmp_path, suffix=suffix)
    utterance = the_utterance(read(tmp_path))
    assert utterance.audio.suffix == suffix
    assert utterance.emotion in ("joy", "joyful", "happy")


@pytest.mark.parametrize("make", MAKERS)
def test_every_reader_finds_clips_whose_names_were_made_upper_or_lower_case(make, tmp_path):
    stem = make.__defaults__[0]
    for n, other in enumerate((stem.upper(), stem.lower())):
        assert the_utterance(make(tmp_path / str(n), stem=other)(tmp_path / str(n))).audio.stem == other


@pytest.mark.parametrize("make", [make_meld, make_emorynlp, make_m3ed])  # IEMOCAP's are codes between tabs
def test_every_reader_accepts_emotions_with_characters_that_spreadsheets_add(make, tmp_path):
    name = make.__defaults__[2]
    for n, spelled in enumerate((f"\ufeff{name}", f"{name}\u00a0", f"{name}\u200b", name.upper(), f" {name} ")):
        assert the_utterance(make(tmp_path / str(n), emotion=spelled)(tmp_path / str(n))).emotion == name.lower()


@pytest.mark.parametrize(
    ("evaluations", "clips"),
    [
        ("SESSION1/DIALOG/EMOEVALUATION/SES01F_IMPRO01.TXT", "SESSION1/SENTENCES/WAV/SES01F_IMPRO01"),
        ("session1/dialog/emoevaluation/ses01f_impro01.txt", "session1/sentences/wav/ses01f_impro01"),
        ("IEMOCAP/Session1/Dialog/EmoEvaluation/Ses01F_impro01.Txt", "IEMOCAP/Session1/Sentences/Wav/Ses01F_impro01"),
        ("Session1/dialog/EmoEvaluation/Ses01F_impro01.txt", "Session1/sentences/wav"),
    ],
)
def test_iemocap_in_folders_of_other_letter_case(evaluations, clips, tmp_path):
    read = make_iemocap(tmp_path, evaluations=evaluations, clips=clips, suffix=".WAV")
    base = tmp_path / evaluations.split("/")[0] if evaluations.startswith("IEMOCAP") else tmp_path
    transcripts = base / evaluations.removeprefix("IEMOCAP/").split("/")[0] / evaluations.split("/")[-3]
    (transcripts / "Transcriptions").mkdir()
    (transcripts / "Transcriptions" / "Ses01F_impro01.TXT").write_text("Ses01F_impro01_F000 [6.29-8.23]: Hello.\n")
    utterance = the_utterance(read(tmp_path))
    assert (utterance.utterance_id, utterance.text, utterance.speaker) == ("Ses01F_impro01_F000", "Hello.", "Ses01F")


def test_a_folder_name_with_accents_in_either_form(tmp_path):
    read = make_m3ed(tmp_path, stem=nfd("É_s_1_1"))
    path = tmp_path / "annotation.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"A"', '"É"'), encoding="utf-8")
    utterance = the_utterance(read(tmp_path))
    assert (utterance.speaker, utterance.audio.stem) == ("É", nfd("É_s_1_1"))
    series = path.read_text(encoding="utf-8").replace('"s"', f'"{nfd("é")}"').replace('"s_1"', f'"{nfd("é")}_1"')
    path.write_text(series, encoding="utf-8")
    (tmp_path / "movie_list_train.txt").write_text("é", encoding="utf-8")
    assert the_utterance(read(tmp_path)).dialogue_id == "é_1"


@pytest.mark.parametrize("make", MAKERS)
def test_of_two_clips_that_look_the_same_the_exact_one_is_read_else_both_are_named(make, tmp_path):
    read = make(tmp_path, suffix=".wav")
    first = the_utterance(read(tmp_path)).audio
    other = clip(first.with_name(first.stem.swapcase() + ".wav"), value=0.2)
    if other.samefile(first):
        pytest.skip("the file system has one name for both")
    assert the_utterance(read(tmp_path)).audio == first
    third = first.rename(first.with_name(first.stem.title() + ".wav"))
    with pytest.raises(CorpusError) as caught:
        read(tmp_path)
    assert str(other) in str(caught.value)
    assert str(third) in str(caught.value)
    shutil.copy(other, third)  # a copy that was made twice is no question
    assert the_utterance(read(tmp_path)).audio in (other, third)


def test_a_suffix_in_two_letter_cases(tmp_path):
    read = make_meld(tmp_path, suffix=".wav")
    lower, upper = tmp_path / "train_splits/dia0_utt0.wav", clip(tmp_path / "train_splits/dia0_utt0.WAV", value=0.2)
    if lower.samefile(upper):
        pytest.skip("the file system has one name for both")
    with pytest.raises(CorpusError, match=r"dia0_utt0\.WAV and .*dia0_utt0\.wav differ in letter case"):
        read(tmp_path)
    clip(tmp_path / "Music.wav"), clip(tmp_path / "music.wav", value=0.2)  # what is not asked for is no question
    shutil.copy(lower, upper)
    assert the_utterance(read(tmp_path)).audio in (lower, upper)


def test_a_table_in_two_letter_cases(tmp_path):
    read = make_meld(tmp_path)
    exact, other = tmp_path / "train_sent_emo.csv", tmp_path / "Train_Sent_Emo.CSV"
    other.write_text(exact.read_text().replace("joy", "anger"))
    if exact.samefile(other):
        pytest.skip("the file system has one name for both")
    assert the_utterance(read(tmp_path)).emotion == "joy"
    exact.rename(tmp_path / "TRAIN_sent_emo.csv")
    with pytest.raises(CorpusError, match="differ in letter case"):
        read(tmp_path)


# Manifests


def manifest(path, emotions, dialogue_id="d"):
    turns = [
        Utterance(dialogue_id, str(n), "A", clip(path.parent / "wav" / f"{n}.wav"), emotion=emotion)
        for n, emotion in enumerate(emotions)
    ]
    write_manifest([Dialogue(dialogue_id, tuple(turns))], path)


def test_a_folder_of_manifests_of_another_system(tmp_path):
    emotions = ["énervé", nfd("énervé"), "Énervé\u00a0", "calme"]
    for name in ("Train.JSONL", f"{nfd('été')}.jsonl", "fold10.jsonl", "fold2.jsonl"):
        manifest(tmp_path / name, emotions, dialogue_id=name)
    corpus = read_corpus(tmp_path)
    assert list(corpus.splits) == ["Train", "fold2", "fold10", "été"]
    assert list(corpus.labels) == ["calme", "énervé"]
    assert [u.emotion for u in corpus.splits["Train"][0].utterances] == ["énervé", "énervé", "énervé", "calme"]
    assert corpus.report.complete
    labelled = read_corpus(tmp_path, labels=LabelSet((nfd("énervé"), "calme")))
    assert labelled.report.found["total"].labelled == 16
    assert read_corpus(tmp_path / f"{nfd('été')}.jsonl").name == "été"


def test_two_manifests_that_look_the_same(tmp_path):
    manifest(tmp_path / "train.jsonl", ["a", "b"])
    manifest(tmp_path / "TRAIN.jsonl", ["a", "b", "a"], dialogue_id="e")
    if (tmp_path / "train.jsonl").samefile(tmp_path / "TRAIN.jsonl"):
        pytest.skip("the file system has one name for both")
    with pytest.raises(CorpusError, match=r"TRAIN\.jsonl and .*train\.jsonl differ in letter case"):
        read_corpus(tmp_path)


def test_a_clip_named_in_another_letter_case_is_found(tmp_path):
    manifest(tmp_path / "train.jsonl", ["a", "b"])
    (tmp_path / "wav" / "0.wav").rename(tmp_path / "wav" / "0.WAV")
    corpus = read_corpus(tmp_path)
    assert (len(corpus.splits["train"][0].utterances), dict(corpus.report.left_out)) == (2, {})
    shutil.copy(clip(tmp_path / "wav" / "2.wav", value=0.3), tmp_path / "wav" / "1.WAV")
    (tmp_path / "wav" / "1.wav").rename(tmp_path / "wav" / "1.Wav")
    if (tmp_path / "wav" / "1.WAV").samefile(tmp_path / "wav" / "1.Wav"):
        pytest.skip("the file system has one name for both")
    (reason,) = read_corpus(tmp_path).report.left_out.values()
    assert "1.WAV" in reason
    assert "1.Wav" in reason
