"""Strips of blocks, and how they are cut and joined; see `kvtier.core.strips`."""

from collections.abc import Iterator
from typing import Final

from kvtier.core.blocks import KEY_NBYTES
from kvtier.core.table import NEW, SHARD_OF, IntSet, Order, print_at, prints, shards

MAX_STRIP: Final = 512  # blocks
_FULL: Final = MAX_STRIP * KEY_NBYTES
_MAX_MASKS: Final = 4096  # sets of holders of which all strips have the same int


class Strip:
    """Some blocks that the holders in `mask` have: never empty, never without a holder."""

    __slots__ = ("age", "before", "handle", "mask", "packed", "then")

    def __init__(self, handle: int, packed: bytes, mask: int) -> None:
        self.handle = handle  # where it stands in the list of all strips
        self.packed = packed  # the keys, one after the other
        self.mask = mask
        self.before: int | None = None  # fingerprint of the block before the first, if any
        # One that follows it, if any: a guess, good until its keys say otherwise.
        self.then: Strip | None = None
        self.age = NEW  # in the order of those that `ranked` has

    def __len__(self) -> int:
        """How many blocks it has."""
        return len(self.packed) // KEY_NBYTES


class Strips:
    """All strips, and the tables by which they are found."""

    def __init__(self) -> None:
        self._of = shards()  # to the handle of a strip
        self._after = shards()  # to that of the strip that follows a block, where it waits for it
        self._strips: list[Strip | None] = []  # by handle
        self._free: list[int] = []  # handles
        self._held: dict[int, IntSet] = {}  # handles by holder
        self._masks: dict[int, int] = {}  # by itself: one int for all strips with these holders
        self._order = Order()  # handles of those that one holder has

    def _find(self, packed: bytes, i: int) -> Strip | None:
        """The strip that the block at `i` is in, unless another has its fingerprint."""
        found = print_at(packed, (i + 1) * KEY_NBYTES)
        handle = self._of[found >> SHARD_OF].get(found)
        return None if handle is None else self._strips[handle]

    def _strip(self, handle: int) -> Strip:
        strip = self._strips[handle]
        assert strip is not None
        return strip

    def _make(self, packed: bytes, mask: int) -> Strip:
        handle = self._free.pop() if self._free else len(self._strips)
        strip = Strip(handle, packed, mask)
        if handle < len(self._strips):
            self._strips[handle] = strip
        else:
            self._strips.append(strip)
        return strip

    def _turn(self, strip: Strip, holder: int) -> None:
        """`holder`, which had the strip, has it no more, or the other way round."""
        if len(self._masks) >= _MAX_MASKS:
            self._masks.clear()
        mask = strip.mask ^ holder
        strip.mask = self._masks.setdefault(mask, mask)

    def _free_handle(self, strip: Strip) -> None:
        self._follow(strip, None)
        strip.packed, strip.then = b"", None  # some strip may still take it for the one behind it
        self._strips[strip.handle] = None
        self._free.append(strip.handle)

    def _follow(self, strip: Strip, before: int | None) -> None:
        """`strip` follows another block than it did, or none."""
        if strip.before is not None:
            shard = self._after[strip.before >> SHARD_OF]
            if shard.get(strip.before) == strip.handle:
                del shard[strip.before]
        strip.before = before
        if before is not None:
            self._after[before >> SHARD_OF][before] = strip.handle

    def _ending(self, before: int | None) -> Strip | None:
        """The strip that ends with this block."""
        handle = None if before is None else self._of[before >> SHARD_OF].get(before)
        if handle is None:
            return None
        strip = self._strip(handle)
        return strip if print_at(strip.packed, len(strip.packed)) == before else None

    def _settle(self, strip: Strip) -> None:
        """Tie it to the strips before and after it; join those that have the same holders."""
        before = self._ending(strip.before)
        if before is not None:
            strip = self._tie(before, strip)
        end = print_at(strip.packed, len(strip.packed))
        handle = self._after[end >> SHARD_OF].get(end)
        if handle is not None:
            self._tie(strip, self._strip(handle))

    def _tie(self, first: Strip, then: Strip) -> Strip:
        """`then` follows `first`; the one in which its blocks are now."""
        if first is then:
            return then
        if first.mask == then.mask and len(first.packed) + len(then.packed) <= _FULL:
            return self._join(first, then)
        first.then = then
        return then

    def _join(self, first: Strip, then: Strip) -> Strip:
        """Make one of two strips; the longer stays, so that the fewest blocks move."""
        packed = first.packed + then.packed
        stays, goes = (first, then) if len(first) >= len(then) else (then, first)
        of, handle = self._of, stays.handle
        for each in prints(goes.packed):
            of[each >> SHARD_OF][each] = handle
        for holder in bits(goes.mask):
            self._held[holder].remove(goes.handle)
        if goes.age != NEW:
            self._order.remove(goes.handle, goes.age)
        before, behind = first.before, then.then
        self._follow(then, None)
        self._free_handle(goes)
        if stays is then:
            self._follow(stays, before)
        stays.packed, stays.then = packed, behind
        return stays

    def _carve(self, strip: Strip, start: int, stop: int) -> Strip:
        """A strip with just these blocks; those before and after them become others."""
        if stop < len(strip):
            strip, _ = self._cut(strip, stop)
        if start:
            _, strip = self._cut(strip, start)
        return strip

    def _cut(self, strip: Strip, at: int) -> tuple[Strip, Strip]:
        """The strip as two, the second of which follows the first; the longer stays what it is."""
        packed = strip.packed
        first, then = packed[: at * KEY_NBYTES], packed[at * KEY_NBYTES :]
        middle = print_at(packed, at * KEY_NBYTES)
        if len(first) >= len(then):
            part = self._move(strip, first, then)
            self._follow(part, middle)
            part.then, strip.then = strip.then, part
            return strip, part
        before = strip.before
        part = self._move(strip, then, first)
        self._follow(strip, middle)
        self._follow(part, before)
        part.then = strip
        if (last := self._ending(before)) is not None:
            last.then = part
        return part, strip

    def _move(self, strip: Strip, stays: bytes, goes: bytes) -> Strip:
        """Give the blocks `goes` of `strip` to one of their own, with the same holders."""
        part = self._make(goes, strip.mask)
        strip.packed = stays
        of, handle = self._of, part.handle
        for each in prints(goes):
            of[each >> SHARD_OF][each] = handle
        for holder in bits(strip.mask):
            self._held[holder].add(handle)
        if strip.age != NEW:
            part.age = self._order.touch(handle, NEW)
        return part


def bits(mask: int) -> Iterator[int]:
    """The bits that are set, each as an int, lowest first."""
    while mask:
        low = mask & -mask
        mask ^= low
        yield low
