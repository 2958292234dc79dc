"""What every node holds, as its feeds tell it.

A source is one feed: a node's daemon, or a worker with its VRAM. What it says of VRAM, host and
disk is its own and goes with it. What it says of the shared store is said for everybody, and stays
when it goes: the blocks are still there.

Nothing that takes long is done at once. What a source tells is taken in in steps, a few blocks
each, between which anybody may ask; a source that goes is gone at once, and the room that its
blocks took is given back by `tidy`, in steps too.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Final, NamedTuple

from kvtier.core.audience import OWNED, Audience, Warmth
from kvtier.core.blocks import BEGINS, KEY_NBYTES, BlockKey
from kvtier.core.strips import StripIndex
from kvtier.core.tiers import Tier

STEP: Final = 64  # blocks taken in in one step
_DROP: Final = 128  # blocks given back in one step, and up to a strip more
_MAX_AUDIENCES: Final = 8  # fleets (of one model, adapter, tenant) that look-ups are prepared for
_SHARED: Final = 1  # the shared store's bit; each slot has len(OWNED) bits above it

_NONE: Final = -1  # the slot of a snapshot that is over

Steps = Iterator[None]


class Told(NamedTuple):
    """Some blocks in one tier, each of which follows the one before it in a prompt.

    Of blocks that are removed nothing of the kind is said.
    """

    tier: Tier
    packed: bytes  # keys of 16 bytes, one after the other
    before: BlockKey = BEGINS  # the block before the first


class _Source:
    """The last that one feed said."""

    def __init__(self, slot: int) -> None:
        self.slot = slot
        self.epoch = 0
        self.seq = 0
        self.live = False  # between a snapshot and `remove`


class Filling:
    """A snapshot of which not all is told yet: `Directory.begin` makes it."""

    def __init__(self, source: str, epoch: int, seq: int, slot: int) -> None:
        self.source = source
        self.epoch = epoch
        self.seq = seq
        self.slot = slot


class Directory:
    """Residency of all sources, fed by snapshots and sequenced deltas.

    Of the shared store at most `max_shared` blocks are remembered; those announced or asked for
    least recently are dropped first. What it takes of memory is stated in `kvtier.core.strips`.
    `Steps` are to be gone through to their end before the next word of the same source is taken;
    those of a source that is removed meanwhile, or of a snapshot that is over, do nothing more.

    Raises:
        ValueError: `max_shared` is less than 1.
    """

    def __init__(self, max_shared: int = 4_000_000) -> None:
        if max_shared < 1:
            raise ValueError(f"max_shared is {max_shared}, must be >= 1")
        self._max_shared = max_shared
        self._strips = StripIndex(_SHARED)
        self._sources: dict[str, _Source] = {}  # the live ones, and those that were asked about
        self._slots = 0  # ever made
        self._free: list[int] = []  # slots
        self._fillings: set[Filling] = set()
        self._dying: deque[int] = deque()  # slots of which nobody is asked any more
        self._audiences: list[tuple[dict[str, list[str]], Audience]] = []  # last asked first

    def begin(self, source: str, epoch: int, seq: int) -> Filling:
        """A snapshot of all that `source` holds as of `seq` begins.

        Until it is whole (`finish`) what the source said before counts.
        """
        filling = Filling(source, epoch, seq, self._slot())
        self._fillings.add(filling)
        return filling

    def fill(self, filling: Filling, held: Iterable[Told]) -> Steps:
        """More of a snapshot."""
        return self._add(filling, filling.slot, held)

    def finish(self, filling: Filling) -> None:
        """The snapshot is whole, and takes the place of whatever its source said before."""
        self._fillings.remove(filling)
        known = self._source(filling.source)
        self._retire(known, filling.slot)
        known.epoch, known.seq, known.live = filling.epoch, filling.seq, True
        filling.slot = _NONE

    def abandon(self, filling: Filling) -> None:
        """The rest of the snapshot will never come. Once it is finished this does nothing."""
        if filling in self._fillings:
            self._fillings.remove(filling)
            self._dying.append(filling.slot)
            filling.slot = _NONE

    def snapshot(self, source: str, epoch: int, seq: int, held: Iterable[Told]) -> None:
        """A whole snapshot at once."""
        filling = self.begin(source, epoch, seq)
        _all(self.fill(filling, held))
        self.finish(filling)

    def delta(
        self,
        source: str,
        epoch: int,
        seq: int,
        added: Iterable[Told],
        removed: Iterable[Told],
    ) -> Steps | None:
        """One delta. A key that is in both, in one tier, is held afterwards.

        Returns:
            None where the delta does not follow what is known of the source (a gap, another
            epoch, a source that is unknown or was removed): nothing has changed, and a replay or a
            snapshot is needed. A delta that was seen before is ignored: no steps.
        """
        known = self._sources.get(source)
        if known is None or not known.live or known.epoch != epoch or seq > known.seq + 1:
            return None
        if seq <= known.seq:
            return iter(())
        known.seq = seq
        return self._change(known, known.slot, added, removed)

    def apply(
        self,
        source: str,
        epoch: int,
        seq: int,
        added: Iterable[Told],
        removed: Iterable[Told],
    ) -> bool:
        """A whole `delta` at once; False where that is None."""
        steps = self.delta(source, epoch, seq, added, removed)
        if steps is not None:
            _all(steps)
        return steps is not None

    def remove(self, source: str) -> None:
        """The source is gone, with all that was its own. Unknown sources are ignored.

        What it says later counts for nothing until it begins anew with a snapshot. The room is
        given back by `tidy`, in time in proportion to what it held.
        """
        known = self._sources.get(source)
        if known is not None and known.live:
            self._retire(known, self._slot())
            known.live = False

    def tidy(self) -> bool:
        """Give back a little of what sources that are gone took; whether there may be more."""
        if self._dying:
            slot = self._dying[0]
            if not any(self._strips.drop(_bit(slot, tier), _DROP) for tier in OWNED):
                self._free.append(self._dying.popleft())
        return bool(self._dying)

    def position(self, source: str) -> tuple[int, int] | None:
        """The epoch and the number of the last word of a live source; None for any other."""
        known = self._sources.get(source)
        return (known.epoch, known.seq) if known is not None and known.live else None

    def warmth(
        self, keys: Sequence[BlockKey], candidates: Mapping[str, Sequence[str]]
    ) -> dict[str, Warmth]:
        """How much of a prompt each candidate has or can fetch.

        Fastest where the candidates are the same as in one of the last calls.

        Args:
            keys: The prompt's blocks, from the first on.
            candidates: The sources of each candidate, e.g. a worker's and its node daemon's feed.
                Unknown sources hold nothing.
        """
        audience = self._audience(candidates) or self._prepare(candidates)
        return audience.warmth(self._strips.walk(keys))

    def counts(self, source: str) -> dict[Tier, int]:
        """How many blocks a source holds, by tier; empty for one that is not live."""
        known = self._sources.get(source)
        if known is None or not known.live:
            return {}
        return {tier: self._strips.count(_bit(known.slot, tier)) for tier in OWNED}

    @property
    def blocks(self) -> int:
        """Different blocks that take room, also those that `tidy` has still to give back."""
        return len(self._strips)

    @property
    def shared_blocks(self) -> int:
        """Blocks known to be in the shared store."""
        return self._strips.count(_SHARED)

    def check(self) -> None:
        """Every invariant; for tests."""
        self._strips.check()
        used = [each.slot for each in self._sources.values()]
        used += [each.slot for each in self._fillings]
        assert sorted([*self._free, *self._dying, *used]) == list(range(self._slots))

    def _audience(self, candidates: Mapping[str, Sequence[str]]) -> Audience | None:
        """What was prepared for the same candidates, if that was not long ago."""
        known = self._audiences
        for at, (asked, audience) in enumerate(known):
            if asked == candidates:
                if at:
                    known.insert(0, known.pop(at))
                return audience
        return None

    def _prepare(self, candidates: Mapping[str, Sequence[str]]) -> Audience:
        asked = {name: list(sources) for name, sources in candidates.items()}
        del self._audiences[_MAX_AUDIENCES - 1 :]
        wanted = {
            source
            for names in (asked, *(each for each, _ in self._audiences))
            for sources in names.values()
            for source in sources
        }
        for name, known in list(self._sources.items()):
            if not known.live and name not in wanted:  # nobody asks for it any more
                self._free.append(self._sources.pop(name).slot)
        audience = Audience(
            asked, lambda source, tier: _bit(self._source(source).slot, tier), _SHARED
        )
        self._audiences.insert(0, (asked, audience))
        return audience

    def _source(self, name: str) -> _Source:
        known = self._sources.get(name)
        if known is None:
            known = self._sources[name] = _Source(self._slot())
        return known

    def _slot(self) -> int:
        if self._free:
            return self._free.pop()
        self._slots += 1
        return self._slots - 1

    def _retire(self, source: _Source, slot: int) -> None:
        """From now on the source is known by `slot`; nobody is asked for the former one's."""
        self._dying.append(source.slot)
        source.slot = slot
        self._audiences.clear()

    def _change(
        self, known: _Source, slot: int, added: Iterable[Told], removed: Iterable[Told]
    ) -> Steps:
        for tier, packed, *_ in removed:
            for at in range(0, len(packed), STEP * KEY_NBYTES):
                if known.slot != slot:  # gone meanwhile
                    return
                self._strips.discard(packed[at : at + STEP * KEY_NBYTES], _bit(slot, tier))
                yield
        yield from self._add(known, slot, added)

    def _add(self, to: _Source | Filling, slot: int, held: Iterable[Told]) -> Steps:
        for tier, packed, told_before in held:
            before, holder = told_before, _bit(slot, tier)
            for at in range(0, len(packed), STEP * KEY_NBYTES):
                if to.slot != slot:  # gone meanwhile
                    return
                part = packed[at : at + STEP * KEY_NBYTES]
                self._strips.add(part, holder, before)
                if holder == _SHARED:
                    self._strips.trim(self._max_shared)
                before = BlockKey(part[-KEY_NBYTES:])
                yield


def _all(steps: Steps) -> None:
    for _ in steps:
        pass


@lru_cache(maxsize=4096)  # one int for all strips of a holder: it takes as much as 60 bytes
def _bit(slot: int, tier: Tier) -> int:
    return _SHARED if tier is Tier.SHARED else 2 << (len(OWNED) * slot + tier)
