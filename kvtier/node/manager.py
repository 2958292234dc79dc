"""Read first: one layout's blocks on this node, from an engine's request to the last tier.

    request --> TierManager --> Ledger, which decides --> effects --> Movers, which copy
                                  ^                         |            |
                                  `------- Outcome ---------|------------'
                                                            `--> announce: routers hear of it

Everything here runs on the daemon's one loop, so there is no lock. Only `Movers` has threads.
"""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Final, NamedTuple

from kvtier import metrics
from kvtier.arena import Arena
from kvtier.core.blocks import BlockKey, BlockLayout
from kvtier.core.breakeven import worth_loading
from kvtier.core.effects import HOST, Forget, Gone, Held, Move, Settled, TierUsage
from kvtier.core.fidelity import Lineage
from kvtier.core.ledger import Lease, Ledger, Match
from kvtier.core.policy import NO_USE, Learning, Use
from kvtier.core.tiers import Tier, TierSpec
from kvtier.errors import StoreUnavailable
from kvtier.node.credit import Credits
from kvtier.node.movers import LowerTier, Moved, Movers, Outcome
from kvtier.node.outages import Outages
from kvtier.node.reading import Loading, Reading
from kvtier.node.speed import Speed
from kvtier.node.uses import Uses
from kvtier.stores.base import ChainedStore, Store

MAX_PROBED: Final = 4096  # keys of one request that are looked up in the shared store
SCAN_BATCH: Final = 4096
_STRANGE: Final = "whose frames have a header of another version, or a damaged one"

Changes = Iterable[tuple[Tier, Sequence[BlockKey], bool]]

log = logging.getLogger(__name__)


class TierManager:
    """The tiers of one layout on this node.

    `specs[0]` is the arena; `lower[i]` carries `specs[i + 1]`. `announce` is told of every change
    of residency. `clock` is what eviction learns by, in seconds; by default the loop's. `soon` does
    what an engine need not wait for; by default in the loop's next turn. `learning` are the
    policies that learn. Call everything on the loop that `start` ran on.
    """

    def __init__(
        self,
        layout: BlockLayout,
        arena: Arena,
        specs: Sequence[TierSpec],
        lower: Sequence[LowerTier],
        announce: Callable[[Changes], None],
        clock: Callable[[], float] | None = None,
        soon: Callable[[Callable[[], None]], object] | None = None,
    ) -> None:
        assert len(specs) == len(lower) + 1
        self.layout = layout
        self.arena = arena
        self.epoch = secrets.randbits(63) | 1  # of this arena: a layout may get another one
        self.specs = specs
        self.lower = lower
        self._ledger = Ledger(layout.nbytes, specs, arena.index)
        self.before = self._ledger.before  # for the feed
        self.learning: dict[Tier, Learning] = {
            specs[index].tier: policy for index, policy in self._ledger.learning().items()
        }
        self._announce = announce
        self.lineage = Lineage()
        self.credits = Credits(self._ledger, self.lineage, self._carry_out_soon)
        self._movers = Movers(layout, arena, lower, self._report, self.lineage)
        self._shared = next((i for i, spec in enumerate(specs) if spec.shared), None)
        self._loading: dict[int, Loading] = {}  # read leases that are not settled
        self._speeds = [Speed() for _ in specs]
        self._loop = asyncio.get_running_loop()
        self._soon = soon or self._loop.call_soon
        self._outages = Outages(self._ledger, self._movers, lower, self._dropped, self._carry_out)
        self.clock = clock or self._loop.time
        self.uses = Uses(self._ledger, self.clock, self._carry_out_soon)
        self._closed = False
        self._drains = 0  # under way: the last to end ends the draining
        self._carrying = False
        self._at_rest = asyncio.Event()  # set when the last move under way has ended

    async def start(self) -> None:
        """Learn what the lower tiers still hold from an earlier life."""
        for tier, lower in enumerate(self.lower, 1):
            try:
                found = await asyncio.to_thread(_scan, lower.store)
            except StoreUnavailable as error:
                self._outages.pause(tier, str(error))
                continue
            self._outages.greet(tier)
            self._reject(tier, found.strange)
            held = found.held
            for at in range(0, len(held), SCAN_BATCH):
                self._ledger.found(tier, held[at : at + SCAN_BATCH], found.before)
                self._carry_out()
                await asyncio.sleep(0)  # a large disk must not stop the loop
            if held:
                log.info("%s tier: found %d blocks again", lower.tier.label, len(held))

    # --- for engines ------------------------------------------------------------------

    def match(self, keys: Sequence[BlockKey]) -> Match:
        """What is known here of a prompt; looks, changes nothing, asks no store."""
        return self._ledger.match(keys)

    def read(self, asked: Reading) -> Lease | Coroutine[None, None, Lease]:
        """Pin the held blocks of keys[first:] in the arena and load those that lie lower.

        At once, or when `wanted` of them have arrived; `more` tells of the others. Those that
        have not come by the deadline are cut off.
        """
        if self._to_probe(asked.keys, asked.first):
            return self._read_slowly(asked)
        return self._begin(asked, asked.wait_s)

    def more(self, lease_id: int, have: int) -> Lease | Coroutine[None, None, Lease]:
        """The read lease once more than `have` of its blocks have arrived, or all that will."""
        loading = self._loading.get(lease_id)
        if loading is None or loading.lease.arrived() > have:
            return self._ledger.lease(lease_id)
        return self._wait(loading, have + 1)

    def write(self, client: int, keys: Sequence[BlockKey], first: int, use: Use = NO_USE) -> Lease:
        """Reserve slots for the absent ones of keys[first:]; never waits, may grant fewer."""
        now = Use(self.clock(), use.request, use.output_tokens)
        lease = self._ledger.write(client, keys, first, now)
        if lease.refused:
            metrics.REFUSED_BLOCKS.inc(lease.refused)
        self._carry_out_soon()
        return lease

    def commit(self, lease: int, filled: int) -> None:
        """The first `filled` granted blocks are in their slots: from now on they are kept."""
        granted = self._ledger.lease(lease)
        self._ledger.commit(lease, filled)
        self.lineage.written(granted.path, granted.keys[:filled])
        self._carry_out_soon()

    def release(self, lease: int) -> None:
        """The client no longer touches the lease's slots."""
        self._ledger.release(lease)
        self._end_loading(lease)
        self._carry_out_soon()

    def disconnect(self, client: int) -> None:
        """The client is gone, and with it every lease that it had."""
        metrics.LEASES_LOST.inc(self._ledger.disconnect(client))
        self.credits.tell()
        for loading in [each for each in self._loading.values() if each.lease.client == client]:
            self._end_loading(loading.lease.id)
        self._carry_out()

    # --- for the daemon ---------------------------------------------------------------

    def clear(self, tier: Tier) -> int:
        """Drop what a tier holds, except what is leased or moving; the number of blocks."""
        dropped = sum(
            self._ledger.clear(index) for index, spec in enumerate(self.specs) if spec.tier is tier
        )
        self._carry_out()
        return dropped

    async def drain(self, deadline_s: float) -> int:
        """Copy down what has no lower copy; how many blocks were left at the deadline.

        Ends before it where nothing more can be copied: the tiers below are full, or away.
        """
        self._at_rest.clear()
        self._drains += 1
        self._ledger.drain_all(on=True)
        self._carry_out()
        try:
            if self._ledger.moves:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(deadline_s):
                        await self._at_rest.wait()
        finally:  # also where the caller of a drain hangs up
            self._drains -= 1
            if not self._drains:
                self._ledger.drain_all(on=False)
        return self._ledger.undrained()

    def held(self) -> dict[Tier, list[BlockKey]]:
        """The blocks of each tier."""
        held = self._ledger.held()
        return {spec.tier: keys for spec, keys in zip(self.specs, held, strict=True)}

    def usage(self) -> Sequence[tuple[TierSpec, TierUsage, bool]]:
        """Each tier, what it holds, and whether it answers."""
        return [
            (spec, used, not self._ledger.paused(index))
            for index, (spec, used) in enumerate(zip(self.specs, self._ledger.usage(), strict=True))
        ]

    @property
    def leases(self) -> int:
        """Leases that engines hold now."""
        return self._ledger.leases

    @property
    def moves(self) -> int:
        """Copies under way now."""
        return self._ledger.moves

    async def close(self) -> None:
        """End the copies under way and close the stores; no call may follow."""
        self._closed = True
        self._outages.close()
        for lease_id in [*self._loading]:
            self._end_loading(lease_id)
        await asyncio.to_thread(self._movers.close)
        self._ledger.closed()
        await asyncio.to_thread(self.arena.free)

    # --- inside -----------------------------------------------------------------------

    def _reject(self, tier: int, strange: Sequence[BlockKey]) -> None:
        """Give back the room of what a start found and cannot use."""
        if strange:
            label = self.lower[tier - 1].tier.label
            metrics.STRANGE_FRAMES.labels(label).inc(len(strange))
            log.warning("%s tier: dropped %d blocks, %s", label, len(strange), _STRANGE)
            self._movers.forget(tier, strange)

    def _to_probe(self, keys: Sequence[BlockKey], first: int) -> range:
        """Which of the keys only the shared store can still have."""
        if self._shared is None or self._ledger.paused(self._shared):
            return range(0)
        known: int = first + self._ledger.match(keys[first:]).blocks
        return range(known, min(len(keys), known + MAX_PROBED))

    async def _read_slowly(self, asked: Reading) -> Lease:
        start = self._loop.time()
        probed = self._to_probe(asked.keys, asked.first)
        if probed:
            await self._probe(asked.keys, probed, asked.wait_s)
        result = self._begin(asked, max(0.0, asked.wait_s - (self._loop.time() - start)))
        return result if isinstance(result, Lease) else await result

    async def _probe(self, path: Sequence[BlockKey], which: range, wait_s: float) -> None:
        """Ask the shared store how many of these keys it has; the ledger learns of them."""
        shared, keys = self._shared, path[which.start : which.stop]
        assert shared is not None
        try:
            async with asyncio.timeout(wait_s):
                found = await asyncio.wrap_future(self._movers.probe(shared, keys))
        except TimeoutError:
            return
        except StoreUnavailable:
            metrics.STORE_ERRORS.labels(self.specs[shared].tier.label).inc()
            self._outages.pause(shared)
            return
        before = {path[index]: path[index - 1] for index in which[:found] if index}
        self._ledger.found(shared, ((key, self.layout.nbytes) for key in keys[:found]), before)

    def _begin(self, asked: Reading, wait_s: float) -> Lease | Coroutine[None, None, Lease]:
        compute, worth = asked.compute, None
        if compute is not None:
            load_s = [each.seconds_a_block(self._loop.time()) for each in self._speeds]

            def worth(sources: Sequence[int], first: int) -> int:
                return worth_loading(sources, first, compute, load_s)

        use = self.uses.named(asked.use)
        lease = self._ledger.read(asked.client, asked.keys, asked.first, worth, use)
        if lease.refused:
            metrics.DECLINED_BLOCKS.inc(lease.refused)
        if not lease.loading:
            self._carry_out_soon()
            return lease
        deadline = self._loop.call_later(wait_s, self._too_late, lease.id)
        loading = self._loading[lease.id] = Loading(lease, deadline)
        self._carry_out()
        if lease.arrived() >= asked.wanted:
            return lease
        return self._wait(loading, asked.wanted)

    def _wait(self, loading: Loading, wanted: int) -> Coroutine[None, None, Lease]:
        # Made here and not in the coroutine: what happens before that first runs must wake it.
        waiter = loading.waiter = self._loop.create_future()
        loading.wanted = wanted

        async def woken() -> Lease:
            await waiter
            return loading.lease

        return woken()

    def _too_late(self, lease_id: int) -> None:
        lease = self._loading[lease_id].lease
        before = len(lease.keys)
        self._ledger.settle(lease_id)
        metrics.LATE_BLOCKS.inc(before - len(lease.keys))
        self._carry_out()

    def _end_loading(self, lease_id: int) -> None:
        """The lease is settled or over: nobody has anything to wait for."""
        if loading := self._loading.pop(lease_id, None):
            loading.deadline.cancel()
            loading.wake()

    def _carry_out_soon(self) -> None:
        """Let the engine have its answer first."""
        if not self._carrying:
            self._carrying = True
            self._soon(self._carry_out)

    def _carry_out(self) -> None:
        """Do what the ledger asks for; it, or `_carry_out_soon`, follows every call into it."""
        self._carrying = False
        if self._closed:
            return
        moves: list[Move] = []
        forgotten: dict[int, list[BlockKey]] = {}
        changes: list[tuple[Tier, Sequence[BlockKey], bool]] = []
        for effect in self._ledger.take_effects():
            match effect:  # the most frequent first
                case Held(keys, tier):
                    changes.append((self.specs[tier].tier, keys, True))
                case Gone(keys, tier):
                    for key in keys if tier == HOST and len(self.lineage) else ():
                        # Written again since then: what is known now is of the new copy.
                        if not self._ledger.has_slot(key):
                            self.lineage.gone(key)
                    changes.append((self.specs[tier].tier, keys, False))
                case Move():
                    moves.append(effect)
                case Forget(key, tier):
                    forgotten.setdefault(tier, []).append(key)
                case Settled(lease):
                    self._end_loading(lease)
        for tier, keys in forgotten.items():
            self._movers.forget(tier, keys)
        if moves:
            for move in moves:
                if move.target == HOST:
                    self._speeds[move.source].begin(self._loop.time())
            self._movers.start(moves)
        if changes:
            self._announce(changes)

    def _report(self, outcome: Outcome) -> None:
        """On a mover's thread: hand the outcome to the loop."""
        if not self._closed:
            self._loop.call_soon_threadsafe(self._moved, outcome)

    def _dropped(self, moves: Iterable[Move]) -> None:
        """These were not begun, as a tier hangs."""
        self._moved(Outcome([Moved(move, False, 0) for move in moves], None, 0.0))

    def _moved(self, outcome: Outcome) -> None:
        if outcome.unavailable is not None:
            self._outages.pause(outcome.unavailable)
        for move, ok, nbytes, source_lost, fidelity in outcome.moved:
            if move.target == HOST:
                self._speeds[move.source].end(self._loop.time(), ok=ok)
                if self._ledger.late(move):
                    continue
                if ok:
                    self.lineage.loaded(move.key, fidelity)
            self._ledger.moved(move, ok, nbytes, source_lost=source_lost)
            if source_lost:
                self._ledger.lost(move.source, [move.key])
                self._movers.forget(move.source, [move.key])
        for loading in self._loading.values():
            if loading.lease.arrived() >= loading.wanted:
                loading.wake()
        self._carry_out()
        if not self._ledger.moves:
            self._at_rest.set()


class _Found(NamedTuple):
    """What a store held at the start: what it can tell the order of, and the rest."""

    held: list[tuple[BlockKey, int]]
    before: Mapping[BlockKey, BlockKey]
    strange: list[BlockKey]


def _scan(store: Store) -> _Found:
    before = store.take_before() if isinstance(store, ChainedStore) else {}
    found = list(store.scan())
    held = [each for each in found if each[0] in before]
    return _Found(held, before, [key for key, _ in found if key not in before])
