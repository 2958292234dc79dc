"""What the daemon does beside its engines' requests: layouts that open, work that fails."""

import asyncio
from pathlib import Path

import pytest

from kvtier.config import Config, DiskConfig, HostConfig, NodeConfig
from kvtier.core.blocks import BlockKey
from kvtier.core.tiers import Tier
from kvtier.engine.client import TierClient
from kvtier.node import manager as managers
from kvtier.node.daemon import NodeDaemon
from kvtier.node.manager import TierManager
from kvtier.node.movers import Movers
from kvtier.wire import local
from kvtier.wire.pb import feed_pb2
from tests.node.conftest import LAYOUT, new_keys, save
from tests.node.test_hung_disk import until

COUNT = 200
DEADLINE_S = 60.0


def daemon(folder: Path) -> NodeDaemon:
    return NodeDaemon(
        Config(
            node=NodeConfig(name="n", socket=f"{folder}/node.sock"),
            host=HostConfig(bytes=8 * COUNT * LAYOUT.nbytes, drain_at=0.0),
            disk=DiskConfig(path=f"{folder}/disk", bytes=64 << 20, drain_at=0.0),
        )
    )


@pytest.mark.parametrize("batch", [0, 4, COUNT // 16])
async def test_who_watches_while_a_layout_opens_hears_of_all_that_it_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    node = daemon(tmp_path)
    manager = await node.open_layout(LAYOUT)
    keys = new_keys(COUNT)
    lease = manager.write(1, keys, 0)
    manager.commit(lease.id, COUNT)
    async with asyncio.timeout(DEADLINE_S):
        assert await manager.drain(DEADLINE_S) == 0
    await node.close(0.0)

    monkeypatch.setattr(managers, "SCAN_BATCH", 16)
    node, known, turns = daemon(tmp_path), set[BlockKey](), 0
    watching: list[asyncio.Task[None]] = []

    async def watch() -> None:
        async for told in node.feed.Watch(feed_pb2.WatchRequest(), None):
            for part in (*told.snapshot.held, *told.delta.added):
                known.update(local.unpack_keys(part.keys))

    carry_out = TierManager._carry_out

    def counted(self: TierManager) -> None:
        nonlocal turns
        if turns == batch:
            watching.append(asyncio.create_task(watch()))
        turns += 1
        carry_out(self)

    monkeypatch.setattr(TierManager, "_carry_out", counted)
    async with asyncio.timeout(DEADLINE_S):
        manager = await node.open_layout(LAYOUT)
        held = {*manager.held()[Tier.DISK]}
        assert held == {*keys}
        assert turns > batch, "it watches while that opens"
        await until("the watcher to know all", lambda: held <= known)
        for each in watching:
            each.cancel()
        await node.close(0.0)


async def test_work_that_fails_behind_an_answer_costs_no_engine_its_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    node = daemon(tmp_path)
    await asyncio.to_thread(node.local.claim)
    await node.local.start()
    async with asyncio.timeout(DEADLINE_S):
        client = await asyncio.to_thread(TierClient, f"{tmp_path}/node.sock", LAYOUT)
        some, more = new_keys(4), new_keys(4)
        with monkeypatch.context() as patched:

            def fails(self: Movers, moves: object) -> None:
                raise RuntimeError("can't start new thread")

            patched.setattr(Movers, "start", fails)
            await asyncio.to_thread(save, client, some)
            assert (await asyncio.to_thread(client.match, some)).blocks == 4
            assert (await asyncio.to_thread(client.match, some)).blocks == 4
        assert "can't start new thread" in caplog.text
        await asyncio.to_thread(save, client, more)
        assert (await asyncio.to_thread(client.match, more)).blocks == 4
        client.close()
        await node.close(0.0)
