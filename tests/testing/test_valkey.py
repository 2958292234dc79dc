import os
from pathlib import Path

import pytest
import redis

from kvtier.errors import ConfigError
from kvtier.testing.valkey import ValkeyServer


def ping(server: ValkeyServer) -> bool:
    with redis.Redis.from_url(server.url, protocol=2) as client:
        return bool(client.ping())


def test_it_is_there_inside_the_with_and_gone_after_it() -> None:
    with ValkeyServer() as server:
        assert ping(server)
        pid = server.pid
        folder = server.folder
    assert not folder.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_restart_is_empty_and_at_the_same_port(tmp_path: Path) -> None:
    with ValkeyServer(folder=tmp_path / "new", password="secret") as server:
        port, pid = server.port, server.pid
        with redis.Redis.from_url(server.url, protocol=2) as client:
            client.set("a", "b")
        server.restart()
        assert server.port == port
        assert server.pid != pid
        with redis.Redis.from_url(server.url, protocol=2) as client:
            assert client.dbsize() == 0
    assert (tmp_path / "new" / "valkey.log").exists()


def test_a_paused_server_stops_in_order(tmp_path: Path) -> None:
    with ValkeyServer(folder=tmp_path) as server:
        server.pause()
    assert "ready to exit" in (tmp_path / "valkey.log").read_text()


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with ValkeyServer() as first, pytest.raises(ConfigError, match="in use"):
        ValkeyServer(first.port, tmp_path).start()


def test_a_server_that_is_used_without_with_can_be_stopped_twice() -> None:
    server = ValkeyServer()
    server.start()
    server.start()
    assert ping(server)
    server.stop()
    server.stop()
