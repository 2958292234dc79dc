"""A read lease that is given block by block, over a store whose reads end when the test says so."""

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from kvtier.arena import Arena
from kvtier.codec import codecs
from kvtier.core.blocks import BlockKey
from kvtier.core.ledger import Lease
from kvtier.core.tiers import Tier, TierSpec
from kvtier.node.manager import TierManager
from kvtier.node.movers import LowerTier
from kvtier.node.reading import Reading
from kvtier.stores.memory import MemoryStore
from tests.node.conftest import BLOCK, LAYOUT, content

DEADLINE_S = 60.0  # of the test
NEVER_S = 3600.0  # of the loads: what waits for this was not woken
PATH = [BlockKey(bytes([3, i]) * 8) for i in range(5)]


class Gated(MemoryStore):
    """Reads of a block end once its gate is open."""

    def __init__(self) -> None:
        super().__init__(1 << 30)
        self.gates = {key: threading.Event() for key in PATH}
        self.asked: list[BlockKey] = []

    def read(self, keys: Sequence[BlockKey]) -> list[bytes | memoryview | None]:
        self.asked += keys
        for key in keys:
            assert self.gates[key].wait(DEADLINE_S)
        return super().read(keys)


@asynccontextmanager
async def lowered() -> AsyncIterator[tuple[TierManager, Gated]]:
    """A node that has PATH in its store and not in host memory; each load has its own thread."""
    specs = [
        TierSpec(tier=Tier.HOST, capacity=8 * BLOCK, drain_at=0),
        TierSpec(tier=Tier.DISK, capacity=80 * BLOCK, drain_at=80 * BLOCK),
    ]
    store = Gated()
    lower = [LowerTier(Tier.DISK, store, codecs.RAW, len(PATH), 1.0)]
    manager = TierManager(LAYOUT, Arena.create(BLOCK, 8), specs, lower, lambda _: None)
    await manager.start()
    lease = manager.write(1, PATH, 0)
    for key, slot in zip(lease.keys, lease.slots, strict=True):
        manager.arena.slot(slot)[:] = content(key)
    manager.commit(lease.id, len(PATH))
    await at_rest(manager)
    manager.clear(Tier.HOST)
    try:
        async with asyncio.timeout(DEADLINE_S):
            yield manager, store
    finally:
        for gate in store.gates.values():
            gate.set()
        await manager.close()


async def at_rest(manager: TierManager) -> None:
    await asyncio.sleep(0)
    while manager.moves:  # noqa: ASYNC110 - what ends a move has no event
        await asyncio.sleep(0.001)


def check(manager: TierManager, lease: Lease, arrived: int) -> None:
    assert lease.arrived() == arrived
    for key, slot in zip(PATH[:arrived], lease.slots[:arrived], strict=True):
        assert bytes(manager.arena.slot(slot)) == content(key)


async def test_blocks_are_given_as_they_arrive() -> None:
    async with lowered() as (manager, store):
        result = manager.read(Reading(1, PATH, 0, 1, NEVER_S))
        assert not isinstance(result, Lease)
        store.gates[PATH[0]].set()
        lease = await result
        check(manager, lease, 1)
        result = manager.more(lease.id, 1)
        assert not isinstance(result, Lease)
        store.gates[PATH[2]].set()  # behind a gap: of no use yet
        store.gates[PATH[1]].set()
        await result
        if lease.arrived() == 2:
            result = manager.more(lease.id, 2)
            if not isinstance(result, Lease):
                await result
        check(manager, lease, 3)
        result = manager.more(lease.id, 3)
        assert not isinstance(result, Lease)
        store.gates[PATH[3]].set()
        store.gates[PATH[4]].set()
        await result
        await at_rest(manager)
        assert manager.more(lease.id, 4) is lease
        check(manager, lease, 5)
        manager.release(lease.id)
        assert manager.leases == 0


async def test_what_arrives_before_anybody_waits_is_heard_of() -> None:
    """The answer is asked for, all loads end, and only then the asker begins to wait."""
    async with lowered() as (manager, store):
        for gate in store.gates.values():
            gate.set()
        result = manager.read(Reading(1, PATH, 0, len(PATH), NEVER_S))
        assert not isinstance(result, Lease)
        await at_rest(manager)
        check(manager, await result, 5)


async def test_a_load_that_came_too_late_is_not_begun_again() -> None:
    """However many readers give it up: the one that is under way serves the next."""
    async with lowered() as (manager, store):
        for client in range(1, 6):
            result = manager.read(Reading(client, PATH, 0, len(PATH), 0.0))
            assert not isinstance(result, Lease)
            lease = await result
            check(manager, lease, 0)
            manager.release(lease.id)
        result = manager.read(Reading(6, PATH, 0, len(PATH), NEVER_S))
        assert not isinstance(result, Lease)
        assert manager.moves == len(PATH)
        for gate in store.gates.values():
            gate.set()
        check(manager, await result, 5)
        await at_rest(manager)
        assert sorted(store.asked) == PATH, "each was read once"


async def test_a_client_that_dies_while_it_waits_leaves_nothing() -> None:
    async with lowered() as (manager, store):
        result = manager.read(Reading(1, PATH, 0, len(PATH), NEVER_S))
        assert not isinstance(result, Lease)
        waiting = asyncio.ensure_future(result)
        await asyncio.sleep(0)
        manager.disconnect(1)
        await waiting
        assert manager.leases == 0
        for gate in store.gates.values():
            gate.set()
        await at_rest(manager)
        lease = manager.read(Reading(2, PATH, 0, len(PATH), NEVER_S))
        assert isinstance(lease, Lease), "what was loading lies in host memory now"
        check(manager, lease, 5)
