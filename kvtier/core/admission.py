"""Which blocks are worth a write to a tier whose writes wear it out."""

from collections.abc import Callable, Iterable, Iterator, Sequence

from kvtier.core.blocks import BlockKey
from kvtier.core.ghosts import NO_CLASS, Ghosts
from kvtier.core.shards import KeyMap


class SecondUse:
    """Blocks of the tier above that one request has used so far: these are not copied down.

    A block is worth a write from its second use on, also where it was given up in between: the
    keys of the last `remembered` that were are known. As LARC has it (Huang et al., "Improving
    Flash-based Disk Cache with Lazy Adaptive Replacement", MSST 2013), and CacheLib its "reject
    first" (Berg et al., OSDI 2020). Requests are told apart by their ids; without one nothing is
    used.

    Args:
        remembered: Blocks given up, at least 1.
        refused: Called for each block that is given up and was never copied.
    """

    def __init__(self, remembered: int, refused: Callable[[], object] = lambda: None) -> None:
        self._limit, self._refused = remembered, refused
        self._once = KeyMap[int | None]()  # the request that brought each
        self._ghosts = Ghosts()

    def entered(self, keys: Iterable[BlockKey], request: int | None) -> None:
        """`keys` are in the tier above from now on, brought there by `request`."""
        for key in keys:
            _, found = self._ghosts.take([key])
            if not found:
                self._once[key] = request

    def used(self, path: Sequence[BlockKey], request: int | None) -> list[BlockKey]:
        """`request` used `path`: the blocks of it that are worth a write from now on."""
        if request is None:
            return []
        shards = self._once.shards
        again = [key for key in path if shards[key[-1]].get(key, request) != request]
        again = [*dict.fromkeys(again)]  # an engine may name a block twice
        for key in again:
            self._once.pop(key)
        return again

    def left(self, key: BlockKey) -> bool:
        """`key` is given up above; whether it had been used only once."""
        if key not in self._once:
            return False
        self._once.pop(key)
        self._ghosts.put([key], 0.0, NO_CLASS, 0, self._limit)
        self._refused()
        return True

    def remembers(self, key: BlockKey) -> bool:
        """Whether `key` was given up after one use, and has not come back since."""
        return key in self._ghosts

    def __contains__(self, key: BlockKey) -> bool:
        """Whether `key` is above and not worth a write yet."""
        return key in self._once

    def __iter__(self) -> Iterator[BlockKey]:
        """Every such key; ends at the next change."""
        return iter(self._once)


AdmissionFactory = Callable[[], SecondUse]
