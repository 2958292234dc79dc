"""S3-FIFO: a small queue on trial, a main queue, and ghosts of those that failed the trial.

Yang et al., "FIFO Queues are All You Need for Cache Eviction", SOSP 2023. A tenth of the keys are
in the small queue; there are at most as many ghosts as keys in the main one.
"""

from typing import Final

from kvtier.core.blocks import BlockKey
from kvtier.core.policies.classic import Classic, Queue, put_first, remember

_SMALL: Final = 0.1  # of the capacity; the main queue has the rest
_MOST: Final = 3  # uses that are counted
_PASSES: Final = 2  # uses in the small queue that lead to the main one
_SMALL_AT, _MAIN_AT = 0.0, 1.0


class S3FIFO(Classic):
    """See the module; prefixes are kept as in `Classic`."""

    def __init__(self) -> None:
        super().__init__()
        self._small = Queue()
        self._main = Queue()
        self._ghosts = Queue()
        self._uses: dict[BlockKey, int] = {}  # of those with any

    def _missed(self, key: BlockKey) -> int:
        if key in self._ghosts:
            del self._ghosts[key]
            return 1
        return 0

    def _admit(self, key: BlockKey, known: int) -> None:
        (self._main if known else self._small)[key] = None

    def _used(self, key: BlockKey) -> None:
        self._uses[key] = min(_MOST, self._uses.get(key, 0) + 1)

    def _next(self) -> tuple[BlockKey, float] | None:
        while self._small or self._main:
            if self._small and len(self._main) <= self._most_main:
                victim = self._fail()
                if victim is not None:
                    return victim, _SMALL_AT
            else:
                key, _ = self._main.popitem(last=False)
                uses = self._uses.pop(key, 0)
                if not uses:
                    return key, _MAIN_AT
                self._main[key] = None
                if uses > 1:
                    self._uses[key] = uses - 1
        return None

    def _fail(self) -> BlockKey | None:
        """The first in the small queue that was not used enough; the others pass."""
        while self._small:
            key, _ = self._small.popitem(last=False)
            if self._uses.pop(key, 0) < _PASSES:
                return key
            self._main[key] = None
        return None

    @property
    def _most_main(self) -> int:
        return self._room - int(_SMALL * self._room)

    def _detach(self, key: BlockKey) -> float:
        self._uses.pop(key, None)
        if key in self._small:
            del self._small[key]
            return _SMALL_AT
        del self._main[key]
        return _MAIN_AT

    def _put_back(self, key: BlockKey, where: float) -> None:
        put_first(self._small if where == _SMALL_AT else self._main, key)

    def _gone(self, key: BlockKey, where: float) -> None:
        if where == _SMALL_AT:
            remember(self._ghosts, key, self._most_main)
