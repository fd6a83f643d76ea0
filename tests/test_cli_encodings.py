"""Every command writes to terminals, pipes and files of every encoding; and files by number come with a note."""

import codecs
import io
import json
import os
import subprocess
import sys
import unicodedata
from contextlib import redirect_stderr, redirect_stdout

import pytest
from accelerate.state import AcceleratorState

from mal_adapter import cli, demo
from mal_adapter.cli.output import print_json, take_any_text, width
from mal_adapter.ser.dialogue import Dialogue, Utterance, read_manifest, write_manifest
from mal_adapter.stores import FolderStore
from tests.cli.test_cli import run, saved  # noqa: F401  fixtures
from tests.commands import Done
from tests.ser.fixtures import make_dialogue, model, processor, write_audio  # noqa: F401  fixtures
from tests.ser.training_world import make_dialogues
from tests.stores.states import state_of

#: What Python gives a pipe on Windows in Europe, Russia and China, an old console, and a POSIX system without a locale.
ENCODINGS = ["cp1252", "ascii", "latin-1", "cp437", "cp1251", "gbk", "utf-8", "utf-16"]
CHINESE = "高兴,生气"


def into(encoding, *arguments, errors="strict"):
    """Runs a command whose stdout and stderr have this encoding and refuse what it lacks."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding, errors, newline="\n") for _ in range(2)]
    AcceleratorState._reset_state()
    with redirect_stdout(streams[0]), redirect_stderr(streams[1]), pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    for stream in streams:
        stream.flush()
    out, err = (stream.detach().getvalue().decode(encoding) for stream in streams)
    return Done(int(stop.value.code or 0), out, err)


def escaped(text, encoding):
    return text.encode(encoding, "backslashreplace").decode(encoding)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_table_in_letters_that_the_encoding_lacks(run, write_audio, encoding):  # noqa: F811
    path = write_audio("énervé Ω.wav")
    done = into(encoding, "predict", path, path.with_name("fehlt ß 怒.wav"), "--labels", CHINESE)
    assert done.exit_code == 2, done.stderr  # one file is missing, and its name is printed, too
    assert escaped("fehlt ß 怒.wav: there is no such file", encoding) in done.stderr
    lines = done.stdout.splitlines()
    assert escaped("énervé Ω.wav", encoding) in done.stdout
    assert all(escaped(label, encoding) in lines[1] for label in CHINESE.split(","))
    assert len({len(line) for line in lines[1:]}) == 1 or encoding in ("gbk", "utf-8", "utf-16")  # columns line up


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_json_decodes_to_the_right_text(run, write_audio, encoding):  # noqa: F811
    path = write_audio("énervé 怒.wav")
    done = into(encoding, "predict", path, "--labels", CHINESE, "--json")
    assert done.exit_code == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["labels"] == CHINESE.split(",")
    assert answer["utterances"][0]["utterance_id"] == "énervé 怒.wav"
    failed = into(encoding, "predict", "nirgends/怒.jsonl", "--json")
    assert json.loads(failed.stdout)["error"]["message"].startswith(os.path.join("nirgends", "怒.jsonl"))
    assert failed.exit_code == 2


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_the_commands_for_sessions(encoding, tmp_path):
    (tmp_path / "лица").mkdir()
    store = ["--store", tmp_path / "лица"]
    FolderStore(tmp_path / "лица").put("通话 42", state_of(1))
    for wish in (
        ["states", "list", *store],
        ["states", "export", "通话 42", tmp_path / "状态.safetensors", *store],
        ["states", "import", "通话 43", tmp_path / "状态.safetensors", *store],
        ["inspect", tmp_path / "状态.safetensors"],
        ["states", "drop", "通话 42", *store],
        ["states", "list", *store, "--json"],
    ):
        done = into(encoding, *wish)
        assert (done.exit_code, done.stderr) == (0, "")
        assert done.stdout.isascii() or encoding != "ascii"
    assert [entry["session"] for entry in json.loads(done.stdout)["sessions"]] == ["通话 43"]
    absent = into(encoding, "states", "export", "没有", tmp_path / "x", *store)
    assert absent.exit_code == 1
    assert escaped("there is no session '没有'", encoding) in absent.stderr
    usage = into(encoding, "states", "list", "--store", "нет")
    assert usage.exit_code == 2
    assert escaped("нет", encoding) in usage.stderr


def test_training_evaluation_and_report_of_labels_that_the_encoding_lacks(tmp_path):
    decomposed = unicodedata.normalize("NFD", "énervé")
    spelled = {"neutral": "平静", "happy": "énervé", "angry": decomposed, "sad": "悲伤\u00a0"}
    for name, split in (("训练", "train"), ("测试", "test")):
        made = make_dialogues(tmp_path / "wav" / split, (5, 4), split)
        write_manifest(
            [
                Dialogue(
                    f"通话 {d}",
                    tuple(
                        Utterance(f"通话 {d}", u.utterance_id, "Zoé", u.audio, emotion=spelled[u.emotion])
                        for u in dialogue.utterances
                    ),
                )
                for d, dialogue in enumerate(made)
            ],
            tmp_path / f"{name}.jsonl",
        )
    weights = {"epochs": 1, "batch_size": 2, "memory": {"memory_dim": 16, "num_heads": 2}}
    weights["class_weights"] = {decomposed: 2.0}
    (tmp_path / "设置.json").write_text(json.dumps(weights, ensure_ascii=False), encoding="utf-8")
    labels = ["--labels", f"平静,{decomposed},悲伤,惊讶"]
    done = into(
        "cp1252", "train", tmp_path / "训练.jsonl", "--dev", tmp_path / "测试.jsonl", "--model", demo.HOST_FOLDER,
        "--layer", 1, "--config", tmp_path / "设置.json", "--output", tmp_path / "记忆", *labels,
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert "not a label" not in done.stderr
    trained = json.loads((tmp_path / "记忆" / "training.json").read_text(encoding="utf-8"))
    assert trained["labels"] == ["平静", "énervé", "悲伤", "惊讶"]
    assert trained["train"]["not_judged"] == {}
    assert sum(trained["train"]["labels"].values()) == 9
    assert trained["train"]["labels"].keys() == {"平静", "énervé", "悲伤"}

    evaluated = into(
        "ascii", "evaluate", tmp_path / "测试.jsonl", "--adapter", tmp_path / "记忆", "--model", demo.HOST_FOLDER,
        "--arms", "host_only,own", "--output", tmp_path / "评估",
    )  # fmt: skip
    assert evaluated.exit_code == 0, evaluated.stderr
    assert escaped("评估", "ascii") in evaluated.stdout
    # The same answers as another tool may have written them are the same system's.
    other = tmp_path / "评估2"
    other.mkdir()
    for file in ("evaluation.json", "answers.jsonl"):
        content = (tmp_path / "评估" / file).read_text(encoding="utf-8").replace("\\u00e9", "é")
        assert "é" in content
        (other / file).write_text(unicodedata.normalize("NFD", content), encoding="utf-8")
    reported = into("cp437", "report", other, "--against", tmp_path / "评估", "--output", tmp_path / "报告")
    assert reported.exit_code == 0, reported.stderr
    figures = json.loads((tmp_path / "报告" / "report.json").read_text(encoding="utf-8"))
    assert figures["arms"]["own"]["wa"] == figures["against"]["评估"]["wa"]
    assert figures["arms"]["own"]["utterances"] == 9
    assert "énervé" in (tmp_path / "报告" / "report.html").read_text(encoding="utf-8")

    fewer = into(
        "ascii", "evaluate", tmp_path / "测试.jsonl", "--model", demo.HOST_FOLDER, "--labels", "平静,惊讶",
        "--output", tmp_path / "fewer", "--json",
    )  # fmt: skip
    assert (
        escaped("'énervé', which is not a label", "ascii") in fewer.stderr
    )  # a class doesn't become context in silence
    assert (fewer.exit_code, json.loads(fewer.stdout)["run"]["labels"]) == (0, ["平静", "惊讶"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "cp1252:strict"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
    ids=lambda environment: next(iter(environment)),
)
def test_a_process_of_its_own(environment, tmp_path, write_audio):  # noqa: F811
    """Also its usage errors, and its command line and file names where Python takes them for ASCII."""
    write_audio("énervé 怒.wav")
    record = {"dialogue_id": "Gespräch", "utterance_id": "怒", "speaker": "Zoé", "audio": "énervé 怒.wav"}
    (tmp_path / "手稿.jsonl").write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")
    environment = {**{k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG"))}, **environment}

    def process(*arguments):
        command = [sys.executable, "-m", "mal_adapter.cli", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, env=environment, timeout=240)
        assert b"Traceback" not in done.stderr, done.stderr
        return done

    table = process("predict", tmp_path / "手稿.jsonl", "--labels", CHINESE, "--prompt", "怎么样?")
    assert table.returncode == 0, table.stderr
    assert escaped("高兴", "ascii").encode() in table.stdout
    usage = process("predict", "--gibt-es-nicht-怒")
    assert usage.returncode == 2


def test_escapes_are_counted_as_they_are_printed():
    with redirect_stdout(io.TextIOWrapper(io.BytesIO(), "cp1252")):
        assert (width("é"), width("怒")) == (1, len("\\u6012"))
    with redirect_stdout(io.TextIOWrapper(io.BytesIO(), "utf-8")):
        assert (width("é"), width("怒"), width("\udcff")) == (1, 2, len("\\udcff"))


def test_a_name_that_is_not_unicode_is_printed_and_decodes():
    stream = io.TextIOWrapper(io.BytesIO(), "utf-8", "strict", write_through=True)
    with redirect_stdout(stream):
        take_any_text()
        print_json({"path": "\udcff"})
        print("\udcff")
    text = stream.detach().getvalue().decode("utf-8")
    assert text.endswith("\\udcff\n")
    assert json.JSONDecoder().raw_decode(text)[0] == {"path": "\udcff"}


def test_streams_that_are_absent_or_closed_do_not_keep_a_command_from_running(monkeypatch):
    closed = io.TextIOWrapper(io.BytesIO(), "ascii")
    closed.close()
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", closed)
    take_any_text()


# Files by number


def notes_of(run, *files):  # noqa: F811
    done = run("predict", *files, "--json")
    assert done.exit_code == 2  # they are missing, which comes later
    ids = [entry["utterance_id"] for entry in json.loads(done.stdout)["utterances"]]
    assert len(ids) == len(files)
    return [line for line in done.stderr.splitlines() if line.startswith("note:")], ids


@pytest.mark.parametrize(
    ("names", "noted"),
    [
        (["turn1.wav", "turn10.wav", "turn2.wav"], "turn10.wav is processed before turn2.wav"),
        (["a/call1_turn9.wav", "a/call1_turn10.wav", "a/call1_turn1.wav"], "call1_turn10.wav is processed before"),
        (["1.wav", "10.wav", "11.wav", "2.wav"], "11.wav is processed before 2.wav"),
        (["turn1.wav", "turn2.wav", "turn10.wav"], None),
        (["turn01.wav", "turn02.wav", "turn10.wav"], None),
        (["A1.wav", "B1.wav", "A2.wav", "B2.wav", "A10.wav"], None),  # who speaks is part of the name
        (["b.wav", "a.wav"], None),
        (["b2.wav", "a1.wav"], None),
        (["10.wav"], None),
        (["2.wav", "2.wav"], None),
    ],
)
def test_numbers_out_of_order_are_noted_and_the_order_given_is_kept(run, names, noted):  # noqa: F811
    notes, ids = notes_of(run, *names)
    assert [noted in note and "ls -v" in note for note in notes] == ([] if noted is None else [True])
    assert [identifier.split("-")[-1] for identifier in ids] == [name.split("/")[-1] for name in names]


def test_names_that_differ_in_their_unicode_form_alone_are_two_utterances(run, write_audio, tmp_path):  # noqa: F811
    first = write_audio("é.wav")
    (tmp_path / "other").mkdir()
    second = write_audio(unicodedata.normalize("NFD", "é.wav")).rename(
        tmp_path / "other" / unicodedata.normalize("NFD", "é.wav")
    )
    done = run("predict", first, second, "--json")
    assert done.exit_code == 0, done.stderr
    assert [entry["utterance_id"] for entry in json.loads(done.stdout)["utterances"]] == ["0-é.wav", "1-é.wav"]


def test_what_predict_prints_of_a_manifest_names_the_files_on_the_disk(run, write_audio, tmp_path):  # noqa: F811
    write_audio(unicodedata.normalize("NFD", "énervé.WAV"), format="WAV")
    record = {"dialogue_id": "d", "utterance_id": "0", "speaker": "A", "audio": "énervé.wav", "emotion": "SAD\u200b"}
    (tmp_path / "m.jsonl").write_bytes(codecs.BOM_UTF8 + json.dumps(record, ensure_ascii=False).encode())
    done = run("predict", tmp_path / "m.jsonl", "--json")
    assert done.exit_code == 0, done.stderr
    (entry,) = json.loads(done.stdout)["utterances"]
    assert os.path.exists(entry["audio"])
    assert entry["truth"] == "SAD"
    assert read_manifest(tmp_path / "m.jsonl")[0].utterances[0].audio.exists()
