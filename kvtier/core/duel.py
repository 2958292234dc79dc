"""How far a policy may depart from LRU: no further than what it can afford to lose by it.

LRU holds the keys that were used last, as many as there is room for. So from the times of last use
alone, of keys that are here and of those that left, it is known what it would have found, and no
second cache need be kept. Uses are counted by epochs of some 500th of the cache, and an epoch is
in LRU's cache as a whole or not at all, but for the oldest, of which a rest may be.

Known as well are the keys that LRU would have and that are not here: what may yet be lost. The
policy may go its own way as long as its purse pays for what it must expect to lose of those keys,
and for a prompt besides, since a prompt is found or lost as a whole. Into the purse goes what it
finds more than LRU, and ALLOWED of all blocks asked for; out of it what LRU would have found more.
Else LRU's order holds, by which those keys become fewer. So a young cache departs from LRU by
little, one that is ahead by all that it likes, and one that loses goes back before its losses have
come.
"""

from collections import deque
from collections.abc import Sequence
from math import inf, isfinite
from typing import Final

_PARTS: Final = 512  # of a cache, one of which is used in an epoch
_EPOCHS: Final = 4096  # that are told apart; with more, the oldest two are one
ALLOWED: Final = 0.0045  # of all blocks asked for: so much less than LRU may be found
_CHANCE: Final = 0.002  # of them, less what LRU finds, for whoever lost it all long ago
_RISK: Final = 0.3  # of the keys that only LRU has, those asked for before it gives them up
_TO_BEGIN: Final = 1.7  # prompts that the purse must have to depart from LRU; to go on, 1
_PROMPTS: Final = 2  # so many prompts of evidence that is worth, until it was seen
_WINDOW: Final = 1 << 18  # blocks asked for, after which what came before counts half


class Duel:
    """See the module. `follow_lru` says that its order is to be used for now."""

    def __init__(self) -> None:
        self.epoch = 0  # the present one
        self.follow_lru = True
        self._first = 0  # the oldest epoch of which LRU has something
        self._merged = 0  # and the oldest that counts as that one
        # By epoch from `_first` on, the keys that LRU has of it, and those of them that are here.
        self._uses, self._here = deque([0]), deque([0])
        self._size = self._both = 0  # their sums
        self._room = 0  # keys that LRU has room for: the most that were here
        self._left = 1  # uses until the next epoch
        self._lead = 0.0  # blocks found here, less those that LRU would have found
        self._asked = 0.0
        # What the present request found besides counts from the next one on.
        self._judged_lead = self._judged_asked = 0.0
        self._purse = 0.0  # blocks that may be lost
        self._again = inf  # blocks asked for, from which on an empty one gets something besides
        self._requests = 0.0
        self._squares = 0.0  # of each request's blocks, summed up
        self._lost = 0.0  # blocks that only LRU would have found
        self._brought = 0.0  # and those that it would not have
        self._exposed = 0.0  # keys that only LRU had, times blocks asked for

    def found(self, epoch: int, keys: int) -> None:
        """Keys that were last used in `epoch` are used, and were here."""
        self._asked += keys
        if epoch == self.epoch:
            return
        uses, here, brought = self._uses, self._here, keys
        if epoch < self._merged:
            self._both += keys
        else:
            at = epoch - self._first if epoch > self._first else 0
            had = uses[at]
            if had > keys:
                had = keys  # else of the oldest epoch some have gone
            uses[at] -= had
            here[at] -= keys
            brought -= had
        if brought:
            self._lead += brought
            self._size += brought
            self._brought += brought
        uses[-1] += keys
        here[-1] += keys
        self._left -= keys

    def missed(self, epochs: Sequence[int], keys: int) -> None:
        """`keys` are used that were not here, some of which were last used in `epochs`."""
        uses, first, merged, had = self._uses, self._first, self._merged, 0
        for epoch in epochs:
            if epoch >= merged:
                at = epoch - first if epoch > first else 0
                if uses[at]:
                    uses[at] -= 1
                    had += 1
        if had:
            self._lead -= had
            self._lost += had
        self._size += keys - had
        self._brought += keys - had
        self._asked += keys
        self._add(keys)

    def came(self, keys: int) -> None:
        """Keys come that nobody asked for."""
        self._size += keys
        self._add(keys)

    def _add(self, keys: int) -> None:
        self._uses[-1] += keys
        self._here[-1] += keys
        self._both += keys
        self._left -= keys

    def left(self, epoch: int, keys: int) -> None:
        """Keys that were last used in `epoch` are here no more."""
        if epoch >= self._merged:
            self._here[epoch - self._first if epoch > self._first else 0] -= keys
            self._both -= keys

    def step(self, here: int) -> None:
        """A use begins, with `here` keys in the cache."""
        if here > self._room:
            self._room = here
        if self._size > self._room:
            self._forget(self._size - self._room)
        if self._left <= 0:
            self.epoch += 1
            self._uses.append(0)
            self._here.append(0)
            self._left = self._room // _PARTS + 1
            if len(self._uses) > _EPOCHS:
                self._uses[1] += self._uses.popleft()
                self._here[1] += self._here.popleft()
                self._first += 1

    @property
    def missing(self) -> int:
        """Keys that LRU would have and that are not here."""
        # Of the oldest epoch some may have gone there, the same that go first here.
        spare = self._here[0] - self._uses[0]
        missing = self._size - self._both + (spare if spare > 0 else 0)
        return missing if missing > 0 else 0

    def judge(self, here: int) -> None:
        """A request begins, with `here` keys in the cache; `step` was called."""
        asked = self._asked
        new = asked - self._judged_asked
        if not new:
            return
        self._requests += 1
        self._squares += new * new
        self._purse += self._lead - self._judged_lead + ALLOWED * new
        if self._purse < 0:
            self._purse, self._again = 0.0, asked + max(asked, 2 * self._room)
        elif asked >= self._again:
            self._purse, self._again = self._purse + _CHANCE * self._brought**2 / asked, inf
        missing = self.missing
        self._exposed += missing * new
        kept = self._squares / asked * (_TO_BEGIN if self.follow_lru else 1)
        self.follow_lru = (
            missing + kept > self._purse and self._risk() * missing + kept > self._purse
        )
        self._judged_lead, self._judged_asked = self._lead, asked
        if asked > _WINDOW:
            self._room = here
            self._again /= 2
            self._take([each / 2 for each in self._evidence()])

    def _risk(self) -> float:
        """The share of the keys that only LRU has which is asked for before it gives them up."""
        # It has a key for as long as it takes to bring in as many others as there is room for.
        room, brought = self._room, self._brought
        life = (room if room > 1 else 1) * self._asked / (brought if brought > 1.0 else 1.0)
        prior = _PROMPTS * self._asked / self._requests
        risk = (self._lost + _RISK * prior) / (2 * self._exposed / life + prior)
        return risk if risk < 1.0 else 1.0

    def save(self) -> list[list[float]]:
        """What it goes by, for `read` and `restore`."""
        return [self._evidence()]

    def read(self, saved: object) -> list[float]:
        """What `save` has given, checked.

        Raises:
            ValueError: It is not that.
        """
        row = saved[0] if isinstance(saved, list) and len(saved) == 1 else None
        if isinstance(row, list) and len(row) == len(self._evidence()):
            numbers = [x for x in row if isinstance(x, float) and isfinite(x) and abs(x) < 1e18]
            if len(numbers) == len(row):
                return numbers
        raise ValueError("duel must be a row of 8 numbers below 1e18")

    def restore(self, evidence: list[float]) -> None:
        """Begin with what another life has seen."""
        self._take(evidence)

    def _evidence(self) -> list[float]:
        return [
            self._lead,
            self._asked,
            self._purse,
            self._requests,
            self._squares,
            self._lost,
            self._brought,
            self._exposed,
        ]

    def _take(self, evidence: list[float]) -> None:
        self._lead, self._asked, self._purse, self._requests = evidence[:4]
        self._squares, self._lost, self._brought, self._exposed = evidence[4:]
        self._judged_lead, self._judged_asked = self._lead, self._asked

    def _forget(self, keys: int) -> None:
        """LRU gives up `keys` keys, those of the oldest epochs."""
        uses, here = self._uses, self._here
        self._size -= keys
        while keys >= uses[0] and len(uses) > 1:
            keys -= uses.popleft()
            self._both -= here.popleft()
            self._merged = self._first = self._first + 1
            if not keys:
                return
        uses[0] -= keys
