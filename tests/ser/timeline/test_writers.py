"""Each format is read back by another library or program."""

import csv
import html
import io
import itertools
import json
import re
import subprocess
import unicodedata
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path
from urllib.parse import unquote

import pysubs2
import pytest
import webvtt
from hypothesis import HealthCheck, given, settings
from praatio.textgrid import openTextgrid
from pympi import Eaf, TextGrid

from mal_adapter.errors import MissingDependencyError, TurnError
from mal_adapter.ser.names import cleaned
from mal_adapter.ser.timeline import Timeline, TimelineEntry
from mal_adapter.ser.timeline.writers import (
    WRITERS,
    read_timeline,
    write_csv,
    write_elan,
    write_jsonl,
    write_rttm,
    write_srt,
    write_textgrid,
    write_webvtt,
)
from mal_adapter.ser.timeline.writers.parts import one_line, speaker
from mal_adapter.ser.turns.files import read_turns
from mal_adapter.ser.turns.turn import Turn
from tests.ser.timeline.made import LABELS, made_timeline, same, timelines

# Overlaps between speakers, of a speaker with herself, neighbours that touch, a failure, and every character that a
# format might trip over.
ODD = 'He said "no" --> <b>x</b> &amp; {\\an8} \\N ]]> ;;\t\n\n1\n00:00:01,000 --> 00:00:02,000 é 🙂 \u202eabc \x07\x85'
CALL = made_timeline(
    Turn(0.5, 2.25, "agent", 1, "Let me see."),
    Turn(2.0, 3.5, "customer", 0, ODD, "sad", overlaps=True),
    Turn(2.25, 4.0, "agent", 1),
    Turn(3.0, 5.0, "agent", 1, "I talk over myself"),
    Turn(7.5, 8.0004, 'Zoë <& "Co"> --> [x]: 50%\tB\n🙂', text="1984"),
    failed=(2,),
)
given_timelines = given(timelines())
# A file per example: the folder of the test is shared, and each example replaces the file.
sharing = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def by_start(timeline: Timeline) -> list[TimelineEntry]:
    return sorted(timeline.entries, key=lambda entry: entry.turn.start_s)


def ms(turn: Turn) -> tuple[int, int]:
    return round(1000 * turn.start_s), round(1000 * turn.end_s)


def ffmpeg(path: Path, to: str) -> str:
    command = ["ffmpeg", "-loglevel", "error", "-i", path, "-f", to, "-"]
    return subprocess.run(command, capture_output=True, check=True, timeout=60).stdout.decode()


@pytest.mark.parametrize("suffix", WRITERS)
@sharing
@given_timelines
def test_any_timeline_can_be_written(tmp_path: Path, suffix: str, timeline: Timeline):
    path = tmp_path / "new" / "folder" / f"call{suffix}"
    WRITERS[suffix](timeline, path)
    assert path.read_text(encoding="utf-8") or (suffix in (".rttm", ".srt") and not timeline.entries)
    assert list(path.parent.iterdir()) == [path]  # no temporary file is left


@pytest.mark.parametrize("suffix", WRITERS)
def test_an_older_file_stays_if_the_new_one_can_not_be_written(tmp_path: Path, suffix: str):
    path = tmp_path / f"call{suffix}"
    WRITERS[suffix](CALL, path)
    before = path.read_bytes()
    path.chmod(0o444)
    folder = tmp_path / f"folder{suffix}"
    folder.mkdir()
    with pytest.raises(IsADirectoryError):
        WRITERS[suffix](CALL, folder)  # a folder can't be replaced by a file
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [path.name]
    assert path.read_bytes() == before


# JSON Lines


@sharing
@given_timelines
def test_json_lines_have_everything(tmp_path: Path, timeline: Timeline):
    path = tmp_path / "call.jsonl"
    write_jsonl(timeline, path)
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    assert records == json.loads(json.dumps(timeline.to_records()))
    assert same(read_timeline(path), timeline)


def test_json_lines_that_are_none_name_the_line(tmp_path: Path):
    path = tmp_path / "call.jsonl"
    with pytest.raises(TurnError, match=r"call.jsonl: the timeline can't be read: No such file"):
        read_timeline(path)
    write_jsonl(CALL, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    with pytest.raises(TurnError, match=r"call.jsonl, line 6: this is no JSON object"):
        read_timeline(path)
    path.write_bytes(b"[]\n")
    with pytest.raises(TurnError, match="line 1: expected a JSON object"):
        read_timeline(path)
    path.write_bytes(b"")
    with pytest.raises(TurnError, match=r"call.jsonl: the first record of a timeline must"):
        read_timeline(path)


def test_a_recording_whose_name_is_not_utf_8_is_named_in_json(tmp_path: Path):
    odd = Timeline("m\udcfasica.wav", 1.0, (), LABELS, "musica", "How?")
    write_jsonl(odd, tmp_path / "odd.jsonl")
    assert read_timeline(tmp_path / "odd.jsonl") == odd
    for suffix, write in WRITERS.items():
        write(odd, tmp_path / f"odd{suffix}")


# CSV


@sharing
@given_timelines
def test_a_table_has_a_row_per_turn(tmp_path: Path, timeline: Timeline):
    path = tmp_path / "call.csv"
    write_csv(timeline, path)
    rows = list(csv.DictReader(io.StringIO(path.read_bytes().decode(), newline="")))
    assert len(rows) == len(timeline.entries)
    for row, entry in zip(rows, timeline.entries, strict=True):
        turn = entry.turn
        assert (row["speaker"], float(row["start_s"]), float(row["end_s"])) == (turn.speaker, turn.start_s, turn.end_s)
        assert row["channel"] == ("" if turn.channel is None else str(turn.channel))
        assert row["text"] == (turn.text or "")
        assert row["emotion"] == (entry.emotion or "")
        assert row["error"] == (entry.error or "")
        for label in LABELS:
            odds = row[f"probability {label}"]
            assert odds == "" if entry.emotion is None else float(odds) == entry.result.probabilities[label]
        assert row["emotion without memory"] == (entry.emotion_without_memory or "")


# RTTM


@sharing
@given_timelines
def test_rttm_has_ten_fields_per_line(tmp_path: Path, timeline: Timeline):
    path = tmp_path / "call.rttm"
    write_rttm(timeline, path)
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    assert len(lines) == len(timeline.entries)
    for line, entry in zip(lines, by_start(timeline), strict=True):
        kind, recording, channel, start, length, spelling, emotion, name, confidence, ahead = line.split()
        assert (kind, recording, spelling, ahead) == ("SPEAKER", "call-42", "<NA>", "<NA>")
        assert int(channel) == (entry.turn.channel or 0) + 1
        assert (round(1000 * float(start)), round(1000 * (float(start) + float(length)))) == ms(entry.turn)
        assert unquote(name) == speaker(entry)
        assert emotion == (entry.emotion or "<NA>")
        assert confidence == ("<NA>" if entry.probability is None else f"{entry.probability:.4f}")


def test_awk_sums_what_each_speaker_says_in_an_rttm(tmp_path: Path):
    write_rttm(CALL, tmp_path / "call.rttm")
    program = '$1 == "SPEAKER" && NF == 10 { said[$8] += $5 } END { for (n in said) printf "%s %.3f\\n", n, said[n] }'
    out = subprocess.run(["awk", program, tmp_path / "call.rttm"], capture_output=True, check=True, text=True).stdout
    zoe = "Zoë%20<&%20%22Co%22>%20-->%20[x]:%2050%25%20B%20🙂"
    assert sorted(out.splitlines()) == [f"{zoe} 0.500", "agent 5.500", "customer 1.500"]


# Subtitles


@sharing
@given_timelines
def test_webvtt_py_reads_the_cues(tmp_path: Path, timeline: Timeline):
    path = tmp_path / "call.vtt"
    write_webvtt(timeline, path)
    captions = webvtt.from_string(path.read_text(encoding="utf-8"), strict=True)
    assert len(captions) == len(timeline.entries)
    for caption, entry in zip(captions, by_start(timeline), strict=True):
        assert (caption.start_time.in_milliseconds(), caption.end_time.in_milliseconds()) == ms(entry.turn)
        assert html.unescape(caption.voice) == speaker(entry)
        answer = "(no answer)" if entry.emotion is None else f"({entry.emotion} {100 * entry.probability:.0f} %)"
        assert html.unescape(caption.text) == f"{answer} {one_line(entry.turn.text)}".strip()


def test_pysubs2_and_ffmpeg_read_webvtt(tmp_path: Path):
    path = tmp_path / "call.vtt"
    write_webvtt(CALL, path)
    # ffmpeg resolves the escapes.
    assert 'He said "no" --> <b>x</b> &amp;' in ffmpeg(path, "srt")
    # Of words with two times in a line pysubs2 makes another cue.
    path.write_text(path.read_text(encoding="utf-8").replace("00:00:01,000", "one"), encoding="utf-8")
    for text in (path.read_text(encoding="utf-8"), ffmpeg(path, "srt")):
        events = pysubs2.SSAFile.from_string(text).events
        assert [(event.start, event.end) for event in events] == [ms(entry.turn) for entry in by_start(CALL)]
        assert ["no answer" in event.plaintext for event in events] == [False, False, True, False, False]
        assert all("(sad 50 %)" in event.plaintext for event in events if "no answer" not in event.plaintext)


def test_the_reason_of_a_failure_is_a_note_in_webvtt(tmp_path: Path):
    write_webvtt(CALL, tmp_path / "call.vtt")
    (note,) = webvtt.read(str(tmp_path / "call.vtt")).header_comments
    assert note.splitlines()[1:] == [f"3: no answer: {CALL.entries[2].error}"]


@sharing
@given_timelines
def test_pysubs2_reads_srt(tmp_path: Path, timeline: Timeline):
    path = tmp_path / "call.srt"
    write_srt(timeline, path)
    events = pysubs2.SSAFile.from_string(f"{path.read_text(encoding='utf-8')}\n1\n", format_="srt").events
    assert len(events) == len(timeline.entries)
    for event, entry in zip(events, by_start(timeline), strict=True):
        assert (event.start, event.end) == ms(entry.turn)
        answer = "no answer" if entry.emotion is None else f"{entry.emotion} {100 * entry.probability:.0f} %"
        expected = f"[{speaker(entry)}]: ({answer}) {one_line(entry.turn.text)}".strip()
        # Full-width forms are compatible with the characters that SRT can't hold.
        assert unicodedata.normalize("NFKC", event.plaintext) == unicodedata.normalize("NFKC", expected)


def test_ffmpeg_and_webvtt_py_read_srt(tmp_path: Path):
    path = tmp_path / "call.srt"
    write_srt(CALL, path)
    assert len(pysubs2.load(str(path)).events) == len(CALL.entries)
    for captions in (webvtt.from_string(ffmpeg(path, "webvtt")), webvtt.from_srt(str(path))):
        times = [(c.start_time.in_milliseconds(), c.end_time.in_milliseconds()) for c in captions]
        assert times == [ms(entry.turn) for entry in by_start(CALL)]
        assert "[agent]: (no answer)" in [caption.text for caption in captions]
        assert "He said" in captions[1].text
        assert "＼N" in captions[1].text


# TextGrid


def expected_intervals(timeline: Timeline, per_s: int) -> dict[str, list[tuple[int, int, str]]]:
    found = defaultdict(list)
    for entry in by_start(timeline):
        start, end = round(entry.turn.start_s * per_s), round(entry.turn.end_s * per_s)
        found[speaker(entry)].append((start, end, one_line(entry.turn.text) or "speech"))
    return {name: sorted(rows) for name, rows in found.items()}


@sharing
@given_timelines
def test_praatio_and_pympi_read_the_textgrid(tmp_path: Path, timeline: Timeline):
    path = tmp_path / "call.TextGrid"
    write_textgrid(timeline, path)
    grid = openTextgrid(str(path), includeEmptyIntervals=True, reportingMode="error")
    assert grid.maxTimestamp >= timeline.duration_s - 1e-4
    other = TextGrid(str(path))
    assert [tier.name for tier in other.tiers] == list(grid.tierNames)
    found = defaultdict(list)
    for name, tier in zip(grid.tierNames, other.tiers, strict=True):
        entries = grid.getTier(name).entries
        assert entries[0].start == 0
        assert entries[-1].end == grid.maxTimestamp
        assert all(one.end == two.start for one, two in itertools.pairwise(entries))  # no gap or overlap
        assert [(one.start, one.end, one.label) for one in entries] == [
            (a, b, text.strip()) for a, b, text in tier.intervals
        ]
        found[name] = [(round(1e4 * e.start), round(1e4 * e.end), e.label) for e in entries if e.label]
    expected = expected_intervals(timeline, 10_000)
    lanes = defaultdict(list)
    for name, rows in found.items():
        owner = next((one for one in expected if re.fullmatch(re.escape(one) + r"( \(\d+\))?", name)), None)
        lanes[owner] += rows
    assert {name: sorted(rows) for name, rows in lanes.items() if name is not None} == expected


def test_emotions_are_tiers_of_the_textgrid(tmp_path: Path):
    write_textgrid(CALL, tmp_path / "call.TextGrid")
    grid = openTextgrid(str(tmp_path / "call.TextGrid"), includeEmptyIntervals=False)
    assert list(grid.tierNames)[:6] == [
        "agent", "agent emotion", "agent emotion without memory",
        "customer", "customer emotion", "customer emotion without memory",
    ]  # fmt: skip
    assert [tuple(entry) for entry in grid.getTier("agent emotion").entries] == [
        (0.5, 2.25, "sad"), (2.25, 4.0, f"no answer: {CALL.entries[2].error}"),
    ]  # fmt: skip
    assert [entry.label for entry in grid.getTier("agent emotion without memory").entries] == ["neutral", "no answer"]
    assert [tuple(entry) for entry in grid.getTier("agent (2)").entries] == [(3.0, 5.0, "I talk over myself")]


# ELAN


@sharing
@given_timelines
def test_pympi_reads_the_elan_file(tmp_path: Path, timeline: Timeline):
    path = tmp_path / "call.eaf"
    write_elan(timeline, path)
    eaf = Eaf(str(path))
    found = defaultdict(list)
    for name, (notes, _, attributes, _) in eaf.tiers.items():
        if attributes.get("PARENT_REF"):
            continue
        for first, last, text, _ in notes.values():
            found[attributes["PARTICIPANT"]].append((eaf.timeslots[first], eaf.timeslots[last], text))
        kinds = {eaf.tiers[child][2]["TIER_ID"] for child in eaf.get_child_tiers_for(name)}
        assert len(kinds) in (2, 3)
        for child in kinds:
            assert len(eaf.tiers[child][1]) == len(notes)
    expected = {
        name: [(start, end, "" if text == "speech" else text) for start, end, text in rows]
        for name, rows in expected_intervals(timeline, 1000).items()
    }
    assert {name: sorted(rows) for name, rows in found.items()} == {
        name: sorted(rows) for name, rows in expected.items()
    }
    check_schema(path)


def check_schema(path: Path) -> None:
    """The rules of EAF's schema 3.0 that concern these files: order, ids, references, attributes and stereotypes."""
    root = ElementTree.parse(path).getroot()
    assert root.tag == "ANNOTATION_DOCUMENT"
    assert {"AUTHOR", "DATE", "FORMAT", "VERSION"} <= set(root.keys())
    assert root.get("FORMAT") == root.get("VERSION") == "3.0"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d", root.get("DATE"))
    order = ["HEADER", "TIME_ORDER", "TIER", "LINGUISTIC_TYPE", "CONSTRAINT"]
    tags = [element.tag for element in root]
    assert tags == sorted(tags, key=order.index)
    for media in root.iter("MEDIA_DESCRIPTOR"):
        assert {"MEDIA_URL", "MIME_TYPE"} <= set(media.keys())
    slots = {slot.get("TIME_SLOT_ID"): int(slot.get("TIME_VALUE")) for slot in root.iter("TIME_SLOT")}
    assert list(slots.values()) == sorted(slots.values())
    types = {kind.get("LINGUISTIC_TYPE_ID"): kind for kind in root.iter("LINGUISTIC_TYPE")}
    stereotypes = {constraint.get("STEREOTYPE") for constraint in root.iter("CONSTRAINT")}
    tiers = {tier.get("TIER_ID"): tier for tier in root.iter("TIER")}
    assert len(tiers) == tags.count("TIER")
    notes = {note.get("ANNOTATION_ID"): note for note in root.iter() if note.tag.endswith("_ANNOTATION")}
    assert len(notes) == len(list(root.iter("ANNOTATION")))
    assert all(re.fullmatch(r"[a-z]+\d+", name) for name in [*slots, *notes])  # xsd:ID
    assert not slots.keys() & notes.keys()
    for tier in tiers.values():
        kind = types[tier.get("LINGUISTIC_TYPE_REF")]
        parent = tier.get("PARENT_REF")
        assert (parent is None) == (kind.get("CONSTRAINTS") is None)
        assert parent is None or (parent in tiers and kind.get("CONSTRAINTS") in stereotypes)
        last = 0
        for note in tier.findall("ANNOTATION/ALIGNABLE_ANNOTATION"):
            start, end = slots[note.get("TIME_SLOT_REF1")], slots[note.get("TIME_SLOT_REF2")]
            assert last <= start < end  # annotations of a tier do not overlap
            last = end
        referred = [note.get("ANNOTATION_REF") for note in tier.findall("ANNOTATION/REF_ANNOTATION")]
        assert len(set(referred)) == len(referred)  # Symbolic_Association: one to one
        assert all(reference in notes for reference in referred)
        assert len(list(tier.iter("ANNOTATION_VALUE"))) == len(tier)


def test_emotions_are_below_the_turns_in_elan(tmp_path: Path):
    write_elan(CALL, tmp_path / "out" / "call.eaf")
    eaf = Eaf(str(tmp_path / "out" / "call.eaf"))
    assert [row[:3] for row in eaf.get_annotation_data_for_tier("agent emotion")] == [
        (500, 2250, "sad"), (2250, 4000, f"no answer: {CALL.entries[2].error}"),
    ]  # fmt: skip
    assert [row[2] for row in eaf.get_annotation_data_for_tier("agent probability")] == ["0.5000", ""]
    assert [row[2] for row in eaf.get_annotation_data_for_tier("customer emotion without memory")] == ["neutral"]
    (media,) = eaf.media_descriptors
    assert media["MEDIA_URL"].startswith("file:///")
    assert (tmp_path / "out" / media["RELATIVE_MEDIA_URL"]).resolve() == Path("calls/call-42.wav").resolve()
    assert dict(eaf.properties)["mal_adapter prompt"] == "How?"


# What is written is read as turns, too.


@pytest.mark.parametrize("suffix", WRITERS)
def test_turns_are_read_from_each_format(tmp_path: Path, suffix: str):
    path = tmp_path / f"call{suffix}"
    WRITERS[suffix](CALL, path)
    turns = read_turns(path)
    assert [ms(turn) for turn in turns] == [ms(entry.turn) for entry in CALL.entries]
    names = [cleaned(entry.turn.speaker) for entry in CALL.entries]
    if suffix == ".srt":
        names[-1] = names[-1].translate(str.maketrans("<>[]", "＜＞［］"))
    if suffix == ".TextGrid":
        names[3] = "agent (2)"  # a TextGrid has no participants
    assert [turn.speaker for turn in turns] == names
    if suffix not in (".rttm", ".srt"):
        assert [one_line(turn.text) or None for turn in turns] == [
            one_line(cleaned(entry.turn.text or "")) or None for entry in CALL.entries
        ]


@pytest.mark.parametrize(("suffix", "package"), [(".eaf", "pympi.Elan"), (".TextGrid", "praatio.textgrid")])
def test_missing_packages_name_their_extra(tmp_path: Path, suffix: str, package: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'mal-adapter\[recordings\]'"):
        WRITERS[suffix](CALL, tmp_path / "call")
    assert not any(tmp_path.iterdir())
