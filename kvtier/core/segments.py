"""One strip: some blocks of a prompt in a row, and who has which; see `kvtier.core.strips`."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from functools import reduce
from operator import or_
from typing import Final

from kvtier.core.blocks import KEY_NBYTES
from kvtier.core.table import NEW

MAX_STRIP: Final = 512  # blocks
_NUMBERS: Final = tuple(range(MAX_STRIP + 1))  # one int for all segments that end there

Same = Callable[[int], int]  # the one int that all strips have for these holders


class Strip:
    """Some blocks in a row, in segments with the same holders: never empty.

    Segment n goes from where the one before it ends to before block `ends[n]`, and the holders in
    `masks[n]` have it. Neighbours have different ones. Tuples: they are read far more often than
    changed, and lie in one piece of memory.
    """

    __slots__ = ("age", "before", "ends", "forks", "handle", "masks", "packed", "then")

    def __init__(self, handle: int) -> None:
        self.handle = handle  # where it stands in the list of all strips
        self.packed = b""  # the keys, one after the other
        self.ends: tuple[int, ...] = ()
        self.masks: tuple[int, ...] = ()
        self.before: int | None = None  # fingerprint of the block before the first, if any
        # One that follows it, if any: a guess, good until its keys say otherwise.
        self.then: Strip | None = None
        self.forks = False  # several prompts go on from its end, so that it is joined to none
        self.age = NEW  # in the order of those that `ranked` has some of

    def __len__(self) -> int:
        """How many blocks it has."""
        return len(self.packed) // KEY_NBYTES

    @property
    def holders(self) -> int:
        """All who have any of its blocks."""
        return reduce(or_, self.masks, 0)

    def held_by(self, holder: int) -> bool:
        """Whether it has any of the blocks."""
        for mask in self.masks:  # noqa: SIM110 - a generator takes three times as long
            if mask & holder:
                return True
        return False

    def blocks_of(self, holder: int) -> int:
        """How many of the blocks it has."""
        return sum(stop - start for start, stop, mask in self.segments() if mask & holder)

    def segments(self) -> Iterator[tuple[int, int, int]]:
        """Where each begins and ends, and who has it."""
        return zip((0, *self.ends), self.ends, self.masks, strict=False)

    def gap(self) -> tuple[int, int] | None:
        """The deepest blocks in a row that nobody has, if there are any."""
        if 0 not in self.masks:
            return None
        n = len(self.masks) - 1 - self.masks[::-1].index(0)
        return self.ends[n - 1] if n else 0, self.ends[n]

    def deepest(self, holder: int, most: int) -> int:
        """From which block on `holder` has `most` blocks, or fewer if it has no more."""
        ends, masks = self.ends, self.masks
        for n in range(len(masks) - 1, -1, -1):
            if masks[n] & holder:
                size = ends[n] - (ends[n - 1] if n else 0)
                if size >= most:
                    return ends[n] - most
                most -= size
        return 0

    def within(self, start: int, stop: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The segments of these blocks, as `ends`, counted from `start`, and `masks`."""
        first, last = bisect_right(self.ends, start), bisect_left(self.ends, stop)
        ends = self.ends[first:last]
        if start:
            ends = tuple([_NUMBERS[end - start] for end in ends])
        return (*ends, _NUMBERS[stop - start]), self.masks[first : last + 1]

    def keep(self, start: int, stop: int) -> None:
        """Leave all blocks but these out."""
        self.ends, self.masks = self.within(start, stop)
        self.packed = self.packed[start * KEY_NBYTES : stop * KEY_NBYTES]

    def extend(self, packed: bytes, ends: tuple[int, ...], masks: tuple[int, ...]) -> None:
        """Put blocks with these segments behind its own."""
        size = len(self)
        had = len(self.ends)
        if had and self.masks[-1] == masks[0]:
            had -= 1
        self.ends = (*self.ends[:had], *[_NUMBERS[size + end] for end in ends])
        self.masks = self.masks[:had] + masks
        self.packed += packed

    def give(self, start: int, stop: int, holder: int, same: Same) -> int:
        """`holder` has these blocks, too; how many of them it had not."""
        return self._change(start, stop, holder, 0, same)

    def take(self, start: int, stop: int, holder: int, same: Same) -> int:
        """`holder` has these blocks no more; how many of them it had. Some may be nobody's now."""
        return self._change(start, stop, holder, holder, same)

    def _change(self, start: int, stop: int, holder: int, had: int, same: Same) -> int:
        """Turn the bit of `holder` where it is as in `had`; in how many blocks that was."""
        ends, masks = self.ends, self.masks
        first, last = bisect_right(ends, start), bisect_left(ends, stop)
        low, high = max(0, first - 1), min(len(ends), last + 2)  # neighbours may become equal
        new_ends: list[int] = []
        new_masks: list[int] = []
        changed = at = 0
        if first:
            at = ends[first - 1]
            new_ends.append(at)
            new_masks.append(masks[first - 1])
        for n in range(first, high):
            end, mask = ends[n], masks[n]
            a, b = max(at, start), min(end, stop)
            if a < b and mask & holder == had:
                changed += b - a
                parts = [(a, mask), (b, same(mask ^ holder)), (end, mask)]
            else:
                parts = [(end, mask)]
            for to, whose in parts:
                if to == at:
                    continue
                if new_masks and new_masks[-1] == whose:
                    new_ends[-1] = _NUMBERS[to]
                else:
                    new_ends.append(_NUMBERS[to])
                    new_masks.append(whose)
                at = to
        if changed:
            self.ends = (*ends[:low], *new_ends, *ends[high:])
            self.masks = (*masks[:low], *new_masks, *masks[high:])
        return changed


def bits(mask: int) -> Iterator[int]:
    """The bits that are set, each as an int, lowest first."""
    while mask:
        low = mask & -mask
        mask ^= low
        yield low
