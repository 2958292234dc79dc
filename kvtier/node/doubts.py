"""Which frames of a shared store are not to be had, though the store has them. Thread-safe."""

import threading
from collections.abc import Iterable, Sequence
from typing import Final

from kvtier.core.blocks import BlockKey

MOST: Final = 16_384  # keys; about 2 MiB


class Doubts:
    """Shared frames that this node cannot use: to it they are not there.

    One is corrupt, or of a lossy codec that this node was not told to take. What is shared is no
    node's to delete. So its finder remembers it, computes the block again and writes its own bytes
    over the others; other nodes find out by themselves, as this one did. At most `most` are
    remembered, the newest: one that was forgotten is fetched, and refused, once more.
    """

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._keys: dict[BlockKey, bool] = {}  # oldest first; whether corrupt

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, key: BlockKey, *, corrupt: bool) -> None:
        """The frame of `key` was found corrupt, or is not exact."""
        with self._lock:
            self._keys.pop(key, None)
            self._keys[key] = corrupt
            if len(self._keys) > self._most:
                del self._keys[next(iter(self._keys))]

    def written(self, keys: Iterable[BlockKey]) -> int:
        """This node wrote these frames: they are doubted no more; how many were as corrupt."""
        if not self._keys:
            return 0
        with self._lock:
            return sum(self._keys.pop(key, False) for key in keys)

    def leading(self, keys: Sequence[BlockKey]) -> Sequence[BlockKey]:
        """`keys` up to the first that is doubted."""
        if not self._keys:
            return keys
        with self._lock:
            end = next((i for i, key in enumerate(keys) if key in self._keys), len(keys))
        return keys[:end]
