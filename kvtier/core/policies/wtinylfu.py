"""W-TinyLFU: what leaves a small window stays only if it was used more than what would go instead.

Einziger, Friedman and Manes, "TinyLFU: A Highly Efficient Cache Admission Policy", ACM Transactions
on Storage 13(4), 2017. The window, LRU, has 1% of the keys; the rest is segmented, 80% of it for
keys that were used again. Uses are counted exactly, up to 15, not in a sketch, and halved after
every ten uses for each key of the capacity. Counted are at most ten keys for each that is here.
"""

from collections import OrderedDict
from typing import Final

from kvtier.core.blocks import BlockKey
from kvtier.core.policies.classic import Classic, Queue, put_first

_WINDOW: Final = 0.01
_PROTECTED: Final = 0.8
_MOST: Final = 15
_SAMPLE: Final = 10  # uses between two halvings, and keys counted, for each key of the capacity
_WINDOW_AT, _TRIAL_AT, _PROTECTED_AT = 0.0, 1.0, 2.0


class Frequencies:
    """How often keys were used of late. Halving takes no time: a count knows when it was made."""

    def __init__(self) -> None:
        self._counts: OrderedDict[BlockKey, tuple[int, int]] = OrderedDict()
        self._uses = 0
        self._halvings = 0

    def __len__(self) -> int:
        return len(self._counts)

    def __getitem__(self, key: BlockKey) -> int:
        count, halvings = self._counts.get(key, (0, 0))
        return count >> (self._halvings - halvings)

    def add(self, key: BlockKey, most: int) -> None:
        """One more use; `most` keys are counted, and so many uses lead to a halving."""
        self._counts[key] = min(_MOST, self[key] + 1), self._halvings
        self._counts.move_to_end(key)
        while len(self._counts) > most:
            self._counts.popitem(last=False)
        self._uses += 1
        if self._uses >= most:
            self._uses = 0
            self._halvings += 1


class WTinyLFU(Classic):
    """See the module; prefixes are kept as in `Classic`."""

    def __init__(self) -> None:
        super().__init__()
        self._window = Queue()
        self._trial = Queue()
        self._protected = Queue()
        self._uses = Frequencies()

    def _missed(self, key: BlockKey) -> int:
        self._uses.add(key, _SAMPLE * self._room)
        return 0

    def _admit(self, key: BlockKey, known: int) -> None:
        self._window[key] = None
        main = len(self._trial) + len(self._protected)
        if len(self._window) > self._most_window and main < self._room - self._most_window:
            self._trial[self._window.popitem(last=False)[0]] = None

    def _used(self, key: BlockKey) -> None:
        self._uses.add(key, _SAMPLE * self._room)
        if key in self._window:
            self._window.move_to_end(key)
            return
        self._trial.pop(key, None)
        self._protected[key] = None
        self._protected.move_to_end(key)
        while len(self._protected) > _PROTECTED * (self._room - self._most_window):
            self._trial[self._protected.popitem(last=False)[0]] = None

    def _next(self) -> tuple[BlockKey, float] | None:
        main, where = (self._trial, _TRIAL_AT) if self._trial else (self._protected, _PROTECTED_AT)
        entering = len(self._window) + len(self._waiting)
        if self._window and (entering > self._most_window or not main):
            candidate = next(iter(self._window))
            if not main or self._uses[candidate] <= self._uses[next(iter(main))]:
                del self._window[candidate]
                return candidate, _WINDOW_AT
            del self._window[candidate]
            victim, _ = main.popitem(last=False)
            self._trial[candidate] = None
            return victim, where
        return (main.popitem(last=False)[0], where) if main else None

    def _detach(self, key: BlockKey) -> float:
        for queue, where in (
            (self._window, _WINDOW_AT),
            (self._trial, _TRIAL_AT),
        ):
            if key in queue:
                del queue[key]
                return where
        del self._protected[key]
        return _PROTECTED_AT

    def _put_back(self, key: BlockKey, where: float) -> None:
        queues = {_WINDOW_AT: self._window, _TRIAL_AT: self._trial}
        put_first(queues.get(where, self._protected), key)

    def _gone(self, key: BlockKey, where: float) -> None:
        pass

    @property
    def _most_window(self) -> int:
        return max(1, int(_WINDOW * self._room))
