"""Names are compared as people see them, wherever they meet: labels, weights, manifests, evaluations, files."""

import json
import os
import unicodedata
from pathlib import Path

import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from mal_adapter.errors import AudioError, ConfigError, LabelError, ManifestError
from mal_adapter.ser.dialogue import Dialogue, Utterance, read_manifest, write_manifest
from mal_adapter.ser.evaluation.colors import emotion_colors
from mal_adapter.ser.labels import LabelSet, emotions_that_occur
from mal_adapter.ser.names import cleaned, composed, folded, label_keys, natural
from mal_adapter.ser.paths import existing_path, existing_sound, paths_alike
from mal_adapter.ser.recognizer.audio import load_waveform
from mal_adapter.ser.recognizer.prompt import choose_task
from mal_adapter.ser.training.config import TrainingConfig
from mal_adapter.ser.training.loss import class_weights
from mal_adapter.serialization.metadata import AdapterMetadata

NFC, NFD = (lambda text: unicodedata.normalize("NFC", text)), (lambda text: unicodedata.normalize("NFD", text))
#: French, German, Vietnamese, Korean (syllables are letters of the alphabet on macOS), Japanese, and a singleton.
WORDS = ["énervé", "Überraschung", "buồn bã", "행복", "がっかり", "Ångst", "\u212bngst"]


def test_the_words_differ_between_the_forms():
    assert all(NFC(word) != NFD(word) for word in WORDS)


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize(("set_form", "asked_form"), [(NFC, NFD), (NFD, NFC)])
def test_a_label_set_knows_its_names_in_either_form(word, set_form, asked_form):
    labels = LabelSet((set_form(word), "calme"), {set_form("alias " + word): set_form(word)})
    for asked in (asked_form(word), asked_form(word).upper(), f" {asked_form(word)}\n", asked_form("alias " + word)):
        assert asked in labels
        assert (labels.lookup(asked), labels.index(asked)) == (NFC(word), 0)
    assert labels == LabelSet((asked_form(word), "calme"), {asked_form("alias " + word): asked_form(word)})
    with pytest.raises(LabelError, match="same label"):
        LabelSet((set_form(word), "calme", asked_form(word)))


def test_an_alias_may_lead_to_its_name_in_any_spelling():
    assert LabelSet(("énervé", "calme"), {"fâché": NFD("énervé"), "zen": "CALME"}).lookup(NFD("fâché")) == "énervé"
    with pytest.raises(LabelError, match="leads to 'énervé', but is a name of 'calme' already"):
        LabelSet(("énervé", "calme"), {NFD("fâché"): "calme", NFC("fâché"): "énervé"})


@pytest.mark.parametrize(
    "spelled",
    [
        "\ufeffsad",
        "sad\u200b",
        "sad\u00a0",
        "\u3000sad",
        "s\u00adad",
        "\u202asad\u202c",
        "sad\u200d",
        "ｓａｄ",
        "ＳＡＤ",
    ],
)
def test_invisible_characters_and_the_width_of_letters_make_no_difference(spelled):
    labels = LabelSet(("neutral", "sad"))
    assert labels.lookup(spelled) == "sad"
    with pytest.raises(LabelError, match="same label"):
        LabelSet(("sad", spelled))


def test_names_are_kept_without_invisible_characters():
    assert LabelSet(("\ufeffvery\u00a0 sad\u200b", " calm ")).names == ("very sad", "calm")
    # A joiner within a Persian word, or in an emoji, is part of its spelling; without it, it is the same word.
    persian, emoji = "بی\u200cتفاوت", "🙂\u200d↔\ufe0f"
    labels = LabelSet((persian, emoji))
    assert labels.names == (persian, emoji)
    assert labels.lookup(persian.replace("\u200c", "")) == persian
    assert labels.lookup("🙂↔") == emoji


@pytest.mark.parametrize("name", ["sad\x00", "\x1b[31msad", "\ud83d", "sad\x7f"])
def test_an_unprintable_character_is_named(name):
    with pytest.raises(LabelError, match=r"unprintable character U\+"):
        LabelSet((name, "calm"))


@pytest.mark.parametrize("name", ["\u200b", "\ufeff", "\u00a0", " \t"])
def test_a_name_of_invisible_characters_is_empty(name):
    with pytest.raises(LabelError, match="non-empty"):
        LabelSet((name, "calm"))
    assert name not in LabelSet(("sad", "calm"))


def test_letter_case_by_unicode_and_in_turkish():
    german = LabelSet(("spaß", "größe"))
    assert [german.lookup(name) for name in ("SPASS", "SPAẞ", "Größe", NFD("GRÖẞE"))] == ["spaß"] * 2 + ["größe"] * 2
    turkish = LabelSet(("kızgın", "iğrenme"))
    assert [turkish.lookup(name) for name in ("KIZGIN", "İĞRENME", NFD("İĞRENME"))] == ["kızgın", "iğrenme", "iğrenme"]
    assert "kizgin" not in turkish  # dotted and dotless are different letters to see
    assert LabelSet(("KIZGIN", "İĞRENME")).lookup("kızgın") == "KIZGIN"
    assert LabelSet(("kızgın", "kizgin")).lookup("kizgin") == "kizgin"
    assert LabelSet(("λύπησ", "χαρά")).lookup("ΛΎΠΗΣ") == "λύπησ"  # a final sigma is one, too
    assert "Disgust" in LabelSet(("disgust", "ANGRY"))


def test_other_words_stay_other_words():
    labels = LabelSet(("sad", "mad", "ému"))
    for word in ("saď", "sads", "s ad", "emu", "émû", "", "sаd"):  # the last has a Cyrillic а
        assert word not in labels


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)


@given(text=texts)
def test_keys_do_not_depend_on_the_form(text):
    for form in ("NFC", "NFD"):
        other = unicodedata.normalize(form, text)
        assert composed(other) == composed(text)
        assert cleaned(other) == cleaned(text) == cleaned(cleaned(text))
        assert folded(other) == folded(text)
        assert label_keys(other) == label_keys(text)


@given(names=st.lists(texts, min_size=2, max_size=4))
def test_a_label_set_finds_its_own_names_or_is_refused(names):
    try:
        labels = LabelSet(tuple(names))
    except LabelError:
        return
    for place, name in enumerate(names):
        assert labels.index(NFD(name)) == labels.index(NFC(name)) == place
        assert labels.names[place] == cleaned(name)


def test_each_emotion_that_occurs_is_listed_once():
    found = emotions_that_occur(
        ["énervé", NFD("énervé"), "Énervé ", "sad", None, "", "\u200b", "\ufeffsad", "KIZGIN", "kızgın"]
    )
    assert len(found) == 3
    assert set(found) <= {"énervé", "sad", "KIZGIN", "kızgın"}
    assert LabelSet(found).lookup("ÉNERVÉ") == "énervé"


# What is made of labels


def labelled(*emotions, folder=Path()):
    turns = (Utterance("d", str(n), "A", folder / f"{n}.wav", emotion=e) for n, e in enumerate(emotions))
    return Dialogue("d", tuple(turns))


def test_a_class_does_not_become_context_in_training():
    labels = LabelSet(("calme", "énervé"))
    dialogues = [labelled(NFD("énervé"), "énervé\u200b", "ÉNERVÉ", "calme\u00a0", "calme", "\ufeffcalme", None)]
    assert class_weights("balanced", dialogues, labels).tolist() == [1, 1]
    assert class_weights({NFD("énervé"): 3}, dialogues, labels).tolist() == [1, 3]
    config = TrainingConfig(class_weights={NFD("énervé"): 3})
    assert config == TrainingConfig(class_weights={"énervé": 3})  # so that a run resumes on another system
    with pytest.raises(ConfigError, match="twice"):
        TrainingConfig(class_weights={NFD("énervé"): 3, "énervé": 2})
    with pytest.raises(ConfigError, match="two weights for the label 'énervé'"):
        class_weights({NFD("énervé"): 3, "Énervé": 2}, dialogues, labels)


def test_a_card_of_another_tool():
    task = {"labels": [NFD("énervé"), "calme"], "prompt": "?", "aliases": {NFD("fâché"): "énervé"}}
    labels, _ = choose_task(AdapterMetadata(layer_idx=0, task=task))
    assert labels.names == ("énervé", "calme")
    assert labels.lookup("fâché") == "énervé"


def test_an_emotion_has_its_colour_in_any_spelling():
    assert list(emotion_colors(["ＨＡＰＰＹ", "\ufeffsad"]).values()) == list(emotion_colors(["happy", "sad"]).values())


# Manifests


def lines(path, *records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def test_lines_of_one_dialogue_in_two_forms_are_one_dialogue(tmp_path):
    record = {"dialogue_id": NFC("Gespräch"), "utterance_id": "0", "speaker": NFC("Zoé"), "audio": "0.wav"}
    other = {**record, "dialogue_id": NFD("Gespräch"), "utterance_id": "1", "speaker": NFD("Zoé") + " "}
    (dialogue,) = read_manifest(lines(tmp_path / "m.jsonl", record, other))
    assert (dialogue.dialogue_id, {turn.speaker for turn in dialogue.utterances}) == ("Gespräch", {"Zoé"})
    write_manifest([dialogue], tmp_path / "n.jsonl")
    assert read_manifest(tmp_path / "n.jsonl") == [dialogue]
    with pytest.raises(ManifestError, match="line 2: utterance 'é' of dialogue 'Gespräch' is repeated"):
        read_manifest(
            lines(tmp_path / "m.jsonl", {**record, "utterance_id": NFC("é")}, {**other, "utterance_id": NFD("é")})
        )
    with pytest.raises(ManifestError, match="two dialogues have the id"):
        write_manifest([_named(NFC("ö")), _named(NFD("ö"))], tmp_path / "o.jsonl")
    # Ids are exact but for that: an application may tell sessions apart by letter case or a space.
    assert [_named(name).dialogue_id for name in ("Call", "call", "call ")] == ["Call", "call", "call "]


def _named(dialogue_id):
    return Dialogue(dialogue_id, (Utterance(dialogue_id, "0", "A", "0.wav"),))


def sound(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, [0.1, -0.1] * 800, 16_000, format="WAV")
    return path


def keeps_forms(folder) -> bool:
    """Whether the file system distinguishes é from e and an accent, and a from A, as on Linux."""
    (folder / "é").touch()
    return not (folder / NFD("é")).exists() and not (folder / "É").exists()


@pytest.mark.parametrize(("written", "on_disk"), [(NFC, NFD), (NFD, NFC)])
def test_a_manifest_of_one_system_finds_the_files_of_another(written, on_disk, tmp_path):
    path = sound(tmp_path / on_disk("données") / on_disk("énervé 1.wav"))
    record = {"dialogue_id": "d", "utterance_id": "0", "speaker": "A", "audio": written("données/énervé 1.wav")}
    (dialogue,) = read_manifest(lines(tmp_path / "m.jsonl", record))
    assert os.path.samefile(dialogue.utterances[0].audio, path)
    by_hand = Utterance("d", "0", "A", tmp_path / written("données") / written("ÉNERVÉ 1.WAV"))
    assert load_waveform(by_hand).size == 1600


def test_a_manifest_itself_is_found_in_either_form(tmp_path):
    record = {"dialogue_id": "d", "utterance_id": "0", "speaker": "A", "audio": "0.wav"}
    lines(tmp_path / NFD("données.jsonl"), record)
    assert read_manifest(tmp_path / "données.jsonl")[0].dialogue_id == "d"
    assert existing_path(tmp_path / "Données.JSONL").read_bytes()
    assert existing_path(tmp_path / "autre.jsonl") == tmp_path / "autre.jsonl"


def test_a_manifest_with_the_backslashes_of_windows(tmp_path):
    path = sound(tmp_path / "données" / "wav" / "0.WAV")
    record = {"dialogue_id": "d", "utterance_id": "0", "speaker": "A", "audio": "données\\wav\\0.wav"}
    (dialogue,) = read_manifest(lines(tmp_path / "m.jsonl", record))
    assert os.path.samefile(dialogue.utterances[0].audio, path)
    if os.sep == "/":  # where a backslash may be part of a name, it is the name of a file
        exact = sound(tmp_path / "données\\wav\\0.wav")
        assert read_manifest(tmp_path / "m.jsonl")[0].utterances[0].audio == exact


def test_of_names_that_look_the_same_the_exact_one_is_taken_and_several_are_named(tmp_path):
    if not keeps_forms(tmp_path):
        pytest.skip("the file system has one name for all of them")
    lower, upper = sound(tmp_path / "a.wav"), sound(tmp_path / "A.WAV")
    assert (existing_sound(lower), existing_sound(upper)) == (lower, upper)
    assert set(paths_alike(tmp_path / "a.Wav")) == {lower, upper}
    with pytest.raises(AudioError, match=r"A\.WAV and .*a\.wav differ"):
        load_waveform(Utterance("d", "0", "A", tmp_path / "a.Wav"))
    decomposed = sound(tmp_path / NFD("é.wav"))
    sound(tmp_path / "É.wav")
    assert paths_alike(tmp_path / "é.wav") == (decomposed,)  # the form goes before the case
    assert paths_alike(tmp_path / "missing.wav") == paths_alike(tmp_path / "a.wav" / "b.wav") == ()
    assert existing_sound(tmp_path / "missing.wav") == tmp_path / "missing.wav"


def test_a_file_that_comes_later_is_found(tmp_path):
    wanted = tmp_path / "é.wav"
    assert paths_alike(wanted) == ()
    os.utime(tmp_path, ns=(0, 0))  # the folder changes for certain when the file comes, however coarse the clock
    sound(tmp_path / NFD("é.wav"))
    assert len(paths_alike(wanted)) == 1


def test_relative_paths_and_links_up(tmp_path, monkeypatch):
    sound(tmp_path / NFD("é") / "A.WAV")
    monkeypatch.chdir(tmp_path)
    assert [os.fspath(path) for path in paths_alike(Path("é/../é/a.wav"))] in (
        [f"{NFD('é')}/../{NFD('é')}/A.WAV"],
        ["é/../é/a.wav"],
    )


def test_numbers_in_names_sort_by_value():
    assert sorted(["t10", "t2", "t1b", "t1"], key=natural) == ["t1", "t1b", "t2", "t10"]
