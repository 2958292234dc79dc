"""The one seam between a node and its lower tiers."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NamedTuple, Protocol, runtime_checkable

from kvtier.core.blocks import BlockKey

# A frame to be written, as the buffers that follow each other in it: a header that the codec
# made and payload views that may point straight into the arena. The caller keeps them valid and
# unchanged until `write` returns.
Parts = Sequence[bytes | memoryview]

BROKEN: Final = b""  # in place of a frame: something lies there that is none


class Store(Protocol):
    """Frames by key; the batch is the only shape. Called from a bounded thread pool.

    Every method may be called from several threads at once. None of them interprets a frame.

    Raises:
        StoreUnavailable: No answer within the store's own deadline, or an answer that leaves
            open what is held. Said by any method; never a synonym for "not there".
    """

    def write(self, frames: Sequence[tuple[BlockKey, Parts]]) -> list[bool]:
        """Keep each frame; True only once it can be read back. False: refused, for want of room."""
        ...

    def read(self, keys: Sequence[BlockKey]) -> list[bytes | memoryview | None]:
        """The frame of each key, None where it is not there. The buffers belong to the caller.

        `BROKEN` where `count` counts what can't be read: a shared frame that has lost a part.
        """
        ...

    def count(self, keys: Sequence[BlockKey]) -> int:
        """How many keys from the first on are there without a gap. Reads no payload."""
        ...

    def delete(self, keys: Sequence[BlockKey]) -> None:
        """Forget the keys; those not there are ignored.

        A shared store keeps them: others use them, and only a person may remove what is shared.
        """
        ...

    def scan(self) -> Iterator[tuple[BlockKey, int]]:
        """Every key that is held with its frame's bytes, oldest first. Reads no payload.

        A shared store yields nothing: what others put there is found by `count`.
        """
        ...

    def close(self) -> None:
        """Give back files, locks and connections. Idempotent."""
        ...


class Placed(NamedTuple):
    """A frame whose last bytes lie in the place that was offered; `head` has those before."""

    head: bytes


@runtime_checkable
class PlacingStore(Store, Protocol):
    """A store that can read into the very memory where a block belongs."""

    def read_into(
        self, keys: Sequence[BlockKey], places: Sequence[memoryview]
    ) -> list[bytes | memoryview | Placed | None]:
        """As `read`; of a frame that allows it, what fits its place exactly may be put there.

        A place may hold anything unless its frame is `Placed` and then proves whole.
        """
        ...


@runtime_checkable
class ChainedStore(Store, Protocol):
    """A store that can say how the blocks that `scan` tells of follow each other.

    Only what such a store held before it was opened is used again.
    """

    def take_before(self) -> Mapping[BlockKey, BlockKey]:
        """The block before each, by the headers of their frames, as found at the start; told once.

        Those that are missing have a header that is damaged, or of another version.
        """
        ...


@runtime_checkable
class ProbedStore(Store, Protocol):
    """A store whose `count` says nothing of the medium that the frames lie on."""

    def probe(self) -> None:
        """Write and read a little there: returns once it has answered, be it full or read-only."""
        ...


class Trial(Protocol):
    """A few frames at once in a place of a store's kind that are nobody's blocks, to time it by.

    Used by one thread.

    Raises:
        StoreUnavailable: As a store says it; by any method but `close`.
    """

    def write(self, nbytes: int) -> bool:
        """Write frames of `nbytes` each over those of before; False: there is no room."""
        ...

    def read(self, nbytes: int) -> bool:
        """Read so much of each of the frames that were written; False: it is not there."""
        ...

    def close(self) -> None:
        """Give back what it took."""
        ...
