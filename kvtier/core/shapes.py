"""All strips, and how they are found, cut and joined; see `kvtier.core.strips`."""

from typing import Final

from kvtier.core.blocks import KEY_NBYTES
from kvtier.core.segments import MAX_STRIP, Strip, bits
from kvtier.core.table import NEW, SHARD_OF, IntSet, Order, print_at, prints, shards

_FULL: Final = MAX_STRIP * KEY_NBYTES
_MAX_SEGMENTS: Final = 128  # of a strip: it bounds what a change of one block takes
_FEW_SEGMENTS: Final = 96  # of two strips that become one, so that this is not soon cut again
_MAX_MASKS: Final = 4096  # sets of holders of which all strips have the same int


class Strips:
    """The tables of strips."""

    def __init__(self, ranked: int) -> None:
        self._ranked = ranked  # the holder whose strips are kept in the order of their use
        self._of = shards()  # to the handle of a strip
        self._after = shards()  # to that of the strip that follows a block, where it waits for it
        self._strips: list[Strip | None] = []  # by handle
        self._free: list[int] = []  # handles
        self._held: dict[int, IntSet] = {}  # handles by holder
        self._masks: dict[int, int] = {}  # by itself: one int for all strips with these holders
        self._order = Order()  # handles of those that `ranked` has some of

    def _find(self, packed: bytes, i: int) -> Strip | None:
        """The strip that the block at `i` is in, unless another has its fingerprint."""
        found = print_at(packed, (i + 1) * KEY_NBYTES)
        handle = self._of[found >> SHARD_OF].get(found)
        return None if handle is None else self._strips[handle]

    def _strip(self, handle: int) -> Strip:
        strip = self._strips[handle]
        assert strip is not None
        return strip

    def _make(self) -> Strip:
        """One without blocks yet."""
        handle = self._free.pop() if self._free else len(self._strips)
        strip = Strip(handle)
        if handle < len(self._strips):
            self._strips[handle] = strip
        else:
            self._strips.append(strip)
        return strip

    def _same(self, mask: int) -> int:
        """The one int for these holders."""
        if len(self._masks) >= _MAX_MASKS:
            self._masks.clear()
        return self._masks.setdefault(mask, mask)

    def _free_handle(self, strip: Strip) -> None:
        self._follow(strip, None)
        strip.packed, strip.then = b"", None  # some strip may still take it for the one behind it
        strip.ends = strip.masks = ()
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

    def _open_end(self, before: int | None) -> Strip | None:
        """The strip that ends with this block and may go on; None where others go on from there.

        Where it went on until now, prompts part: it is cut there.
        """
        handle = None if before is None else self._of[before >> SHARD_OF].get(before)
        if before is None or handle is None:
            return None
        strip = self._strip(handle)
        if print_at(strip.packed, len(strip.packed)) != before:
            strip, _ = self._cut(strip, 1 + prints(strip.packed).index(before))
            strip.forks = True
        elif before in self._after[before >> SHARD_OF]:
            strip.forks = True
        full = len(strip.packed) >= _FULL or len(strip.masks) >= _MAX_SEGMENTS
        return None if strip.forks or full else strip

    def _settle(self, strip: Strip) -> None:
        """Tie it to the strips before and after it, or make one of them."""
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
        fit = (
            len(first.packed) + len(then.packed) <= _FULL
            and len(first.masks) + len(then.masks) <= _FEW_SEGMENTS
        )
        if fit and not first.forks:
            return self._join(first, then)
        first.then = then
        return then

    def _join(self, first: Strip, then: Strip) -> Strip:
        """Make one of two strips; the longer stays, so that the fewest blocks move."""
        stays, goes = (first, then) if len(first) >= len(then) else (then, first)
        of, handle = self._of, stays.handle
        for each in prints(goes.packed):
            of[each >> SHARD_OF][each] = handle
        for holder in bits(goes.holders):
            self._held[holder].remove(goes.handle)
            self._held[holder].add(handle)
        if goes.age != NEW:
            self._order.remove(goes.handle, goes.age)
            if goes.age >= stays.age:  # as warm as the warmer of them
                stays.age = self._order.touch(handle, stays.age)
        before, behind, forks = first.before, then.then, then.forks
        packed, ends, masks = then.packed, then.ends, then.masks
        self._follow(then, None)
        if stays is then:
            then.packed, then.ends, then.masks = first.packed, first.ends, first.masks
        self._free_handle(goes)
        if stays is then:
            self._follow(stays, before)
        stays.extend(packed, ends, masks)
        stays.then, stays.forks = behind, forks
        return stays

    def _cut(self, strip: Strip, at: int) -> tuple[Strip, Strip]:
        """The strip as two, the second of which follows the first; the longer stays what it is."""
        size, before = len(strip), strip.before
        middle = print_at(strip.packed, at * KEY_NBYTES)
        if 2 * at >= size:
            part = self._move(strip, at, size, 0, at)
            self._follow(part, middle)
            part.then, strip.then = strip.then, part
            part.forks, strip.forks = strip.forks, False
            return strip, part
        part = self._move(strip, 0, at, at, size)
        self._follow(strip, middle)
        self._follow(part, before)
        part.then = strip
        if (last := self._ending(before)) is not None:
            last.then = part
        return part, strip

    def _halves(self, strip: Strip) -> tuple[Strip, ...]:
        """The strip, or as two where it has too many segments."""
        if len(strip.masks) <= _MAX_SEGMENTS:
            return (strip,)
        return self._cut(strip, strip.ends[_MAX_SEGMENTS // 2])

    def _move(self, strip: Strip, start: int, stop: int, kept: int, kept_stop: int) -> Strip:
        """Give the blocks from `start` to `stop` to a strip of their own."""
        part = self._make()
        part.extend(
            strip.packed[start * KEY_NBYTES : stop * KEY_NBYTES], *strip.within(start, stop)
        )
        strip.keep(kept, kept_stop)
        of, handle = self._of, part.handle
        for each in prints(part.packed):
            of[each >> SHARD_OF][each] = handle
        for holder in bits(part.holders):
            self._held[holder].add(handle)
            if holder == self._ranked:
                part.age = self._order.touch(handle, NEW)
            if not strip.held_by(holder):
                self._gone(strip, holder)
        return part

    def _gone(self, strip: Strip, holder: int) -> None:
        """`holder` has none of the strip's blocks any more."""
        self._held[holder].remove(strip.handle)
        if holder == self._ranked:
            self._order.remove(strip.handle, strip.age)
            strip.age = NEW
