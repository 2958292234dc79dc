"""Which blocks are held by whom, kept by runs of blocks rather than block by block.

A strip is some blocks that the same holders have, in the order of a prompt wherever that is known.
A look-up finds the strip of a prompt's first block and compares the rest of it in one step; it
touches a hash table once a strip, not once a block, which is what a look-up in a large table costs.
Nothing depends on the order but speed: every block of an answer was compared with the prompt's
key. (The edges of a radix tree are kept so in SGLang's RadixAttention; there is no tree here, as a
block's key names all of its prefix.)

Strips grow as their blocks are told: whoever tells of some says which block comes before them,
and whenever two strips follow each other and have the same holders they become one, the shorter
moved to the longer, whichever came first. So a block moves at most log2(MAX_STRIP) times. What was
told without an order is joined along the first prompt that is looked up, in steps, afterwards.

Memory: a block takes 80 to 105 bytes (its entry in the table, 28 to 54 as that is just grown or
full; the fingerprint there, 32; its key in a strip, 16), a strip about 250 and 60 for each of its
holders, whatever its length. Two blocks with one fingerprint (2^-60 for any two) are not both
known: the later one counts as held by nobody.
"""

from collections import deque
from collections.abc import Sequence
from typing import Final, NamedTuple

from kvtier.core.blocks import KEY_NBYTES, BlockKey
from kvtier.core.packed import common, distinct, has, overlap, unpack
from kvtier.core.shapes import MAX_STRIP, Strip, Strips, bits
from kvtier.core.table import NEW, SHARD_OF, IntSet, Prints, print_at, prints

_RAGGED: Final = 8  # strips in a row that one look-up takes before they are worth joining
_MAX_RAGGED: Final = 16  # prompts that wait to be joined
_GATHER: Final = 32  # strips joined in one step


class Run(NamedTuple):
    """So many blocks of a prompt in a row that the holders in `mask` have."""

    blocks: int
    mask: int


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
        self._ragged: deque[tuple[bytes, int]] = deque()  # prompts, and how far they are joined

    def __len__(self) -> int:
        """Blocks that anybody holds."""
        return self._blocks

    def count(self, holder: int) -> int:
        """Blocks of one holder."""
        return self._counts.get(holder, 0)

    def add(
        self, packed: bytes, holder: int, before: BlockKey | None = None, *, ordered: bool = False
    ) -> None:
        """`holder` has these blocks from now on.

        If `ordered` each follows the one before it in a prompt, and the first follows `before`.
        Else they go where `before` is, as nothing better is known.
        """
        packed, found = distinct(packed)
        of, i, n = self._of, 0, len(found)
        last = None if before is None else print_at(before, KEY_NBYTES)
        while i < n:
            handle = of[found[i] >> SHARD_OF].get(found[i])
            if handle is None:
                i = self._enter(packed, found, i, holder, last, ordered)
            else:
                strip = self._strip(handle)
                place = overlap(strip.packed, packed, i)
                if place is None:
                    i += 1
                else:
                    known = ordered and has(strip.packed, place[0], packed, i)
                    i += place[1] - place[0]
                    self._share(strip, *place, holder, last if known else None, known)
            last = found[i - 1]

    def discard(self, packed: bytes, holder: int) -> None:
        """`holder` has these blocks no more; those that it never had are ignored."""
        packed, found = distinct(packed)
        i, n = 0, len(found)
        while i < n:
            handle = self._of[found[i] >> SHARD_OF].get(found[i])
            strip = None if handle is None else self._strip(handle)
            place = None if strip is None else overlap(strip.packed, packed, i)
            if strip is None or place is None:
                i += 1
                continue
            i += place[1] - place[0]
            if strip.mask & holder:
                self._release(strip, *place, holder)

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
        strips = self._walk(keys)
        blocks = mask = 0
        for matched, strip in strips:
            if strip.mask != mask:
                if blocks:
                    runs.append(Run(blocks, mask))
                blocks, mask = 0, strip.mask
            blocks += matched
        if blocks:
            runs.append(Run(blocks, mask))
        if len(strips) > _RAGGED and len(self._ragged) < _MAX_RAGGED:
            self._ragged.append((b"".join(keys), 0))
        if self._order:
            for _, strip in reversed(strips):
                if strip.age != NEW:
                    strip.age = self._order.touch(strip.handle, strip.age)
        return runs

    def trim(self, limit: int) -> None:
        """Forget the coldest blocks of `ranked`, until it has at most `limit`."""
        while (excess := self.count(self._ranked) - limit) > 0:
            strip = self._strip(self._order.first())
            size = len(strip)
            self._release(strip, max(0, size - excess), size, self._ranked)

    def gather(self) -> bool:
        """Join some strips of a prompt that was found in many pieces; whether there are more."""
        if not self._ragged:
            return False
        packed, i = self._ragged.popleft()
        for _ in range(_GATHER):
            if i * KEY_NBYTES >= len(packed):
                break
            size = self._align(packed, i)
            if not size:
                break
            i += size
        else:
            self._ragged.appendleft((packed, i))
        return bool(self._ragged)

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
            for each in prints(strip.packed):
                assert self._of[each >> SHARD_OF][each] == strip.handle
            held = [holder for holder, handles in self._held.items() if strip.handle in handles]
            assert sorted(held) == list(bits(strip.mask))
            assert (strip.age != NEW) == bool(strip.mask & self._ranked)
        for holder, handles in self._held.items():
            assert sum(len(self._strip(each)) for each in handles) == self.count(holder)
        for shard in self._after:
            assert all(self._strip(each).before == before for before, each in shard.items())

    def _walk(self, keys: Sequence[BlockKey]) -> list[tuple[int, Strip]]:
        """The strips that the prompt goes through, and how many blocks it has of each."""
        i, n = 0, len(keys)
        strips: list[tuple[int, Strip]] = []
        strip = self._find(keys[0], 0) if n else None
        packed = b"" if strip is None else b"".join(keys)
        while strip is not None:
            following = None
            if packed.startswith(strip.packed, i * KEY_NBYTES):
                matched = len(strip.packed) // KEY_NBYTES
            elif strip.packed.startswith(keys[i]):
                matched = common(strip.packed, 0, packed, i)
            else:  # in the middle: worth a search for the place only if the next is there, too
                matched = 1
                following = self._find(packed, i + 1) if i + 1 < n else None
                if following is strip or strip.packed.find(keys[i]) < 0:
                    place = overlap(strip.packed, packed, i)
                    if place is None:
                        break
                    matched, following = place[1] - place[0], None
            strips.append((matched, strip))
            i += matched
            strip = following or (self._find(packed, i) if i < n else None)
        return strips

    def _enter(
        self, packed: bytes, found: Prints, i: int, holder: int, before: int | None, ordered: bool
    ) -> int:
        """Blocks from `i` on that nobody has, up to one that somebody has: where that is."""
        tail = self._tail(before, holder, 1)
        strip = tail if tail is not None and tail.ordered is ordered else None
        new = strip is None
        if strip is None:
            strip = self._make(b"", holder, ordered)
            self._follow(strip, before if ordered else None)
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

    def _share(
        self, strip: Strip, start: int, stop: int, holder: int, before: int | None, ordered: bool
    ) -> None:
        """`holder` has these blocks of a strip, too; `ordered` if they are and follow `before`."""
        if not strip.mask & holder:
            part = self._carve(strip, start, stop)
            if ordered:
                part.ordered = True
                if before is not None and before != part.before:
                    self._follow(part, before)
            part.mask |= holder
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
        strip.mask ^= holder
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

    def _align(self, packed: bytes, i: int) -> int:
        """Put the blocks from `i` on that lie together behind the one before; how many."""
        strip = self._find(packed, i)
        place = None if strip is None else overlap(strip.packed, packed, i)
        if strip is None or place is None:
            return 0
        part = self._carve(strip, *place)
        size = len(part)
        if not has(part.packed, 0, packed, i):
            part.packed = b"".join(reversed(unpack(part.packed)))
        part.ordered = True
        self._follow(part, print_at(packed, i * KEY_NBYTES) if i else None)
        self._settle(part)
        return size
