"""The model card: the Hub's own parser reads it, the user's text is kept, and its snippet runs as pasted."""

import re

import pytest
from huggingface_hub import ModelCard

from mal_adapter import MemoryAdapter, MemoryConfig
from mal_adapter.demo import HOST_FOLDER
from mal_adapter.errors import AdapterFormatError
from mal_adapter.serialization.metadata import AdapterMetadata
from mal_adapter.serialization.model_card import BEGIN, END, model_card
from tests.serialization.client import Client

CONFIG = MemoryConfig(hidden_size=16, memory_dim=8, num_heads=2)
MEMORY = CONFIG.to_dict()
RESULT = {
    "dataset_name": "MELD",
    "dataset_type": "user/meld",
    "dataset_split": "test",
    "metrics": {"f1": 0.61, "accuracy": 0.63},
    "host_metrics": {"f1": 0.52},
}
CARD = AdapterMetadata(
    layer_idx=16,
    base_model_name_or_path="Qwen/Qwen2-Audio-7B-Instruct",
    model_type="qwen2_audio",
    datasets=["user/meld"],
    training_data="MELD's training split, English, acted television.",
    evaluation=[RESULT],
).with_task(["happy", "sad"], "How does the speaker feel?")


def test_the_hubs_own_parser_reads_the_metadata():
    data = ModelCard(model_card(MEMORY, CARD, repo_id="user/memory")).data
    assert data.base_model == "Qwen/Qwen2-Audio-7B-Instruct"
    assert data.library_name == "mal_adapter"
    assert data.pipeline_tag == "audio-classification"
    assert data.datasets == ["user/meld"]
    assert data.metrics == ["accuracy", "f1"]
    assert "titans" in data.tags
    assert data.model_name == "memory"
    found = {(r.dataset_type, r.dataset_split, r.metric_type, r.metric_name): r.metric_value for r in data.eval_results}
    assert found == {
        ("user/meld", "test", "f1", "f1"): 0.61,
        ("user/meld", "test", "accuracy", "accuracy"): 0.63,
        ("user/meld", "test", "f1", "f1 of the bare host"): 0.52,
    }


def test_unknown_metadata_are_left_out():
    data = ModelCard(model_card(MEMORY, AdapterMetadata())).data.to_dict()
    assert data.keys() == {"library_name", "pipeline_tag", "tags"}


def test_a_card_has_layer_labels_training_data_results_and_limits():
    text = model_card(MEMORY, CARD, repo_id="user/memory")
    for part in (
        "decoder layer 16",
        "happy, sad",
        "acted television",
        "| MELD | test | f1 | 0.52 | 0.61 |",
        "## Limits",
    ):
        assert part in text


def test_the_users_own_text_and_metadata_are_kept_and_ours_are_updated():
    first = model_card(MEMORY, CARD)
    edited = first.replace("tags:\n", "license: mit\nlanguage: [de, en]\ntags:\n- my-tag\n")
    edited = edited.replace(BEGIN, f"My introduction.\n\n{BEGIN}") + "\n## How I trained it\n\nWith care.\n"
    second = model_card(MEMORY, AdapterMetadata(layer_idx=3, datasets=["user/iemocap"]), existing=edited)
    card = ModelCard(second)
    assert card.data.license == "mit"
    assert card.data.language == ["de", "en"]
    assert card.data.tags.count("titans") == 1
    assert "my-tag" in card.data.tags
    assert card.data.datasets == ["user/iemocap"]
    assert second.index("My introduction.") < second.index(BEGIN) < second.index(END) < second.index("With care.")
    assert "decoder layer 3" in second
    assert "decoder layer 16" not in second
    assert model_card(MEMORY, AdapterMetadata(layer_idx=3, datasets=["user/iemocap"]), existing=second) == second


def test_a_readme_written_by_hand_is_kept_before_ours():
    text = model_card(MEMORY, CARD, existing="# Mine\n\nAll about it.\n")
    assert text.index("All about it.") < text.index(BEGIN)


@pytest.mark.parametrize("metadata", ["a: [", "- a\n- b", "model-index: 3", "tags: 5", "1: 2", "a: " + "[" * 3000])
def test_metadata_that_cannot_be_read_are_refused_and_not_lost(metadata, tmp_path):
    adapter = MemoryAdapter(CONFIG)
    adapter.save_pretrained(tmp_path)
    before = f"---\n{metadata}\n---\nMy text."
    (tmp_path / "README.md").write_text(before)
    with pytest.raises(AdapterFormatError, match=r"README\.md"):
        adapter.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == before


def test_text_of_the_metadata_cannot_be_mistaken_for_marks_or_yaml():
    hostile = f"x\n---\nlicense: evil\n{END} {BEGIN} ```"
    card = AdapterMetadata(
        base_model_name_or_path=hostile, training_data=hostile, evaluation=[RESULT | {"dataset_name": hostile}]
    )
    text = model_card(MEMORY, card)
    body, data = ModelCard(text).text, ModelCard(text).data
    assert body.count(BEGIN) == body.count(END) == 1
    assert data.base_model == hostile
    assert data.license is None
    assert model_card(MEMORY, card, existing=text) == text
    (snippet,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert f"load_host({hostile!r})".replace("<!--", "<\\x21--") in snippet


def test_saving_again_keeps_the_text_in_the_folder(tmp_path):
    adapter = MemoryAdapter(CONFIG)
    adapter.save_pretrained(tmp_path)
    with (tmp_path / "README.md").open("a") as file:
        file.write("\nMy note: größer.\n")
    adapter.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text().count("My note: größer.") == 1


def test_pushing_again_keeps_the_text_in_the_repository(client, hub):
    client.run("random_adapter().push_to_hub('alice/carded', token='hf_alice')")
    text = hub.store.repos["alice/carded"]["README.md"].decode() + "\nFor my thesis.\n"
    client.run(
        """
api = HfApi(token="hf_alice")
text = text.replace("library_name:", "license: cc-by-4.0\\nlibrary_name:")
api.upload_file(repo_id="alice/carded", path_in_repo="README.md", path_or_fileobj=text.encode())
random_adapter(seed=1).push_to_hub("alice/carded", token="hf_alice")
""",
        text=text,
    )
    assert [status for _, path, _, status in hub.log if path == "/api/validate-yaml"] == [200, 200, 200]
    again = hub.store.repos["alice/carded"]["README.md"].decode()
    assert again.count("For my thesis.") == 1
    assert "license: cc-by-4.0" in again
    assert "adapter='alice/carded'" in again


@pytest.fixture(scope="module")
def newcomer(hub_server, tmp_path_factory):
    """A user whose cache is empty."""
    client = Client(HF_ENDPOINT=hub_server.url, HF_HOME=str(tmp_path_factory.mktemp("newcomer")))
    yield client
    client.close()


@pytest.mark.parametrize("task", [True, False])
def test_the_snippet_runs_as_pasted(client, newcomer, hub, tmp_path, task):
    """Host and adapter both come from the hub, by the names in the card."""
    name, host = f"alice/pasted-{task}", f"alice/tiny-host-{task}"
    client.run(
        """
api = HfApi(token="hf_alice")
api.create_repo(host)
api.upload_folder(repo_id=host, folder_path=host_folder)
from mal_adapter.demo import ADAPTER_FOLDER
adapter = MemoryAdapter.from_pretrained(ADAPTER_FOLDER)
import dataclasses
changes = {"base_model_name_or_path": host} | ({} if task else {"task": None})
adapter.metadata = dataclasses.replace(adapter.metadata, **changes)
adapter.push_to_hub(name, token="hf_alice")
""",
        name=name,
        host=host,
        host_folder=str(HOST_FOLDER),
        task=task,
    )
    card = hub.store.repos[name]["README.md"].decode()
    (snippet,) = re.findall(r"^```python\n(.*?)^```", card, re.MULTILINE | re.DOTALL)
    printed = newcomer.run(
        "import contextlib, io, os\nos.chdir(folder)\nwith contextlib.redirect_stdout(io.StringIO()) as out:\n"
        "    exec(snippet)\nresult = out.getvalue()",
        folder=str(tmp_path),
        snippet=snippet,
    )
    assert re.findall(r"^turn(\d)\.wav \w+$", printed, re.MULTILINE) == ["0", "1"]
