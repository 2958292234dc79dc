"""Maps and queues of a million keys in which no single step takes long.

Python builds a dict anew when it is full: 19 ms for a million keys, in the middle of an engine's
call. Here keys are spread over SHARDS dicts by their last byte (keys are hashes), so that a step
builds at most a few small ones. What they hold should be numbers: those the garbage collector
does not look at.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Final, Generic, TypeVar

from kvtier.core.blocks import BlockKey

SHARDS: Final = 256
FEW: Final = 16_384  # keys, of which a dict is built anew in 0.2 ms
_BUNDLE: Final = 512  # keys of a `Line` that are kept together

V = TypeVar("V")


class KeyMap(Generic[V]):
    """A dict by key. `shards[key[-1]]` is the part that has a key, for whoever is in a hurry.

    `most` is how many keys there can be, where that is known. Few lie in one dict: in many, each
    would be a place of its own in memory, which costs more than to build that dict anew.
    """

    __slots__ = ("_parts", "shards")

    def __init__(self, most: int | None = None) -> None:
        parts = SHARDS if most is None or most > FEW else 1
        self._parts: list[dict[BlockKey, V]] = [{} for _ in range(parts)]
        self.shards = self._parts * (SHARDS // parts)

    def get(self, key: BlockKey) -> V | None:
        """See `dict.get`."""
        return self.shards[key[-1]].get(key)

    def setdefault(self, key: BlockKey, value: V) -> V:
        """See `dict.setdefault`."""
        return self.shards[key[-1]].setdefault(key, value)

    def pop(self, key: BlockKey) -> V:
        """See `dict.pop`."""
        return self.shards[key[-1]].pop(key)

    def __getitem__(self, key: BlockKey) -> V:
        return self.shards[key[-1]][key]

    def __setitem__(self, key: BlockKey, value: V) -> None:
        self.shards[key[-1]][key] = value

    def __delitem__(self, key: BlockKey) -> None:
        del self.shards[key[-1]][key]

    def __contains__(self, key: BlockKey) -> bool:
        return key in self.shards[key[-1]]

    def __iter__(self) -> Iterator[BlockKey]:
        """Every key, in no order; ends at the next change."""
        for part in self._parts:
            yield from part

    def among(self, keys: Sequence[BlockKey]) -> list[BlockKey]:
        """Those of `keys` that are here, in order."""
        shards = self.shards
        return [key for key in keys if key in shards[key[-1]]]

    def __len__(self) -> int:
        """O(SHARDS)."""
        return sum(map(len, self._parts))

    def items(self) -> Iterator[tuple[BlockKey, V]]:
        """Every key with its value, in no order; ends at the next change."""
        for part in self._parts:
            yield from part.items()


class Line:
    """Keys in the order in which they came last, each with a number; O(1) a step.

    They lie in bundles, each a small dict, which go when they are empty.
    """

    __slots__ = ("_bundle_of", "_bundles", "_last", "_newest", "_room", "_size")

    def __init__(self) -> None:
        self._bundle_of = KeyMap[int]()
        self._newest: dict[BlockKey, int] = {}
        self._last = 0  # the number of the newest bundle
        self._bundles = OrderedDict({0: self._newest})
        self._room = _BUNDLE  # keys that the newest bundle still takes
        self._size = 0

    def put(self, key: BlockKey, value: int = 0) -> None:
        """`key` is the newest now, wherever it stood, and has `value`."""
        shard = self._bundle_of.shards[key[-1]]
        number = shard.get(key)
        if number is None:
            self._size += 1
        else:
            self._leave(key, number)
        if not self._room:
            self._begin()
        self._room -= 1
        self._newest[key] = value
        shard[key] = self._last

    def remove(self, key: BlockKey) -> int | None:
        """Take `key` out; its value, None if it was not there."""
        number = self._bundle_of.shards[key[-1]].pop(key, None)
        if number is None:
            return None
        self._size -= 1
        return self._leave(key, number)

    def _leave(self, key: BlockKey, number: int) -> int:
        bundle = self._bundles[number]
        value = bundle.pop(key)
        if not bundle and number != self._last:
            del self._bundles[number]
        return value

    def _begin(self) -> None:
        if not self._newest:
            del self._bundles[self._last]
        self._last += 1
        self._newest = self._bundles[self._last] = {}
        self._room = _BUNDLE

    def __iter__(self) -> Iterator[BlockKey]:
        """Every key, the oldest first; ends at the next change."""
        for bundle in self._bundles.values():
            yield from bundle

    def items(self) -> Iterator[tuple[BlockKey, int]]:
        """Every key with its value, the oldest first; ends at the next change."""
        for bundle in self._bundles.values():
            yield from bundle.items()

    def __contains__(self, key: object) -> bool:
        return isinstance(key, bytes) and BlockKey(key) in self._bundle_of

    def __len__(self) -> int:
        return self._size
