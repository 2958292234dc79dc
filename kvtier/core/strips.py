"""Which blocks are held by whom, kept by runs of blocks rather than block by block.

A strip is some blocks that the same holders have, in the order in which they were told, which is
nearly always the order of a prompt. A look-up finds the strip of a prompt's first block and
compares the rest of it in one step; it touches a hash table once a strip, not once a block, which
is what a look-up in a large table costs. Nothing depends on that order but speed: every block of
an answer was compared with the prompt's key. (The edges of a radix tree are kept so in SGLang's
RadixAttention; there is no tree here, as a block's key names all of its prefix.)

Memory: a block takes about 112 bytes (its key, its entry in the table, its key again in a strip),
a strip about 150 and 60 for each of its holders, whatever its length.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from kvtier.core.blocks import KEY_NBYTES, BlockKey

MAX_STRIP: Final = 512  # blocks
_RAGGED: Final = 8  # strips in a row that one look-up takes before they are worth joining


class Strip:
    """Some blocks that the holders in `mask` have: never empty, never without a holder."""

    __slots__ = ("mask", "packed")

    def __init__(self, packed: bytes, mask: int) -> None:
        self.packed = packed  # the keys, one after the other
        self.mask = mask

    def __len__(self) -> int:
        """How many blocks it has."""
        return len(self.packed) // KEY_NBYTES


class Run(NamedTuple):
    """So many blocks of a prompt in a row that the holders in `mask` have."""

    blocks: int
    mask: int


class StripIndex:
    """A map from block keys to sets of holders; a holder is an int with one bit set.

    The blocks of one holder, `ranked`, are kept in the order in which they were asked for.
    """

    def __init__(self, ranked: int) -> None:
        self._ranked = ranked
        self._of: dict[BlockKey, Strip] = {}
        self._cold_first: OrderedDict[Strip, None] = OrderedDict()  # those of `ranked`
        self._held: dict[int, dict[Strip, None]] = {ranked: self._cold_first}  # by holder
        self._counts: dict[int, int] = {}
        self._ragged: Sequence[BlockKey] = ()

    def __len__(self) -> int:
        """Blocks that anybody holds."""
        return len(self._of)

    def count(self, holder: int) -> int:
        """Blocks of one holder."""
        return self._counts.get(holder, 0)

    def add(self, keys: Iterable[BlockKey], holder: int) -> None:
        """`holder` has these blocks from now on."""
        keys = list(dict.fromkeys(keys))
        packed = b"".join(keys)
        of, i, n = self._of, 0, len(keys)
        while i < n:
            strip = of.get(keys[i])
            if strip is None:
                j, end = i + 1, min(n, i + MAX_STRIP)
                while j < end and keys[j] not in of:
                    j += 1
                strip = Strip(packed[i * KEY_NBYTES : j * KEY_NBYTES], holder)
                of.update(dict.fromkeys(keys[i:j], strip))
                self._hold(strip, holder)
                i = j
                continue
            start, stop = _overlap(strip.packed, packed, i)
            i += stop - start
            if not strip.mask & holder:
                part = self._carve(strip, start, stop)
                part.mask |= holder
                self._hold(part, holder)

    def discard(self, keys: Iterable[BlockKey], holder: int) -> None:
        """`holder` has these blocks no more; those that it never had are ignored."""
        keys = list(dict.fromkeys(keys))
        packed = b"".join(keys)
        i, n = 0, len(keys)
        while i < n:
            strip = self._of.get(keys[i])
            if strip is None:
                i += 1
                continue
            start, stop = _overlap(strip.packed, packed, i)
            i += stop - start
            if strip.mask & holder:
                self._release(strip, start, stop, holder)

    def drop(self, holder: int) -> None:
        """`holder` has nothing any more; takes time in proportion to what it had."""
        held = self._held.get(holder, {})
        for strip in held:
            strip.mask ^= holder
            if not strip.mask:
                self._forget(strip)
        held.clear()
        self._counts.pop(holder, None)

    def walk(self, keys: Sequence[BlockKey]) -> list[Run]:
        """The leading keys that anybody holds, as runs with the same holders.

        Those of `ranked` become its warmest, the first of them most.
        """
        runs: list[Run] = []
        strips = self._strips(keys)
        blocks = mask = 0
        for matched, strip in strips:
            if strip.mask != mask:
                if blocks:
                    runs.append(Run(blocks, mask))
                blocks, mask = 0, strip.mask
            blocks += matched
        if blocks:
            runs.append(Run(blocks, mask))
        if len(strips) > _RAGGED:
            self._ragged = keys
        if self._cold_first:
            for _, strip in reversed(strips):
                if strip in self._cold_first:
                    self._cold_first.move_to_end(strip)
        return runs

    def trim(self, limit: int) -> None:
        """Forget the coldest blocks of `ranked`, until it has at most `limit`."""
        while (excess := self.count(self._ranked) - limit) > 0:
            strip = next(iter(self._cold_first))
            stop = len(strip)
            if excess < stop:
                strip = self._carve(strip, stop - excess, stop)
            self._release(strip, 0, len(strip), self._ranked)

    def gather(self) -> None:
        """Join the strips of the last prompt that was found in many pieces.

        Costs a few microseconds a piece: to be called when an answer is out.
        """
        keys, self._ragged = self._ragged, ()
        packed = b"".join(keys)
        i = 0
        while i < len(keys) and (strip := self._of.get(keys[i])) is not None:
            i += self._join(strip, keys, packed, i)

    def check(self) -> None:
        """Every invariant; for tests."""
        found = {strip for held in self._held.values() for strip in held}
        assert sum(map(len, found)) == len(self._of)
        for strip in found:
            assert 1 <= len(strip) <= MAX_STRIP
            assert strip.mask
            assert all(self._of[key] is strip for key in _unpack(strip.packed))
        for holder, held in self._held.items():
            assert all(strip.mask & holder for strip in held)
            assert sum(map(len, held)) == self.count(holder)
        for strip in found:
            holders = sum(strip in held for held in self._held.values())
            assert holders == strip.mask.bit_count()

    def _strips(self, keys: Sequence[BlockKey]) -> list[tuple[int, Strip]]:
        """The strips that the prompt goes through, and how many blocks it has of each."""
        of, i, n = self._of, 0, len(keys)
        strips: list[tuple[int, Strip]] = []
        strip = of.get(keys[0]) if n else None
        if strip is None:
            return strips
        packed = b"".join(keys)
        while strip is not None:
            following = None
            if packed.startswith(strip.packed, i * KEY_NBYTES):
                matched = len(strip.packed) // KEY_NBYTES
            elif strip.packed.startswith(keys[i]):
                matched = _common(strip.packed, 0, packed, i)
            else:  # in the middle: worth a search for the place only if the next is there, too
                matched = 1
                following = of.get(keys[i + 1]) if i + 1 < n else None
                if following is strip:
                    start, stop = _overlap(strip.packed, packed, i)
                    matched, following = stop - start, None
            strips.append((matched, strip))
            i += matched
            strip = following or (of.get(keys[i]) if i < n else None)
        return strips

    def _hold(self, strip: Strip, holder: int) -> None:
        self._held.setdefault(holder, {})[strip] = None
        self._counts[holder] = self._counts.get(holder, 0) + len(strip)

    def _release(self, strip: Strip, start: int, stop: int, holder: int) -> None:
        """Take these blocks from `holder`."""
        self._counts[holder] -= stop - start
        part = self._carve(strip, start, stop)
        part.mask ^= holder
        del self._held[holder][part]
        if not part.mask:
            self._forget(part)

    def _forget(self, strip: Strip) -> None:
        for key in _unpack(strip.packed):
            del self._of[key]

    def _carve(self, strip: Strip, start: int, stop: int) -> Strip:
        """A strip with just these blocks; the rest becomes another, or stays in `strip`.

        The longer part keeps the strip, so that the fewest blocks are told of another.
        """
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

    def _move(self, strip: Strip, stays: bytes, goes: bytes) -> Strip:
        """Give the blocks `goes` of `strip` to one of their own, with the same holders."""
        part = Strip(goes, strip.mask)
        strip.packed = stays
        self._of.update(dict.fromkeys(_unpack(goes), part))
        for holder in bits(strip.mask):
            self._held[holder][part] = None
        return part

    def _join(self, strip: Strip, keys: Sequence[BlockKey], packed: bytes, i: int) -> int:
        """Let the strip of keys[i] take in those that follow; how many it has then."""
        into = self._part(strip, packed, i, MAX_STRIP)
        pieces, size = [into.packed], len(into)
        while size < MAX_STRIP and i + size < len(keys):
            other = self._of.get(keys[i + size])
            if other is None or other.mask != into.mask or other is into:
                break
            other = self._part(other, packed, i + size, MAX_STRIP - size)
            for holder in bits(other.mask):
                del self._held[holder][other]
            pieces.append(other.packed)
            size += len(other)
            self._of.update(dict.fromkeys(_unpack(other.packed), into))
        into.packed = b"".join(pieces)
        return size

    def _part(self, strip: Strip, packed: bytes, i: int, most: int) -> Strip:
        """A strip that begins with the block at `i` and has at most `most` of what follows it."""
        start, stop = _overlap(strip.packed, packed, i)
        most = min(most, stop - start)
        backwards = _key(strip.packed, start) != _key(packed, i)
        start, stop = (stop - most, stop) if backwards else (start, start + most)
        part = self._carve(strip, start, stop)
        if backwards:
            part.packed = b"".join(reversed(_unpack(part.packed)))
        return part


def _key(packed: bytes, i: int) -> BlockKey:
    return BlockKey(packed[i * KEY_NBYTES : (i + 1) * KEY_NBYTES])


def _unpack(packed: bytes) -> list[BlockKey]:
    return [BlockKey(packed[i : i + KEY_NBYTES]) for i in range(0, len(packed), KEY_NBYTES)]


def bits(mask: int) -> Iterator[int]:
    """The bits that are set, each as an int, lowest first."""
    while mask:
        low = mask & -mask
        mask ^= low
        yield low


def _overlap(held: bytes, packed: bytes, i: int) -> tuple[int, int]:
    """Where in `held` the block at `i` and those after it lie, in the same order or backwards."""
    key = _key(packed, i)
    at = held.find(key)
    while at % KEY_NBYTES:
        at = held.find(key, at + 1)
    start = at // KEY_NBYTES
    size = len(held) // KEY_NBYTES
    if start == size - 1:
        back, end = 1, min(size, len(packed) // KEY_NBYTES - i)
        while back < end and _key(held, start - back) == _key(packed, i + back):
            back += 1
        return size - back, size
    return start, start + _common(held, start, packed, i)


def _common(held: bytes, start: int, packed: bytes, i: int) -> int:
    """How many blocks from `i` on lie in `held` from `start` on, given that the first does."""
    a, b = start * KEY_NBYTES, i * KEY_NBYTES
    high = min(len(held) - a, len(packed) - b) // KEY_NBYTES
    if held[a : a + high * KEY_NBYTES] == packed[b : b + high * KEY_NBYTES]:
        return high
    low = 1  # so many are equal; fewer than `high` are
    while low < high - 1:
        middle = (low + high) // 2
        if (
            held[a + low * KEY_NBYTES : a + middle * KEY_NBYTES]
            == packed[b + low * KEY_NBYTES : b + middle * KEY_NBYTES]
        ):
            low = middle
        else:
            high = middle
    return low
