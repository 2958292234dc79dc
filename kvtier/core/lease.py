"""What the ledger answers: how much of a prompt is held, and the right to touch its slots."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kvtier.core.blocks import BlockKey, Slot
from kvtier.core.policy import Use


class Match(NamedTuple):
    """Leading blocks of a prompt held here without a gap; each counted in its warmest tier.

    The first ones lie in `slots` of the host tier, at `turn`: see `SlotIndex`.
    """

    blocks: int
    by_tier: tuple[int, ...]
    slots: list[Slot]
    turn: int


class Kept(NamedTuple):
    """What became of blocks that were put: the keys that are held now and were not before.

    `slots` are the client's in place of those that it named. `aside` are kept until whoever fills
    them commits, and are held should that never be.
    """

    keys: list[BlockKey]
    slots: list[Slot]
    aside: list[BlockKey]


@dataclass(slots=True)
class Lease:
    """A client's right to touch the slots of some blocks, until commit, release or disconnect.

    `keys` and `slots` go together; of a read lease also `sources`, the tier that each block came
    from, and of a write lease `indexes`, the position of each in the path that was asked for.
    A read lease is settled once `loading` is empty. Until then only the first `arrived()` of its
    slots may be read, and a load that fails can cut it short behind them.
    """

    id: int
    client: int
    writing: bool
    path: Sequence[BlockKey]
    use: Use  # what is known of the request behind it
    keys: list[BlockKey] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    indexes: list[int] = field(default_factory=list)
    loading: set[BlockKey] = field(default_factory=set)
    refused: int = 0  # blocks of a write that found no slot, or of a read not worth their loading
    _arrived: int = 0

    def arrived(self) -> int:
        """Leading blocks of a read lease that are in their slots; never fewer than before."""
        if not self.loading:
            return len(self.keys)
        while self.keys[self._arrived] not in self.loading:
            self._arrived += 1
        return self._arrived
