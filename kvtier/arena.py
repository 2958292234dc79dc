"""Host memory that a node daemon owns and engines of the node map: tier 0.

An arena is a memfd, sealed against resize, cut into slots of one block each. The descriptor goes
to an engine over the node's Unix socket. So nothing is left behind by a crash (the kernel frees
the memory with its last mapping), /dev/shm's size is no limit, and an engine's mapping survives
the daemon.

Behind the slots lies an index of what is in them, by which engines copy without a lease
(docs/decisions/0043 and 0058).
"""

import fcntl
import os
import threading
from collections.abc import Callable
from typing import Final

from kvtier.core.blocks import Slot
from kvtier.core.slot_index import SlotIndex
from kvtier.errors import ConfigError, RemoteProtocolError
from kvtier.mapping import LARGE, Mapping

ALIGNMENT: Final = 4096  # slots start on pages, as direct I/O and CUDA registration want it
_SEALS: Final = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


def stride(slot_nbytes: int) -> int:
    """Bytes from one slot's start to the next one's."""
    return -(-slot_nbytes // ALIGNMENT) * ALIGNMENT


def _sizes(slot_nbytes: int, slots: int) -> tuple[int, int]:
    """Bytes of all slots, and of the index behind them.

    Together whole large pages, where there are any.
    """
    nbytes = stride(slot_nbytes) * slots
    align = LARGE if nbytes >= LARGE else ALIGNMENT
    return nbytes, -(-(nbytes + SlotIndex.nbytes(slots)) // align) * align - nbytes


class Fence:
    """A barrier in memory: a lock that is given back and taken again is one in both directions."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __call__(self) -> None:
        """What comes before this in memory comes before what follows, on every processor."""
        for _ in range(2):
            with self._lock:
                pass


class Arena:
    """`slots` pieces of `slot_nbytes` bytes; made by `create` in the daemon, `attach` elsewhere.

    Views handed out stay valid until the last of them is gone, also after `close`.
    """

    def __init__(self, fd: int, mapping: Mapping, slot_nbytes: int, slots: int) -> None:
        self.fd = fd
        self.slot_nbytes = slot_nbytes
        self.slots = slots
        self.large_nbytes = 0  # that `create` could take in large pages
        self._stride = stride(slot_nbytes)
        self._mapping = mapping
        nbytes, _ = _sizes(slot_nbytes, slots)
        self._view = mapping.view[:nbytes]
        self.index = SlotIndex(slots, mapping.view[nbytes:], Fence())

    @classmethod
    def create(cls, slot_nbytes: int, slots: int, *, prefault: bool = True) -> "Arena":
        """A new zeroed arena; `prefault` takes its memory now, so that no first use pays for it.

        It is then in large pages as far as the kernel has them to give.

        Raises:
            ConfigError: The kernel has not that much memory to give.
        """
        nbytes, more = _sizes(slot_nbytes, slots)
        fd = os.memfd_create("kvtier-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, nbytes + more)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            mapping = Mapping(fd, nbytes + more)
            large = 0
            if prefault:
                large = mapping.take_large_pages(nbytes)
                mapping.populate()
        except OSError as error:
            os.close(fd)
            raise ConfigError(
                f"host.bytes: cannot take {nbytes} bytes of memory: {error.strerror}"
            ) from None
        arena = cls(fd, mapping, slot_nbytes, slots)
        arena.large_nbytes = large
        return arena

    @classmethod
    def attach(cls, fd: int, slot_nbytes: int, slots: int) -> "Arena":
        """Map an arena whose descriptor came from the daemon; takes over `fd`.

        Raises:
            RemoteProtocolError: It is not sealed (it could shrink under us) or has another size.
        """
        nbytes = sum(_sizes(slot_nbytes, slots))
        try:
            if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
                raise RemoteProtocolError("arena: the descriptor is not sealed against resize")
            if (size := os.fstat(fd).st_size) != nbytes:
                raise RemoteProtocolError(f"arena: {size} bytes long, announced were {nbytes}")
            mapping = Mapping(fd, nbytes)
        except (OSError, RemoteProtocolError) as error:
            os.close(fd)
            if isinstance(error, OSError):
                raise RemoteProtocolError(f"arena: not a memfd: {error.strerror}") from None
            raise
        return cls(fd, mapping, slot_nbytes, slots)

    def populate(self, go_on: Callable[[], bool] = lambda: True) -> None:
        """Map every page now, so that no first use pays for it; safe beside other uses.

        `go_on` is asked before each piece of it, and may wait; False ends it.
        """
        self._mapping.populate(go_on)

    def slot(self, slot: Slot) -> memoryview:
        """The writable bytes of one slot; valid for as long as the caller's lease on it."""
        if not 0 <= slot < self.slots:
            raise IndexError(f"slot {slot} of {self.slots}")
        start = slot * self._stride
        return self._view[start : start + self.slot_nbytes]

    @property
    def view(self) -> memoryview:
        """All slots with the gaps between them; slot i starts at i * stride(slot_nbytes)."""
        return self._view

    def close(self) -> None:
        """Close the descriptor; the memory goes with its last view. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def free(self) -> None:
        """Let go of the memory: with the last view that was handed out it goes, 0.2 s a GiB."""
        self.close()
        self.index.release()
        for view in (self._view, self._mapping.view):
            view.release()
