"""Files of turns as other tools write them."""

import contextlib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mal_adapter.errors import ConfigError, MissingDependencyError, TurnError
from mal_adapter.ser.turns.files import FORMATS, read_turns
from mal_adapter.ser.turns.turn import Turn
from tests.ser.turns.files.written import EAF, FILES, LONG_TEXTGRID, SHORT_TEXTGRID, TURNS

WITHOUT_TEXT = [replace(turn, text=None) for turn in TURNS]


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("name", FILES)
def test_each_tool_gives_the_same_turns(name: str, tmp_path: Path):
    turns = read_turns(written(tmp_path, name, FILES[name]))
    assert turns == (TURNS if "parcel" in FILES[name] else WITHOUT_TEXT)


@pytest.mark.parametrize("name", FILES)
def test_the_content_says_the_format_where_the_suffix_does_not(name: str, tmp_path: Path):
    turns = read_turns(written(tmp_path, "turns.dat", FILES[name]))
    assert turns == read_turns(written(tmp_path, name, FILES[name]))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", [name for name in FILES if name != "elan.eaf"])
def test_encodings_and_line_ends_make_no_difference(name: str, encoding: str, tmp_path: Path):
    content = FILES[name].replace("\n", "\r\n").encode(encoding)
    assert read_turns(written(tmp_path, name, content)) == read_turns(written(tmp_path, "plain", FILES[name]))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "iso-8859-1"])
def test_xml_is_read_in_the_encoding_that_it_declares(encoding: str, tmp_path: Path):
    declared = {"utf-8-sig": "UTF-8"}.get(encoding, encoding)
    content = EAF.replace("agent", "Zoé").replace('encoding="UTF-8"', f'encoding="{declared}"')
    turns = read_turns(written(tmp_path, "call.eaf", content.encode(encoding)))
    assert {turn.speaker for turn in turns} == {"customer", "Zoé"}


def test_names_are_composed_and_without_invisible_characters(tmp_path: Path):
    rttm = "SPEAKER call 1 0 1 <NA> <NA> Zoe\u0301\u200b <NA> <NA>\nSPEAKER call 1 2 1 <NA> <NA> Zo\u00e9 <NA> <NA>"
    assert [turn.speaker for turn in read_turns(written(tmp_path, "call.rttm", rttm))] == ["Zo\u00e9"] * 2


def test_whoever_has_no_name_is_a_question_mark(tmp_path: Path):
    assert read_turns(written(tmp_path, "a.csv", "start,end\n0,1\n"))[0].speaker == "?"
    assert read_turns(written(tmp_path, "a.json", '[{"start": 0, "end": 1, "speaker": null}]'))[0].speaker == "?"
    assert read_turns(written(tmp_path, "a.rttm", "SPEAKER c 1 0 1 <NA> <NA> <NA> <NA> <NA>"))[0].speaker == "?"
    assert read_turns(written(tmp_path, "a.srt", "1\n00:00:00,000 --> 00:00:01,000\nHi.\n"))[0].speaker == "?"


def test_a_text_may_start_like_a_sound_file(tmp_path: Path):
    assert read_turns(written(tmp_path, "a.csv", "FORM;start;end\nx;0;1\n")) == [Turn(0, 1)]


def test_a_file_may_be_called_like_the_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    written(tmp_path, "-", EAF)
    monkeypatch.chdir(tmp_path)
    assert read_turns("-") == TURNS


def test_channels_are_given_by_name_or_in_order(tmp_path: Path):
    path = written(tmp_path, "call.rttm", FILES["pyannote.rttm"])
    assert {turn.speaker: turn.channel for turn in read_turns(path)} == {"customer": None, "agent": None}
    for channels in (["customer", "agent"], {"agent": 1, "customer": 0, "absent": 2}):
        found = read_turns(path, channels=channels)
        assert {turn.speaker: turn.channel for turn in found} == {"customer": 0, "agent": 1}
        assert [turn.overlaps for turn in found] == [True, True, False]
    with pytest.raises(TurnError, match=r"call.rttm: channels names 'agent', but the file also has 'customer'; give"):
        read_turns(path, channels=["agent"])


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        ("agent", "a sequence of names or a mapping, got the text 'agent'"),
        ({"agent": -1}, "channel of 'agent' must be an integer, counted from 0, got -1"),
        ({"agent": True}, "must be an integer"),
        (["agent", "agent "], "names 'agent ' twice"),
    ],
)
def test_channels_that_are_none_are_refused(channels, message, tmp_path: Path):
    with pytest.raises(ConfigError, match=message):
        read_turns(written(tmp_path, "call.rttm", FILES["pyannote.rttm"]), channels=channels)


def test_an_unknown_format_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"format must be one of rttm, textgrid, elan, .*, got 'lab'"):
        read_turns(tmp_path / "turns.lab", format="lab")


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_that_is_given_is_not_guessed(name: str, tmp_path: Path):
    with pytest.raises(TurnError, match=r"story\.xyz: "):
        read_turns(written(tmp_path, "story.xyz", "Once upon a time\nthere was a king.\n"), format=name)


def test_missing_packages_name_their_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "pympi", None)
    with pytest.raises(MissingDependencyError, match=r"ELAN files needs pympi.*mal-adapter\[recordings\]"):
        read_turns(written(tmp_path, "call.eaf", EAF))


BAD = {
    "nothing": (b"", "the file is empty"),
    "blank": (b" \n\n\t\r\n", "the file is empty"),
    "only a mark": (b"\xef\xbb\xbf", "the file is empty"),
    "prose": (b"Once upon a time\nthere was a king.\n", "the format is not known; read are rttm, textgrid"),
    "sound": (b"RIFF\x24\x00\x00\x00WAVEfmt ", "this is a sound file, and no file of turns"),
    "film": (b"\x00\x00\x00\x18ftypmp42", "this is a sound file"),
    "zeros": (b"text\x00\x01\x02\x03with zeros", "this is no text"),
    "latin": ("WEBVTT\n\n00:01.000 --> 00:02.000\n<v Zoé>Hi\n".encode("latin-1"), r"line 4: .*not UTF-8 \(byte 0xe9\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_file_of_turns_is_refused(name: str, tmp_path: Path):
    content, message = BAD[name]
    with pytest.raises(TurnError, match=rf"turns\.vtt: .*{message}" if name != "prose" else message):
        read_turns(written(tmp_path, "turns.vtt" if name != "prose" else "turns.xyz", content))


def test_places_that_are_no_files_are_refused(tmp_path: Path):
    with pytest.raises(TurnError, match=r"absent.rttm: there is no such file; check the path"):
        read_turns(tmp_path / "absent.rttm")
    with pytest.raises(TurnError, match=r"the file can't be read|no regular file"):
        read_turns(tmp_path)


def test_a_huge_file_is_not_read(tmp_path: Path):
    path = tmp_path / "huge.rttm"
    with path.open("wb") as file:
        file.truncate(300 * 2**20)  # sparse: it takes no space on the disk
    with pytest.raises(TurnError, match="the file has 315 MB, and a file of turns has at most 268 MB"):
        read_turns(path)


#: Format, content, message: a wrong value in each format, with its line or tier.
WRONG = [
    ("a.csv", f"start,end\n{'9' * 5000}:00:00,1\n", "line 2: the start must be a number of seconds, got '999"),
    ("a.csv", f"start,end,channel\n1,2,{'9' * 5000}\n", "line 2: the channel must be an integer"),
    ("a.eaf", EAF.replace('TIME_VALUE="500"', f'TIME_VALUE="{"9" * 400}"'), "a time has hundreds of digits"),
    ("a.vtt", f"WEBVTT\n\n{'9' * 400}:00:03.000 --> 00:04.000\nHi\n", "line 3: expected times such as"),
    ("a.rttm", "SPEAKER c 1 x 1 <NA> <NA> A <NA> <NA>", "line 1: the start must be a number of seconds, got 'x'"),
    ("a.rttm", "SPEAKER c 1 NaN 1 <NA> <NA> A <NA> <NA>", "line 1: the start must be a number of seconds, got 'NaN'"),
    ("a.rttm", "SPEAKER c 1 1 inf <NA> <NA> A <NA> <NA>", "line 1: the duration must be a number of seconds"),
    ("a.rttm", "\nSPEAKER c 1 -1 2 <NA> <NA> A <NA> <NA>", "line 2: the start must be at least 0, got -1 s to 1 s"),
    ("a.rttm", "SPEAKER c 1 1 -2 <NA> <NA> A <NA> <NA>", "line 1: the duration must be at least 0, got -2 s"),
    ("a.rttm", "SPEAKER c 1 1 2 <NA>", "line 1: a SPEAKER line has 10 fields .* got 6 fields"),
    ("a.rttm", "SPEAKER c 1 1 2 <NA> <NA> Ann Lee <NA> <NA>", "line 1: .* got 11; names can't contain spaces"),
    ("a.rttm", "SPEAKER c 1 1 2 <NA> <NA> A <NA> <NA>\nHello", "line 2: .* starts with SPEAKER, got 'Hello'"),
    ("a.rttm", "SPEAKER c 1 1 0 <NA> <NA> A <NA> <NA>", "has no turns, only 'c' \\(1 line\\)"),
    (
        "a.TextGrid",
        SHORT_TEXTGRID.replace("\n2.25\n4\n", "\n4\n2.25\n"),
        "'customer', interval 3: the end must be after",
    ),
    ("a.TextGrid", SHORT_TEXTGRID.replace("\n0.5\n2.25", "\n-0.5\n2.25"), "interval 2: the start must be at least 0"),
    (
        "a.TextGrid",
        SHORT_TEXTGRID.replace("\n5.5\n6\n", "\n5.5\n7\n"),
        "interval 5: the end is 7 s, after the TextGrid's",
    ),
    (
        "a.TextGrid",
        SHORT_TEXTGRID.replace('"Let me see."', "Let"),
        "expected tier 'agent', interval 2: the text as a str",
    ),
    ("a.TextGrid", SHORT_TEXTGRID.replace('see."', "see."), "line .*: expected .*interval 3: the start as a number"),
    ("a.TextGrid", SHORT_TEXTGRID[:200], "is missing: the file is not complete"),
    ("a.TextGrid", SHORT_TEXTGRID.replace("<exists>", "<absent>"), "the TextGrid has no tiers"),
    ("a.TextGrid", SHORT_TEXTGRID.replace("\n3\n", "\n2.5\n", 1), "the number of tiers must be an integer, got 2.5"),
    ("a.TextGrid", SHORT_TEXTGRID.replace("TextTier", "PitchTier"), "tier 'beeps': the class must be IntervalTier or"),
    ("a.TextGrid", LONG_TEXTGRID.replace("TextGrid", "Pitch"), "this is Praat's 'Pitch', expected a TextGrid"),
    ("a.TextGrid", LONG_TEXTGRID.replace("= 5.5 ", "= 5,5 "), "expected .* as a number"),
    ("a.eaf", EAF.replace("</TIER>", "", 1), "line .*: the XML is not complete"),
    ("a.eaf", EAF.replace('TIME_SLOT_REF1="ts1"', 'TIME_SLOT_REF1="ts9"'), "'K-Spch': there is no time slot 'ts9'"),
    ("a.eaf", EAF.replace('TIME_VALUE="500"', ""), "tier 'K-Spch': time slot ts1 has no time; align it"),
    ("a.eaf", EAF.replace('TIME_VALUE="500"', 'TIME_VALUE="2900"'), "'K-Spch', annotation a1: the end must be after"),
    (
        "a.eaf",
        EAF.replace('TIME_VALUE="500"', 'TIME_VALUE="-5"'),
        "'K-Spch', annotation a1: the start must be at least 0",
    ),
    ("a.eaf", EAF.replace('TIME_VALUE="500"', 'TIME_VALUE="x"'), "no ELAN file that can be read .ValueError"),
    (
        "a.eaf",
        EAF.replace('ANNOTATION_REF="a4"', 'ANNOTATION_REF="a9"'),
        "'note', annotation a5: it refers to no annota",
    ),
    ("a.eaf", EAF.replace('ANNOTATION_REF="a3"', 'ANNOTATION_REF="a5"'), "annotation a4: it refers to no annotation"),
    ("a.eaf", EAF.replace('"milliseconds"', '"PAL-frames"'), "the times are in 'PAL-frames', expected milliseconds"),
    ("a.eaf", "<ANNOTATION_DOCUMENT/>", "this is XML, but no ELAN file that can be read .KeyError"),
    ("a.srt", "1\n00:00:03,000 --> 00:00:02,000\nHi\n", "line 2: the end must be after the start, got 3 s to 2 s"),
    (
        "a.srt",
        "1\n00:00:03,000 --> 00:00:03,000\nHi\n",
        "line 2: .*got 3 s for both with the text 'Hi'; correct or remove",
    ),
    ("a.srt", "1\n00:00:03 --> 00:00:02\nHi\n", "line 2: expected times such as 00:01:02,500 --> 00:01:04,000"),
    ("a.srt", "1\n100:00:03,000 --> 100:00:04,000\nHi\n", "line 2: expected times such as"),
    ("a.vtt", "WEBVTT\n\n00:03.000 --> 00:02.000\nHi\n", "line 3: the end must be after the start"),
    ("a.vtt", "WEBVTT\n\n00:03 --> 00:04\nHi\n", "line 3: expected times such as 00:01:02.500 --> 00:01:04.000"),
    ("a.vtt", "WEBVTT\n\n-00:03.000 --> 00:04.000\nHi\n", "line 3: expected times such as"),
    ("a.vtt", "00:03.000 --> 00:04.000\nHi\n", "must start with a line WEBVTT; add it"),
    ("a.vtt", "WEBVTT\n\nNOTE nothing is said\n", "the file has no turns, only 0 cues"),
    ("a.txt", "0.5\t0.25\tA\n", "line 1: the end must be after the start, got 0.5 s to 0.25 s"),
    ("a.txt", "0.5\t1.5\tA\n2\n", "line 2: expected start, end and label, separated by tabs, got '2'"),
    ("a.txt", "0.5\t1.5\tA\n2\tx\tA\n", "line 2: the end must be a number of seconds, got 'x'"),
    ("a.txt", "0.5\t0.5\tA\n", "the file has no turns, only 0 labels"),
    ("a.csv", "0,1,A\n2,3,B\n", r"the first line must name the columns: expected start and end .*got '0,1,A'"),
    ("a.csv", "start,end\n1,\n", "line 2: the end is missing; expected start and end"),
    ("a.csv", "start,end\n1\n", "line 2: the end is missing"),
    ("a.csv", "start,end,speaker\n1,2,Ann,Lee\n", "line 2: the row has more fields than the header"),
    ("a.csv", "start,end,speaker\n2,1,Ann\n", "line 2: the end must be after the start"),
    ("a.csv", "start,end,speaker\n1e400,1,Ann\n", "line 2: the start must be a number of seconds, got '1e400'"),
    ("a.csv", "start,end,channel\n1,2,left\n", "line 2: the channel must be an integer, counted from 0, got 'left'"),
    ("a.csv", 'start,end,text\n1,2,"never closed\n', "the table can't be read: unexpected end of data"),
    ("a.csv", "start,duration\n1,-2\n", "line 2: the duration must be at least 0"),
    (
        "a.csv",
        "start,end,text\n1,1,Hi\n",
        "line 2: the end must be after the start, got 1 s for both with the text 'Hi'",
    ),
    ("a.csv", "start,end\n", "the file has no turns, only no tiers"),
    ("a.csv", f"start,end,text\n1,2,{'x' * 200_000}\n", "the table can't be read: field larger than field limit"),
    (
        "a.json",
        '{"segments": [{"start": 1, "end": 2}, {"start": 3}]}',
        "segments, item 2: expected start and end .*'start'",
    ),
    ("a.json", '[{"start": 1, "end": 2}, {"start": NaN, "end": 2}]', "list, item 2: the start must be a number"),
    ("a.json", '[{"start": 1, "end": true}]', "list, item 1: the end must be a number of seconds, got True"),
    ("a.json", '[{"start": 1, "end": 2}, 3]', "list, item 2: expected an object"),
    ("a.json", '[{"start": 2, "end": 1}]', "list, item 1: the end must be after the start"),
    ("a.json", '{"segments": []}', "the file has no turns, only 'segments' .0 items."),
    ("a.json", '{"text": "Hello"}', "expected a list of objects with start and end .*got 'the keys text'"),
    ("a.json", '{"segments": [{"start": 1,', "line 1: the JSON is not complete"),
    ("a.json", '{"a": 1, "a": 2}', "the JSON can't be read: the key 'a' is given twice"),
    ("a.json", "[" * 200_000, "the JSON can't be read|not complete"),
    ("a.json", '{"jobId": "1", "status": "running"}', "the job has the status 'running' and no output"),
    ("a.jsonl", '{"start": 1, "end": 2}\n{"start": 1,\n', "line 2: this is no JSON object"),
]


@pytest.mark.parametrize(("name", "content", "message"), WRONG, ids=range(len(WRONG)))
def test_a_wrong_value_is_named_with_its_place(name: str, content: str, message: str, tmp_path: Path):
    with pytest.raises(TurnError, match=message) as caught:
        read_turns(written(tmp_path, name, content))
    assert str(caught.value).startswith(f"{tmp_path / name}: ")


HOSTILE = [
    '<!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;">]>\n',
    '<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/hostname">]>\n',
    '<!DOCTYPE x SYSTEM "http://localhost/x.dtd">\n',
]


@pytest.mark.parametrize("before", HOSTILE)
def test_xml_with_entities_is_refused(before: str, tmp_path: Path):
    content = EAF.replace("<ANNOTATION_DOCUMENT", f"{before}<ANNOTATION_DOCUMENT").replace("Thank you.", "&amp;a;")
    with pytest.raises(TurnError, match="the XML has a document type"):
        read_turns(written(tmp_path, "call.eaf", content))


def test_an_undefined_entity_is_refused(tmp_path: Path):
    with pytest.raises(TurnError, match=r"the XML is not complete .undefined entity"):
        read_turns(written(tmp_path, "call.eaf", EAF.replace("Thank you.", "&file;")))


@given(st.sampled_from(sorted(FILES)), st.data())
def test_files_that_are_cut_or_changed_give_turns_or_a_turn_error(tmp_path_factory, name: str, data: st.DataObject):
    """Nothing but a TurnError leaves the readers, whatever the file has."""
    content = bytearray(FILES[name].encode())
    for _ in range(data.draw(st.integers(1, 3))):
        first = data.draw(st.integers(0, len(content)))
        last = data.draw(st.integers(first, min(first + 40, len(content))))
        content[first:last] = data.draw(st.binary(max_size=6) | st.sampled_from([b'"', b"\n", b"-", b"\x00", b"1e9"]))
    path = written(tmp_path_factory.getbasetemp(), name, bytes(content))
    with contextlib.suppress(TurnError):
        turns = read_turns(path)
        assert turns
        assert all(isinstance(turn, Turn) for turn in turns)
