"""SIEVE: a FIFO queue and a hand that spares what was used since it last came by.

Zhang et al., "SIEVE is Simpler than LRU", NSDI 2024. The queue is two: what the hand has passed in
this round, and what lies before it, where new keys enter at the end.
"""

from kvtier.core.blocks import BlockKey
from kvtier.core.policies.classic import Classic, Queue, put_first


class SIEVE(Classic):
    """See the module; prefixes are kept as in `Classic`. No ghosts."""

    def __init__(self) -> None:
        super().__init__()
        self._passed = Queue()
        self._coming = Queue()
        self._visited: set[BlockKey] = set()

    def _missed(self, key: BlockKey) -> int:
        return 0

    def _admit(self, key: BlockKey, known: int) -> None:
        self._coming[key] = None

    def _used(self, key: BlockKey) -> None:
        self._visited.add(key)

    def _next(self) -> tuple[BlockKey, float] | None:
        while self._coming or self._passed:
            self._turn()
            key, _ = self._coming.popitem(last=False)
            if key not in self._visited:
                self._turn()  # now: what enters next is behind the hand until it comes round
                return key, 0.0
            self._visited.remove(key)
            self._passed[key] = None
        return None

    def _turn(self) -> None:
        if not self._coming:
            self._coming, self._passed = self._passed, self._coming

    def _detach(self, key: BlockKey) -> float:
        self._visited.discard(key)
        if key in self._passed:
            del self._passed[key]
        else:
            del self._coming[key]
        return 0.0

    def _put_back(self, key: BlockKey, where: float) -> None:
        put_first(self._coming, key)

    def _gone(self, key: BlockKey, where: float) -> None:
        pass
