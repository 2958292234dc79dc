"""Keys that left a tier and are remembered for a while: when they were last used, and as what."""

from collections import deque
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import Final

from kvtier.core.blocks import BlockKey
from kvtier.core.shards import SHARDS, KeyMap

NO_CLASS: Final = -1
_NONE: Final = ((),) * SHARDS

Past = tuple[float, int, int]
"""Time, class and epoch of a key's last use; one for all that left together."""
Back = list[tuple[int, Past]]
"""Which of some keys are back, and what was remembered of each."""


class Ghosts:
    """The keys of the last departures, less those that came back.

    What is kept of a key are tuples of numbers, which the garbage collector passes over.
    """

    def __init__(self) -> None:
        self._past = KeyMap[Past]()  # as of the last departure, by key
        self.shards = self._past.shards  # to ask of many keys whether they are here
        self._left: deque[BlockKey] = deque()  # in order, those that have come back as well
        self._as: deque[Past] = deque()  # what was noted of each

    def put(self, keys: Sequence[BlockKey], at: float, cls: int, epoch: int, limit: int) -> None:
        """`keys`, at least one, leave in this order; all were last used at `at`, in `epoch`.

        `cls` is that of the observation that is still open on the last of them, NO_CLASS: none is.
        Of departures the last `limit`, at least as many as `keys`, are kept.
        """
        shards, past = self.shards, (at, NO_CLASS, epoch)
        for key in keys:
            shards[key[-1]][key] = past
        self._left += keys
        self._as += [past] * len(keys)
        if cls != NO_CLASS:
            last = keys[-1]
            shards[last[-1]][last] = self._as[-1] = (at, cls, epoch)
        if len(self._left) > limit:
            self._forget(len(self._left) - limit)

    def take(
        self, keys: Iterable[BlockKey], others: Sequence[Container[BlockKey]] = _NONE
    ) -> tuple[int, Back]:
        """`keys` are back, up to the first one that is in `others`, which has a `KeyMap`'s shards.

        How many these are; and of those that were remembered the index, and what was.
        """
        shards, i = self.shards, 0
        found: Back = []
        for key in keys:
            place = key[-1]
            if key in others[place]:
                break
            shard = shards[place]
            if key in shard:
                found.append((i, shard.pop(key)))
            i += 1
        return i, found

    def _forget(self, departures: int) -> None:
        shards, left, noted = self.shards, self._left.popleft, self._as.popleft
        for _ in range(departures):
            key, past = left(), noted()
            shard = shards[key[-1]]
            if shard.get(key) is past:  # it left only once
                del shard[key]

    def __contains__(self, key: BlockKey) -> bool:
        return key in self.shards[key[-1]]

    def __iter__(self) -> Iterator[BlockKey]:
        """Every key that is remembered; ends at the next change."""
        return iter(self._past)

    def __len__(self) -> int:
        return len(self._past)
