"""API keys: which files are accepted, and which requests."""

import hashlib
import http.client
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mal_adapter.errors import ConfigError
from mal_adapter.server import ApiKeys, make_app
from mal_adapter.server.refusals import Refusal
from mal_adapter.server.tenant_store import TenantStore
from tests.server.running import in_thread, send

KEY, OTHER = "0123456789abcdefghijklmnop", "zyxwvutsrqponmlkjihgfedcba"


def keys_in(folder: Path, text: str | bytes) -> ApiKeys:
    path = folder / "keys"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return ApiKeys.read(path)


def test_a_key_or_its_digest_with_comments_and_two_keys_of_one_tenant(tmp_path: Path):
    digest = hashlib.sha256(OTHER.encode()).hexdigest()
    keys = keys_in(tmp_path, f"# ours\n\nacme {KEY}\n  globex\tsha256:{digest}\r\nacme {KEY}-new\n")
    assert keys.tenants == ["acme", "globex"]
    assert [keys.space(f"Bearer {key}").tenant for key in (KEY, OTHER, f"{KEY}-new")] == ["acme", "globex", "acme"]
    assert keys.space(f"bearer  {KEY} ").tenant == "acme"
    assert KEY not in repr(vars(keys))


BAD = {
    "empty": "",
    "comments": "# acme key\n",
    "no key": "acme\n",
    "three words": f"acme {KEY} {OTHER}",
    "short": "acme 0123456789",
    "slash": f"acme/x {KEY}",
    "capital": f"Acme {KEY}",
    "long name": f"{'a' * 33} {KEY}",
    "dots": f"../acme {KEY}",
    "digest": f"acme sha256:{'0' * 63}",
    "letters": f"acme {KEY}é",
    "same": f"acme {KEY}\nglobex {KEY}\n",
    "bytes": b"\xff\xfe acme",
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_file_is_refused_without_its_secrets(what: str, tmp_path: Path):
    with pytest.raises(ConfigError) as refused:
        keys_in(tmp_path, BAD[what])
    assert KEY not in str(refused.value)
    assert "0123456789" not in str(refused.value)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="no-file"):
        ApiKeys.read(tmp_path / "no-file")


@given(st.one_of(st.none(), st.text(max_size=80), st.text(max_size=40).map("Bearer {}".format)))
def test_no_other_header_is_accepted(header: str | None):
    keys = ApiKeys([("acme", hashlib.sha256(KEY.encode()).digest())])
    with pytest.raises(Refusal) as refused:
        keys.space(header)
    assert (refused.value.status_code, refused.value.kind) in {(401, "missing_api_key"), (403, "unknown_api_key")}


@pytest.mark.slow
def test_every_route_but_the_probes_needs_a_key(recognizer_on, spoken, tmp_path: Path):
    keys = keys_in(tmp_path, f"acme {KEY}\nglobex {OTHER}\n")
    recognizer = recognizer_on(TenantStore(keys.tenants))
    sound = spoken[0].utterances[0].audio.read_bytes()
    routes = [
        ("POST", "/sessions/a/utterances", sound),
        ("POST", "/sessions/a/fork", b'{"to": "b"}'),
        ("GET", "/sessions", None),
        ("GET", "/sessions/a", None),
        ("DELETE", "/sessions/a", None),
        ("GET", "/states/a", None),
        ("PUT", "/states/a", b"0"),
    ]
    with in_thread(make_app(recognizer, recognizer.memory, keys=keys)) as port:
        for method, path, body in routes:
            missing = send(port, method, path, body)
            assert (missing.status, missing.json["type"]) == (401, "missing_api_key"), path
            assert missing.headers["www-authenticate"] == "Bearer"
            for wrong in (f"Basic {KEY}", KEY, "Bearer", "Bearer "):
                assert send(port, method, path, body, {"Authorization": wrong}).status == 401
            for wrong in (
                KEY[:-1],
                KEY + "x",
                KEY.upper(),
                "x" * 30_000,
                "\xff\xfe",
                hashlib.sha256(KEY.encode()).hexdigest(),
            ):
                unknown = send(port, method, path, body, {"Authorization": f"Bearer {wrong}"})
                assert (unknown.status, unknown.json["type"]) == (403, "unknown_api_key"), path
        for path in ("/health", "/ready", "/metrics"):
            assert send(port, "GET", path).status == 200
        assert {send(port, "GET", path).status for path in ("/docs", "/redoc", "/openapi.json", "/")} == {404}
        mine, theirs = ({"Authorization": f"Bearer {key}"} for key in (KEY, OTHER))
        assert send(port, "POST", "/sessions/a/utterances", sound, mine).json["utterance"] == 1
        assert send(port, "GET", "/sessions/a", None, theirs).status == 404
        assert send(port, "POST", "/sessions/a/utterances", sound, theirs).json["utterance"] == 1
        assert send(port, "POST", "/sessions/a/utterances", sound, mine).json["utterance"] == 2
        assert send(port, "GET", "/sessions/a", None, theirs).json["utterances"] == 1
        with pytest.raises(ValueError, match="Invalid header"):  # a client can't even send it
            http.client.HTTPConnection("127.0.0.1", port).request("GET", "/", headers={"Authorization": "a\nb"})
