"""Which blocks are held by whom, kept by runs of blocks rather than block by block.

A strip is up to 512 blocks of a prompt, one after the other, in segments with the same holders. A
look-up finds the strip of a prompt's first block, compares the rest of it in one step, and reads
off its segments who has what; most strips know one that follows them. So a hash table is touched
and keys are compared where prompts part, not once a block nor where holders differ, which is what a
look-up in a large table costs. Nothing depends on the order but speed: every block of an answer
was compared with the prompt's key. (The edges of a radix tree are kept so in SGLang's
RadixAttention; there is no tree here, as a block's key names all of its prefix.)

Strips grow as their blocks are told: whoever tells of some says which block comes before them,
and blocks that nobody had are put behind it. Where two strips follow each other they become one if
they fit, the shorter moved to the longer, whichever came first. So a block moves at most
log2(MAX_STRIP) times on the way to a full strip. A strip is cut where a second prompt goes on from
its middle, and there stays so; where blocks leave that nobody else has; and where it has more than
128 segments, which bounds what the change of one block takes.

Memory: a block takes 80 to 110 bytes (its entry in the table, 28 to 54 as that is just grown or
full; the fingerprint there, 32; its key in a strip, 16), a strip about 230, 60 for each of its
holders and 16 for each segment, whatever its length. Two blocks with one fingerprint (2^-60 for any
two) are not both known: the later one counts as held by nobody.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Final

from kvtier.core.blocks import BEGINS, KEY_NBYTES, BlockKey
from kvtier.core.packed import common, distinct, either_way, place
from kvtier.core.segments import MAX_STRIP, Strip, bits
from kvtier.core.shapes import Strips
from kvtier.core.table import NEW, SHARD_OF, IntSet, Prints, print_at, prints

_AT_ONCE: Final = 64  # blocks dropped before it is counted what that took

Run = tuple[int, int]  # so many blocks of a prompt in a row, and the mask of those that have them


class StripIndex(Strips):
    """A map from block keys to sets of holders; a holder is an int with one bit set.

    Keys are told packed: one after the other, 16 bytes each. A call takes time in proportion to
    its own keys, so that whoever must not wait tells few at a time. The blocks of one holder,
    `ranked`, are kept in the order in which they were asked for.
    """

    def __init__(self, ranked: int) -> None:
        super().__init__(ranked)
        self._counts: dict[int, int] = {}
        self._blocks = 0

    def __len__(self) -> int:
        """Blocks that anybody holds."""
        return self._blocks

    def count(self, holder: int) -> int:
        """Blocks of one holder."""
        return self._counts.get(holder, 0)

    def add(self, packed: bytes, holder: int, before: BlockKey) -> None:
        """`holder` has these blocks of a prompt, in its order, from now on.

        The first follows `before`, or BEGINS the prompt.
        """
        packed, found = distinct(packed)
        of, i, n = self._of, 0, len(found)
        last = None if before == BEGINS else print_at(before, KEY_NBYTES)
        while i < n:
            handle = of[found[i] >> SHARD_OF].get(found[i])
            if handle is None:
                i = self._enter(packed, found, i, holder, last)
            else:
                strip = self._strip(handle)
                start = place(strip.packed, packed, i)
                if start is None:
                    i += 1
                else:
                    stop = start + common(strip.packed, start, packed, i)
                    i += stop - start
                    self._share(strip, start, stop, holder, last)
            last = found[i - 1]

    def discard(self, packed: bytes, holder: int) -> None:
        """`holder` has these blocks no more; those that it never had are ignored."""
        packed, found = distinct(packed)
        i, n = 0, len(found)
        while i < n:
            handle = self._of[found[i] >> SHARD_OF].get(found[i])
            strip = None if handle is None else self._strip(handle)
            part = None if strip is None else either_way(strip.packed, packed, i)
            if strip is None or part is None:
                i += 1
                continue
            i += part[1] - part[0]
            self._release(strip, *part, holder)

    def drop(self, holder: int, blocks: int) -> bool:
        """Take about so many blocks from `holder`, whichever; whether it has more."""
        held = self._held.get(holder)
        while held and blocks > 0:
            strip, strips = self._strip(held.some()), len(self._strips) - len(self._free)
            passed = len(strip.masks) // 4  # of which it may have few
            start = strip.deepest(holder, min(blocks, _AT_ONCE))
            blocks -= max(passed, self._release(strip, start, len(strip), holder))
            blocks -= 8 * max(0, len(self._strips) - len(self._free) - strips)  # cuts take longer
        if held:
            return True
        self._held.pop(holder, None)
        self._counts.pop(holder, None)
        return False

    def walk(self, keys: Sequence[BlockKey]) -> list[Run]:
        """The leading keys that anybody holds, as runs with the same holders.

        Those of `ranked` become its warmest, the first of them most.
        """
        runs: list[Run] = []
        packed = b"".join(keys)
        at, end, blocks, mask = 0, len(packed), 0, 0
        ranked: list[Strip] = []
        strip: Strip | None = None
        while at < end:
            then = None if strip is None else strip.then
            if then is not None and packed.startswith(then.packed, at) and then.packed:
                strip = then
                ends, masks = strip.ends, strip.masks
            else:
                strip, start, size = self._meet(packed, at // KEY_NBYTES)
                if strip is None:
                    break
                if size == len(strip):
                    ends, masks = strip.ends, strip.masks
                else:
                    ends, masks = strip.within(start, start + size)
            at += ends[-1] * KEY_NBYTES
            passed = 0
            for stop, found in zip(ends, masks, strict=True):
                if found == mask:
                    blocks += stop - passed
                else:
                    if blocks:
                        runs.append((blocks, mask))
                    blocks, mask = stop - passed, found
                passed = stop
            if strip.age != NEW:
                ranked.append(strip)
        if blocks:
            runs.append((blocks, mask))
        for strip in reversed(ranked):
            strip.age = self._order.touch(strip.handle, strip.age)
        return runs

    def _meet(self, packed: bytes, i: int) -> tuple[Strip | None, int, int]:
        """The strip that the block at `i` is in, where, and with how many it goes on there."""
        strip = self._find(packed, i)
        if strip is None:
            return None, 0, 0
        held = strip.packed
        if packed.startswith(held, i * KEY_NBYTES):
            return strip, 0, len(strip)
        start = place(held, packed, i)
        if start is None:
            return None, 0, 0  # another has its fingerprint
        return strip, start, common(held, start, packed, i)

    def trim(self, limit: int) -> None:
        """Forget the coldest blocks of `ranked`, until it has at most `limit`."""
        while (excess := self.count(self._ranked) - limit) > 0:
            strip = self._strip(self._order.first())
            start = strip.deepest(self._ranked, excess)
            self._release(strip, start, len(strip), self._ranked)

    def check(self) -> None:
        """Every invariant; for tests."""
        found = [strip for strip in self._strips if strip is not None]
        dicts = {id(shard): shard for shard in self._of}.values()
        assert sum(map(len, found)) == self._blocks == sum(map(len, dicts))
        assert len(found) + len(self._free) == len(self._strips)
        for strip in found:
            self._check(strip)
        for holder, handles in self._held.items():
            had = [self._strip(each) for each in handles]
            assert sum(strip.blocks_of(holder) for strip in had) == self.count(holder)
        assert self._held.keys() == self._counts.keys()
        ordered = {each for part in self._order.parts() for each in part}
        assert ordered == {strip.handle for strip in found if strip.age != NEW}
        for shard in self._after:
            assert all(self._strip(each).before == before for before, each in shard.items())

    def _check(self, strip: Strip) -> None:
        """Every invariant of one strip."""
        assert self._strips[strip.handle] is strip
        assert 1 <= len(strip) <= MAX_STRIP
        assert len(strip.ends) == len(strip.masks)
        assert self._halves(strip) == (strip,)
        assert all(start < stop for start, stop, _ in strip.segments())
        assert strip.ends[-1] == len(strip)
        assert all(strip.masks)
        assert all(a != b for a, b in pairwise(strip.masks))
        then = strip.then
        assert then is None or not then.packed or self._strips[then.handle] is then
        for each in prints(strip.packed):
            assert self._of[each >> SHARD_OF][each] == strip.handle
        held = [holder for holder, handles in self._held.items() if strip.handle in handles]
        assert sorted(held) == list(bits(strip.holders))
        assert (strip.age != NEW) == bool(strip.holders & self._ranked)

    def _enter(self, packed: bytes, found: Prints, i: int, holder: int, before: int | None) -> int:
        """Blocks from `i` on that nobody has, up to one that somebody has: where that is."""
        strip = self._open_end(before)
        if strip is None:
            strip = self._make()
            self._follow(strip, before)
        end = min(len(found), i + MAX_STRIP - len(strip))
        of, handle, j = self._of, strip.handle, i
        while j < end:
            shard = of[found[j] >> SHARD_OF]
            if found[j] in shard:
                break
            shard[found[j]] = handle
            j += 1
        strip.extend(packed[i * KEY_NBYTES : j * KEY_NBYTES], (j - i,), (self._same(holder),))
        self._blocks += j - i
        self._hold(strip, holder, j - i)
        self._settle(strip)
        return j

    def _share(self, strip: Strip, start: int, stop: int, holder: int, before: int | None) -> None:
        """`holder` has these blocks of a strip, too, which follow `before`."""
        had = len(strip.masks)
        self._hold(strip, holder, strip.give(start, stop, holder, self._same))
        fewer = len(strip.masks) < had
        strip = self._halves(strip)[0]
        if start == 0 and before is not None and before != strip.before:
            self._follow(strip, before)
            self._settle(strip)
        elif fewer:
            self._settle(strip)

    def _hold(self, strip: Strip, holder: int, blocks: int) -> None:
        """`holder` has so many more blocks of a strip."""
        if blocks:
            held = self._held.get(holder)
            if held is None:
                held = self._held[holder] = IntSet()
                self._counts[holder] = 0
            held.add(strip.handle)
            self._counts[holder] += blocks
        if holder == self._ranked:
            strip.age = self._order.touch(strip.handle, strip.age)

    def _release(self, strip: Strip, start: int, stop: int, holder: int) -> int:
        """Take these blocks from `holder`; how many of them it had."""
        had = len(strip.masks)
        blocks = strip.take(start, stop, holder, self._same)
        if blocks:
            self._counts[holder] -= blocks
            if not strip.held_by(holder):
                self._gone(strip, holder)
            for part in self._halves(strip):
                self._clear(part)
            if strip.packed and len(strip.masks) < had:
                self._settle(strip)
        return blocks

    def _clear(self, strip: Strip) -> None:
        """Cut out the blocks that nobody has, the deepest first."""
        while gap := strip.gap():
            start, stop = gap
            if start and stop < len(strip):
                strip, _ = self._cut(strip, stop)
            gone = prints(strip.packed[start * KEY_NBYTES : stop * KEY_NBYTES])
            for each in gone:
                del self._of[each >> SHARD_OF][each]
            self._blocks -= len(gone)
            if len(gone) == len(strip):
                self._free_handle(strip)
                return
            if start:
                strip.keep(0, start)
                strip.then, strip.forks = None, False
            else:
                strip.keep(stop, len(strip))
                self._follow(strip, gone[-1])
