"""What a node daemon grants an engine: the right to touch some slots for a while."""

from dataclasses import dataclass
from typing import NamedTuple

from kvtier.core.blocks import Slot
from kvtier.core.tiers import Tier
from kvtier.engine.seen import Seen


class TierMatch(NamedTuple):
    """Leading blocks of a prompt that the node holds, and how many of them in each tier.

    `seen` is where they lie, as far as that is in the arena.
    """

    blocks: int
    by_tier: dict[Tier, int]
    seen: Seen


@dataclass(slots=True)
class ReadLease:
    """Slots of blocks keys[first], keys[first + 1], ...; valid until the context ends.

    The first `arrived` of them hold their blocks. The others may come (`TierClient.more`), or be
    cut off.
    """

    id: int
    slots: list[Slot]
    sources: list[Tier]  # where each block was before this read
    arrived: int


@dataclass(slots=True)
class WriteLease:
    """Slots to fill with blocks keys[i] for i in `indexes`; valid until the context ends.

    `filled` says how many of them, from the first on, are to be kept; the caller sets it once
    they are in their slots. If the context ends by an exception, none is kept.
    """

    id: int  # 0: on credit, the daemon hears of it at the end
    indexes: list[int]
    slots: list[Slot]
    filled: int = 0
