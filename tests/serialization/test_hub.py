"""Pushes to and downloads from a hub on loopback, with the unmodified huggingface_hub client."""

import hashlib
import json

import huggingface_hub
import pytest

from tests.serialization.client import Client, Raised
from tests.serialization.server import Fault

FINGERPRINT = "result = MemoryAdapter.from_pretrained(name, **options).fingerprint()"
HUB_RETRIES = int(huggingface_hub.__version__.split(".")[0]) >= 1  # earlier clients resume at the next call, not within


def push(client, name, seed=0, **options):
    """Pushes a random adapter as alice and returns its fingerprint, the commit and the pull request."""
    return client.run(
        """
adapter = random_adapter(seed=seed)
commit = adapter.push_to_hub(name, **{"token": "hf_alice", **options})
result = {"fingerprint": adapter.fingerprint(), "oid": commit.oid, "url": str(commit), "pr": commit.pr_url}
""",
        name=name,
        seed=seed,
        options=options,
    )


def pull(client, name, **options):
    return client.run(FINGERPRINT, name=name, options=options)


def test_what_is_pushed_is_pulled_byte_for_byte(client, hub, pushed, tmp_path):
    files = client.run(
        """
MemoryAdapter.from_pretrained("alice/memory").save_pretrained(folder)
result = {path.name: path.read_bytes().hex() for path in Path(folder).iterdir()}
""",
        folder=str(tmp_path / "again"),
    )
    repo = hub.store.repos["alice/memory"]
    assert set(repo.commits[pushed["oid"]]) == {"README.md", "config.json", "model.safetensors", ".gitattributes"}
    assert files["model.safetensors"] == repo["model.safetensors"].hex()
    assert files["config.json"] == repo["config.json"].hex()
    assert pull(client, "alice/memory") == pushed["fingerprint"]
    assert pushed["url"].endswith(f"/alice/memory/commit/{pushed['oid']}")
    assert json.loads(repo["config.json"])["weights_sha256"] == hashlib.sha256(repo["model.safetensors"]).hexdigest()


def test_the_weights_travel_through_large_file_storage(client, hub, pushed):
    pull(client, "alice/memory", force_download=True)
    assert any(method == "GET" and path.startswith("/storage/") for method, path, _, _ in hub.log)


def test_a_push_is_one_commit(client, hub):
    before = push(client, "alice/one-commit")
    assert len(hub.store.repos["alice/one-commit"].commits) == 2  # the hub's own, and ours
    assert hub.store.repos["alice/one-commit"].messages[before["oid"]] == "Push a mal_adapter memory"
    push(client, "alice/one-commit", seed=1, commit_message="Trained longer")
    assert [*hub.store.repos["alice/one-commit"].messages.values()][-1] == "Trained longer"


def test_attach_by_hub_id_equals_the_local_folder(client, pushed, tmp_path):
    assert client.run(
        """
from tests.hosts.builders import HOSTS
host = HOSTS["qwen2_audio"]
model = host.build()
inputs, _ = host.make_inputs(model, [[4]])
MemoryAdapter.from_pretrained("alice/memory").save_pretrained(folder)
logits = []
for adapter in ("alice/memory", folder):
    with attach_memory(model, adapter=adapter) as memory, memory.session("call"), torch.no_grad():
        model(**inputs)
        logits.append(model(**{**inputs, "input_ids": inputs["input_ids"].clone()}).logits)
with torch.no_grad():
    bare = model(**inputs).logits
result = [torch.equal(*logits), torch.equal(logits[0], bare)]
""",
        folder=str(tmp_path / "adapter"),
    ) == [True, False]


def test_a_private_repository_needs_its_owners_token(client, hub):
    fingerprint = push(client, "alice/private", private=True)["fingerprint"]
    assert hub.store.repos["alice/private"].private
    for token in (False, "hf_bob", "hf_wrong"):
        with pytest.raises(Raised) as raised:
            pull(client, "alice/private", token=token)
        assert {"AdapterNotFoundError", "MalAdapterError", "FileNotFoundError"} <= set(raised.value.kinds), raised.value
        assert "alice/private" in raised.value.message
        assert "token" in raised.value.message
        assert raised.value.cause
    assert pull(client, "alice/private", token="hf_alice") == fingerprint


def test_a_gated_repository_is_not_found_by_others(client, hub):
    push(client, "alice/gated")
    hub.store.repos["alice/gated"].gated = True
    with pytest.raises(Raised) as raised:
        pull(client, "alice/gated", token="hf_bob", force_download=True)
    assert "AdapterNotFoundError" in raised.value.kinds, raised.value
    assert "gated" in raised.value.message


def test_a_misspelt_repository_or_id_is_not_found(client, hub):
    for name in ("alice/absent", "absent", "alice/has space", "./nowhere", "a/b/c"):
        with pytest.raises(Raised) as raised:
            pull(client, name)
        assert "AdapterNotFoundError" in raised.value.kinds, raised.value
        assert name in raised.value.message


def test_a_branch_a_tag_and_a_commit_are_revisions(client, hub):
    first = push(client, "alice/versions")
    second = push(client, "alice/versions", seed=1)
    third = push(client, "alice/versions", seed=2, revision="experiment")
    client.run("HfApi(token='hf_alice').create_tag('alice/versions', tag='v1', revision=oid)", oid=first["oid"])
    for revision, expected in {"v1": first, first["oid"]: first, "main": second, "experiment": third}.items():
        assert pull(client, "alice/versions", revision=revision) == expected["fingerprint"]
    assert pull(client, "alice/versions") == second["fingerprint"]
    with pytest.raises(Raised) as raised:
        pull(client, "alice/versions", revision="absent")
    assert "AdapterNotFoundError" in raised.value.kinds
    assert "'absent'" in raised.value.message


def test_config_and_weights_come_from_one_commit(client, hub, monkeypatch):
    """There is a push between the downloads of the two files."""
    old = push(client, "alice/moving")
    new = push(client, "alice/moving", seed=1, revision="next")
    repo = hub.store.repos["alice/moving"]
    served = type(hub).fault

    def then_move(self, method, path):
        if method == "HEAD" and "model.safetensors" in path:
            repo.refs["main"] = new["oid"]
        return served(self, method, path)

    monkeypatch.setattr(type(hub), "fault", then_move)
    assert pull(client, "alice/moving") == old["fingerprint"]
    assert pull(client, "alice/moving") == new["fingerprint"]


def test_a_pull_request_leaves_the_branch_alone(client, hub):
    first = push(client, "alice/proposal")
    proposed = push(client, "alice/proposal", seed=1, create_pr=True)
    assert proposed["pr"].endswith("/alice/proposal/discussions/1")
    assert pull(client, "alice/proposal") == first["fingerprint"]
    assert pull(client, "alice/proposal", revision="refs/pr/1") == proposed["fingerprint"]


def test_another_user_can_propose_but_not_push(client, hub):
    push(client, "alice/others")
    with pytest.raises(Raised) as raised:
        push(client, "alice/others", seed=1, token="hf_bob")
    assert "AdapterNotFoundError" in raised.value.kinds, raised.value
    assert push(client, "alice/others", seed=1, token="hf_bob", create_pr=True)["pr"]


def test_a_push_without_or_with_a_wrong_token_is_typed(client, hub):
    for token in (False, "hf_wrong"):
        with pytest.raises(Raised) as raised:
            push(client, "alice/nobody", token=token)
        assert "AdapterNotFoundError" in raised.value.kinds, raised.value
    assert "alice/nobody" not in hub.store.repos


def test_a_push_over_another_model_is_refused(client, hub):
    client.run(
        """
api = HfApi(token="hf_alice")
api.create_repo("alice/whole-model")
api.upload_file(repo_id="alice/whole-model", path_in_repo="model.safetensors", path_or_fileobj=b"1234")
"""
    )
    with pytest.raises(Raised) as raised:
        push(client, "alice/whole-model")
    assert "AdapterFormatError" in raised.value.kinds, raised.value
    assert hub.store.repos["alice/whole-model"]["model.safetensors"] == b"1234"


def test_a_push_is_refused_after_another_push_in_the_meantime(client, hub, monkeypatch):
    push(client, "alice/race")
    repo = hub.store.repos["alice/race"]
    served = type(hub).fault

    def then_move(self, method, path):
        if method == "POST" and "/preupload/" in path:
            repo.commit("main", {}, "overtaking")
        return served(self, method, path)

    monkeypatch.setattr(type(hub), "fault", then_move)
    with pytest.raises(Raised) as raised:
        push(client, "alice/race", seed=1)
    assert "HubError" in raised.value.kinds, raised.value
    assert repo.messages[repo.refs["main"]] == "overtaking"


def test_an_adapter_in_a_subfolder(client, hub):
    push(client, "alice/many")
    repo = hub.store.repos["alice/many"]
    files = repo.commits[repo.refs["main"]]
    repo.commit("main", {f"meld/seed-0/{name}": entry for name, entry in files.items()}, "in a subfolder too")
    assert pull(client, "alice/many", subfolder="meld/seed-0") == pull(client, "alice/many")
    with pytest.raises(Raised) as raised:
        pull(client, "alice/many", subfolder="absent")
    assert "AdapterFormatError" in raised.value.kinds
    for subfolder in ("../many", "/meld", "meld/../../x", "..\\x", "C:\\x"):
        with pytest.raises(Raised, match="not a path within"):
            pull(client, "alice/many", subfolder=subfolder)


def test_a_repository_without_an_adapter_is_refused_before_its_weights_are_downloaded(client, hub):
    client.run(
        """
api = HfApi(token="hf_alice")
api.create_repo("alice/plain")
api.upload_file(repo_id="alice/plain", path_in_repo="config.json", path_or_fileobj=b'{"model_type": "bert"}')
api.upload_file(repo_id="alice/plain", path_in_repo="model.safetensors", path_or_fileobj=b"12345")
"""
    )
    hub.log.clear()
    with pytest.raises(Raised, match="does not describe a mal_adapter adapter") as raised:
        pull(client, "alice/plain")
    assert "AdapterFormatError" in raised.value.kinds
    assert not any("safetensors" in path for _, path, _, _ in hub.log)


def test_a_download_that_is_cut_is_resumed(client, hub):
    """Clients before 1.0 give up at the cut, and resume at the next call."""
    large = {"hidden_size": 1024, "memory_dim": 512}
    expected = client.run(
        """
from mal_adapter import MemoryConfig
adapter = MemoryAdapter(MemoryConfig(**config)).eval()
adapter.push_to_hub("alice/large", token="hf_alice")
result = adapter.fingerprint()
""",
        config=large,
    )
    assert len(hub.store.repos["alice/large"]["model.safetensors"]) > 20e6
    hub.faults.append(Fault("GET", "/storage/", cut=15_000_000))
    if not HUB_RETRIES:
        with pytest.raises(Raised) as raised:
            pull(client, "alice/large")
        assert "HubError" in raised.value.kinds, raised.value
    assert pull(client, "alice/large") == expected
    ranges = [r for method, path, r, _ in hub.log if method == "GET" and "/storage/" in path]
    assert ranges == [None, f"bytes={10 * 2**20}-"]  # the client writes what it has in pieces of 10 MiB


def test_a_download_waits_for_a_busy_hub(client, hub, pushed):
    """Clients before 1.0 do not wait."""
    hub.faults.append(Fault("GET", "/storage/", status=429, headers=(("Retry-After", "0"),)))
    if not HUB_RETRIES:
        with pytest.raises(Raised, match=r"HubError.*429"):
            pull(client, "alice/memory", force_download=True)
    assert pull(client, "alice/memory", force_download=True) == pushed["fingerprint"]
    assert 429 in [status for *_, status in hub.log]


def test_a_hub_that_stays_busy_is_a_typed_error(client, hub, pushed, tmp_path):
    hub.faults.append(Fault("HEAD", "/resolve/", times=99, status=429, headers=(("Retry-After", "0"),)))
    with pytest.raises(Raised) as raised:
        pull(client, "alice/memory", cache_dir=str(tmp_path))
    assert {"HubError", "MalAdapterError", "ConnectionError", "OSError"} <= set(raised.value.kinds), raised.value
    assert "429" in raised.value.message
    assert raised.value.cause


def test_an_error_in_mid_download_leaves_nothing_half_written(client, hub, pushed, tmp_path):
    hub.faults += [Fault("GET", "/storage/", cut=1000), Fault("GET", "/storage/", times=99, status=500)]
    with pytest.raises(Raised) as raised:
        pull(client, "alice/memory", cache_dir=str(tmp_path))
    assert "HubError" in raised.value.kinds, raised.value
    hub.faults.clear()
    weights = hub.store.repos["alice/memory"]["model.safetensors"]
    for path in tmp_path.rglob("*"):
        if path.is_file() and path.name == "model.safetensors":
            assert path.read_bytes() == weights
    assert pull(client, "alice/memory", cache_dir=str(tmp_path)) == pushed["fingerprint"]


def test_a_closed_connection_is_a_typed_error(client, hub, pushed, tmp_path):
    hub.faults.append(Fault("HEAD", "/resolve/", times=99, cut=0))
    with pytest.raises(Raised) as raised:
        pull(client, "alice/memory", cache_dir=str(tmp_path))
    assert {"HubError", "ConnectionError"} <= set(raised.value.kinds), raised.value
    assert raised.value.cause


@pytest.mark.parametrize(("step", "seed"), [("/preupload/", 11), ("/commit/", 12), ("/lfs/verify", 13)])
def test_a_push_that_fails_changes_nothing_and_can_be_repeated(client, hub, step, seed):
    """Clients from 1.0 on repeat most steps themselves, but none repeats a commit."""
    name = f"alice/failing-{step.strip('/').replace('/', '-')}"
    push(client, name)
    before = hub.store.repos[name].refs["main"]
    hub.faults.append(Fault("POST", step, times=99, status=403))
    with pytest.raises(Raised) as raised:
        push(client, name, seed=seed)
    assert {"AdapterNotFoundError", "OSError"} <= set(raised.value.kinds), raised.value
    assert hub.store.repos[name].refs["main"] == before
    hub.faults[:] = [Fault("POST", step, status=500)]
    if step == "/commit/" or (step == "/preupload/" and not HUB_RETRIES):
        with pytest.raises(Raised) as raised:
            push(client, name, seed=seed)
        assert "HubError" in raised.value.kinds, raised.value
    assert push(client, name, seed=seed)["fingerprint"] == pull(client, name)


def test_a_download_waits_for_a_slow_hub(client, hub, pushed):
    hub.faults.append(Fault("GET", "/storage/", delay_s=1.5))
    assert pull(client, "alice/memory", force_download=True) == pushed["fingerprint"]


def test_a_warm_cache_is_used_while_the_hub_fails(client, hub, pushed):
    pull(client, "alice/memory")
    hub.faults.append(Fault("HEAD", "/resolve/", times=99, status=500))
    assert pull(client, "alice/memory") == pushed["fingerprint"]


def test_local_files_only_makes_no_request(client, hub, pushed, tmp_path):
    pull(client, "alice/memory")
    hub.log.clear()
    assert pull(client, "alice/memory", local_files_only=True) == pushed["fingerprint"]
    with pytest.raises(Raised) as raised:
        pull(client, "alice/memory", local_files_only=True, cache_dir=str(tmp_path))
    assert {"HubError", "ConnectionError"} <= set(raised.value.kinds), raised.value
    assert "local_files_only" in raised.value.message
    assert hub.log == []


@pytest.fixture(scope="module")
def offline(hub_server, cache):
    client = Client(HF_ENDPOINT=hub_server.url, HF_HOME=str(cache), HF_HUB_OFFLINE="1")
    yield client
    client.close()


def test_offline_mode_reads_a_warm_cache_and_a_cold_one_is_a_typed_error(client, offline, hub, pushed, tmp_path):
    pull(client, "alice/memory")
    hub.log.clear()
    assert pull(offline, "alice/memory") == pushed["fingerprint"]
    with pytest.raises(Raised) as raised:
        pull(offline, "alice/memory", cache_dir=str(tmp_path))
    assert "HubError" in raised.value.kinds, raised.value
    assert "HF_HUB_OFFLINE" in raised.value.message
    with pytest.raises(Raised) as raised:
        push(offline, "alice/memory")
    assert "HubError" in raised.value.kinds, raised.value
    assert hub.log == []


def test_a_pulled_folder_is_loaded_from_its_links(client, pushed):
    """The Hub's cache is links to blobs, and a local folder may be such a snapshot."""
    assert (
        client.run(
            """
from huggingface_hub import snapshot_download
result = MemoryAdapter.from_pretrained(snapshot_download("alice/memory")).fingerprint()
"""
        )
        == pushed["fingerprint"]
    )
