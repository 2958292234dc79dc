"""Which blocks are held by whom, kept by runs of blocks rather than block by block.

A strip is some blocks of a prompt, one after the other, that the same holders have. A look-up finds
the strip of a prompt's first block and compares the rest of it in one step; most strips know one
that follows them, so that a hash table is touched where prompts part, not once a block, which is
what a look-up in a large table costs. Nothing depends on the order but speed: every block of an
answer was compared with the prompt's key. (The edges of a radix tree are kept so in SGLang's
RadixAttention; there is no tree here, as a block's key names all of its prefix.)

Strips grow as their blocks are told: whoever tells of some says which block comes before them,
and whenever two strips follow each other and have the same holders they become one, the shorter
moved to the longer, whichever came first. So a block moves at most log2(MAX_STRIP) times.

Memory: a block takes 80 to 105 bytes (its entry in the table, 28 to 54 as that is just grown or
full; the fingerprint there, 32; its key in a strip, 16), a strip about 260 and 60 for each of its
holders, whatever its length. Two blocks with one fingerprint (2^-60 for any two) are not both
known: the later one counts as held by nobody.
"""

from collections.abc import Sequence

from kvtier.core.blocks import BEGINS, KEY_NBYTES, BlockKey
from kvtier.core.packed import common, distinct, either_way, place
from kvtier.core.shapes import MAX_STRIP, Strip, Strips, bits
from kvtier.core.table import NEW, SHARD_OF, IntSet, Prints, print_at, prints

Run = tuple[int, int]  # so many blocks of a prompt in a row, and the mask of those that have them


class StripIndex(Strips):
    """A map from block keys to sets of holders; a holder is an int with one bit set.

    Keys are told packed: one after the other, 16 bytes each. A call takes time in proportion to
    its own keys, so that whoever must not wait tells few at a time. The blocks of one holder,
    `ranked`, are kept in the order in which they were asked for.
    """

    def __init__(self, ranked: int) -> None:
        super().__init__()
        self._ranked = ranked
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
            if strip.mask & holder:
                self._release(strip, *part, holder)

    def drop(self, holder: int, blocks: int) -> bool:
        """Take about so many blocks from `holder`, whichever; whether it has more."""
        held = self._held.get(holder)
        while held and blocks > 0:
            strip = self._strip(held.pop())
            blocks -= len(strip)
            self._left(strip, len(strip), holder)
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
                size = len(strip.packed) // KEY_NBYTES
            else:
                strip, size = self._meet(packed, at // KEY_NBYTES)
                if strip is None:
                    break
            at += size * KEY_NBYTES
            if strip.mask == mask:
                blocks += size
            else:
                if blocks:
                    runs.append((blocks, mask))
                blocks, mask = size, strip.mask
            if strip.age != NEW:
                ranked.append(strip)
        if blocks:
            runs.append((blocks, mask))
        for strip in reversed(ranked):
            strip.age = self._order.touch(strip.handle, strip.age)
        return runs

    def _meet(self, packed: bytes, i: int) -> tuple[Strip | None, int]:
        """The strip that the block at `i` is in, and with how many it goes on there."""
        strip = self._find(packed, i)
        if strip is None:
            return None, 0
        held = strip.packed
        if packed.startswith(held, i * KEY_NBYTES):
            return strip, len(strip)
        start = place(held, packed, i)
        if start is None:
            return None, 0  # another has its fingerprint
        return strip, common(held, start, packed, i)

    def trim(self, limit: int) -> None:
        """Forget the coldest blocks of `ranked`, until it has at most `limit`."""
        while (excess := self.count(self._ranked) - limit) > 0:
            strip = self._strip(self._order.first())
            size = len(strip)
            self._release(strip, max(0, size - excess), size, self._ranked)

    def check(self) -> None:
        """Every invariant; for tests."""
        found = [strip for strip in self._strips if strip is not None]
        dicts = {id(shard): shard for shard in self._of}.values()
        assert sum(map(len, found)) == self._blocks == sum(map(len, dicts))
        assert len(found) + len(self._free) == len(self._strips)
        for strip in found:
            assert self._strips[strip.handle] is strip
            assert 1 <= len(strip) <= MAX_STRIP
            assert strip.mask
            then = strip.then
            assert then is None or not then.packed or self._strips[then.handle] is then
            for each in prints(strip.packed):
                assert self._of[each >> SHARD_OF][each] == strip.handle
            held = [holder for holder, handles in self._held.items() if strip.handle in handles]
            assert sorted(held) == list(bits(strip.mask))
            assert (strip.age != NEW) == bool(strip.mask & self._ranked)
        for holder, handles in self._held.items():
            assert sum(len(self._strip(each)) for each in handles) == self.count(holder)
        for shard in self._after:
            assert all(self._strip(each).before == before for before, each in shard.items())

    def _enter(self, packed: bytes, found: Prints, i: int, holder: int, before: int | None) -> int:
        """Blocks from `i` on that nobody has, up to one that somebody has: where that is."""
        strip = self._ending(before)
        new = strip is None or strip.mask != holder or len(strip) >= MAX_STRIP
        if strip is None or new:
            strip = self._make(b"", holder)
            self._follow(strip, before)
        end = min(len(found), i + MAX_STRIP - len(strip))
        of, handle, j = self._of, strip.handle, i
        while j < end:
            shard = of[found[j] >> SHARD_OF]
            if found[j] in shard:
                break
            shard[found[j]] = handle
            j += 1
        strip.packed += packed[i * KEY_NBYTES : j * KEY_NBYTES]
        self._blocks += j - i
        if new:
            self._hold(strip, holder)
        else:
            self._counts[holder] += j - i
            if strip.age != NEW:
                strip.age = self._order.touch(handle, strip.age)
        self._settle(strip)
        return j

    def _share(self, strip: Strip, start: int, stop: int, holder: int, before: int | None) -> None:
        """`holder` has these blocks of a strip, too, which follow `before`."""
        if not strip.mask & holder:
            part = self._carve(strip, start, stop)
            if before is not None and before != part.before:
                self._follow(part, before)
            self._turn(part, holder)
            self._hold(part, holder)
            self._settle(part)
        elif strip.age != NEW and holder == self._ranked:
            strip.age = self._order.touch(strip.handle, strip.age)

    def _hold(self, strip: Strip, holder: int) -> None:
        held = self._held.get(holder)
        if held is None:
            held = self._held[holder] = IntSet()
        held.add(strip.handle)
        self._counts[holder] = self._counts.get(holder, 0) + len(strip)
        if holder == self._ranked:
            strip.age = self._order.touch(strip.handle, strip.age)

    def _release(self, strip: Strip, start: int, stop: int, holder: int) -> None:
        """Take these blocks from `holder`."""
        part = self._carve(strip, start, stop)
        self._held[holder].remove(part.handle)
        self._left(part, stop - start, holder)

    def _left(self, strip: Strip, blocks: int, holder: int) -> None:
        """`holder`, in whose set it is no longer, has not this strip any more."""
        self._counts[holder] -= blocks
        self._turn(strip, holder)
        if holder == self._ranked:
            self._order.remove(strip.handle, strip.age)
            strip.age = NEW
        if strip.mask:
            self._settle(strip)
            return
        for each in prints(strip.packed):
            del self._of[each >> SHARD_OF][each]
        self._blocks -= blocks
        self._free_handle(strip)
