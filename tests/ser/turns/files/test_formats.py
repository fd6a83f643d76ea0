"""What each format has of its own: tiers, silence, voices, channels, names in texts."""

import io
from pathlib import Path

import pytest
from praatio import textgrid as praatio_textgrid
from pympi import Eaf, TextGrid

from mal_adapter.errors import TurnError
from mal_adapter.ser.turns.files import read_turns
from mal_adapter.ser.turns.turn import Turn
from tests.ser.turns.files.written import EAF, FILES, LONG_TEXTGRID, SHORT_TEXTGRID, TURNS, aligned, eaf


@pytest.fixture
def read(tmp_path: Path):
    def read(name: str, content: str | bytes, **options) -> list[Turn]:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_turns(path, **options)

    return read


def said(turns: list[Turn]) -> list[tuple[str, str | None]]:
    return [(turn.speaker, turn.text) for turn in turns]


# RTTM


def test_channels_of_rttm_count_if_there_are_several(read):
    lines = "SPEAKER c {} 0 1 <NA> <NA> A <NA> <NA>\nSPEAKER c {} 2 1 <NA> <NA> B <NA> <NA>"
    assert [turn.channel for turn in read("a.rttm", lines.format(1, 1))] == [None, None]
    assert [turn.channel for turn in read("a.rttm", lines.format(1, 2))] == [0, 1]
    assert [turn.channel for turn in read("a.rttm", lines.format(2, 2))] == [1, 1]
    assert [turn.channel for turn in read("a.rttm", lines.format("<NA>", "<NA>"))] == [None, None]


def test_one_recording_of_an_rttm_is_chosen(read):
    lines = "SPEAKER one 1 0 1 <NA> <NA> A <NA> <NA>\nSPEAKER two 1 2 1 <NA> <NA> B <NA> <NA>"
    with pytest.raises(TurnError, match=r"several recordings; choose one by tiers=: 'one' \(1 line\), 'two' \(1 lin"):
        read("a.rttm", lines)
    assert said(read("a.rttm", lines, tiers="two")) == [("B", None)]


def test_sums_of_start_and_duration_have_no_rounding_errors(read):
    assert read("a.rttm", "SPEAKER c 1 0.1 0.2 <NA> <NA> A <NA> <NA>")[0].end_s == 0.3


# TextGrid


def test_praat_texts_may_have_comments_breaks_and_quotes(read):
    content = LONG_TEXTGRID.replace("Let me see.", 'See ""item [2]:""\nintervals [1]: xmin = 7 ! no "" comment')
    content = content.replace('name = "agent"', 'name = "agent" ! her name is "Zoë" and 7')
    assert read("a.TextGrid", content)[1].text == 'See "item [2]:" intervals [1]: xmin = 7 ! no " comment'


def test_times_with_exponents_are_numbers(read):
    assert read("a.TextGrid", SHORT_TEXTGRID.replace("0.5", "5.0e-05"))[0].start_s == 5e-05


@pytest.mark.parametrize("form", ["short_textgrid", "long_textgrid"])
def test_what_praatio_writes_is_read(read, tmp_path: Path, form: str):
    grid = praatio_textgrid.Textgrid()
    for name in ("customer", "agent"):
        entries = [(t.start_s, t.end_s, t.text) for t in TURNS if t.speaker == name]
        grid.addTier(praatio_textgrid.IntervalTier(name, entries, 0, 6))
    grid.save(str(tmp_path / "made.TextGrid"), form, includeBlankSpaces=True)
    assert read_turns(tmp_path / "made.TextGrid") == TURNS


@pytest.mark.parametrize("mode", ["normal", "short", "binary"])
def test_what_pympi_writes_is_read(read, tmp_path: Path, mode: str):
    grid = TextGrid(xmax=6)
    for name in ("customer", "agent"):
        tier = grid.add_tier(name)
        for turn in TURNS:
            if turn.speaker == name:
                tier.add_interval(turn.start_s, turn.end_s, turn.text)
    grid.to_file(tmp_path / "made.TextGrid", mode=mode)
    assert read_turns(tmp_path / "made.TextGrid") == TURNS


def test_a_binary_textgrid_that_is_cut_is_refused(read, tmp_path: Path):
    grid = TextGrid(xmax=6)
    grid.add_tier("a").add_interval(1, 2, "Hi")
    grid.to_file(tmp_path / "made.TextGrid", mode="binary")
    data = (tmp_path / "made.TextGrid").read_bytes()
    with pytest.raises(TurnError, match="the binary TextGrid can't be read"):
        read("cut.TextGrid", data[:60])


def test_tiers_are_chosen_by_name(read):
    assert said(read("a.TextGrid", SHORT_TEXTGRID, tiers=["Agent "])) == [("agent", "Let me see.")]
    with pytest.raises(TurnError, match=r"no tier 'agnet'; did you mean 'agent'\?; the file has 'customer' \(2 interv"):
        read("a.TextGrid", SHORT_TEXTGRID, tiers="agnet")
    with pytest.raises(TurnError, match=r"'beeps', point 1: the end must be after the start, got 1.5 s for both"):
        read("a.TextGrid", SHORT_TEXTGRID, tiers=["beeps"])


def test_tiers_of_words_and_phones_are_no_speakers(read):
    aligner = SHORT_TEXTGRID.replace('"customer"', '"words"').replace('"agent"', '"phones"')
    with pytest.raises(
        TurnError, match=r"not clear .* choose them by tiers=: 'words' \(2 intervals\), 'phones' \(1 int"
    ):
        read("a.TextGrid", aligner)
    assert len(read("a.TextGrid", aligner, tiers="words")) == 2
    assert said(read("a.TextGrid", SHORT_TEXTGRID.replace('"customer"', '"agent - words"'))) == [
        ("agent", "Let me see.")
    ]


def test_a_tier_with_the_intervals_of_another_one_is_no_other_speaker(read):
    first, second = SHORT_TEXTGRID.split('"IntervalTier"\n"agent"')
    customer = first[first.index('"IntervalTier"') :].replace('"customer"', '"feeling"').replace("Thank you.", "glad")
    content = (first + customer + '"IntervalTier"\n"agent"' + second).replace("\n3\n", "\n4\n", 1)
    assert read("a.TextGrid", content) == TURNS


def test_labels_of_a_single_tier_of_speakers_are_their_names(read):
    content = SHORT_TEXTGRID[: SHORT_TEXTGRID.index('"IntervalTier"\n"agent"')].replace("\n3\n", "\n1\n", 1)
    content = (
        content.replace('"customer"', '"Speakers"').replace("Where is my parcel?", "Ann").replace("Thank you.", "Bo")
    )
    assert said(read("a.TextGrid", content)) == [("Ann", None), ("Bo", None)]


# ELAN


def test_tiers_that_refer_to_others_have_their_times(read):
    assert read("a.eaf", EAF, tiers="translation") == [Turn(2.0, 3.5, "agent", text="Mal sehen.")]
    assert read("a.eaf", EAF, tiers=["note"]) == [Turn(2.0, 3.5, "note", text="friendly")]
    with pytest.raises(TurnError, match=r"the file has 'K-Spch' \(2 annotations\), 'agent' \(1 annotation\), 'transl"):
        read("a.eaf", EAF, tiers="customer")


def test_slots_without_times_divide_what_is_between_their_neighbours(read):
    slots = '<TIME_SLOT TIME_SLOT_ID="ts1" TIME_VALUE="1000"/><TIME_SLOT TIME_SLOT_ID="ts2"/>'
    slots += '<TIME_SLOT TIME_SLOT_ID="ts3"/><TIME_SLOT TIME_SLOT_ID="ts4" TIME_VALUE="4000"/>'
    tier = f'<TIER LINGUISTIC_TYPE_REF="default-lt" TIER_ID="A">{aligned(1, 1, 2, "one")}'
    tier += f"{aligned(2, 2, 3, 'two')}{aligned(3, 3, 4, 'three')}</TIER>"
    assert [(turn.start_s, turn.end_s) for turn in read("a.eaf", eaf(tier, slots))] == [(1, 2), (2, 3), (3, 4)]


def test_what_pympi_writes_as_elan_is_read(tmp_path: Path):
    made = Eaf()
    made.remove_tier("default")
    for name in ("customer", "agent"):
        made.add_tier(name)
    for turn in TURNS:
        made.add_annotation(turn.speaker, int(1000 * turn.start_s), int(1000 * turn.end_s), turn.text)
    made.to_file(tmp_path / "made.eaf")
    assert read_turns(tmp_path / "made.eaf") == TURNS


# Subtitles


def test_a_cue_with_several_voices_is_a_turn_of_each(read):
    content = "WEBVTT\n\n00:01.000 --> 00:02.000\n<v Ann>Yes.</v> <v Bo &amp; Co>No.\n<v Ann>Well.\n"
    turns = read("a.vtt", content)
    assert sorted(said(turns)) == [("Ann", "Yes. Well."), ("Bo & Co", "No.")]
    assert all(turn.overlaps for turn in turns)


def test_names_before_colons_are_names_where_most_lines_have_them(read):
    cue = "{0}\n00:00:0{0},000 --> 00:00:0{0},900\n{1}\n\n"

    def names(*lines: str) -> list[str]:
        content = "".join(cue.format(number, line) for number, line in enumerate(lines, start=1))
        return [turn.speaker for turn in read("a.srt", content)]

    assert names("Hello.", "Note: it rains.", "Yes.") == ["?", "?", "?"]
    assert names("Ann: Hello.", "Bo: Hi.", "Well.") == ["Ann", "Bo", "?"]
    assert names("It is 10:30 now.", "MR. LEE: Sure.", "Yes.") == ["?", "?", "?"]
    assert names("JANE: Hi.", "So, here it is: a cat.", "No.") == ["JANE", "?", "?"]
    assert names("Speaker 1: Hi.", "[Bo]: No.", "[Music]", "x") == ["Speaker 1", "Bo", "?", "?"]
    assert names("Just one: colon") == ["?"]


def test_numbers_that_are_said_are_no_counters(read):
    assert said(read("a.srt", "1\n00:00:01,000 --> 00:00:02,000\nI was born in\n1984\n")) == [
        ("?", "I was born in 1984")
    ]


def test_cues_without_words_are_no_turns(read):
    content = "1\n00:00:01,000 --> 00:00:02,000\n\n\n2\n00:00:02,000 --> 00:00:03,000\nHi.\n"
    assert said(read("a.srt", content)) == [("?", "Hi.")]
    content = "WEBVTT\n\n00:01.000 --> 00:02.000\n\n00:02.000 --> 00:03.000\nHi.\n"
    assert said(read("a.vtt", content)) == [("?", "Hi.")]


# Audacity


def test_short_labels_are_names_and_sentences_are_texts(read):
    assert said(read("a.txt", "0\t1\tAnn\n1\t2\tBo Lee\n3\t4\n")) == [("Ann", None), ("Bo Lee", None), ("?", None)]
    assert said(read("a.txt", "0\t1\tWhere is it?\n1\t2\tHere\n")) == [("?", "Where is it?"), ("?", "Here")]
    assert said(read("a.txt", "0\t1\tAnn\n1\t2\tsilence\n")) == [("Ann", None)]
    assert read("a.txt", "0,5\t1,25\tAnn\n")[0].end_s == 1.25


# Tables


@pytest.mark.parametrize(
    ("header", "row"),
    [
        ("Start,End,Speaker", "1.5,2.5,Ann"),
        ("START_TIME,END_TIME,SPEAKER_ID", "1.5,2.5,Ann"),
        ("start (s),stop (s),participant", "1.5,2.5,Ann"),
        ("speaker,begin,dur", "Ann,1.5,1"),
        ("from;to;who", "00:00:01,5;00:00:02,5;Ann"),
        ("tmin\ttier\ttext\ttmax", "1.5\tAnn\t\t2.5"),
        ("Begin Time - msec|End Time - msec|Tier", "1500|2500|Ann"),
        ("start_s,end_s,speaker", " 1.5 , 2.5 , Ann"),
        ("startTime,endTime,name", "0:01.5,0:02.5,Ann"),
        ('"start","end","speaker"', '"1.5","2.5","Ann"'),
    ],
)
def test_columns_have_many_names(read, header: str, row: str):
    assert read("a.csv", f"{header}\n{row}\n") == [Turn(1.5, 2.5, "Ann")]


def test_times_of_whispers_tsv_are_milliseconds(read):
    table = 'start\tend\ttext\n0\t2250\tShe said "Hi\n2500\t7000\tand left.\n'
    assert read("a.tsv", table) == [Turn(0.0, 2.25, text='She said "Hi'), Turn(2.5, 7.0, text="and left.")]
    assert read("a.tsv", table.replace("7000", "7000.5").replace('"', ""))[1].end_s == 7000.5
    assert read("a.tsv", table.replace("end", "stop").replace('"', ""))[1].end_s == 7000


def test_tables_may_have_channels_emotions_and_recordings(read):
    table = "file,start,end,channel,emotion\none.wav,0,1,0,sad\ntwo.wav,0,1,1,glad\n"
    with pytest.raises(TurnError, match=r"several recordings; choose one by tiers=: 'one.wav'"):
        read("a.csv", table)
    assert read("a.csv", table, tiers="two.wav") == [Turn(0, 1, "?", 1, emotion="glad")]


def test_fields_may_have_several_lines(read):
    assert read("a.csv", 'start,end,text\n0,1,"two\nlines"\n')[0].text == "two lines"
    with pytest.raises(TurnError, match="line 5: the start must"):
        read("a.csv", '\nstart,end,text\n0,1,"two\nlines"\nx,1,a\n')


# JSON


def test_other_lists_are_chosen_as_tiers(read):
    exclusive = read("a.json", FILES["pyannote.json"], tiers="exclusive_diarization")
    assert [turn.start_s for turn in exclusive] == [0.5, 2.25, 4.0]
    assert not any(turn.overlaps for turn in exclusive)
    assert len(read("a.json", FILES["job.json"], tiers="exclusiveDiarization")) == 1
    assert len(read("a.json", FILES["whisperx.json"], tiers=["word_segments"])) == 1


def test_offsets_of_whisper_cpp_are_milliseconds(read):
    content = """{"systeminfo": "", "model": {"type": "base"}, "transcription": [{"timestamps": {"from": "00:00:00,500",
    "to": "00:00:02,250"}, "offsets": {"from": 500, "to": 2250}, "text": " Hi."}]}"""
    assert read("a.json", content) == [Turn(0.5, 2.25, text="Hi.")]
    with pytest.raises(TurnError, match="transcription, item 1: the end is missing"):
        read("a.json", content.replace('"to": 2250', '"until": 2250'))


def test_speakers_may_be_numbers(read):
    for number, name in ((0, "0"), (1234567, "1234567"), (2.0, "2"), (2.5, "2.5")):
        assert said(read("a.json", f'[{{"start": 0, "end": 1, "speaker": {number}}}]')) == [(name, None)]


def test_reading_a_long_file_is_linear(read):
    lines = io.StringIO()
    for number in range(60_000):
        print(f"SPEAKER c 1 {number}.25 1.5 <NA> <NA> speaker{number % 7} <NA> <NA>", file=lines)
    turns = read("a.rttm", lines.getvalue())
    assert len(turns) == 60_000
    assert all(turn.overlaps for turn in turns)
