"""Large maps in many small parts, so that none of them ever stops to grow as a whole.

A dict of a million entries takes some 20 ms to move to twice the room. One of a thousand parts of
it takes as many microseconds. Ints alone lie in them, which the garbage collector passes over.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from itertools import cycle
from struct import Struct
from typing import Final

from kvtier.core.blocks import KEY_NBYTES

Prints = list[int]
Shards = tuple[dict[int, int], ...]

NEW: Final = -1  # the age of what has none
_PART: Final = 4096  # entries of one part of a set or an order
_WORD: Final = Struct("=Q")
_BITS: Final = 60  # of a fingerprint; one more and it would take 48 bytes instead of 32
_MASK: Final = (1 << _BITS) - 1
SHARD_OF: Final = 47  # a print's bits above these are its shard's number
_SHARDS: Final = 1 << (_BITS - SHARD_OF)


def print_at(packed: bytes, at: int) -> int:
    """The fingerprint of the key that ends before byte `at`: 60 bits of its 128."""
    number: int = _WORD.unpack_from(packed, at - _WORD.size)[0]
    return number & _MASK


def prints(packed: bytes) -> Prints:
    """The fingerprints of keys that lie one after the other."""
    words = memoryview(packed).cast("Q")[1 :: KEY_NBYTES // _WORD.size].tolist()
    return [word & _MASK for word in words]  # not shifted: that would keep the room of 64 bits


def shards() -> Shards:
    """An empty map from fingerprints to ints: that of `it` is `shards[it >> SHARD_OF][it]`.

    4 to 7 neighbours are one dict, so that these are of many sizes: they do not all grow at once,
    and one grows into what another has left.
    """
    found: list[dict[int, int]] = []
    widths = cycle((4, 7, 5, 6))
    while len(found) < _SHARDS:
        found += [{}] * next(widths)
    return tuple(found[:_SHARDS])


class IntSet:
    """A set of ints, dense as handles are."""

    def __init__(self) -> None:
        self._parts: dict[int, dict[int, None]] = {}

    def __bool__(self) -> bool:
        return bool(self._parts)

    def __iter__(self) -> Iterator[int]:
        return (each for part in self._parts.values() for each in part)

    def __contains__(self, item: int) -> bool:
        return item in self._parts.get(item // _PART, ())

    def add(self, item: int) -> None:
        """Put it in."""
        part = self._parts.get(item // _PART)
        if part is None:
            part = self._parts[item // _PART] = {}
        part[item] = None

    def remove(self, item: int) -> None:
        """Take it out; KeyError where it is not in."""
        part = self._parts[item // _PART]
        del part[item]
        if not part:
            del self._parts[item // _PART]

    def some(self) -> int:
        """Any that is in; the last put into its part, so that none is passed over for it."""
        return next(reversed(next(iter(self._parts.values()))))


class Order:
    """Ints in the order of their last use, in parts of like age."""

    def __init__(self) -> None:
        self._parts: OrderedDict[int, OrderedDict[int, None]] = OrderedDict()  # oldest first
        self._age = 0  # of the youngest part

    def __bool__(self) -> bool:
        return bool(self._parts)

    def touch(self, item: int, age: int) -> int:
        """Make it the last; `age` is what its last touch gave, NEW if it had none. A new age."""
        if age != NEW:
            self.remove(item, age)
        part = self._parts.get(self._age)
        if part is None or len(part) >= _PART:
            self._age += 1
            part = self._parts[self._age] = OrderedDict()
        part[item] = None
        return self._age

    def remove(self, item: int, age: int) -> None:
        """Take it out."""
        part = self._parts[age]
        del part[item]
        if not part:
            del self._parts[age]

    def first(self) -> int:
        """The one used least recently."""
        return next(iter(next(iter(self._parts.values()))))

    def parts(self) -> Iterator[Iterable[int]]:
        """All of them, oldest first, in parts of like age."""
        return iter(self._parts.values())
