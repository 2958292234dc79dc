"""Block keys on the wire (`TierKeys`), with which block comes before which where that is known."""

from collections.abc import Callable, Container, Iterator, Sequence
from operator import lt
from typing import Final

from kvtier.core.blocks import KEY_NBYTES, BlockKey
from kvtier.core.directory import Told
from kvtier.core.tiers import Tier
from kvtier.errors import RemoteProtocolError
from kvtier.wire.pb import feed_pb2

Before = Callable[[BlockKey], BlockKey | None]

TO_WIRE: Final = {
    Tier.VRAM: feed_pb2.TIER_VRAM,
    Tier.HOST: feed_pb2.TIER_HOST,
    Tier.DISK: feed_pb2.TIER_DISK,
    Tier.SHARED: feed_pb2.TIER_SHARED,
}
STEP: Final = 2048  # blocks; a few ms of work
MAX_STARTS: Final = 8192  # of one message
_NONE: Final = bytes(KEY_NBYTES)
_TIERS: Final[dict[int, Tier]] = {int(wire): tier for tier, wire in TO_WIRE.items()}


def tell(tier: Tier, keys: Sequence[BlockKey], before: Before) -> feed_pb2.TierKeys:
    """These blocks, which differ, in chains; `before` gives the block before one, if known."""
    parents = {key: before(key) for key in keys}
    linked = ((key, parent) for key, parent in parents.items() if parent != key)
    after = {parent: key for key, parent in linked if parent in parents}
    loose: list[BlockKey] = []
    chained: list[BlockKey] = []
    starts: list[int] = []
    heads: list[bytes] = []
    left = dict.fromkeys(keys)
    for key, parent in parents.items():
        if parent is not None and after.get(parent) == key:
            continue  # it comes behind its parent
        if parent is None and key not in after:
            loose.append(key)
            del left[key]
            continue
        starts.append(len(chained))
        heads.append(parent or _NONE)
        link: BlockKey | None = key
        while link is not None:
            chained.append(link)
            del left[link]
            link = after.get(link)
    loose += left  # in a circle, which no prompt is
    return feed_pb2.TierKeys(
        tier=TO_WIRE[tier], keys=b"".join(loose + chained),
        starts=[len(loose) + start for start in starts], parents=b"".join(heads),
    )  # fmt: skip


def in_chains(keys: Sequence[BlockKey], before: Before) -> Iterator[list[BlockKey]]:
    """These blocks, which differ, each behind the one before it where that is among them.

    In steps of at most STEP blocks of work, of which some give nothing yet.
    """
    left: dict[BlockKey, BlockKey | None] = {}  # with the block before each
    after: dict[BlockKey, BlockKey] = {}  # the first that follows; others begin chains of their own
    for at in range(0, len(keys), STEP):
        for key in keys[at : at + STEP]:
            parent = left[key] = before(key)
            if parent is not None:
                after.setdefault(parent, key)
        yield []
    found: list[BlockKey] = []
    for key in keys:
        parent = left.get(key)
        if parent in left and after.get(parent) == key:
            continue  # it comes behind its parent
        link: BlockKey | None = key
        while link in left:
            del left[link]
            found.append(link)
            link = after.get(link)
            if len(found) == STEP:
                yield found
                found = []
    yield [*found, *left]  # in a circle, which no prompt is


def hear(part: feed_pb2.TierKeys, tiers: Container[Tier]) -> Iterator[Told]:
    """What such a message of a source that may speak of `tiers` says; checked before the first.

    Raises:
        RemoteProtocolError: A field is not as feed.proto says.
    """
    tier, packed, starts = _TIERS.get(part.tier), part.keys, [*part.starts]
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
    bounds = [*starts, len(packed) // KEY_NBYTES]
    if not all(map(lt, bounds, bounds[1:])):
        raise RemoteProtocolError(f"feed: starts must ascend and be below {bounds[-1]}")
    return _chains(tier, packed, bounds, part.parents)


def _chains(tier: Tier, packed: bytes, bounds: list[int], parents: bytes) -> Iterator[Told]:
    yield Told(tier, packed[: bounds[0] * KEY_NBYTES])
    for number in range(len(bounds) - 1):
        chain = packed[bounds[number] * KEY_NBYTES : bounds[number + 1] * KEY_NBYTES]
        parent = BlockKey(parents[number * KEY_NBYTES : (number + 1) * KEY_NBYTES])
        yield Told(tier, chain, True, None if parent == _NONE else parent)
