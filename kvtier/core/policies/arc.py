"""ARC: what was used once and what was used more often, and a border that ghosts move.

Megiddo and Modha, "ARC: A Self-Tuning, Low Overhead Replacement Cache", FAST 2003. Ghosts, at most
as many as keys: `_once_gone` and `_often_gone`, the paper's B1 and B2.
"""

from kvtier.core.blocks import BlockKey
from kvtier.core.policies.classic import Classic, Queue, put_first

_NEW, _WAS_ONCE, _WAS_OFTEN = 0, 1, 2
_ONCE_AT, _OFTEN_AT = 0.0, 1.0


class ARC(Classic):
    """See the module; prefixes are kept as in `Classic`."""

    def __init__(self) -> None:
        super().__init__()
        self._once = Queue()
        self._often = Queue()
        self._once_gone = Queue()
        self._often_gone = Queue()
        self._border = 0.0  # keys that `_once` should have

    def _missed(self, key: BlockKey) -> int:
        once, often = len(self._once_gone), len(self._often_gone)
        if key in self._once_gone:
            self._border = min(float(self._room), self._border + max(1.0, often / once))
            del self._once_gone[key]
            return _WAS_ONCE
        if key in self._often_gone:
            self._border = max(0.0, self._border - max(1.0, once / often))
            del self._often_gone[key]
            return _WAS_OFTEN
        return _NEW

    def _admit(self, key: BlockKey, known: int) -> None:
        (self._once if known == _NEW else self._often)[key] = None
        self._trim()

    def _used(self, key: BlockKey) -> None:
        if key in self._once:
            del self._once[key]
        self._often[key] = None
        self._often.move_to_end(key)

    def _next(self) -> tuple[BlockKey, float] | None:
        once = len(self._once)
        entering = next(iter(self._waiting.values()), _NEW)
        over = once > self._border or (once == self._border and entering == _WAS_OFTEN)
        if self._once and (over or not self._often):
            return self._once.popitem(last=False)[0], _ONCE_AT
        if self._often:
            return self._often.popitem(last=False)[0], _OFTEN_AT
        return None

    def _detach(self, key: BlockKey) -> float:
        if key in self._once:
            del self._once[key]
            return _ONCE_AT
        del self._often[key]
        return _OFTEN_AT

    def _put_back(self, key: BlockKey, where: float) -> None:
        put_first(self._once if where == _ONCE_AT else self._often, key)

    def _gone(self, key: BlockKey, where: float) -> None:
        (self._once_gone if where == _ONCE_AT else self._often_gone)[key] = None
        self._trim(len(self._waiting))

    def _trim(self, entering: int = 0) -> None:
        most = self._room + entering
        while self._once_gone and len(self._once) + len(self._once_gone) > most:
            self._once_gone.popitem(last=False)
        while len(self._once_gone) + len(self._often_gone) > most:
            (self._often_gone or self._once_gone).popitem(last=False)
