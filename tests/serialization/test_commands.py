"""`mal-adapter push` and `pull`, and the example of both, against the hub on loopback."""

from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "push_and_pull.py"

COMMANDS = """
from typer.testing import CliRunner
from mal_adapter.cli import app

def mal_adapter(*arguments):
    done = CliRunner().invoke(app, list(arguments))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.stderr
    return done.stdout.strip()

def files(folder):
    return {path.name: path.read_bytes().decode("latin-1") for path in Path(folder).iterdir()}

"""


def test_a_folder_is_pushed_pulled_and_inspected(hub, client, tmp_path):
    result = client.run(
        COMMANDS
        + """
random_adapter().save_pretrained(f"{folder}/mine")
url = mal_adapter("push", f"{folder}/mine", "alice/command", "--message", "First", "--token", "hf_alice")
mal_adapter("pull", "alice/command", f"{folder}/pulled", "--token", "hf_alice")
shown = mal_adapter("inspect", "alice/command", "--token", "hf_alice")
result = {
    "url": url,
    "mine": files(f"{folder}/mine"),
    "pulled": files(f"{folder}/pulled"),
    "shown": shown,
    "fingerprint": random_adapter().fingerprint(),
}
""",
        folder=str(tmp_path),
    )
    assert "alice/command" in result["url"]
    repo = hub.store.repos["alice/command"]
    assert repo.messages[repo.refs["main"]] == "First"
    assert set(result["pulled"]) == {"config.json", "model.safetensors", "README.md"}
    for name in ("config.json", "model.safetensors"):
        assert result["pulled"][name] == result["mine"][name]
    assert "alice/command" in result["pulled"]["README.md"]  # the card's snippet, which a save would lose
    assert f"fingerprint: {result['fingerprint']}" in result["shown"]


def test_a_pull_into_a_folder_named_as_the_repository(hub, client, tmp_path):
    (tmp_path / "alice" / "named").mkdir(parents=True)
    folder = client.run(
        COMMANDS
        + """
import os
os.chdir(folder)
random_adapter().push_to_hub("alice/named", token="hf_alice")
result = mal_adapter("pull", "alice/named", "alice/named", "--token", "hf_alice")
""",
        folder=str(tmp_path),
    )
    assert folder == "alice/named"
    assert {"config.json", "model.safetensors"} <= {path.name for path in (tmp_path / "alice" / "named").iterdir()}


def test_a_lora_that_is_not_pushed_is_reported(hub, client, tmp_path):
    stderr = client.run(
        COMMANDS
        + """
random_adapter().save_pretrained(folder)
Path(folder, "lora").mkdir()
result = CliRunner().invoke(app, ["push", folder, "alice/beside-a-lora", "--token", "hf_alice"]).stderr
""",
        folder=str(tmp_path),
    )
    assert f"note: {tmp_path / 'lora'} is not pushed" in stderr
    assert set(hub.store.repos["alice/beside-a-lora"].messages)


def test_a_pull_into_another_models_folder_changes_nothing(hub, client, pushed, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    kinds = client.run(
        COMMANDS
        + """
try:
    mal_adapter("pull", "alice/memory", folder)
except Exception as error:
    result = [kind.__name__ for kind in type(error).__mro__]
""",
        folder=str(tmp_path),
    )
    assert "AdapterFormatError" in kinds
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_text() == '{"model_type": "llama"}'


def test_the_example_pushes_and_attaches(hub, client):
    lines = client.run(
        """
import contextlib, io, os, runpy, sys
os.environ["HF_TOKEN"], sys.argv = "hf_alice", ["push_and_pull.py", "alice/example"]
with contextlib.redirect_stdout(io.StringIO()) as printed:
    runpy.run_path(path, run_name="__main__")
del os.environ["HF_TOKEN"]
result = printed.getvalue().splitlines()
""",
        path=str(EXAMPLE),
    )
    assert lines[0].startswith("pushed ")
    assert lines[1].startswith("pulled ")
    assert lines[1].endswith(" True")
    assert "AttachedMemory(attached=True" in lines[2]
