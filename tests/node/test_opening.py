"""A layout that is opened while routers watch: they hear of all that its disk holds."""

import asyncio
import os
from pathlib import Path

import pytest

from kvtier.config import Config, DiskConfig, HostConfig, NodeConfig
from kvtier.core.blocks import Attention, BlockKey, BlockLayout, LayerGroup
from kvtier.core.tiers import Tier
from kvtier.node import manager as managers
from kvtier.node.daemon import NodeDaemon
from kvtier.node.manager import TierManager
from kvtier.wire import local
from kvtier.wire.pb import feed_pb2
from tests.node.test_hung_disk import until

LAYOUT = BlockLayout((LayerGroup(Attention.FULL, 1, 1, 16),), 16, "float16")
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
    keys = [BlockKey(os.urandom(16)) for _ in range(COUNT)]
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
