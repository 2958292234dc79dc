"""What every node holds, as its feeds tell it.

A source is one feed: a node's daemon, or a worker with its VRAM. What it says of VRAM, host and
disk is its own and goes with it. What it says of the shared store is said for everybody, and stays
when it goes: the blocks are still there.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from kvtier.core.audience import OWNED, Audience, Warmth
from kvtier.core.blocks import BlockKey
from kvtier.core.strips import StripIndex
from kvtier.core.tiers import Tier

TierKeys = Iterable[tuple[Tier, Iterable[BlockKey]]]

_SHARED: Final = 1  # the shared store's bit; each slot has len(OWNED) bits above it


class _Source:
    """The last that one feed said."""

    def __init__(self, slot: int) -> None:
        self.slot = slot
        self.epoch = 0
        self.seq = 0
        self.live = False  # between a snapshot and `remove`


class Directory:
    """Residency of all sources, fed by snapshots and sequenced deltas.

    Of the shared store at most `max_shared` blocks are remembered; those announced or asked for
    least recently are dropped first. What it takes of memory is stated in `kvtier.core.strips`.

    Raises:
        ValueError: `max_shared` is less than 1.
    """

    def __init__(self, max_shared: int = 4_000_000) -> None:
        if max_shared < 1:
            raise ValueError(f"max_shared is {max_shared}, must be >= 1")
        self._max_shared = max_shared
        self._strips = StripIndex(_SHARED)
        self._sources: dict[str, _Source] = {}  # the live ones, and those that were asked about
        self._free: list[int] = []  # slots
        self._audience: Audience | None = None
        self._asked: dict[str, list[str]] = {}  # whom `_audience` is made for

    def snapshot(self, source: str, epoch: int, seq: int, held: TierKeys) -> None:
        """All that `source` holds as of `seq`, in place of whatever it said before."""
        known = self._source(source)
        self._drop(known)
        known.epoch, known.seq, known.live = epoch, seq, True
        self._add(known, held)

    def apply(self, source: str, epoch: int, seq: int, added: TierKeys, removed: TierKeys) -> bool:
        """One delta. A key that is in both, in one tier, is held afterwards.

        Returns:
            False where the delta does not follow what is known of the source (a gap, another
            epoch, a source that is unknown or was removed): nothing has changed, and a replay or a
            snapshot is needed. A delta that was seen before is ignored and gives True.
        """
        known = self._sources.get(source)
        if known is None or not known.live or known.epoch != epoch or seq > known.seq + 1:
            return False
        if seq <= known.seq:
            return True
        known.seq = seq
        for tier, keys in removed:
            self._strips.discard(keys, _bit(known, tier))
        self._add(known, added)
        return True

    def remove(self, source: str) -> None:
        """The source is gone, with all that was its own. Unknown sources are ignored.

        Takes time in proportion to what it held. What it says later counts for nothing until it
        begins anew with a snapshot.
        """
        known = self._sources.get(source)
        if known is not None:
            self._drop(known)
            known.live = False

    def position(self, source: str) -> tuple[int, int] | None:
        """The epoch and the number of the last word of a live source; None for any other."""
        known = self._sources.get(source)
        return (known.epoch, known.seq) if known is not None and known.live else None

    def warmth(
        self, keys: Sequence[BlockKey], candidates: Mapping[str, Sequence[str]]
    ) -> dict[str, Warmth]:
        """How much of a prompt each candidate has or can fetch.

        Fastest where the candidates are the same as in the call before.

        Args:
            keys: The prompt's blocks, from the first on.
            candidates: The sources of each candidate, e.g. a worker's and its node daemon's feed.
                Unknown sources hold nothing.
        """
        audience = self._audience
        if audience is None or candidates != self._asked:
            audience = self._prepare(candidates)
        return audience.warmth(self._strips.walk(keys))

    def gather(self) -> None:
        """Tidy up after a look-up that had to take many steps, so that the next takes few."""
        self._strips.gather()

    def counts(self, source: str) -> dict[Tier, int]:
        """How many blocks a source holds, by tier; empty for one that is not live."""
        known = self._sources.get(source)
        if known is None or not known.live:
            return {}
        return {tier: self._strips.count(_bit(known, tier)) for tier in OWNED}

    @property
    def blocks(self) -> int:
        """Different blocks that anybody holds, or the shared store."""
        return len(self._strips)

    @property
    def shared_blocks(self) -> int:
        """Blocks known to be in the shared store."""
        return self._strips.count(_SHARED)

    def check(self) -> None:
        """Every invariant; for tests."""
        self._strips.check()
        slots = [*self._free, *(each.slot for each in self._sources.values())]
        assert sorted(slots) == list(range(len(slots)))

    def _prepare(self, candidates: Mapping[str, Sequence[str]]) -> Audience:
        self._asked = {name: list(sources) for name, sources in candidates.items()}
        wanted = {source for sources in self._asked.values() for source in sources}
        for name, known in list(self._sources.items()):
            if not known.live and name not in wanted:  # nobody asks for it any more
                self._free.append(self._sources.pop(name).slot)
        self._audience = Audience(
            self._asked, lambda source, tier: _bit(self._source(source), tier), _SHARED
        )
        return self._audience

    def _source(self, name: str) -> _Source:
        known = self._sources.get(name)
        if known is None:
            slot = self._free.pop() if self._free else len(self._sources)
            known = self._sources[name] = _Source(slot)
        return known

    def _drop(self, source: _Source) -> None:
        for tier in OWNED:
            self._strips.drop(_bit(source, tier))

    def _add(self, source: _Source, held: TierKeys) -> None:
        for tier, keys in held:
            self._strips.add(keys, _bit(source, tier))
        self._strips.trim(self._max_shared)


def _bit(source: _Source, tier: Tier) -> int:
    return _SHARED if tier is Tier.SHARED else 2 << (len(OWNED) * source.slot + tier)
