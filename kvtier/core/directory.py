"""What every node holds, as its feeds tell it.

A source is one feed: a node's daemon, or a worker with its VRAM. What it says of VRAM, host and
disk is its own and goes with it. What it says of the shared store is said for everybody, and stays
when it goes: the blocks are still there.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from kvtier.core.blocks import BlockKey
from kvtier.core.tiers import Tier

OWNED = (Tier.VRAM, Tier.HOST, Tier.DISK)  # warmest first

TierKeys = Iterable[tuple[Tier, Iterable[BlockKey]]]


class Warmth(NamedTuple):
    """Leading blocks of a prompt that somebody has without a gap, by the warmest tier of each."""

    vram: int = 0
    host: int = 0
    disk: int = 0
    shared: int = 0

    @property
    def blocks(self) -> int:
        """All of them."""
        return sum(self)


class _Source:
    """The last that one feed said."""

    def __init__(self, epoch: int, seq: int) -> None:
        self.epoch = epoch
        self.seq = seq
        self.held: dict[Tier, set[BlockKey]] = {tier: set() for tier in OWNED}


class Directory:
    """Residency of all sources, fed by snapshots and sequenced deltas.

    Of the shared store at most `max_shared` blocks are remembered, about 200 bytes each; those
    announced or asked for least recently are dropped first.

    Raises:
        ValueError: `max_shared` is less than 1.
    """

    def __init__(self, max_shared: int = 4_000_000) -> None:
        if max_shared < 1:
            raise ValueError(f"max_shared is {max_shared}, must be >= 1")
        self._max_shared = max_shared
        self._sources: dict[str, _Source] = {}
        self._shared: OrderedDict[BlockKey, None] = OrderedDict()  # coldest first

    def snapshot(self, source: str, epoch: int, seq: int, held: TierKeys) -> None:
        """All that `source` holds as of `seq`, in place of whatever it said before."""
        self._sources[source] = _Source(epoch, seq)
        self._add(self._sources[source], held)

    def apply(self, source: str, epoch: int, seq: int, added: TierKeys, removed: TierKeys) -> bool:
        """One delta. A key that is in both, in one tier, is held afterwards.

        Returns:
            False where the delta does not follow what is known of the source (a gap, another
            epoch, an unknown source): nothing has changed, and a snapshot is needed. A delta that
            was seen before is ignored and gives True.
        """
        known = self._sources.get(source)
        if known is None or known.epoch != epoch or seq > known.seq + 1:
            return False
        if seq <= known.seq:
            return True
        known.seq = seq
        for tier, keys in removed:
            if tier is Tier.SHARED:
                for key in keys:
                    self._shared.pop(key, None)
            else:
                known.held[tier].difference_update(keys)
        self._add(known, added)
        return True

    def remove(self, source: str) -> None:
        """The source is gone, with all that was its own. Unknown sources are ignored."""
        self._sources.pop(source, None)

    def warmth(
        self, keys: Sequence[BlockKey], candidates: Mapping[str, Sequence[str]]
    ) -> dict[str, Warmth]:
        """How much of a prompt each candidate has or can fetch.

        Args:
            keys: The prompt's blocks, from the first on.
            candidates: The sources of each candidate, e.g. a worker's and its node daemon's feed.
                Unknown sources hold nothing.
        """
        shared = {key for key in keys if key in self._shared}
        for key in reversed(keys):  # so that a prompt's root is the last of it to be dropped
            if key in shared:
                self._shared.move_to_end(key)
        return {name: self._leading(keys, names, shared) for name, names in candidates.items()}

    def counts(self, source: str) -> dict[Tier, int]:
        """How many blocks a source holds, by tier; empty for an unknown one."""
        known = self._sources.get(source)
        return {} if known is None else {tier: len(keys) for tier, keys in known.held.items()}

    @property
    def shared_blocks(self) -> int:
        """Blocks known to be in the shared store."""
        return len(self._shared)

    def _leading(
        self, keys: Sequence[BlockKey], names: Sequence[str], shared: set[BlockKey]
    ) -> Warmth:
        sources = [self._sources[name] for name in names if name in self._sources]
        layers = [(tier, source.held[tier]) for tier in OWNED for source in sources]
        layers.append((Tier.SHARED, shared))
        counts = [0] * len(Tier)
        for key in keys:
            for tier, held in layers:
                if key in held:
                    counts[tier] += 1
                    break
            else:
                break
        return Warmth(*counts)

    def _add(self, source: _Source, held: TierKeys) -> None:
        for tier, keys in held:
            if tier is not Tier.SHARED:
                source.held[tier].update(keys)
                continue
            for key in keys:
                self._shared[key] = None
                self._shared.move_to_end(key)
                if len(self._shared) > self._max_shared:
                    self._shared.popitem(last=False)
