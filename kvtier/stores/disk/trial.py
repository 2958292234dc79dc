"""Free slots of a disk store, written and read to measure the disk: nobody's blocks."""

import errno
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from kvtier import metrics
from kvtier.errors import StoreUnavailable
from kvtier.stores.disk.budget import WriteBudget
from kvtier.stores.disk.buffers import BufferPool
from kvtier.stores.disk.files import Folder
from kvtier.stores.disk.record import PAGE, pages, record_nbytes
from kvtier.stores.disk.room import NO_ROOM, Room
from kvtier.stores.disk.space import Place, Space
from kvtier.stores.disk.transfer import at_once

T = TypeVar("T")

_ANSWERS: Final = {*NO_ROOM, errno.EROFS}  # of a disk that works
_LEFT: Final = 2  # times what is taken must be free, so that blocks still find room


def ask(folder: Folder) -> None:
    """See `ProbedStore.probe`: by a page of a file of its own."""
    try:
        folder.probe()
    except OSError as error:
        if error.errno not in _ANSWERS:
            raise StoreUnavailable(f"disk {folder.path}: {error.strerror}") from error


class DiskTrial:
    """Up to `count` slots for frames of up to `nbytes` bytes, held until `close`. See `Trial`.

    No header is ever written to them, so nothing takes what lies there for a block: not this
    store, not a restart after a kill, not `kvtier check`. They lie in the store's own segments and
    so within its capacity; a store with little room lends none, and nothing is moved for them.

    Args:
        room: Gives slots.
        space: Over `room`.
        state: The lock over `space`.
        budget: Over what may be written, also here.
        clock: Its seconds.
        nbytes: The largest frame.
        count: Frames of one call.

    Raises:
        StoreUnavailable: The disk takes no segment.
    """

    def __init__(
        self,
        room: Room,
        space: Space,
        state: threading.Condition,
        budget: WriteBudget,
        clock: Callable[[], float],
        nbytes: int,
        count: int,
    ) -> None:
        self._space, self._state, self._budget, self._clock = space, state, budget, clock
        self._buffers = [BufferPool().take(record_nbytes(nbytes)) for _ in range(count)]
        for buffer in self._buffers:
            buffer[:PAGE] = bytes(PAGE)
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="disk-trial")
        self._places: list[Place] = []
        needed = record_nbytes(nbytes)
        try:
            while len(self._places) < count and self._spare(needed, count - len(self._places)):
                if (place := room.take(needed)) is None:
                    break
                self._places.append(place)
        except OSError as error:
            self.close()
            raise StoreUnavailable(f"disk: {error.strerror}") from error

    def write(self, nbytes: int) -> bool:
        """See `Trial.write`."""
        total = PAGE + pages(nbytes)
        if len(self._places) < len(self._buffers):
            return False
        with self._state:
            if not self._budget.spend(total * len(self._places), self._clock()):
                return False

        def put(index: int) -> None:
            segment, slot = self._places[index]
            segment.file.write(slot, [self._buffers[index][:total]])

        self._all(put)
        metrics.DISK_WRITTEN_BYTES.inc(total * len(self._places))
        return True

    def read(self, nbytes: int) -> bool:
        """See `Trial.read`."""
        total = PAGE + pages(nbytes)

        def get(index: int) -> int:
            segment, slot = self._places[index]
            return segment.file.read(slot, self._buffers[index][:total])

        return all(got == total for got in self._all(get))

    def close(self) -> None:
        """See `Trial.close`."""
        self._pool.shutdown()
        with self._state:
            for place in self._places:
                self._space.give(place)
        self._places.clear()

    def _all(self, work: Callable[[int], T]) -> list[T]:
        try:
            return at_once(self._pool, work, range(len(self._places)))
        except OSError as error:
            raise StoreUnavailable(f"disk: {error.strerror}") from error

    def _spare(self, needed: int, count: int) -> bool:
        """Whether `count` slots can be taken and as many again are left, all as they lie."""
        with self._state:
            free = sum(
                len(segment.free)
                for segment in self._space.segments.values()
                if not segment.closed and self._space.fits(segment, needed)
            )
            new = (self._space.capacity - self._space.nbytes) // needed
        return free + new >= _LEFT * count
