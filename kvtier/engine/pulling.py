"""What a request brings to its node before it is restored: blocks that another node has."""

from collections.abc import Sequence

from kvtier.core.blocks import BlockKey
from kvtier.core.breakeven import ComputeCost
from kvtier.core.policy import Use
from kvtier.core.tiers import Tier
from kvtier.engine.beside import LowerTiers
from kvtier.engine.sequence import Running


def pull(
    tiers: LowerTiers, sequence: Running, path: Sequence[BlockKey], first: int,
    compute: ComputeCost | None, use: Use,
) -> None:  # fmt: skip
    """Have the missing ones of path[first:] loaded from the node that the request names, if any.

    On the tiers' thread, which the engine's thread waits for before it calls `arrived`.
    """
    if source := sequence.request.source:
        sequence.coming = tiers.pull(path, first, source, compute, use)


def arrived(sequence: Running, sources: Sequence[Tier]) -> None:
    """Count what was pulled and then restored."""
    sequence.pulled += counted(sequence.coming, sum(each is Tier.HOST for each in sources))
    sequence.coming = 0


def counted(came: int, in_host: int) -> int:
    """How many of the blocks that came were restored, where `in_host` were from host memory.

    Some may have been evicted, or have come too late.
    """
    return min(came, in_host)
