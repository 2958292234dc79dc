"""LIRS: what matters is the time between the last two uses, not the time since the last one.

Jiang and Zhang, "LIRS: An Efficient Low Inter-reference Recency Set Replacement Policy", SIGMETRICS
2002. Most keys are "low" (their last two uses were close) and stay; a few others ("high") pass
through a queue. The stack holds both by recency, and ghosts of high ones, at most two for each key
that is here. The paper gives the high ones 1%; here they have 5%, as a prompt brings some twenty
blocks at once.
"""

from typing import Final

from kvtier.core.blocks import BlockKey
from kvtier.core.policies.classic import Classic, Queue, put_first

HIGH: Final = 0.05
_GHOSTS: Final = 2.0
_NEW, _KNOWN = 0, 1
_HIGH_AT, _LOW_AT = 0.0, 1.0


class LIRS(Classic):
    """See the module; prefixes are kept as in `Classic`. `high`: the share of high keys."""

    def __init__(self, high: float = HIGH) -> None:
        super().__init__()
        self._share = high
        self._stack = Queue()  # the oldest first; its first is always low
        self._low: set[BlockKey] = set()
        self._high = Queue()
        self._ghosts = Queue()  # in the stack too

    def _missed(self, key: BlockKey) -> int:
        if key in self._ghosts:
            del self._ghosts[key]
            del self._stack[key]
            return _KNOWN
        return _NEW

    def _admit(self, key: BlockKey, known: int) -> None:
        if known == _KNOWN or len(self._low) < self._most_low:
            self._low.add(key)
        else:
            self._high[key] = None
        self._to_top(key)
        self._settle()

    def _used(self, key: BlockKey) -> None:
        if key in self._high:
            if key in self._stack:
                del self._high[key]
                self._low.add(key)
            else:
                self._high.move_to_end(key)
        self._to_top(key)
        self._settle()

    def _next(self) -> tuple[BlockKey, float] | None:
        self._settle()
        if self._high:
            return self._high.popitem(last=False)[0], _HIGH_AT
        if self._low:
            key = next(iter(self._stack))
            return key, self._detach(key)
        return None

    def _detach(self, key: BlockKey) -> float:
        if key in self._high:
            del self._high[key]
            return _HIGH_AT
        self._low.remove(key)
        del self._stack[key]
        self._prune()
        return _LOW_AT

    def _put_back(self, key: BlockKey, where: float) -> None:
        if where == _HIGH_AT:
            put_first(self._high, key)
        else:
            self._low.add(key)
            put_first(self._stack, key)

    def _gone(self, key: BlockKey, where: float) -> None:
        if key in self._stack:
            self._ghosts[key] = None
        while len(self._ghosts) > _GHOSTS * self._room:
            del self._stack[self._ghosts.popitem(last=False)[0]]

    @property
    def _most_low(self) -> int:
        return max(1, self._room - max(1, int(self._share * self._room)))

    def _to_top(self, key: BlockKey) -> None:
        self._stack[key] = None
        self._stack.move_to_end(key)

    def _settle(self) -> None:
        """The oldest low ones beyond their number become high; the stack begins with a low one."""
        self._prune()
        while len(self._low) > self._most_low:
            key, _ = self._stack.popitem(last=False)
            self._low.remove(key)
            self._high[key] = None
            self._prune()

    def _prune(self) -> None:
        while self._stack:
            key = next(iter(self._stack))
            if key in self._low:
                return
            del self._stack[key]
            self._ghosts.pop(key, None)
