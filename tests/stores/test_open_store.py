"""open_store: one string says which store."""

from pathlib import Path

import pytest

from mal_adapter.errors import ConfigError
from mal_adapter.stores import FolderStore, RedisStore, open_store


def test_a_path_opens_a_folder(tmp_path: Path):
    for place in (tmp_path / "a", str(tmp_path / "b"), str(tmp_path / "redis:x")):
        assert isinstance(open_store(place), FolderStore)


@pytest.mark.parametrize("url", ["redis://host", "rediss://:secret@host:6380/2", "unix:///run/redis.sock"])
def test_a_redis_url_opens_redis(url: str):
    pytest.importorskip("redis")
    store = open_store(url)
    assert isinstance(store, RedisStore)
    assert "secret" not in repr(store)


@pytest.mark.parametrize("url", ["file:///tmp/x", "http://:secret@host", "REDIS://host", "://"])
def test_another_url_is_refused_without_telling_it(url: str):
    with pytest.raises(ConfigError, match="no store for") as caught:
        open_store(url)
    assert "secret" not in str(caught.value)


def test_both_take_a_time_to_live(tmp_path: Path):
    pytest.importorskip("redis")
    assert [open_store(place, 60.0).ttl_s for place in (tmp_path / "a", "redis://host")] == [60.0, 60.0]
