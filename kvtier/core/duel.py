"""Whether LRU would have found more in a cache as large as this one, so far.

LRU holds the keys that were used last, as many as there is room for. So from the times of last use
alone, of keys that are here and of those that left, it is known what it would have found, and no
second cache need be kept. Uses are counted by epochs of some 500th of the cache, and an epoch is
in LRU's cache as a whole or not at all, but for the oldest, of which a rest may be.
"""

from collections import deque
from collections.abc import Sequence
from typing import Final

_PARTS: Final = 512  # of a cache, one of which is used in an epoch
_EPOCHS: Final = 4096  # that are told apart; with more, the oldest two are one
_BEHIND: Final = 0.003  # of all blocks asked for: so much more LRU must have found lately
_WINDOW: Final = 1 << 18  # blocks asked for, after which what came before counts half


class Duel:
    """See the module. `lru_leads` says that its order is to be used from now on."""

    def __init__(self) -> None:
        self.epoch = 0  # the present one
        self.lru_leads = False
        self._first = 0  # the oldest epoch of which LRU has something
        self._merged = 0  # and the oldest that counts as that one
        self._uses = deque([0])  # by epoch from `_first` on, the keys that LRU has of it
        self._size = 0  # their sum
        self._room = 0  # keys that LRU has room for: the most that were here
        self._left = 1  # uses until the next epoch
        self._lead = 0.0  # blocks found here, less those that LRU would have found
        self._asked = 0.0
        self._base = 0.0  # the best lead since LRU led, or 0
        self._until = 0.0  # blocks asked for when LRU's order ends, however it did

    def found(self, epoch: int, keys: int) -> None:
        """Keys that were last used in `epoch` are used, and were here."""
        if epoch < self._merged:
            self._lead += keys
            self._size += keys
        elif epoch != self.epoch:
            uses, at = self._uses, max(0, epoch - self._first)
            had = min(uses[at], keys)  # of the oldest epoch some may have gone
            uses[at] -= had
            self._lead += keys - had
            self._size += keys - had
        else:
            self._asked += keys
            return
        self._uses[-1] += keys
        self._asked += keys
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
        self._lead -= had
        self._size += keys - had
        uses[-1] += keys
        self._asked += keys
        self._left -= keys

    def came(self, keys: int) -> None:
        """Keys come that nobody asked for."""
        self._uses[-1] += keys
        self._size += keys
        self._left -= keys

    def step(self, here: int) -> None:
        """A use begins, with `here` keys in the cache."""
        if here > self._room:
            self._room = here
        while self._size > self._room:
            self._forget(self._size - self._room)
        if self._left <= 0:
            self.epoch += 1
            self._uses.append(0)
            self._left = self._room // _PARTS + 1
            if len(self._uses) > _EPOCHS:
                self._uses[1] += self._uses.popleft()
                self._first += 1
        self._judge()
        if self._asked > _WINDOW:
            self._asked, self._lead, self._room = self._asked / 2, self._lead / 2, here
            self._base, self._until = self._base / 2, self._until / 2

    def _judge(self) -> None:
        if self.lru_leads:
            if self._asked >= self._until:
                self.lru_leads, self._base = False, min(0.0, self._lead)
        elif self._lead < self._base - _BEHIND * self._asked:
            self.lru_leads = True
            self._until = self._asked + max(self._asked / 2, 2 * self._room)
        elif self._lead > self._base:
            self._base = min(0.0, self._lead)

    def _forget(self, keys: int) -> None:
        """LRU gives up `keys` keys, or as many as the oldest epoch has."""
        oldest = self._uses[0]
        if keys < oldest or len(self._uses) == 1:
            self._uses[0] -= keys
            self._size -= keys
            return
        self._size -= oldest
        self._uses.popleft()
        self._first += 1
        self._merged = self._first
