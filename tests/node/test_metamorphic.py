"""One workload over many nodes restores the same bytes: only how much of them may differ.

Tiers, codecs, sizes, policies of the queue, injected faults and engines that die are drawn from a
seed; the manager, its movers and the stores are the real ones. What a read grants must be the bytes
that were saved, whatever happened on the way, and at the end nothing may be stuck.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvtier import metrics
from kvtier.arena import Arena
from kvtier.codec import codecs
from kvtier.core.blocks import BlockKey
from kvtier.core.breakeven import ComputeCost
from kvtier.core.ledger import Lease
from kvtier.core.phd import PHD
from kvtier.core.policy import LRU
from kvtier.core.tiers import Tier, TierSpec
from kvtier.node.manager import TierManager
from kvtier.node.movers import LowerTier
from kvtier.node.reading import Reading
from kvtier.node.tuner import Tuner
from kvtier.stores.base import Store
from kvtier.stores.disk import DiskStore
from kvtier.stores.faulty import Fault, FaultyStore
from kvtier.stores.memory import MemoryStore
from tests.node.conftest import BLOCK, LAYOUT, content

STEPS = 120
LOSSLESS = [codec for codec in codecs.CODECS if codec.exact]
DEADLINE_S = 60.0


class Faults:
    """Which fault comes next, from a seed; until `stop`."""

    def __init__(self, seed: int, kinds: list[Fault], share: float) -> None:
        self._draw = random.Random(seed)
        self._kinds, self._share = kinds, share
        self._on = True

    def __call__(self, operation: str) -> Fault | None:
        if not self._on or not self._kinds or self._draw.random() > self._share:
            return None
        return self._draw.choice(self._kinds)

    def stop(self) -> None:
        self._on = False


def mad_clock(seed: int) -> Callable[[], float]:
    """Any time may pass between two looks at it."""
    draw, now = random.Random(seed), 0.0

    def look() -> float:
        nonlocal now
        now += draw.choice([1e-6, 1e-3, 0.1])
        return now

    return look


def prompts() -> list[list[BlockKey]]:
    """Paths that share their beginnings, longer together than any host tier here."""
    draw = random.Random(5)
    roots = [[BlockKey(draw.randbytes(16)) for _ in range(4)] for _ in range(3)]
    return [
        [*draw.choice(roots), *(BlockKey(draw.randbytes(16)) for _ in range(draw.randint(1, 12)))]
        for _ in range(24)
    ]


PROMPTS = prompts()


@contextmanager
def node_of(seed: int, folder: Path) -> Iterator[tuple[Callable[[], TierManager], Faults]]:
    """A drawn node; the manager must be made on a loop."""
    draw = random.Random(seed)
    slots = draw.randint(20, 40)
    kinds = draw.choice(
        [[], [Tier.DISK], [Tier.SHARED], [Tier.DISK, Tier.SHARED], [Tier.DISK, Tier.SHARED]]
    )
    wrong = draw.choice([[], [Fault.REFUSE], [Fault.UNAVAILABLE], [*Fault], [*Fault]])
    faults = Faults(seed, wrong, draw.choice([0.05, 0.2]))
    specs = [TierSpec(
        tier=Tier.HOST, capacity=slots * BLOCK, drain_at=int(draw.random() * slots * BLOCK),
        policy=draw.choice([LRU, PHD]),
    )]  # fmt: skip
    lower: list[LowerTier] = []
    for kind in kinds:
        blocks = draw.choice([30, 60, 400])
        inner: Store
        if kind is Tier.DISK:
            inner = DiskStore(folder / str(seed), 2 * blocks * BLOCK)
            capacity = inner.usable(BLOCK + 64)
        else:
            inner = MemoryStore(blocks * BLOCK)  # a full shared store refuses
            capacity = 1 << 30
        pick = random.Random(seed + 1).randrange
        store = FaultyStore(inner, faults, wait=lambda: time.sleep(0.002), pick=pick)
        specs.append(TierSpec(
            tier=kind, capacity=capacity, drain_at=int(draw.random() * capacity),
            queue=draw.choice([4, 64]), policy=draw.choice([LRU, PHD]),
        ))  # fmt: skip
        codec, threads = draw.choice(LOSSLESS), draw.choice([1, 3])
        if seed % 2:
            lower.append(LowerTier(kind, store, codec, threads, 0.01))
        else:  # codec auto, and nothing that it measures makes sense
            tuner = Tuner(kind.label, LAYOUT, threads, 2, period_s=0.0, clock=mad_clock(seed))
            lower.append(LowerTier(kind, tuner.metered(store), codec, threads, 0.01, tuner))
    arena = Arena.create(BLOCK, slots)
    yield lambda: TierManager(LAYOUT, arena, specs, lower, lambda _: None), faults


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110 - what ends a move has no event
            await asyncio.sleep(0.001)


async def at_rest(manager: TierManager) -> None:
    await until(lambda: not manager.moves)


def save(manager: TierManager, path: list[BlockKey]) -> int:
    lease = manager.write(1, path, 0)
    for key, slot in zip(lease.keys, lease.slots, strict=True):
        manager.arena.slot(slot)[:] = content(key)
    manager.commit(lease.id, len(lease.keys))
    return len(lease.keys)


async def restore(manager: TierManager, draw: random.Random, path: list[BlockKey]) -> int:
    """Read piece by piece as it arrives, and check every byte when it is said to be there."""
    compute = draw.choice([None, None, ComputeCost(1e-4, 1e-6)])
    wait_s = draw.choice([0.0, 0.05, 5.0])
    asked = Reading(2, path, 0, draw.choice([0, 1, len(path)]), wait_s, compute)
    done, least = 0, asked.wanted
    result = manager.read(asked)
    while True:
        lease = result if isinstance(result, Lease) else await result
        arrived = lease.arrived()
        for key, slot in zip(path[done:arrived], lease.slots[done:arrived], strict=True):
            assert bytes(manager.arena.slot(slot)) == content(key), "a wrong block"
        assert arrived >= least or arrived == len(lease.keys), "woken for nothing"
        done, least = arrived, arrived + 1
        if done == len(lease.keys):
            break
        result = manager.more(lease.id, done)
    manager.release(lease.id)
    return done


async def die(
    manager: TierManager, draw: random.Random, path: list[BlockKey], seen: Counter[str]
) -> None:
    """An engine is killed in the middle of a write, or of a read, its blocks there or not."""
    client = 3
    if draw.random() < 0.5:
        fresh = [*path, *(BlockKey(draw.randbytes(16)) for _ in range(2))]
        lease = manager.write(client, fresh, 0)
        for slot in lease.slots:
            manager.arena.slot(slot)[:] = b"\xff" * BLOCK  # half of a copy
        seen["died writing"] += bool(lease.slots)
    else:
        result = manager.read(Reading(client, path, 0, len(path), 5.0))
        seen["died reading"] += 1
        if not isinstance(result, Lease):
            waiting = asyncio.ensure_future(result)
            await asyncio.sleep(0)
            manager.disconnect(client)
            await waiting
    manager.disconnect(client)


async def play(manager: TierManager, faults: Faults, seed: int, seen: Counter[str]) -> None:
    """The workload; `seen` counts what happened."""
    await manager.start()
    draw = random.Random(99)  # the same steps on every node
    how = random.Random(seed)
    try:
        for _ in range(STEPS):
            path = draw.choice(PROMPTS)
            if how.random() < 0.2:
                await die(manager, how, path, seen)
            seen["restored"] += await restore(manager, how, path)
            save(manager, path)
            await asyncio.sleep(0)
        faults.stop()
        # Whatever happened: the host tier takes blocks again, all of them are given back, and
        # what was started ends.
        fresh = [BlockKey(how.randbytes(16)) for _ in range(8)]

        def all_taken() -> bool:
            save(manager, fresh)
            return manager.match(fresh).blocks == len(fresh)

        await until(all_taken)
        await at_rest(manager)
        assert await restore(manager, random.Random(0), fresh) <= len(fresh)
        assert manager.leases == 0
    finally:
        await manager.close()


SEEDS = range(24)


def seen_on_node(seed: int, folder: Path) -> Counter[str]:
    """What happened when the workload was played on the node of `seed`."""
    seen = Counter[str]()

    async def run() -> None:
        with node_of(seed, folder) as (make, faults):
            await play(make(), faults, seed, seen)

    asyncio.run(run())
    return seen


@pytest.mark.parametrize("seed", SEEDS)
def test_one_workload_restores_the_same_bytes_on_every_node(seed: int, tmp_path: Path) -> None:
    assert seen_on_node(seed, tmp_path)["restored"], "nothing was restored: nothing was tested"


def test_engines_die_in_both_ways(tmp_path: Path) -> None:
    """On a small node every write of one that dies may be refused, but not on all of them."""
    seen = Counter[str]()
    for seed in SEEDS:
        seen += seen_on_node(seed, tmp_path)
        if seen["died writing"] and seen["died reading"]:
            return
    raise AssertionError(f"some way to die was never tried: {seen}")


def test_a_full_shared_tier_does_not_freeze_the_host_tier() -> None:
    """It refuses all it is given, for ever: the host tier goes on as if there were none."""

    async def run() -> None:
        specs = [
            TierSpec(tier=Tier.HOST, capacity=8 * BLOCK, drain_at=0),
            TierSpec(tier=Tier.SHARED, capacity=1 << 30, drain_at=1 << 30),
        ]
        lower = [LowerTier(Tier.SHARED, MemoryStore(0), codecs.RAW, 2, 0.01)]
        manager = TierManager(LAYOUT, Arena.create(BLOCK, 8), specs, lower, lambda _: None)
        await manager.start()
        for number in range(20):
            path = [BlockKey(bytes([number, i]) * 8) for i in range(4)]

            def all_taken(path: list[BlockKey] = path) -> bool:
                save(manager, path)
                return manager.match(path).blocks == len(path)

            await until(all_taken)
        await manager.close()

    asyncio.run(run())


def test_a_load_that_misses_its_deadline_leaves_what_has_arrived() -> None:
    release = asyncio.Event()

    async def run() -> None:
        loop = asyncio.get_running_loop()
        calls = 0

        def plan(operation: str) -> Fault | None:
            nonlocal calls
            calls += operation == "read"
            return Fault.SLOW if operation == "read" and calls > 3 else None

        def hang() -> None:
            asyncio.run_coroutine_threadsafe(release.wait(), loop).result(DEADLINE_S)

        specs = [
            TierSpec(tier=Tier.HOST, capacity=8 * BLOCK, drain_at=0),
            TierSpec(tier=Tier.DISK, capacity=80 * BLOCK, drain_at=80 * BLOCK),
        ]
        store = FaultyStore(MemoryStore(80 * BLOCK), plan, wait=hang)
        lower = [LowerTier(Tier.DISK, store, codecs.RAW, 6, 0.01)]  # a thread for each block
        manager = TierManager(LAYOUT, Arena.create(BLOCK, 8), specs, lower, lambda _: None)
        await manager.start()
        path = [BlockKey(bytes([7, i]) * 8) for i in range(6)]
        save(manager, path)
        await at_rest(manager)
        manager.clear(Tier.HOST)
        late = metrics.LATE_BLOCKS._value.get()
        calls = 0
        result = manager.read(Reading(1, path, 0, 6, 0.5))
        assert not isinstance(result, Lease)
        lease = await result
        assert len(lease.keys) == lease.arrived() <= 3
        assert metrics.LATE_BLOCKS._value.get() - late == 6 - len(lease.keys)
        for key, slot in zip(lease.keys, lease.slots, strict=True):
            assert bytes(manager.arena.slot(slot)) == content(key)
        manager.release(lease.id)
        release.set()
        await at_rest(manager)
        await manager.close()

    asyncio.run(run())


def test_what_is_slower_to_load_than_to_compute_is_not_loaded() -> None:
    async def run() -> None:
        specs = [
            TierSpec(tier=Tier.HOST, capacity=8 * BLOCK, drain_at=0),
            TierSpec(tier=Tier.DISK, capacity=80 * BLOCK, drain_at=80 * BLOCK),
        ]
        store = FaultyStore(
            MemoryStore(80 * BLOCK),
            lambda operation: Fault.SLOW if operation == "read" else None,
            wait=lambda: time.sleep(0.01),
        )
        lower = [LowerTier(Tier.DISK, store, codecs.RAW, 1, 0.01)]
        manager = TierManager(LAYOUT, Arena.create(BLOCK, 8), specs, lower, lambda _: None)
        await manager.start()
        path = [BlockKey(bytes([8, i]) * 8) for i in range(4)]
        save(manager, path)
        declined = metrics.DECLINED_BLOCKS._value.get()
        for compute, expected in [
            (ComputeCost(1e-6), 4),  # nothing is known of the disk: it is tried
            (ComputeCost(1e-6), 0),
            (ComputeCost(100.0), 4),
            (None, 4),
        ]:
            await at_rest(manager)
            manager.clear(Tier.HOST)
            result = manager.read(Reading(1, path, 0, 4, DEADLINE_S, compute))
            lease = result if isinstance(result, Lease) else await result
            assert len(lease.keys) == expected
            manager.release(lease.id)
        assert metrics.DECLINED_BLOCKS._value.get() - declined == 4
        await manager.close()

    asyncio.run(run())
