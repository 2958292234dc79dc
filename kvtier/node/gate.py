"""Who is attached to a node daemon, and how many may be."""

from typing import Final, Generic, TypeVar

from kvtier import metrics
from kvtier.node.notes import Hearing

# Taken at once from an engine: all that its socket holds, or what it told there could be heard
# after what another one asked later.
RECEIVE_NBYTES: Final = 256 << 10

C = TypeVar("C")


class Gate(Generic[C]):
    """The connections that are inside, and the notes of all of them. Lives on one loop."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.inside: set[C] = set()
        self.hearing = Hearing()
        # For one at a time: what is taken is acted on, or copied, before anything else is.
        self.received = memoryview(bytearray(RECEIVE_NBYTES))

    def enter(self, connection: C) -> bool:
        """Count a connection in; False when it is one too many."""
        if len(self.inside) >= self.limit:
            return False
        self.inside.add(connection)
        metrics.CLIENTS.set(len(self.inside))
        return True

    def leave(self, connection: C) -> None:
        """Count it out; one that never entered is ignored."""
        self.inside.discard(connection)
        metrics.CLIENTS.set(len(self.inside))
