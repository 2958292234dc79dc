"""Shared memory mapped so that the processor sees its large pages.

A mapping that begins anywhere has none, whatever the memory is made of: each copy then waits for
some hundreds of small ones in every 2 MiB, by 0.7 ms in 64 MiB. Where one begins is the kernel's
choice, and of memfds it makes a bad one, unless it is told: Python's `mmap` cannot.
"""

import ctypes
import mmap
import os
import weakref
from collections.abc import Callable
from functools import cache
from typing import Final

LARGE: Final = 2 << 20  # a large page
_POPULATE_NBYTES: Final = 4 << 20  # some 1 ms where pages are small
_MADV_POPULATE_WRITE: Final = 23  # Linux 5.14; Python 3.11 has no name for it
_MADV_COLLAPSE: Final = 25  # Linux 6.1
_MAP_FIXED: Final = 16
_MAP_FAILED: Final = (1 << 8 * ctypes.sizeof(ctypes.c_void_p)) - 1
_ACCESS: Final = mmap.PROT_READ | mmap.PROT_WRITE
_NOWHERE: Final = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
_MOST_REFUSED: Final = 16  # large pages in a row, until no more are asked for


class Mapping:
    """All `nbytes` of a file of shared memory, to be read and written.

    It goes with the last view of it. Python's lock is not held in any call here that may last.

    Raises:
        OSError: The kernel does not map it.
    """

    def __init__(self, fd: int, nbytes: int) -> None:
        self._fd = fd  # the owner's, and used in `take_large_pages` only
        self._start = _mapped(fd, nbytes)

        class Memory(ctypes.Array[ctypes.c_ubyte]):  # a class of ours, or nothing hears of its end
            _type_ = ctypes.c_ubyte
            _length_ = nbytes

        memory = Memory.from_address(self._start)
        end = weakref.finalize(memory, _calls().munmap, self._start, nbytes)
        end.atexit = False  # other threads may still be using it then
        self.view = memoryview(memory).cast("B")

    def populate(self, go_on: Callable[[], bool] = lambda: True) -> None:
        """Map every page now, in pieces; `go_on` is asked before each, may wait, and may end it.

        An older kernel takes the pages at first use instead: slower once, never wrong.
        """
        for at in range(0, len(self.view), _POPULATE_NBYTES):
            size = min(_POPULATE_NBYTES, len(self.view) - at)
            if not go_on() or _calls().madvise(self._start + at, size, _MADV_POPULATE_WRITE):
                return

    def take_large_pages(self, nbytes: int) -> int:
        """Take what the first `nbytes` of an empty file will hold in large pages; how many bytes.

        A disk moves 2 MiB twice as fast between memory that is one piece than between 512 small
        pages (docs/decisions/0021-large-pages.md). Shared memory gets large pages by this call
        alone, unless an administrator has set `shmem_enabled`.
        """
        taken = refused = 0
        if self._start % LARGE:
            return 0
        for at in range(0, nbytes // LARGE * LARGE, LARGE):
            os.pwrite(self._fd, b"\0", at)  # of nothing at all it makes no large page
            if _calls().madvise(self._start + at, LARGE, _MADV_COLLAPSE) == 0:
                taken, refused = taken + LARGE, 0
            elif (refused := refused + 1) == _MOST_REFUSED:
                break
        return taken


def _mapped(fd: int, nbytes: int) -> int:
    """Where it was mapped: at the beginning of a large page, if it has one and there is room."""
    try:
        room = _mmap(0, nbytes + LARGE, 0, _NOWHERE, -1) if nbytes >= LARGE else 0
    except OSError:  # no addresses are left for that
        room = 0
    if not room:
        return _mmap(0, nbytes, _ACCESS, mmap.MAP_SHARED, fd)
    start, last = -(-room // LARGE) * LARGE, room + nbytes + LARGE
    try:
        _mmap(start, nbytes, _ACCESS, mmap.MAP_SHARED | _MAP_FIXED, fd)
    except OSError:
        _calls().munmap(room, nbytes + LARGE)
        raise
    for piece, until in ((room, start), (start + nbytes, last)):
        if piece < until:
            _calls().munmap(piece, until - piece)
    return start


def _mmap(start: int, nbytes: int, access: int, flags: int, fd: int) -> int:
    at: int = _calls().mmap(start or None, nbytes, access, flags, fd, 0)
    if at == _MAP_FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return at


@cache
def _calls() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
    ]  # fmt: skip
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc
