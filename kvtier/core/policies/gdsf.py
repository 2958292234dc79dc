"""GDSF: uses, and a clock that rises to the worth of what goes, so that old fame fades.

Cherkasova, "Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency Caching Policy", HP
Laboratories 1998. Worth is the clock at the last use + uses * cost / size; blocks are of one size,
and cost is the same for all, so the cost of a miss deep in a prompt does not count here. No ghosts.
"""

from heapq import heapify, heappop, heappush
from itertools import count

from kvtier.core.blocks import BlockKey
from kvtier.core.policies.classic import Classic


class GDSF(Classic):
    """See the module; prefixes are kept as in `Classic`."""

    def __init__(self) -> None:
        super().__init__()
        self._clock = 0.0
        self._uses: dict[BlockKey, int] = {}
        self._worth: dict[BlockKey, tuple[float, int]] = {}  # and when it was set, by number
        self._heap: list[tuple[float, int, BlockKey]] = []  # also worths that hold no more
        self._numbers = count(1)
        self._first = 0  # the number of what was put back last

    def _missed(self, key: BlockKey) -> int:
        return 0

    def _admit(self, key: BlockKey, known: int) -> None:
        self._uses[key] = 0
        self._used(key)

    def _used(self, key: BlockKey) -> None:
        self._uses[key] += 1
        self._put(key, self._clock + self._uses[key], next(self._numbers))

    def _next(self) -> tuple[BlockKey, float] | None:
        while self._heap:
            worth, number, key = heappop(self._heap)
            if self._worth.get(key) == (worth, number):
                del self._worth[key]
                return key, worth
        return None

    def _detach(self, key: BlockKey) -> float:
        return self._worth.pop(key)[0]

    def _put_back(self, key: BlockKey, where: float) -> None:
        self._first -= 1  # before all that are worth as much
        self._put(key, where, self._first)

    def _gone(self, key: BlockKey, where: float) -> None:
        del self._uses[key]
        self._clock = max(self._clock, where)

    def _put(self, key: BlockKey, worth: float, number: int) -> None:
        self._worth[key] = worth, number
        heappush(self._heap, (worth, number, key))
        if len(self._heap) > 2 * len(self._worth) + 64:
            self._heap = [(*place, key) for key, place in self._worth.items()]
            heapify(self._heap)
