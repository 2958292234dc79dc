"""A store whose calls are watched, as one that hangs says nothing itself."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count

from kvtier.core.blocks import BlockKey
from kvtier.stores.base import ChainedStore, Parts, Placed, PlacingStore, ProbedStore, Store


class WatchedStore:
    """`inner`; `look` tells how long its calls have been under way. See `Store`.

    Time is told in looks and not by a clock: a process that was stopped for a minute finds no
    calls that are a minute old when it goes on.
    """

    def __init__(self, inner: Store) -> None:
        self._inner = inner
        self._lock = threading.Lock()
        self._looks: dict[int, int] = {}  # that each call under way has met
        self._numbers = count()

    def look(self) -> int:
        """How many looks, with this one, the longest call under way has met; 0: there is none."""
        with self._lock:
            self._looks = {number: looks + 1 for number, looks in self._looks.items()}
            return max(self._looks.values(), default=0)

    @contextmanager
    def _call(self) -> Iterator[None]:
        with self._lock:
            number = next(self._numbers)
            self._looks[number] = 0
        try:
            yield
        finally:
            with self._lock:
                del self._looks[number]

    def write(self, frames: Sequence[tuple[BlockKey, Parts]]) -> list[bool]:
        """See `Store.write`."""
        with self._call():
            return self._inner.write(frames)

    def read(self, keys: Sequence[BlockKey]) -> list[bytes | memoryview | None]:
        """See `Store.read`."""
        with self._call():
            return self._inner.read(keys)

    def read_into(
        self, keys: Sequence[BlockKey], places: Sequence[memoryview]
    ) -> list[bytes | memoryview | Placed | None]:
        """See `PlacingStore.read_into`; as `read` where `inner` is none."""
        with self._call():
            if isinstance(self._inner, PlacingStore):
                return self._inner.read_into(keys, places)
            return [*self._inner.read(keys)]

    def count(self, keys: Sequence[BlockKey]) -> int:
        """See `Store.count`."""
        with self._call():
            return self._inner.count(keys)

    def probe(self) -> None:
        """See `ProbedStore.probe`; a question to `inner` where it is none."""
        with self._call():
            if isinstance(self._inner, ProbedStore):
                self._inner.probe()
            else:
                self._inner.count([BlockKey(bytes(16))])

    def delete(self, keys: Sequence[BlockKey]) -> None:
        """See `Store.delete`."""
        with self._call():
            self._inner.delete(keys)

    def scan(self) -> Iterator[tuple[BlockKey, int]]:
        """See `Store.scan`."""
        with self._call():
            return self._inner.scan()

    def take_before(self) -> Mapping[BlockKey, BlockKey]:
        """See `ChainedStore.take_before`; nothing where `inner` is none."""
        return self._inner.take_before() if isinstance(self._inner, ChainedStore) else {}

    def close(self) -> None:
        """See `Store.close`."""
        self._inner.close()
