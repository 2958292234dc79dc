"""Keys that left a tier and are remembered for a while: when they were last used, and as what."""

from array import array
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from kvtier.core.blocks import BlockKey
from kvtier.core.shards import KeyMap

_BITS: Final = 10
_PLACES: Final = 1 << _BITS  # departures of one page
NO_CLASS: Final = -1
_UNKNOWN: Final = array("b", [NO_CLASS]) * _PLACES


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

    def put(self, keys: Sequence[BlockKey], at: float, cls: int, epoch: int, limit: int) -> None:
        """`keys`, at least one, leave in this order; all were last used at `at`, in `epoch`.

        `cls` is that of the observation that is still open on the last of them, NO_CLASS: none is.
        Of departures the last `limit`, at least as many as `keys`, are kept.
        """
        shards, number = self.shards, self._next
        names, times, classes, epochs = self._page
        place = number & (_PLACES - 1)
        for _ in range(number + len(keys) - self._first - limit):
            self._forget()
        for key in keys:
            place = number & (_PLACES - 1)
            if not place:
                self._pages[number >> _BITS] = self._page = _Page(
                    [None] * _PLACES,
                    array("d", bytes(8 * _PLACES)),
                    array("b", _UNKNOWN),
                    array("I", bytes(4 * _PLACES)),
                )
                names, times, classes, epochs = self._page
            names[place], times[place], epochs[place] = key, at, epoch
            shards[key[-1]][key] = number
            number += 1
        classes[place] = cls
        self._next = number

    def take(self, keys: Sequence[BlockKey]) -> list[tuple[int, float, int, int]]:
        """`keys` are back: index, time, class and epoch of the last use of those remembered."""
        shards, pages = self.shards, self._pages
        found: list[tuple[int, float, int, int]] = []
        for i, key in enumerate(keys):
            shard = shards[key[-1]]
            if key in shard:
                number = shard.pop(key)
                names, times, classes, epochs = pages[number >> _BITS]
                place = number & (_PLACES - 1)
                names[place] = None
                found.append((i, times[place], classes[place], epochs[place]))
        return found

    def _forget(self) -> None:
        number = self._first
        page, place = self._pages[number >> _BITS], number & (_PLACES - 1)
        key = page.key[place]
        if key is not None:
            page.key[place] = None
            shard = self.shards[key[-1]]
            if shard.get(key) == number:  # it left only once
                del shard[key]
        if place == _PLACES - 1:
            del self._pages[number >> _BITS]
        self._first = number + 1

    def __contains__(self, key: BlockKey) -> bool:
        return key in self.shards[key[-1]]

    def __iter__(self) -> Iterator[BlockKey]:
        """Every key that is remembered; ends at the next change."""
        return iter(self._number)

    def __len__(self) -> int:
        return len(self._number)
