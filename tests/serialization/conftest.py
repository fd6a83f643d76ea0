"""One hub and one client for all tests; each test uses its own repository names."""

import pytest

from tests.serialization.client import Client
from tests.serialization.server import HubServer


@pytest.fixture(scope="session")
def hub_server():
    with HubServer() as server:
        yield server


@pytest.fixture
def hub(hub_server):
    yield hub_server
    hub_server.faults.clear()
    hub_server.log.clear()


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("hf_home")


@pytest.fixture(scope="session")
def client(hub_server, cache):
    """A user who is not logged in; the scripts give the tokens."""
    client = Client(HF_ENDPOINT=hub_server.url, HF_HOME=str(cache))
    yield client
    client.close()


@pytest.fixture(scope="session")
def pushed(client):
    """An adapter at alice/memory, pushed once, and its bytes as saved in a folder."""
    return client.run(
        """
adapter = random_adapter()
adapter.metadata = AdapterMetadata(layer_idx=1, model_type="qwen2_audio", base_model_name_or_path="alice/host")
commit = adapter.push_to_hub("alice/memory", token="hf_alice")
result = {"oid": commit.oid, "url": str(commit), "fingerprint": adapter.fingerprint()}
"""
    )
