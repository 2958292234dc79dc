"""The socket's path: whose it is while one daemon ends and the next begins."""

import asyncio
import socket
from pathlib import Path

import pytest

from kvtier.config import Config, HostConfig, NodeConfig
from kvtier.node.daemon import NodeDaemon
from kvtier.node.server import LocalServer


def server(path: Path) -> LocalServer:
    config = Config(node=NodeConfig(socket=str(path)), host=HostConfig(bytes=2**20))
    return NodeDaemon(config).local


def listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


async def test_the_path_is_given_up_before_anybody_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From Python 3.12 on that wait is one for the engines that are attached."""
    path = tmp_path / "node.sock"
    first, second = server(path), server(path)
    await first.start()
    real = asyncio.Server.wait_closed

    async def wait_closed(closing: asyncio.Server) -> None:
        if not path.exists():  # as the next daemon would, as soon as it can
            await second.start()
        await real(closing)

    monkeypatch.setattr(asyncio.Server, "wait_closed", wait_closed)
    await first.close()
    monkeypatch.undo()
    assert listens(path)
    await second.close()
    assert not path.exists()


async def test_a_path_that_another_daemon_has_taken_over_is_left_to_it(tmp_path: Path) -> None:
    path = tmp_path / "node.sock"
    first, second = server(path), server(path)
    await first.start()
    path.unlink()  # by a person, who takes it for one that was left behind
    await second.start()
    await first.close()
    assert listens(path)
    await second.close()
    assert not path.exists()
