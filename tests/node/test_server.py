"""The socket's path: whose it is while one daemon ends and the next begins."""

import asyncio
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from kvtier.config import Config, DiskConfig, HostConfig, NodeConfig, PeersConfig
from kvtier.core.tiers import Tier
from kvtier.engine.client import TierClient
from kvtier.errors import ConfigError
from kvtier.node.daemon import NodeDaemon
from kvtier.node.peer import Order, Peer
from kvtier.node.server import LocalServer
from kvtier.node.stream import Stream
from kvtier.wire.access import Access
from tests.launching import DEADLINE_S, Process, node_toml
from tests.node.conftest import BLOCK, LAYOUT, content, new_keys, save
from tests.node.test_hung_disk import until


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
    for name in ("node.sock", "node.sock.lock"):  # a person takes them for left behind
        (tmp_path / name).unlink()
    await second.start()
    await first.close()
    assert listens(path)
    await second.close()
    assert not path.exists()


def left_behind(path: Path) -> None:
    """The socket of a daemon that was killed."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))


async def test_who_has_claimed_a_path_that_was_left_behind_has_it_alone(tmp_path: Path) -> None:
    path = tmp_path / "node.sock"
    left_behind(path)
    first, second = server(path), server(path)
    first.claim()  # and looks at what is there, as the second does
    with pytest.raises(ConfigError, match=rf"\(pid {os.getpid()}\) has {path}"):
        await second.start()
    assert not listens(path)
    await first.start()
    assert listens(path)
    await second.close()
    assert listens(path), "it was never the second's"
    await first.close()
    await second.start()
    assert listens(path)
    await second.close()


def test_of_daemons_that_start_at_once_over_a_stale_socket_one_wins(tmp_path: Path) -> None:
    left_behind(tmp_path / "node.sock")
    config = tmp_path / "node.toml"
    config.write_text(node_toml(tmp_path))
    command = [sys.executable, "-m", "kvtier.cli", "node", "--config", str(config)]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    try:
        ready = [each for each in processes if "ready at" in _line(each)]
        (won,) = ready
        assert listens(tmp_path / "node.sock")
        for each in processes:
            if each is not won:
                _, said = each.communicate(timeout=DEADLINE_S)
                assert said.splitlines()[-1] == (
                    f"kvtier: node.socket: another kvtier process (pid {won.pid}) has "
                    f"{tmp_path}/node.sock"
                )
                assert each.returncode == 2
    finally:
        for each in processes:
            each.kill()
            each.communicate(timeout=DEADLINE_S)
    with Process("node", node_toml(tmp_path), tmp_path):  # no kill is in the way of the next
        assert listens(tmp_path / "node.sock")


def _line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline()


async def test_no_slot_of_an_engine_that_is_hung_up_on_is_loaded_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It hears of its leases' end only when it has copied; another node asks meanwhile."""
    config = Config(
        node=NodeConfig(name="a", socket=f"{tmp_path}/node.sock"),
        host=HostConfig(bytes=4 * BLOCK, drain_at=0.0),
        disk=DiskConfig(path=f"{tmp_path}/disk", bytes=64 << 20, drain_at=0.0),
        peers=PeersConfig(),
    )
    daemon = NodeDaemon(config)
    await daemon.local.start()
    await daemon.lender.start("127.0.0.1:0")
    client = await asyncio.to_thread(TierClient, config.node.socket, LAYOUT)
    (manager,) = daemon.layouts.values()
    lower, leased = new_keys(4), new_keys(4)
    async with asyncio.timeout(DEADLINE_S):
        for count, keys in enumerate((lower, leased), 1):
            manager.clear(Tier.HOST)
            await asyncio.to_thread(save, client, keys)
            await until("copies", lambda n=4 * count: manager.usage()[1][1].blocks == n)
            await until("rest", lambda: not manager.moves)
    reading = client.read(leased)
    lease = await asyncio.to_thread(reading.__enter__)
    peer = Peer("a", daemon.lender.address, Access(Config(), serving=False))
    stream = await asyncio.to_thread(peer.connect, DEADLINE_S)
    assert isinstance(stream, Stream)
    order = Order(LAYOUT, lower, 0, [memoryview(bytearray(BLOCK)) for _ in lower], lossy=False)
    real = asyncio.Server.wait_closed

    async def wait_closed(closing: asyncio.Server) -> None:
        """From Python 3.12 on it waits until all engines are gone."""
        async with asyncio.timeout(DEADLINE_S):
            await until("no lease", lambda: not manager.leases)
        await asyncio.to_thread(peer.fetch, order, DEADLINE_S, stream)
        await real(closing)

    monkeypatch.setattr(asyncio.Server, "wait_closed", wait_closed)
    await daemon.close(DEADLINE_S)
    for key, slot in zip(leased, lease.slots, strict=True):
        assert bytes(client.arena.slot(slot)) == content(key), "written to while it is copied"
    reading.__exit__(None, None, None)
    client.close()
    peer.close()
