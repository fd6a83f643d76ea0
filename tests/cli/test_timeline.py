"""`mal-adapter timeline`: recordings in, tables, JSON and folders out; done once, continued, and never mixed up."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mal_adapter.demo import ADAPTER_FOLDER, HOST_FOLDER
from mal_adapter.ser.recognizer import EmotionRecognizer
from mal_adapter.ser.timeline.output import FORMATS
from mal_adapter.ser.turns import Turn
from tests.commands import interrupted, mal_adapter, on_a_terminal
from tests.ser.timeline.calls import made_call

FAST = ("--formats", "jsonl,html", "--no-audio")


def write_turns(path: Path, **turns: Sequence[Turn]) -> Path:
    """An RTTM file with the turns of several recordings."""
    lines = [
        f"SPEAKER {name} {(turn.channel or 0) + 1} {turn.start_s:.4f} {turn.duration_s:.4f} "
        f"<NA> <NA> {turn.speaker} <NA> <NA>"
        for name, several in turns.items()
        for turn in several
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Three calls with a file of turns each, in the working directory."""
    monkeypatch.chdir(tmp_path)
    for number in range(3):
        call = made_call(tmp_path / f"call{number}.wav", seed=number, turns=5, channels=2)
        write_turns(tmp_path / f"call{number}.rttm", **{f"call{number}": call.turns})
    return [f"call{number}.wav" for number in range(3)]


def files(folder: Path) -> dict[str, int]:
    """Path -> the time of its last change, of all files in a folder."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_a_table_has_each_turn_and_marks_what_the_memory_changes(calls: list[str]):
    done = mal_adapter("timeline", calls[1], "--turns", "call1.rttm")
    assert (done.exit_code, done.stderr) == (0, "")
    title, columns, *rows, last = done.stdout.splitlines()
    assert title.startswith("call1.wav  00:")
    assert title.endswith(", 5 turns")
    assert columns.split() == ["time", "speaker", "emotion", "p", "without", "p"]
    recognizer = EmotionRecognizer.from_pretrained(ADAPTER_FOLDER, HOST_FOLDER)
    entries = list(recognizer.timeline(calls[1], "call1.rttm"))
    assert len(rows) == len(entries)
    for entry, line in zip(entries, rows, strict=True):
        time, speaker, emotion, p, without, plain, *mark = line.split()
        start, end = (60 * float(text[:2]) + float(text[3:]) for text in time.split("-"))
        assert (start, end) == (
            pytest.approx(entry.turn.start_s, abs=0.051),
            pytest.approx(entry.turn.end_s, abs=0.051),
        )
        assert (speaker, emotion, without) == (entry.turn.speaker, entry.emotion, entry.emotion_without_memory)
        assert float(p) == pytest.approx(entry.probability, abs=0.006)
        assert float(plain) == pytest.approx(entry.without_memory.probabilities[without], abs=0.006)
        assert mark == (["*"] if emotion != without else [])
    changed = sum(line.endswith("*") for line in rows)
    assert changed > 0
    assert last == f"* changed by the memory: {changed} of 5"

    alone = mal_adapter("timeline", calls[1], "--turns", "call1.rttm", "--no-memory").stdout.splitlines()
    assert alone[1].split() == ["time", "speaker", "emotion", "p"]
    assert [line.split()[2] for line in alone[2:]] == [entry.emotion_without_memory for entry in entries]


def test_the_json_has_the_records_of_each_timeline(calls: list[str]):
    done = mal_adapter("timeline", *calls, "--turns", ".", "--json", "--no-compare")
    assert (done.exit_code, done.stderr) == (0, "")
    answer = json.loads(done.stdout)
    assert (answer["memory"], answer["prompt"], answer["not_read"]) == (True, "How does the speaker feel?", [])
    assert answer["settings"]["pad_s"] == 0.1
    assert [entry["recording"] for entry in answer["recordings"]] == calls
    recognizer = EmotionRecognizer.from_pretrained(ADAPTER_FOLDER, HOST_FOLDER)
    for entry, name in zip(answer["recordings"], calls, strict=True):
        expected = list(recognizer.timeline(name, name.replace("wav", "rttm"), compare=False))
        assert (entry["skipped"], entry["output"], entry["session_id"]) == (False, None, Path(name).stem)
        assert [turn["emotion"] for turn in entry["turns"]] == [one.emotion for one in expected]
        assert [turn["start_s"] for turn in entry["turns"]] == [one.turn.start_s for one in expected]
        assert all(turn["without_memory"] is None for turn in entry["turns"])


def test_a_folder_per_recording_has_every_format(calls: list[str], tmp_path: Path):
    done = mal_adapter("timeline", *calls[:2], "--turns", ".", "--output", "out")
    assert done.exit_code == 0, done.stderr
    names = {f"call{n}/{name}" for n in (0, 1) for name in ("run.json", *(f"call{n}{s}" for s in FORMATS.values()))}
    assert files(tmp_path / "out").keys() == names
    assert done.stdout.count("written to ") == 2
    assert min(path.stat().st_size for path in (tmp_path / "out").rglob("*.*")) > 50


@pytest.mark.slow
def test_what_is_complete_is_skipped_and_what_is_not_is_done_again(calls: list[str], tmp_path: Path):
    command = ("timeline", *calls[:2], "--turns", ".", "--output", "out", *FAST)
    assert mal_adapter(*command).exit_code == 0
    first = files(tmp_path / "out")

    def again(*more: object, done: int) -> dict[str, int]:
        """Run it again; `done` recordings must have been complete."""
        result = mal_adapter(*command, *more)
        assert result.exit_code == 0, result.stderr
        assert (f"{done} of 2 recordings are complete in out, and skipped" in result.stderr) == (done > 0)
        assert result.stdout.count("written to") == 2 - done
        return files(tmp_path / "out")

    assert again(done=2) == first
    assert again("--device", "cpu", done=2) == first
    shown = json.loads(mal_adapter(*command, "--json").stdout)["recordings"]
    assert [(entry["skipped"], len(entry["turns"]), entry["output"]) for entry in shown] == [
        (True, 5, os.path.join("out", name)) for name in ("call0", "call1")
    ]
    for more in (
        ["--max-s", "1"],
        ["--prompt", "Well?"],
        ["--labels", "calm,upset"],
        ["--no-memory"],
        ["--dtype", "float32"],
    ):
        again(*more, done=0)
    assert again(done=0).keys() == first.keys()

    (tmp_path / "out/call0/call0.html").unlink()
    again(done=1)
    with (tmp_path / "out/call1/call1.jsonl").open("a") as file:
        file.write("more\n")
    again(done=1)
    (tmp_path / "out/call1/run.json").write_text("{")
    again(done=1)
    text = (tmp_path / "call0.rttm").read_text()
    (tmp_path / "call0.rttm").write_text(text.partition("\n")[2])
    again(done=1)
    sound, rate = soundfile.read("call1.wav", dtype="int16")
    soundfile.write("call1.wav", sound[:, ::-1], rate)
    again(done=1)
    assert again(done=2)["call0/call0.jsonl"] > first["call0/call0.jsonl"]


def test_formats_are_added_and_files_of_another_timeline_do_not_stay(calls: list[str], tmp_path: Path):
    command = ("timeline", calls[0], "--turns", ".", "--output", "out", "--no-audio")

    def names(*more: str) -> set[str]:
        done = mal_adapter(*command, *more)
        assert done.exit_code == 0, done.stderr
        return {Path(name).name.removeprefix("call0.") for name in files(tmp_path / "out")}

    assert names("--formats", "jsonl,srt") == {"jsonl", "srt", "run.json"}
    assert names("--formats", "csv,html") == {"jsonl", "srt", "csv", "html", "run.json"}
    for formats in ("html,jsonl", "srt", "csv"):
        assert "1 of 1 recordings are complete" in mal_adapter(*command, "--formats", formats).stderr
    (tmp_path / "out/call0/notes.txt").write_text("somebody's own")
    run = json.loads((tmp_path / "out/call0/run.json").read_text())
    (tmp_path / "victim.txt").touch()
    run["files"] |= {"../../victim.txt": 0, "notes.txt": 14}
    (tmp_path / "out/call0/run.json").write_text(json.dumps(run))
    assert names("--formats", "html", "--no-compare") == {"html", "run.json", "notes.txt"}
    assert (tmp_path / "victim.txt").exists()
    shown = json.loads(mal_adapter(*command, "--formats", "html", "--no-compare", "--json").stdout)["recordings"]
    assert (shown[0]["skipped"], shown[0]["turns"]) == (True, None)
    with_sound = mal_adapter(*command[:-1], "--formats", "html", "--no-compare")
    assert "written to" in with_sound.stdout  # a page without the sound is not the same
    assert "1 of 1 recordings" in mal_adapter(*command, "--formats", "html", "--no-compare").stderr


def test_recordings_of_the_same_name_have_a_folder_each_in_every_run(calls: list[str], tmp_path: Path):
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        shutil.copy("call0.wav", f"{name}/call.wav")
    shutil.copy("call1.wav", "c/CALL.wav")
    write_turns(tmp_path / "call.rttm", call=[Turn(0.5, 1.9, "A")])
    command = ("--turns", "call.rttm", "--tiers", "call", "--output", "out", *FAST)
    every = ["a/call.wav", "b/call.wav", "c/call.wav", "c/CALL.wav"]
    assert mal_adapter("timeline", every[1], *command).exit_code == 0
    assert mal_adapter("timeline", *every, *command).exit_code == 0
    first = files(tmp_path / "out")
    assert len(first) == 4 * 3
    owners = {
        json.loads(path.read_text())["recording"]: path.parent.name for path in (tmp_path / "out").rglob("run.json")
    }
    assert owners.keys() == {str(tmp_path / name) for name in every}
    assert owners[str(tmp_path / "b/call.wav")] == "call"  # the first to come
    assert len({name.lower() for name in owners.values()}) == 4
    done = mal_adapter("timeline", *every[::-1], every[0], *command)
    assert "4 of 5 recordings are complete" in done.stderr
    assert files(tmp_path / "out") == first


def test_bad_recordings_give_a_line_each_and_the_others_are_done(calls: list[str], tmp_path: Path):
    Path("text.wav").write_text("no sound")
    Path("noturns.wav").symlink_to("call0.wav")
    write_turns(Path("call2.rttm"), call2=[Turn(1, 2, "A", channel=1), Turn(900, 901, "A", channel=0)])
    names = ["missing.wav", "text.wav", "noturns.wav", "call2.wav"]
    for more in ([], ["--json"]):
        done = mal_adapter("timeline", *names[:2], calls[0], *names[2:], calls[1], "--turns", ".", *more)
        assert done.exit_code == 2
        lines = done.stderr.splitlines()
        assert [line.partition(":")[0] for line in lines] == ["error"] * 4
        assert [line.split()[1] for line in lines] == [f"{name}:" for name in names]
        assert "has no file of its turns" in done.stderr
        assert "error: call2.wav: the turn of 'A' from 900.0 s to 901.0 s ends after the recording" in done.stderr
    answer = json.loads(done.stdout)
    assert [entry["recording"] for entry in answer["recordings"]] == calls[:2]
    assert len(answer["not_read"]) == 4


def test_a_folder_is_complete_only_with_its_last_file(calls: list[str], tmp_path: Path):
    command = ("timeline", calls[0], "--turns", ".", "--output", "out", *FAST)
    assert mal_adapter(*command).exit_code == 0
    page = tmp_path / "out/call0/call0.html"
    page.unlink()
    page.mkdir()  # so that writing fails halfway
    failed = mal_adapter(*command)
    assert failed.exit_code == 1
    assert "Is a directory" in failed.stderr
    assert not (tmp_path / "out/call0/run.json").exists()
    page.rmdir()
    again = mal_adapter(*command)
    assert (again.exit_code, "skipped" in again.stderr) == (0, False)
    assert "1 of 1 recordings are complete" in mal_adapter(*command).stderr


@pytest.mark.slow
def test_a_recording_that_is_damaged_in_its_middle_leaves_no_folder(calls: list[str], tmp_path: Path):
    sound, rate = soundfile.read(calls[1])
    soundfile.write("call1.flac", np.tile(sound, (20, 1)), rate)
    whole = Path("call1.flac").read_bytes()
    Path("call1.flac").write_bytes(whole[: len(whole) // 2] + bytes(5_000) + whole[len(whole) // 2 + 5_000 :])
    done = mal_adapter("timeline", "call1.flac", calls[0], "--output", "out", *FAST, "--channels", "customer,agent")
    assert done.exit_code == 2
    assert done.stderr.startswith("error: call1.flac: ")
    assert done.stderr.count("\n") == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["call0"]


@pytest.mark.skipif(os.name != "posix", reason="elsewhere these are no names")
def test_odd_names_have_folders_of_their_own_within_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    call = made_call(tmp_path / "call.wav", turns=2)
    write_turns(tmp_path / "turns.rttm", x=call.turns)
    names = [
        "...wav",
        "..wav",
        "a b\n'\"<b>.wav",
        "x" * 251 + ".wav",
        os.fsdecode(b"m\xfasica.wav"),
        "\u60b2.wav",
        "e\u0301.wav",
    ]
    for name in names:
        shutil.copy("call.wav", name)
    command = ("timeline", *(f"./{name}" for name in names), "--turns", "turns.rttm", "--tiers", "x", "--output", "out")
    done = mal_adapter(*command)
    assert done.exit_code == 0, done.stderr
    folders = list((tmp_path / "out").iterdir())
    assert len(folders) == len(names)
    assert {len(list(folder.iterdir())) for folder in folders} == {len(FORMATS) + 1}
    assert f"{len(names)} of {len(names)} recordings are complete" in mal_adapter(*command).stderr


@pytest.mark.slow
def test_ctrl_c_loses_nothing_that_is_finished(calls: list[str], tmp_path: Path):
    long = made_call(tmp_path / "long.wav", turns=150)
    write_turns(tmp_path / "long.rttm", long=long.turns)
    command = ("timeline", calls[0], "long.wav", calls[1], "--turns", ".", "--output", "out", *FAST)
    done = interrupted(*command, "--batch-size", 1, at=b"1 of 3 recordings")
    assert done.exit_code == 130
    assert "interrupted" in done.stderr
    assert "written to out/call0" in done.stdout.replace("\\", "/")
    first = files(tmp_path / "out")
    assert first.keys() == {"call0/run.json", "call0/call0.jsonl", "call0/call0.html"}
    again = mal_adapter(*command)
    assert again.exit_code == 0
    assert "1 of 3 recordings are complete" in again.stderr
    after = files(tmp_path / "out")
    assert {name: after[name] for name in first} == first
    assert len(after) == 9


def test_channels_that_are_averaged_are_noted_with_the_remedy(calls: list[str], tmp_path: Path):
    call = made_call(tmp_path / "mixed.wav", turns=2, channels=2)
    write_turns(tmp_path / "mixed.txt")
    (tmp_path / "mixed.txt").write_text("".join(f"{t.start_s}\t{t.end_s}\t{t.speaker}\n" for t in call.turns))
    mixed = mal_adapter("timeline", "mixed.wav", "--turns", "mixed.txt")
    assert mixed.stderr.startswith("note: mixed.wav has 2 channels, which are averaged; if each has a speaker, name")
    assert "--channels customer,agent" in mixed.stderr
    named = mal_adapter("timeline", "mixed.wav", "--turns", "mixed.txt", "--channels", "customer, agent", "--json")
    assert named.stderr == ""
    assert [turn["channel"] for turn in json.loads(named.stdout)["recordings"][0]["turns"]] == [
        turn.channel for turn in call.turns
    ]


def test_one_file_may_have_the_turns_of_several_recordings(calls: list[str], tmp_path: Path):
    text = "".join((tmp_path / f"call{number}.rttm").read_text() for number in range(3))
    (tmp_path / "all.rttm").write_text(text)
    each = json.loads(mal_adapter("timeline", *calls, "--turns", ".", "--json").stdout)["recordings"]
    together = json.loads(mal_adapter("timeline", *calls, "--turns", "all.rttm", "--json").stdout)["recordings"]
    assert [[turn["probabilities"] for turn in entry["turns"]] for entry in together] == [
        [turn["probabilities"] for turn in entry["turns"]] for entry in each
    ]


def test_a_turn_without_an_answer_says_why_in_its_row(tmp_path: Path):
    call = made_call(tmp_path / "call.wav", turns=2)
    write_turns(tmp_path / "call.rttm", call=[Turn(0.1, 0.4, "A"), *call.turns])
    done = mal_adapter("timeline", tmp_path / "call.wav", "--turns", tmp_path / "call.rttm")
    assert (done.exit_code, done.stderr) == (0, "")
    time, speaker, rest = done.stdout.splitlines()[2].split(maxsplit=2)
    assert (time, speaker) == ("00:00.1-00:00.4", "A")
    assert rest == "no answer: the audio is silent (all samples are zero)"


def test_progress_is_in_seconds_of_audio(calls: list[str]):
    shown = on_a_terminal("timeline", calls[0], "--turns", "call0.rttm").stderr
    length = soundfile.info("call0.wav").duration
    assert f"/{length:.0f} s of audio" in shown
    assert "0 of 1 recordings: " in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--formats", "html"], "add --output"),
        (["--no-audio"], "add --output"),
        (["--tiers", "a"], "add --turns"),
        (["--output", "out", "--formats", "html,docx"], "there is no format 'docx'"),
        (["--output", "call0.wav"], "is a file, not a folder"),
        (["--min-s", "-1"], "min_s must be at least 0"),
        (["--threshold", "2"], "threshold must be"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_done(options: list[str], message: str, calls: list[str]):
    done = mal_adapter("timeline", calls[0], *options)
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stdout == ""
    assert not Path("out").exists()


def test_a_recording_without_speech_is_no_error(tmp_path: Path):
    soundfile.write(tmp_path / "noise.wav", np.random.default_rng(0).normal(0, 0.01, 32_000), 16_000)
    done = mal_adapter("timeline", tmp_path / "noise.wav", "--output", tmp_path / "out", *FAST)
    assert (done.exit_code, done.stderr) == (0, "")
    assert "no speech was found" in done.stdout
    assert "No turns were found" in (tmp_path / "out/noise/noise.html").read_text()
