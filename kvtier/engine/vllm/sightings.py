"""Which blocks a second request has: what is stored where only those are wanted."""

from collections.abc import Sequence
from typing import Final

REMEMBERED: Final = 1 << 18  # blocks that one request had; twice as many at most, 100 bytes each


class Sightings:
    """Blocks that were offered once, two generations of them.

    A block is known by the last half of its name before the group: a hash, so that two that are
    taken for one are rarer than one in 2**40, and cost no more than a store.
    """

    def __init__(self, remembered: int = REMEMBERED) -> None:
        self._limit = remembered
        self._young: set[int] = set()
        self._old: set[int] = set()

    def again(self, keys: Sequence[bytes]) -> list[bool]:
        """Of each block whether it was offered before; from now on it was."""
        found = []
        for key in keys:
            name = int.from_bytes(key[-12:], "little")
            found.append(name in self._young or name in self._old)
            if len(self._young) >= self._limit:
                self._old, self._young = self._young, set()
            self._young.add(name)
        return found

    @property
    def remembered(self) -> int:
        """Blocks that are remembered now, at most twice as many as asked for."""
        return len(self._young) + len(self._old)
