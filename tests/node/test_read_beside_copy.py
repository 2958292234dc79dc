"""A read of blocks that are being copied from the disk to the shared store is not cut by that."""

import asyncio
import threading
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest

from kvtier.arena import Arena
from kvtier.codec import codecs, frame
from kvtier.core.blocks import BEGINS, BlockKey
from kvtier.core.ledger import Lease
from kvtier.core.tiers import Tier, TierSpec
from kvtier.engine.client import TierClient
from kvtier.errors import StoreUnavailable
from kvtier.node.manager import TierManager
from kvtier.node.movers import LowerTier
from kvtier.node.reading import Reading
from kvtier.stores.base import Parts
from kvtier.stores.disk import DiskStore
from kvtier.stores.memory import MemoryStore
from kvtier.testing.valkey import ValkeyServer
from tests.launching import Process, disk_toml, node_toml, redis_toml, wait_for
from tests.node.conftest import (
    BLOCK,
    LAYOUT,
    blocks,
    content,
    new_keys,
    restore,
    save,
    wait_for_blocks,
)

DEADLINE_S = 60.0


class Stuck(MemoryStore):
    """A shared store that answers no write before it is told how that ends."""

    def __init__(self) -> None:
        super().__init__(1 << 30)
        self.asked, self.told = threading.Event(), threading.Event()
        self.fails = False

    def write(self, frames: Sequence[tuple[BlockKey, Parts]]) -> list[bool]:
        self.asked.set()
        assert self.told.wait(DEADLINE_S)
        if self.fails:
            raise StoreUnavailable("no answer")
        return super().write(frames)


def node(folder: Path, shared: MemoryStore) -> TierManager:
    specs = [
        TierSpec(tier=Tier.HOST, capacity=8 * BLOCK, drain_at=0),
        TierSpec(tier=Tier.DISK, capacity=80 * BLOCK, drain_at=0),
        TierSpec(tier=Tier.SHARED, capacity=80 * BLOCK, drain_at=0),
    ]
    lower = [
        LowerTier(Tier.DISK, DiskStore(folder, 400 * BLOCK), codecs.RAW, 2, 60.0),
        LowerTier(Tier.SHARED, shared, codecs.RAW, 2, 60.0),
    ]
    return TierManager(LAYOUT, Arena.create(BLOCK, 8), specs, lower, lambda _: None)


async def at_rest(manager: TierManager) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while manager.moves:  # noqa: ASYNC110 - what ends a move has no event
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("fails", [False, True])
def test_what_hangs_on_its_way_to_the_shared_store_is_read_from_disk(
    tmp_path: Path, fails: bool
) -> None:
    path = new_keys(5)

    async def run() -> None:
        first = node(tmp_path, MemoryStore(1 << 30))
        await first.start()
        lease = first.write(1, path, 0)
        for key, slot in zip(lease.keys, lease.slots, strict=True):
            first.arena.slot(slot)[:] = content(key)
        first.commit(lease.id, len(path))
        await at_rest(first)
        await first.close()

        shared = Stuck()
        shared.fails = fails
        again = node(tmp_path, shared)  # as after a restart: what the disk has is copied on
        await again.start()
        assert again.moves == len(path)
        assert await asyncio.to_thread(shared.asked.wait, DEADLINE_S)
        result = again.read(Reading(1, path, 0, len(path), DEADLINE_S))
        lease = result if isinstance(result, Lease) else await result
        assert lease.arrived() == len(path)
        assert not shared.told.is_set()
        for key, slot in zip(lease.keys, lease.slots, strict=True):
            assert bytes(again.arena.slot(slot)) == content(key), "a wrong block"
        shared.told.set()
        await at_rest(again)
        again.release(lease.id)
        held = again.held()
        assert {*held[Tier.HOST]} == {*held[Tier.DISK]} == {*path}
        assert {*held[Tier.SHARED]} == (set() if fails else {*path})
        await again.close()
        # Both stores have the one version of a frame's header, which names the block before.
        assert {bytes(each)[4] for each in shared.read(path) if each} <= {frame.VERSION}
        with closing(DiskStore(tmp_path, 400 * BLOCK)) as disk:
            assert disk.take_before() == dict(zip(path, [BEGINS, *path], strict=False))

    asyncio.run(run())


def test_a_daemon_serves_its_disk_while_the_shared_store_hangs(
    tmp_path: Path, valkey: ValkeyServer
) -> None:
    """An engine attaches right after a restart, when all that the disk has is compared."""
    shared = redis_toml(valkey.url, 60.0)
    toml = node_toml(tmp_path, more=disk_toml(tmp_path) + shared)
    keys = new_keys(20)
    with Process("node", toml, tmp_path) as process:
        with closing(TierClient(f"{tmp_path}/node.sock", LAYOUT, "test")) as client:
            assert save(client, keys) == 20
            wait_for_blocks(process, Tier.SHARED, 20)
        process.kill()
        valkey.restart()  # empty
        valkey.pause()
        try:
            process.restart()
            with closing(TierClient(f"{tmp_path}/node.sock", LAYOUT, "test")) as client:
                assert restore(client, keys, wait_s=60.0) == [Tier.DISK] * 20
                assert blocks(process)[Tier.SHARED] == 0
        finally:
            valkey.resume()
        wait_for("all to be shared", lambda: blocks(process)[Tier.SHARED] == 20)
