"""Which block a full tier gives up first."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from kvtier.core.blocks import BlockKey
from kvtier.core.shards import KeyMap, Line


class Use(NamedTuple):
    """What is known of the request behind a touch.

    A request may be told in several steps (it finds, loads, writes, ends): touches with the same
    `request` are one use. None: no request asked for this, the blocks came by themselves.
    """

    now: float = 0.0  # seconds on any clock that does not run backwards
    request: int | None = None
    output_tokens: int | None = None  # None: not known yet


NO_USE = Use()
Keep = Callable[[BlockKey], bool]
Here = KeyMap[int] | None  # what is in a tier, with whatever number


class EvictionPolicy(Protocol):
    """An order over the keys of one tier, coldest first. Holds no bytes and does no I/O.

    A path is a prompt's keys from its first block on. The order respects parents: as long as
    every key entered as part of a path, no key comes before a key that continues it.
    """

    def touch(self, path: Sequence[BlockKey], use: Use = NO_USE, here: Here = None) -> None:
        """`path` (root first) was used: keys not known yet enter, the others become warm.

        Of a path that is not all `here`, in the tier, only what is; if nothing is, it is no use.
        """
        ...

    def remove(self, *keys: BlockKey) -> None:
        """`keys` left the tier, in this order; unknown keys are ignored."""
        ...

    def coldest(self, keep: Keep | None = None) -> Iterator[BlockKey]:
        """Keys in the order in which to give them up; ends at the next change of the policy.

        Keys of which `keep` holds cannot go now; a policy may leave them out, and what comes
        before them on their path.
        """
        ...

    def __contains__(self, key: object) -> bool: ...

    def __len__(self) -> int: ...


class LRU:
    """Least recently used, a path's deep end before its root."""

    def __init__(self) -> None:
        self._order = Line()  # coldest first
        self._last: Sequence[BlockKey] = ()  # what was touched last, if nothing left since

    def touch(self, path: Sequence[BlockKey], use: Use = NO_USE, here: Here = None) -> None:
        """See `EvictionPolicy.touch`; O(len(path))."""
        path = [*path] if here is None else here.among(path)
        if path == self._last:  # a request is told in several steps
            return
        put = self._order.put
        for key in reversed(path):
            put(key)
        self._last = path

    def remove(self, *keys: BlockKey) -> None:
        """See `EvictionPolicy.remove`."""
        self._last = ()
        for key in keys:
            self._order.remove(key)

    def coldest(self, keep: Keep | None = None) -> Iterator[BlockKey]:
        """See `EvictionPolicy.coldest`."""
        return iter(self._order)

    def __contains__(self, key: object) -> bool:
        return key in self._order

    def __len__(self) -> int:
        return len(self._order)


PolicyFactory = Callable[[], EvictionPolicy]
Learned = dict[str, int | list[list[float]]]  # plain lists and numbers, and a "version"


@runtime_checkable
class Learning(Protocol):
    """A policy that learns, and need not begin blind after a restart."""

    def save(self) -> Learned:
        """What was learned, for `restore`."""
        ...

    def restore(self, state: object) -> None:
        """Go on with what an earlier life had learned.

        Raises:
            ValueError: Not such a state, or one of another version; nothing has changed.
        """
        ...
