"""Carries out the ledger's moves: codec and store, in bounded thread pools, off the loop."""

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple, TypeVar

from kvtier import metrics
from kvtier.arena import Arena
from kvtier.codec import frame
from kvtier.codec.base import Codec
from kvtier.core.blocks import BlockKey, BlockLayout
from kvtier.core.fidelity import Fidelity, Lineage
from kvtier.core.ledger import Move
from kvtier.core.tiers import Tier
from kvtier.errors import CorruptFrame, StoreUnavailable
from kvtier.node.backlog import After, Backlog
from kvtier.node.doubts import Doubts
from kvtier.node.tuner import Tuner
from kvtier.node.watched import WatchedStore
from kvtier.stores.base import BROKEN, Parts, Placed, Store

# Of one store call; with the threads they bound the memory in flight. Loads are cut smaller, so
# that their first blocks arrive early; of demotions one piece is encoded while another is written.
LOAD_NBYTES: Final = 4 << 20
DRAIN_NBYTES: Final = 8 << 20
FORGET_BLOCKS: Final = 256  # of one store call: a long one would be taken for one that hangs
HOST: Final = 0

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class LowerTier:
    """A tier below the arena: where its frames lie and how they are encoded.

    A `tuner` chooses the codec, among the lossless ones; `codec` counts where there is none. A
    store that gives no answer, or whose call takes longer than `hung_s`, is asked again after
    `retry_s`.
    """

    tier: Tier
    store: Store
    codec: Codec
    threads: int
    retry_s: float
    tuner: Tuner | None = None
    hung_s: float = 60.0

    @property
    def codec_in_use(self) -> Codec:
        """What the next frames are encoded with."""
        return self.tuner.codec if self.tuner else self.codec


class Moved(NamedTuple):
    """How one move ended; `nbytes` is the frame's size in the target tier.

    `source_lost`: a lower tier of this node's own had no such frame to copy on, or a corrupt one.
    """

    move: Move
    ok: bool
    nbytes: int
    source_lost: bool = False
    fidelity: Fidelity = Fidelity.EXACT  # of what was loaded


class Outcome(NamedTuple):
    """How a batch of moves ended; `unavailable` names the tier that gave no answer, or is None."""

    moved: list[Moved]
    unavailable: int | None
    seconds: float


class _Frame(NamedTuple):
    """A frame to be written; `fidelity` is not 0 unless it is exact."""

    parts: Parts
    fidelity: int


_NO_FRAME: Final = _Frame((), 0)


class _NoAnswer(Exception):
    """A store gave no answer; says which tier's."""

    def __init__(self, tier: int) -> None:
        super().__init__(tier)
        self.tier = tier


class Movers:
    """The threads that copy blocks of one layout between the arena and the lower tiers.

    Loads and demotions have pools of their own, so that a load never waits behind a demotion; a
    third thread of each tier deletes. `report` is called on a pool's thread with each batch that
    has ended.
    """

    def __init__(
        self,
        layout: BlockLayout,
        arena: Arena,
        tiers: Sequence[LowerTier],
        report: Callable[[Outcome], None],
        lineage: Lineage,
    ) -> None:
        self._layout = layout
        self._lineage = lineage
        # Who has not asked for a lossy codec must never get what another node made with one.
        self._lossy = any(not each.codec.exact for each in tiers)
        self._arena = arena
        self._tiers = tiers  # ledger tier t is self._tiers[t - 1]
        self.stores = [WatchedStore(each.store) for each in tiers]
        self._report = report
        self._load_pools = [self._pool("load", each, each.threads) for each in tiers]
        self._drain_pools = [self._pool("drain", each, each.threads) for each in tiers]
        self._forget_pools = [self._pool("forget", each, 1) for each in tiers]
        self._forgetting: list[After] = [() for _ in tiers]
        self._backlogs: dict[tuple[int, int], Backlog] = {}
        self._doubts = Doubts()

    @staticmethod
    def _pool(name: str, tier: LowerTier, threads: int) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(threads, thread_name_prefix=f"{name}-{tier.tier.label}")

    def start(self, moves: Sequence[Move]) -> None:
        """Begin all moves; the ledger bounds how many there can be."""
        groups: dict[tuple[int, int], list[Move]] = {}
        for move in moves:
            groups.setdefault((move.source, move.target), []).append(move)
        for (source, target), group in groups.items():
            after = () if target == HOST else self._due(target)
            self._backlog(source, target).add(group, after)

    def _backlog(self, source: int, target: int) -> Backlog:
        if backlog := self._backlogs.get((source, target)):
            return backlog
        lower = (source if target == HOST else target) - 1
        pools, work, nbytes = self._drain_pools, self._drain, DRAIN_NBYTES
        if target == HOST:
            pools, work, nbytes = self._load_pools, self._load, LOAD_NBYTES
        most = max(1, nbytes // self._layout.nbytes)
        backlog = Backlog(pools[lower], self._tiers[lower].threads, most, partial(self._run, work))
        self._backlogs[source, target] = backlog
        return backlog

    def drop(self, tier: int) -> list[Move]:
        """Begin no move out of a lower `tier` or into it that has not begun; which these were."""
        ways = [each for way, each in self._backlogs.items() if tier in way]
        return [move for backlog in ways for move in backlog.drop()]

    def call(self, tier: int, work: Callable[[WatchedStore], T]) -> "Future[T]":
        """Run something else on a tier's store."""
        return self._load_pools[tier - 1].submit(work, self.stores[tier - 1])

    def probe(self, tier: int, keys: Sequence[BlockKey]) -> "Future[int]":
        """How many of `keys`, from the first on, a tier's store has and this node may use."""
        return self._load_pools[tier - 1].submit(self._count, tier, keys)

    def forget(self, tier: int, keys: Sequence[BlockKey]) -> None:
        """Delete copies, before any demotion into the same tier that is started later.

        Never in a shared store: what lies there is nobody's own.
        """
        assert not self._shared(tier), "what is shared is not deleted"

        deleted = self._forget_pools[tier - 1].submit(self._delete, tier, keys)
        self._forgetting[tier - 1] = (*self._due(tier), deleted)

    def _due(self, tier: int) -> After:
        """Deletions that may not have been made yet: they make the room that a demotion needs."""
        due = tuple(each for each in self._forgetting[tier - 1] if not each.done())
        self._forgetting[tier - 1] = due
        return due

    def close(self) -> None:
        """Finish what has begun, drop what has not, close the stores."""
        for backlog in self._backlogs.values():
            backlog.close()
        for pool in (*self._load_pools, *self._drain_pools, *self._forget_pools):
            pool.shutdown(wait=True, cancel_futures=True)
        for store in self.stores:
            store.close()

    # --- on a pool's thread -----------------------------------------------------------

    def _delete(self, tier: int, keys: Sequence[BlockKey]) -> None:
        for at in range(0, len(keys), FORGET_BLOCKS):
            try:
                self.stores[tier - 1].delete(keys[at : at + FORGET_BLOCKS])
            except StoreUnavailable:
                metrics.STORE_ERRORS.labels(self._tiers[tier - 1].tier.label).inc()

    def _run(self, work: Callable[[list[Move]], list[Moved]], batch: list[Move]) -> None:
        """One batch; whatever happens, every move of it is reported."""
        start = time.perf_counter()
        unavailable: int | None = None
        try:
            moved = work(batch)
        except _NoAnswer as error:
            unavailable = error.tier
            metrics.STORE_ERRORS.labels(self._label(unavailable)).inc()
            moved = [Moved(move, False, 0) for move in batch]
        except Exception:
            # A bug of ours costs these blocks, not the tier: their moves end as failed.
            log.exception("moving %d blocks failed", len(batch))
            metrics.STORE_ERRORS.labels("bug").inc()
            moved = [Moved(move, False, 0) for move in batch]
        for each in moved:
            names = self._label(each.move.source), self._label(each.move.target)
            metrics.MOVED_BLOCKS.labels(*names, "ok" if each.ok else "failed").inc()
            metrics.MOVED_BYTES.labels(*names).inc(each.nbytes)
        self._report(Outcome(moved, unavailable, time.perf_counter() - start))

    def _label(self, tier: int) -> str:
        return Tier.HOST.label if tier == HOST else self._tiers[tier - 1].tier.label

    def _shared(self, tier: int) -> bool:
        return self._tiers[tier - 1].tier is Tier.SHARED

    def _load(self, batch: list[Move]) -> list[Moved]:
        source = self._tiers[batch[0].source - 1]
        shared = self._shared(batch[0].source)
        moved: list[Moved] = []
        for move, raw, slot in zip(batch, *self._read_into_slots(batch), strict=True):
            ok, corrupt, fidelity = False, raw == BROKEN, Fidelity.EXACT
            if raw is not None and not corrupt:
                try:
                    if isinstance(raw, Placed):
                        info = frame.decode_in_place(move.key, raw.head, slot, self._layout)
                    else:
                        info = frame.decode(move.key, raw, slot, self._layout)
                    fidelity = info.fidelity
                    ok = self._lossy or not fidelity
                    if not ok:
                        metrics.INEXACT_FRAMES.labels(source.tier.label).inc()
                except CorruptFrame:
                    corrupt = True
                    metrics.CORRUPT_FRAMES.labels(source.tier.label).inc()
            if not ok and raw is not None and shared:  # or it would be found, and held, for ever
                self._doubts.add(move.key, corrupt=corrupt)
            nbytes = self._layout.nbytes if ok else 0
            lost = corrupt and not shared
            moved.append(Moved(move, ok, nbytes, lost, fidelity))
        return moved

    def _read_into_slots(
        self, batch: list[Move]
    ) -> tuple[Sequence[bytes | memoryview | Placed | None], list[memoryview]]:
        """What the store has of each, and the slot that each is for: nobody else's by now."""
        slots = [self._arena.slot(move.slot) for move in batch if move.slot is not None]
        try:
            return self.stores[batch[0].source - 1].read_into(
                [move.key for move in batch], slots
            ), slots
        except StoreUnavailable:
            raise _NoAnswer(batch[0].source) from None

    def _read(self, batch: list[Move]) -> list[bytes | memoryview | None]:
        source = batch[0].source
        try:
            return self.stores[source - 1].read([move.key for move in batch])
        except StoreUnavailable:
            raise _NoAnswer(source) from None

    def _drain(self, batch: list[Move]) -> list[Moved]:
        there = self._there(batch)
        moved = [Moved(move, ok=True, nbytes=self._layout.nbytes) for move in batch[:there]]
        return moved + self._copy_down(batch[there:]) if there < len(batch) else moved

    def _there(self, batch: list[Move]) -> int:
        """How many, from the first on, another node or an earlier life has put there already."""
        target = batch[0].target
        if not self._shared(target):
            return 0
        try:
            return self._count(target, [move.key for move in batch])
        except StoreUnavailable:
            raise _NoAnswer(target) from None

    def _count(self, tier: int, keys: Sequence[BlockKey]) -> int:
        usable = self._doubts.leading(keys) if self._shared(tier) else keys
        return self.stores[tier - 1].count(usable)

    def _copy_down(self, batch: list[Move]) -> list[Moved]:
        frames = self._encoded(batch) if batch[0].source == HOST else self._stored(batch)
        # What is not exact never takes the place of what may be.
        kept = {
            move.key: self._layout.nbytes
            for move in batch
            if frames.get(move.key, _NO_FRAME).fidelity and self._there([move])
        }
        fresh = [(key, each.parts) for key, each in frames.items() if key not in kept]
        try:
            written = self.stores[batch[0].target - 1].write(fresh)
        except StoreUnavailable:
            raise _NoAnswer(batch[0].target) from None
        for (key, parts), ok in zip(fresh, written, strict=True):
            kept[key] = frame.frame_nbytes(parts) if ok else 0
        if self._shared(batch[0].target):
            righted = self._doubts.written(key for key, _ in fresh if kept[key])
            metrics.CORRUPT_REWRITTEN.inc(righted)
        return [
            Moved(move, kept[move.key] > 0, kept[move.key])
            if move.key in kept
            else Moved(move, ok=False, nbytes=0, source_lost=True)
            for move in batch
        ]

    def _encoded(self, batch: list[Move]) -> "dict[BlockKey, _Frame]":
        """The frames of blocks in the arena."""
        target = self._tiers[batch[0].target - 1]
        if target.tuner is not None:
            assert batch[0].slot is not None
            target.tuner.offer(self._arena.slot(batch[0].slot))
        codec = target.codec_in_use
        frames: dict[BlockKey, _Frame] = {}
        for move in batch:
            assert move.slot is not None
            block, fidelity = self._arena.slot(move.slot), self._lineage.of(move.key)
            parts = frame.encode(move.key, move.before, block, self._layout, codec, fidelity)
            frames[move.key] = _Frame(parts, fidelity or not codec.exact)
            metrics.ENCODED_BLOCKS.labels(target.tier.label, frame.codec_of(parts).name).inc()
        return frames

    def _stored(self, batch: list[Move]) -> "dict[BlockKey, _Frame]":
        """The frames of a move between two lower tiers: as stored, never encoded again."""
        source = self._tiers[batch[0].source - 1]
        frames: dict[BlockKey, _Frame] = {}
        for move, raw in zip(batch, self._read(batch), strict=True):
            if raw is None:
                continue
            try:
                info = frame.verify(move.key, raw, self._layout.id)
            except CorruptFrame:
                metrics.CORRUPT_FRAMES.labels(source.tier.label).inc()
                continue
            frames[move.key] = _Frame([raw], info.fidelity)
        return frames
