"""Block keys on the wire (`TierKeys`), in chains: each block behind the one before it."""

from collections.abc import Callable, Container, Iterator, Sequence
from itertools import chain
from operator import lt
from typing import Final

from kvtier.core.blocks import KEY_NBYTES, BlockKey
from kvtier.core.directory import Told
from kvtier.core.tiers import Tier
from kvtier.errors import RemoteProtocolError
from kvtier.wire.pb import feed_pb2

# The block before one in its prompt, or BEGINS; None for a block that is not held any more.
Before = Callable[[BlockKey], BlockKey | None]

TO_WIRE: Final = {
    Tier.VRAM: feed_pb2.TIER_VRAM,
    Tier.HOST: feed_pb2.TIER_HOST,
    Tier.DISK: feed_pb2.TIER_DISK,
    Tier.SHARED: feed_pb2.TIER_SHARED,
}
STEP: Final = 2048  # blocks; a few ms of work
MAX_STARTS: Final = 8192  # of one message
_TIERS: Final[dict[int, Tier]] = {int(wire): tier for tier, wire in TO_WIRE.items()}


def tell(tier: Tier, keys: Sequence[BlockKey], before: Before) -> feed_pb2.TierKeys:
    """These blocks, which differ, in chains; those that are not held any more are left out."""
    parents = {key: parent for key in keys if (parent := before(key)) is not None}
    after = {parent: key for key, parent in parents.items() if parent in parents}
    chained: list[BlockKey] = []
    starts: list[int] = []
    heads: list[BlockKey] = []
    left = parents.copy()
    # Whoever follows none of them comes first; what is left then is a circle, which no prompt is.
    heading = (key for key, parent in parents.items() if after.get(parent) != key)
    for key in chain(heading, parents):
        if key not in left:
            continue
        starts.append(len(chained))
        heads.append(parents[key])
        link: BlockKey | None = key
        while link in left:
            del left[link]
            chained.append(link)
            link = after.get(link)
    return feed_pb2.TierKeys(
        tier=TO_WIRE[tier], keys=b"".join(chained), starts=starts, parents=b"".join(heads)
    )


def tell_gone(tier: Tier, keys: Sequence[BlockKey]) -> feed_pb2.TierKeys:
    """These blocks, of which nobody needs to know the order any more."""
    return feed_pb2.TierKeys(tier=TO_WIRE[tier], keys=b"".join(keys))


def in_chains(keys: Sequence[BlockKey], before: Before) -> Iterator[list[BlockKey]]:
    """These blocks, which differ, each behind the one before it where that is among them.

    Those that are not held any more are left out. In steps of at most STEP blocks of work, of
    which some give nothing yet.
    """
    left: dict[BlockKey, BlockKey] = {}  # with the block before each
    after: dict[BlockKey, BlockKey] = {}  # the first that follows; others begin chains of their own
    for at in range(0, len(keys), STEP):
        for key in keys[at : at + STEP]:
            parent = before(key)
            if parent is not None:
                left[key] = parent
                after.setdefault(parent, key)
        yield []
    found: list[BlockKey] = []
    for key in keys:
        before_it = left.get(key)
        if before_it in left and after.get(before_it) == key:
            continue  # it comes behind that one
        link: BlockKey | None = key
        while link in left:
            del left[link]
            found.append(link)
            link = after.get(link)
            if len(found) == STEP:
                yield found
                found = []
    yield [*found, *left]  # in a circle, which no prompt is


def hear(part: feed_pb2.TierKeys, tiers: Container[Tier], *, gone: bool = False) -> Iterator[Told]:
    """What such a message of a source that may speak of `tiers` says; checked before the first.

    `gone`: of blocks that were removed, which need not lie in chains.

    Raises:
        RemoteProtocolError: A field is not as feed.proto says.
    """
    tier, packed, starts = _TIERS.get(part.tier), part.keys, [*part.starts]
    blocks = len(packed) // KEY_NBYTES
    if tier is None or tier not in tiers:
        raise RemoteProtocolError(f"feed: tier {part.tier} is none of this source's")
    if len(packed) % KEY_NBYTES:
        raise RemoteProtocolError(
            f"feed: {len(packed)} bytes of keys, must be a multiple of {KEY_NBYTES}"
        )
    if len(starts) > MAX_STARTS:
        raise RemoteProtocolError(f"feed: {len(starts)} starts, limit {MAX_STARTS}")
    if len(part.parents) != len(starts) * KEY_NBYTES:
        raise RemoteProtocolError(
            f"feed: {len(part.parents)} bytes of parents for {len(starts)} starts"
        )
    bounds = [*starts, blocks]
    if not all(map(lt, bounds, bounds[1:])):
        raise RemoteProtocolError(f"feed: starts must ascend and be below {blocks}")
    if gone:
        return iter((Told(tier, packed),))
    if bounds[0]:
        raise RemoteProtocolError(
            f"feed: {bounds[0]} of {blocks} blocks lie in no chain that says what comes before "
            "them: the first start must be 0"
        )
    return _chains(tier, packed, bounds, part.parents)


def _chains(tier: Tier, packed: bytes, bounds: list[int], parents: bytes) -> Iterator[Told]:
    for number in range(len(bounds) - 1):
        run = packed[bounds[number] * KEY_NBYTES : bounds[number + 1] * KEY_NBYTES]
        yield Told(tier, run, BlockKey(parents[number * KEY_NBYTES : (number + 1) * KEY_NBYTES]))
