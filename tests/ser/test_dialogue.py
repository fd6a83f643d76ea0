"""Manifests: what is written is read back, and what is wrong is named with its line."""

import json
import os
import stat
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mal_adapter.errors import ManifestError
from mal_adapter.ser.dialogue import Dialogue, Utterance, read_manifest, write_manifest
from mal_adapter.ser.names import composed

# Any text that JSON can hold, lone surrogates (file names that are not UTF-8) and odd line separators included.
words = st.text(st.characters(exclude_characters="\0"), min_size=1, max_size=8) | st.sampled_from(
    ["a\u2028b", "\x85", "\ufeffx", "\udc80", "\r\n", "\\", '"', "\u00e9moi", "e\u0301moi", "怒り"]
)
seconds = st.floats(0, 1e6)


@st.composite
def paths(draw, folder):
    parts = draw(st.lists(words.filter(lambda part: "/" not in part and part != ".."), min_size=1, max_size=3))
    below = folder.joinpath(*parts)
    return below if draw(st.booleans()) else Path("/elsewhere", *parts)


@st.composite
def dialogue_lists(draw, folder):
    dialogues = []
    for dialogue_id in draw(st.lists(words, min_size=1, max_size=3, unique_by=composed)):
        utterances = []
        for utterance_id in draw(st.lists(words, min_size=1, max_size=4, unique_by=composed)):
            times = sorted(draw(st.lists(seconds, min_size=2, max_size=2, unique=True)))
            start_s, end_s = (time if draw(st.booleans()) else None for time in times)
            text, emotion = draw(st.none() | st.text(max_size=8)), draw(st.none() | words)
            audio = draw(paths(folder))
            speaker = draw(words)
            utterances.append(Utterance(dialogue_id, utterance_id, speaker, audio, start_s, end_s, text, emotion))
        dialogues.append(Dialogue(dialogue_id, tuple(utterances)))
    return dialogues


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_written_dialogues_are_read_back(data, tmp_path):
    dialogues = data.draw(dialogue_lists(tmp_path))
    write_manifest(dialogues, tmp_path / "m.jsonl")
    assert read_manifest(tmp_path / "m.jsonl") == dialogues


@given(data=st.data())
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_interleaved_dialogues_with_bom_crlf_and_blank_lines_read_the_same(data, tmp_path):
    dialogues = data.draw(dialogue_lists(tmp_path))
    path = tmp_path / "m.jsonl"
    write_manifest(dialogues, path)
    lines = iter(path.read_bytes().split(b"\n"))
    queues = [[next(lines) for _ in dialogue.utterances] for dialogue in dialogues]
    mixed = []
    firsts = [queue.pop(0) for queue in queues]  # dialogues are listed in the order of their first lines
    while any(queues):
        mixed.append(data.draw(st.sampled_from([queue for queue in queues if queue])).pop(0))
    path.write_bytes(b"\xef\xbb\xbf\r\n \t\r\n" + b"\r\n\r\n".join(firsts + mixed))
    assert read_manifest(path) == dialogues


@given(line=st.binary(max_size=60).filter(lambda line: line.strip()))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_content_is_a_manifest_error(line, tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(line)
    with pytest.raises(ManifestError, match=r"m\.jsonl"):
        read_manifest(path)


GOOD = {"dialogue_id": "d", "utterance_id": "0", "speaker": "A", "audio": "0.wav"}


def test_relative_audio_belongs_to_the_folder_of_the_manifest(tmp_path, monkeypatch):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "m.jsonl").write_text(json.dumps(GOOD))
    assert read_manifest(tmp_path / "corpus" / "m.jsonl")[0].utterances[0].audio == tmp_path / "corpus" / "0.wav"
    monkeypatch.chdir(tmp_path)
    assert read_manifest("corpus/m.jsonl")[0].utterances[0].audio == Path("corpus/0.wav")
    utterance = Utterance("d", "0", "A", Path("corpus/wav/0.wav"))
    write_manifest([Dialogue("d", (utterance,))], "corpus/n.jsonl")
    assert json.loads(Path("corpus/n.jsonl").read_text())["audio"] == "wav/0.wav"
    write_manifest([Dialogue("d", (utterance,))], "other/n.jsonl")
    assert json.loads(Path("other/n.jsonl").read_text())["audio"] == str(tmp_path / "corpus/wav/0.wav")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not valid JSON"),
        ("[1, 2]", r"expected a JSON object with the keys dialogue_id.*got \[1, 2\]"),
        ({**GOOD, "audio": None}, "'audio' must be a non-empty string, got None"),
        ({**GOOD, "utterance_id": 7}, "'utterance_id' must be a non-empty string, got 7"),
        ({**GOOD, "speaker": ""}, "'speaker' must be a non-empty string, got ''"),
        ({**GOOD, "audio": "a\0b"}, "null character"),
        ({**GOOD, "text": ["a"]}, "'text' must be a string or null, got "),
        ({**GOOD, "start_s": "1"}, "'start_s' must be a number of seconds.*got '1'"),
        ({**GOOD, "start_s": True}, "got True"),
        ({**GOOD, "start_s": -1}, "at least 0.*got -1"),
        ({**GOOD, "end_s": float("nan")}, "got nan"),
        ({**GOOD, "end_s": 10**400}, "'end_s' must be a number"),
        ({**GOOD, "start_s": 2, "end_s": 2}, "greater than 'start_s', got start_s=2.0 and end_s=2.0"),
        ({**GOOD, "end_s": 0}, "greater than 'start_s'"),
        ({**GOOD, "speeker": "A"}, "unknown key 'speeker', did you mean 'speaker'"),
        ({**GOOD, "zzz": "A"}, "unknown key 'zzz', expected only dialogue_id"),
        ({"dialogue_id": "d", "utterance_id": "0", "speaker": "A"}, "key 'audio' is missing"),
        ('{"audio": "a", "audio": "b"}', "'audio' is given twice"),
        ("[" * 100_000, "not valid JSON"),
        (b"\xff\xfe{\x00", "not UTF-8"),
        (GOOD, "utterance '0' of dialogue 'd' is repeated; line 2 has it already"),
    ],
)
def test_a_bad_line_is_named(line, message, tmp_path):
    path = tmp_path / "m.jsonl"
    line = line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
    path.write_bytes(b"\n" + json.dumps(GOOD).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(ManifestError, match=message) as caught:
        read_manifest(path)
    assert str(caught.value).startswith(f"{path}, line 4: ")
    assert "\n" not in str(caught.value)


def test_a_manifest_that_is_not_there_or_has_nothing(tmp_path):
    with pytest.raises(ManifestError, match=r"no\.jsonl: the manifest can not be read: No such file"):
        read_manifest(tmp_path / "no.jsonl")
    with pytest.raises(ManifestError, match="can not be read"):
        read_manifest(tmp_path)
    (tmp_path / "blank.jsonl").write_text("\n\n")
    with pytest.raises(ManifestError, match="no utterances"):
        read_manifest(tmp_path / "blank.jsonl")


def test_a_manifest_may_have_any_name_that_a_file_may_have(tmp_path):
    dialogues = [Dialogue("d", (Utterance("d", "0", "A", tmp_path / "0.wav"),))]
    write_manifest(dialogues, tmp_path / f"{'m' * 249}.jsonl")
    assert read_manifest(tmp_path / f"{'m' * 249}.jsonl") == dialogues


def test_a_failed_write_leaves_the_old_file_and_no_temporary_files(tmp_path, monkeypatch):
    path = tmp_path / "m.jsonl"
    dialogue = Dialogue("d", (Utterance("d", "0", "A", tmp_path / "0.wav"),))
    write_manifest([dialogue], path)
    before = path.read_bytes()
    with pytest.raises(ManifestError, match="two dialogues"):
        write_manifest([dialogue, dialogue], path)
    with pytest.raises(ManifestError, match="no dialogues"):
        write_manifest([], path)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_manifest([Dialogue("e", (Utterance("e", "0", "A", tmp_path / "0.wav"),))], path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["m.jsonl"]


@pytest.mark.skipif(os.name == "nt", reason="permissions are of POSIX")
def test_a_manifest_has_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    write_manifest([Dialogue("d", (Utterance("d", "0", "A", tmp_path / "0.wav"),))], tmp_path / "m.jsonl")
    assert stat.S_IMODE((tmp_path / "m.jsonl").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_a_dialogue_has_only_its_own_utterances_each_once():
    mine, other = Utterance("d", "0", "A", Path("0.wav")), Utterance("e", "0", "A", Path("0.wav"))
    assert Dialogue("d", [mine]).utterances == (mine,)
    for utterances, message in [((), "no utterances"), ((mine, other), "of dialogue 'e'"), ((mine, mine), "twice")]:
        with pytest.raises(ManifestError, match=message):
            Dialogue("d", utterances)
