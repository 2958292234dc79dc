"""The socket's path: whose it is while one daemon ends and the next begins."""

import asyncio
import socket
from pathlib import Path

import pytest

from kvtier.config import Config, DiskConfig, HostConfig, NodeConfig, PeersConfig
from kvtier.core.tiers import Tier
from kvtier.engine.client import TierClient
from kvtier.node.daemon import NodeDaemon
from kvtier.node.peer import Order, Peer
from kvtier.node.server import LocalServer
from kvtier.node.stream import Stream
from kvtier.wire.access import Access
from tests.launching import DEADLINE_S
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
    path.unlink()  # by a person, who takes it for one that was left behind
    await second.start()
    await first.close()
    assert listens(path)
    await second.close()
    assert not path.exists()


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
