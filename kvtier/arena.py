"""Host memory that a node daemon owns and engines of the node map: tier 0.

An arena is a memfd, sealed against resize, cut into slots of one block each. The descriptor goes
to an engine over the node's Unix socket. So nothing is left behind by a crash (the kernel frees
the memory with its last mapping), /dev/shm's size is no limit, and an engine's mapping survives
the daemon.

Behind the slots lies a number for each, the turn in which a block last left it: what an engine has
copied without a lease is right where that is no later than when it was told of the block
(`unmoved`; docs/decisions/0043).
"""

import contextlib
import ctypes
import fcntl
import mmap
import os
import threading
from collections.abc import Callable, Sequence
from typing import Final

from kvtier.core.blocks import Slot
from kvtier.errors import ConfigError, RemoteProtocolError

ALIGNMENT: Final = 4096  # slots start on pages, as direct I/O and CUDA registration want it
_TURN_NBYTES: Final = 8
_SEALS: Final = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
_POPULATE_NBYTES: Final = 4 << 20  # some 1 ms
_MADV_POPULATE_WRITE: Final = 23  # Linux 5.14; Python 3.11 has no name for it
_MAP_FIXED: Final = 16
_MAP_FAILED: Final = ctypes.c_void_p(-1).value
_MADV_COLLAPSE: Final = 25  # Linux 6.1
_LARGE: Final = 2 << 20  # a large page
_MOST_REFUSED: Final = 16  # large pages in a row, until no more are asked for


def stride(slot_nbytes: int) -> int:
    """Bytes from one slot's start to the next one's."""
    return -(-slot_nbytes // ALIGNMENT) * ALIGNMENT


def _sizes(slot_nbytes: int, slots: int) -> tuple[int, int]:
    """Bytes of all slots, and of the turns behind them.

    Together whole large pages, where there are any: a mapping of another size begins anywhere,
    and then the processor sees small pages only, which a copy waits for.
    """
    nbytes = stride(slot_nbytes) * slots
    align = _LARGE if nbytes >= _LARGE else ALIGNMENT
    return nbytes, -(-(nbytes + _TURN_NBYTES * slots) // align) * align - nbytes


class Arena:
    """`slots` pieces of `slot_nbytes` bytes; made by `create` in the daemon, `attach` elsewhere.

    Views handed out stay valid until the last of them is gone, also after `close`.
    """

    def __init__(self, fd: int, memory: mmap.mmap, slot_nbytes: int, slots: int) -> None:
        self.fd = fd
        self.slot_nbytes = slot_nbytes
        self.slots = slots
        self.large_nbytes = 0  # that `create` could take in large pages
        self._stride = stride(slot_nbytes)
        self._memory = memory
        nbytes, _ = _sizes(slot_nbytes, slots)
        self._view = memoryview(memory)[:nbytes]
        # By the slot; written by the daemon's ledger alone.
        self.turns = memoryview(memory)[nbytes : nbytes + _TURN_NBYTES * slots].cast("Q")
        self._barrier = threading.Lock()

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
            memory = mmap.mmap(fd, nbytes + more)
            large = 0
            if prefault:
                large = _take_large_pages(fd, nbytes)
                _populate(memory)
        except OSError as error:
            os.close(fd)
            raise ConfigError(
                f"host.bytes: cannot take {nbytes} bytes of memory: {error.strerror}"
            ) from None
        arena = cls(fd, memory, slot_nbytes, slots)
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
            memory = mmap.mmap(fd, nbytes)
        except (OSError, RemoteProtocolError) as error:
            os.close(fd)
            if isinstance(error, OSError):
                raise RemoteProtocolError(f"arena: not a memfd: {error.strerror}") from None
            raise
        return cls(fd, memory, slot_nbytes, slots)

    def populate(self, go_on: Callable[[], bool] = lambda: True) -> None:
        """Map every page now, so that no first use pays for it; safe beside other uses.

        `go_on` is asked before each piece of it, and may wait; False ends it.
        """
        _populate(self._memory, go_on)

    def slot(self, slot: Slot) -> memoryview:
        """The writable bytes of one slot; valid for as long as the caller's lease on it."""
        if not 0 <= slot < self.slots:
            raise IndexError(f"slot {slot} of {self.slots}")
        start = slot * self._stride
        return self._view[start : start + self.slot_nbytes]

    def unmoved(self, slots: Sequence[Slot], turn: int) -> int:
        """Of blocks that were seen in `slots` at `turn`, how many leading ones never left them.

        What was copied from these before this call is what was seen: nobody has written there.
        """
        # What was copied is read before the turns are, on every processor: a lock that is given
        # back and taken again is a barrier in both directions.
        for _ in range(2):
            with self._barrier:
                pass
        turns = self.turns
        for count, slot in enumerate(slots):
            if turns[slot] > turn:
                return count
        return len(slots)

    @property
    def view(self) -> memoryview:
        """All slots with the gaps between them; slot i starts at i * stride(slot_nbytes)."""
        return self._view

    def close(self) -> None:
        """Close the descriptor; the memory goes with its last view. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _take_large_pages(fd: int, nbytes: int) -> int:
    """Take what an empty memfd will hold in large pages; gives how many bytes there were for it.

    A disk moves 2 MiB twice as fast between memory that is one piece than between 512 small pages
    (docs/decisions/0021-large-pages.md). Shared memory gets large pages by this call alone, unless
    an administrator has set `shmem_enabled`; it wants a mapping that begins on one, which Python's
    own can't be told to.
    """
    whole = nbytes // _LARGE * _LARGE
    if not whole:
        return 0
    libc = _memory_calls()
    room = libc.mmap(None, whole + _LARGE, 0, mmap.MAP_SHARED, fd, 0)
    if room == _MAP_FAILED:
        return 0
    taken = refused = 0
    start = -(-room // _LARGE) * _LARGE
    access = mmap.PROT_READ | mmap.PROT_WRITE
    if libc.mmap(start, whole, access, mmap.MAP_SHARED | _MAP_FIXED, fd, 0) == start:
        for at in range(0, whole, _LARGE):
            os.pwrite(fd, b"\0", at)  # of nothing at all it makes no large page
            if libc.madvise(start + at, _LARGE, _MADV_COLLAPSE) == 0:
                taken, refused = taken + _LARGE, 0
            elif (refused := refused + 1) == _MOST_REFUSED:
                break
    libc.munmap(room, whole + _LARGE)
    return taken


def _memory_calls() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
    ]  # fmt: skip
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc


def _populate(memory: mmap.mmap, go_on: Callable[[], bool] = lambda: True) -> None:
    # In pieces, since Python holds its lock during each: an engine's other threads go on between.
    # An older kernel takes the pages at first use instead: slower once, never wrong.
    with contextlib.suppress(OSError):
        for start in range(0, len(memory), _POPULATE_NBYTES):
            if not go_on():
                return
            size = min(_POPULATE_NBYTES, len(memory) - start)
            memory.madvise(_MADV_POPULATE_WRITE, start, size)
