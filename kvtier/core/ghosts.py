"""Keys that left a tier and are remembered for a while: when they were last used, and as what."""

from array import array
from collections.abc import Iterator
from typing import Final, NamedTuple

from kvtier.core.blocks import BlockKey
from kvtier.core.shards import KeyMap

_BITS: Final = 10
_PLACES: Final = 1 << _BITS  # departures of one page


class _Page(NamedTuple):
    """_PLACES departures in order; those that have come back have no key."""

    key: list[BlockKey | None]
    at: "array[float]"
    cls: "array[int]"
    epoch: "array[int]"


class Ghosts:
    """The keys of the last departures, less those that came back.

    Departures are numbered and lie in pages, so that no step takes long; what is kept of a key are
    numbers, which the garbage collector does not look at.
    """

    def __init__(self) -> None:
        self._number = KeyMap[int]()  # of the last departure, by key
        self.shards = self._number.shards  # to ask of many keys whether they are here
        self._pages: dict[int, _Page] = {}
        self._page = _Page([], array("d"), array("b"), array("I"))  # the newest
        self._first = self._next = 0  # numbers of the departures in the pages
        self._size = 0

    def put(self, key: BlockKey, at: float, cls: int, epoch: int, limit: int) -> None:
        """`key` leaves; `cls` is that of the observation that is still open, -1: none is.

        `epoch` is that of its last use (`Duel`).

        Of departures the last `limit`, at least 1, are kept.
        """
        number = self._next
        while number - self._first >= limit:
            self._forget()
        place = number & (_PLACES - 1)
        if not place:
            self._pages[number >> _BITS] = self._page = _Page(
                [None] * _PLACES,
                array("d", bytes(8 * _PLACES)),
                array("b", bytes(_PLACES)),
                array("I", bytes(4 * _PLACES)),
            )
        keys, times, classes, epochs = self._page
        keys[place], times[place], classes[place], epochs[place] = key, at, cls, epoch
        self._next = number + 1
        shard = self.shards[key[-1]]
        if key not in shard:
            self._size += 1
        shard[key] = number

    def take(self, key: BlockKey) -> tuple[float, int, int] | None:
        """`key` is back: time, class and epoch of its last use; None: it is not remembered."""
        number = self.shards[key[-1]].pop(key, None)
        if number is None:
            return None
        self._size -= 1
        keys, times, classes, epochs = self._pages[number >> _BITS]
        place = number & (_PLACES - 1)
        keys[place] = None
        return times[place], classes[place], epochs[place]

    def _forget(self) -> None:
        number = self._first
        page, place = self._pages[number >> _BITS], number & (_PLACES - 1)
        key = page.key[place]
        if key is not None:
            page.key[place] = None
            shard = self.shards[key[-1]]
            if shard.get(key) == number:  # it left only once
                del shard[key]
                self._size -= 1
        if place == _PLACES - 1:
            del self._pages[number >> _BITS]
        self._first = number + 1

    def __contains__(self, key: BlockKey) -> bool:
        return key in self.shards[key[-1]]

    def __iter__(self) -> Iterator[BlockKey]:
        """Every key that is remembered; ends at the next change."""
        return iter(self._number)

    def __len__(self) -> int:
        return self._size
