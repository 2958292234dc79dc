"""A store in this process's memory: for tests and for the simulation."""

import threading
from collections.abc import Iterator, Sequence

from kvtier.core.blocks import BlockKey
from kvtier.stores.base import Parts


class MemoryStore:
    """Frames in a dict, at most `capacity` bytes of them. See `Store`."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._lock = threading.Lock()
        self._frames: dict[BlockKey, bytes] = {}  # oldest first
        self._nbytes = 0

    def write(self, frames: Sequence[tuple[BlockKey, Parts]]) -> list[bool]:
        """See `Store.write`; each frame is copied."""
        return [self._put(key, b"".join(parts)) for key, parts in frames]

    def read(self, keys: Sequence[BlockKey]) -> list[bytes | memoryview | None]:
        """See `Store.read`."""
        with self._lock:
            return [self._frames.get(key) for key in keys]

    def count(self, keys: Sequence[BlockKey]) -> int:
        """See `Store.count`."""
        with self._lock:
            return next((i for i, key in enumerate(keys) if key not in self._frames), len(keys))

    def delete(self, keys: Sequence[BlockKey]) -> None:
        """See `Store.delete`."""
        with self._lock:
            for key in keys:
                self._nbytes -= len(self._frames.pop(key, b""))

    def scan(self) -> Iterator[tuple[BlockKey, int]]:
        """See `Store.scan`; shows what was held when it began."""
        with self._lock:
            held = [(key, len(frame)) for key, frame in self._frames.items()]
        return iter(held)

    def close(self) -> None:
        """See `Store.close`; there is nothing to give back."""

    def _put(self, key: BlockKey, frame: bytes) -> bool:
        with self._lock:
            nbytes = self._nbytes - len(self._frames.get(key, b"")) + len(frame)
            if nbytes > self.capacity:
                return False
            self._frames.pop(key, None)
            self._frames[key] = frame
            self._nbytes = nbytes
            return True
