"""What the classic policies share: prefixes, requests, and an order that they did not think of.

The published policies take one key at a time, make room, then let it in, and know their capacity.
`EvictionPolicy` takes paths, is asked for victims when they are needed, and is not told a size:

Prefixes. Without its parent a block is of no use. When the policy's victim has blocks below it
here, the deep end below it goes instead, and the victim when all of them have gone. The blocks of
a path are used from the deep end to the root, so the root is the most recent.

Entering. New keys wait outside the policy's queues: the first victim is found among the others.
After each victim one of them enters, as in the papers, the deepest first; what still waits enters
with the next request.

Capacity. It is as many keys as were left when the tier last gave one up.

Victims that were asked for but stay in the tier return to the head of their queues, in order,
at the next touch. What a search for victims did to the others (a second chance that was used up)
is not undone.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence

from kvtier.core.blocks import BlockKey
from kvtier.core.policy import NO_USE, Here, Keep, Use

Queue = OrderedDict[BlockKey, None]
"""Keys, next to go first. Not a dict: finding the first key of one is slow after deletions."""


class Classic:
    """An `EvictionPolicy` made of the seven steps that a subclass gives. See the module."""

    def __init__(self) -> None:
        self._above: dict[BlockKey, BlockKey | None] = {}  # of every key that is here
        self._below: dict[BlockKey, dict[BlockKey, None]] = {}  # of those with any
        self._waiting: OrderedDict[BlockKey, int] = OrderedDict()
        self._going: OrderedDict[BlockKey, float] = OrderedDict()  # and where they were
        self._open: dict[BlockKey, float] = {}  # the victim, and the path to the deep end below it
        self._left_below: list[Iterator[BlockKey]] = []  # of each of them
        self._told: set[BlockKey] = set()  # of the request that is being told
        self._request: int | None = None
        self._owed = 0  # waiting keys for which a victim was found
        self._left = 0  # keys that were here after the last one went
        self._changes = 0

    # --- the steps --------------------------------------------------------------------

    def _missed(self, key: BlockKey) -> int:
        """`key` is asked for and not here; what `_admit` is to know of it, by a number."""
        raise NotImplementedError

    def _admit(self, key: BlockKey, known: int) -> None:
        """`key` enters the queues."""
        raise NotImplementedError

    def _used(self, key: BlockKey) -> None:
        """`key`, which is in the queues, was used."""
        raise NotImplementedError

    def _next(self) -> tuple[BlockKey, float] | None:
        """Take the next victim out of the queues, and say where it was; None: they are empty."""
        raise NotImplementedError

    def _detach(self, key: BlockKey) -> float:
        """Take `key` out of the queues, and say where it was."""
        raise NotImplementedError

    def _put_back(self, key: BlockKey, where: float) -> None:
        """`key`, taken out, is the next to go where it was."""
        raise NotImplementedError

    def _gone(self, key: BlockKey, where: float) -> None:
        """`key`, taken out, has left; it may be remembered, within bounds."""
        raise NotImplementedError

    # --- what they may ask ------------------------------------------------------------

    @property
    def _room(self) -> int:
        """The capacity, in keys."""
        others = len(self._above) - len(self._waiting) - len(self._going)
        return max(1, self._left, others)

    # --- EvictionPolicy ---------------------------------------------------------------

    def touch(self, path: Sequence[BlockKey], use: Use = NO_USE, here: Here = None) -> None:
        """See `EvictionPolicy.touch`; O(len(path)) and the victims that were not removed."""
        if here is not None and not (path := here.among(path)):
            return
        self._changes += 1
        self._return()
        self._owed = 0
        if use.request is None or use.request != self._request:
            self._told.clear()
            while self._waiting:
                self._admit(*self._waiting.popitem(last=False))
        self._request = use.request
        for at in range(len(path) - 1, -1, -1):
            key = path[at]
            if key not in self._above:
                self._waiting[key] = self._missed(key)
                self._above[key] = None
            elif key not in self._told and key not in self._waiting:
                self._used(key)
            if at:
                self._link(path[at - 1], key)
            self._told.add(key)

    def remove(self, *keys: BlockKey) -> None:
        """See `EvictionPolicy.remove`."""
        for key in keys:
            self._remove(key)

    def _remove(self, key: BlockKey) -> None:
        if key not in self._above:
            return
        self._changes += 1
        self._close()
        where = self._going.pop(key) if key in self._going else self._take(key)
        above = self._above.pop(key)
        if above is not None:
            self._unlink(above, key)
        for child in self._below.pop(key, ()):
            self._above[child] = None
        self._left = len(self._above)
        self._told.discard(key)
        if where >= 0:
            self._gone(key, where)

    def coldest(self, keep: Keep | None = None) -> Iterator[BlockKey]:
        """See `EvictionPolicy.coldest`; what must be kept is not left out."""
        changes = self._changes
        for key in [*self._going]:
            yield key
            if changes != self._changes:
                return
        while changes == self._changes:
            more = self._decide()
            if more is None:
                return
            yield more

    def __contains__(self, key: object) -> bool:
        return key in self._above

    def __len__(self) -> int:
        return len(self._above)

    # --- prefixes and victims ---------------------------------------------------------

    def _link(self, above: BlockKey, key: BlockKey) -> None:
        before = self._above[key]
        if before != above:
            if before is not None:
                self._unlink(before, key)
            self._above[key] = above
            self._below.setdefault(above, {})[key] = None

    def _unlink(self, above: BlockKey, key: BlockKey) -> None:
        below = self._below[above]
        del below[key]
        if not below:
            del self._below[above]

    def _decide(self) -> BlockKey | None:
        """One more key that goes: the victim, or the deep end below it."""
        if not self._open:
            if self._owed and self._waiting:
                self._owed -= 1
                self._admit(*self._waiting.popitem(last=False))
            victim = self._next() or self._next_waiting()
            if victim is None:
                return None
            self._descend(*victim)
        while True:
            key = next((k for k in self._left_below[-1] if self._stays(k)), None)
            if key is None:
                break
            self._descend(key, self._take(key))
        self._left_below.pop()
        key, where = self._open.popitem()
        self._going[key] = where
        self._owed += 1
        return key

    def _descend(self, key: BlockKey, where: float) -> None:
        self._open[key] = where
        self._left_below.append(iter(self._below.get(key, ())))

    def _stays(self, key: BlockKey) -> bool:
        return key not in self._going and key not in self._open

    def _close(self) -> None:
        """What is below the victim has changed: it is looked at again when it is due again."""
        for key, where in self._open.items():
            self._give_back(key, where)
        self._open.clear()
        self._left_below.clear()

    def _return(self) -> None:
        """Nobody took these; they are the next to go, in this order."""
        self._close()
        while self._going:
            self._give_back(*self._going.popitem())

    # Where a waiting key was is below zero, and tells what `_missed` said of it.

    def _next_waiting(self) -> tuple[BlockKey, float] | None:
        if not self._waiting:
            return None
        key, known = self._waiting.popitem(last=False)
        return key, -1.0 - known

    def _take(self, key: BlockKey) -> float:
        known = self._waiting.pop(key, None)
        return self._detach(key) if known is None else -1.0 - known

    def _give_back(self, key: BlockKey, where: float) -> None:
        if where >= 0:
            self._put_back(key, where)
        else:
            self._waiting[key] = int(-1.0 - where)
            self._waiting.move_to_end(key, last=False)


def put_first(queue: Queue, key: BlockKey) -> None:
    """`key` is the next to go from `queue`."""
    queue[key] = None
    queue.move_to_end(key, last=False)


def remember(ghosts: Queue, key: BlockKey, most: int) -> None:
    """`key` is the youngest of at most `most` ghosts."""
    ghosts[key] = None
    while len(ghosts) > most:
        ghosts.popitem(last=False)
