"""Strips of blocks, and how they are cut and joined; see `kvtier.core.strips`."""

from collections.abc import Iterator
from typing import Final

from kvtier.core.blocks import KEY_NBYTES
from kvtier.core.table import NEW, SHARD_OF, IntSet, Order, print_at, prints, shards

MAX_STRIP: Final = 512  # blocks
_FULL: Final = MAX_STRIP * KEY_NBYTES


class Strip:
    """Some blocks that the holders in `mask` have: never empty, never without a holder."""

    __slots__ = ("age", "before", "handle", "mask", "ordered", "packed")

    def __init__(self, handle: int, packed: bytes, mask: int, ordered: bool) -> None:
        self.handle = handle  # where it stands in the list of all strips
        self.packed = packed  # the keys, one after the other
        self.mask = mask
        self.ordered = ordered  # each block is known to follow the one before it
        self.before: int | None = None  # fingerprint of the block before the first, if known
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

    def _make(self, packed: bytes, mask: int, ordered: bool) -> Strip:
        handle = self._free.pop() if self._free else len(self._strips)
        strip = Strip(handle, packed, mask, ordered)
        if handle < len(self._strips):
            self._strips[handle] = strip
        else:
            self._strips.append(strip)
        return strip

    def _free_handle(self, strip: Strip) -> None:
        self._follow(strip, None)
        self._strips[strip.handle] = None
        self._free.append(strip.handle)

    def _follow(self, strip: Strip, before: int | None) -> None:
        """`strip` follows another block than it did, or nobody knows which."""
        if strip.before is not None:
            shard = self._after[strip.before >> SHARD_OF]
            if shard.get(strip.before) == strip.handle:
                del shard[strip.before]
        strip.before = before
        if before is not None:
            self._after[before >> SHARD_OF][before] = strip.handle

    def _tail(self, before: int | None, mask: int, room: int) -> Strip | None:
        """The strip that ends with this block, if it has these holders and takes `room` blocks."""
        handle = None if before is None else self._of[before >> SHARD_OF].get(before)
        if handle is None:
            return None
        strip = self._strip(handle)
        nbytes = len(strip.packed)
        if strip.mask != mask or nbytes + room * KEY_NBYTES > _FULL:
            return None
        return strip if print_at(strip.packed, nbytes) == before else None

    def _settle(self, strip: Strip) -> Strip:
        """Join it with the strips before and after it, if they have the same holders."""
        before = self._tail(strip.before, strip.mask, len(strip))
        if before is not None and before is not strip:
            strip = self._join(before, strip)
        end = print_at(strip.packed, len(strip.packed))
        handle = self._after[end >> SHARD_OF].get(end)
        if handle is not None:
            after = self._strip(handle)
            fits = len(strip.packed) + len(after.packed) <= _FULL
            if after.mask == strip.mask and fits and after is not strip:
                strip = self._join(strip, after)
        return strip

    def _join(self, first: Strip, then: Strip) -> Strip:
        """Make one of two strips; the longer stays, so that the fewest blocks are told."""
        packed = first.packed + then.packed
        stays, goes = (first, then) if len(first) >= len(then) else (then, first)
        of, handle = self._of, stays.handle
        for each in prints(goes.packed):
            of[each >> SHARD_OF][each] = handle
        for holder in bits(goes.mask):
            self._held[holder].remove(goes.handle)
        if goes.age != NEW:
            self._order.remove(goes.handle, goes.age)
        before = first.before
        self._follow(then, None)
        self._free_handle(goes)
        if stays is then:
            self._follow(stays, before)
        stays.packed = packed
        stays.ordered = first.ordered and then.ordered
        return stays

    def _carve(self, strip: Strip, start: int, stop: int) -> Strip:
        """A strip with just these blocks; the rest becomes others, or stays in `strip`.

        The longer part keeps the strip. What was before and after the blocks stays together where
        the strip was not in order anyway.
        """
        if strip.ordered:
            if stop < len(strip):
                strip, _ = self._cut(strip, stop)
            if start:
                _, strip = self._cut(strip, start)
            return strip
        size = len(strip)
        if stop - start == size:
            return strip
        first, last = start * KEY_NBYTES, stop * KEY_NBYTES
        packed = strip.packed
        inside, outside = packed[first:last], packed[:first] + packed[last:]
        if 2 * (stop - start) >= size:
            self._move(strip, inside, outside)
            return strip
        return self._move(strip, outside, inside)

    def _cut(self, strip: Strip, at: int) -> tuple[Strip, Strip]:
        """The strip as two, the second of which follows the first."""
        packed = strip.packed
        first, then = packed[: at * KEY_NBYTES], packed[at * KEY_NBYTES :]
        middle = print_at(packed, at * KEY_NBYTES)
        if len(first) >= len(then):
            part = self._move(strip, first, then)
            self._follow(part, middle)
            return strip, part
        before = strip.before
        part = self._move(strip, then, first)
        self._follow(strip, middle)
        self._follow(part, before)
        return part, strip

    def _move(self, strip: Strip, stays: bytes, goes: bytes) -> Strip:
        """Give the blocks `goes` of `strip` to one of their own, with the same holders."""
        part = self._make(goes, strip.mask, strip.ordered)
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
