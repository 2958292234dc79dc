"""Page-aligned memory that is used again: taking 2 MiB afresh costs as much as reading them."""

import contextlib
import ctypes
import mmap
import weakref
from collections import deque
from functools import cache
from typing import Final

from kvtier.stores.disk.record import PAGE

_KEPT_NBYTES: Final = 64 << 20  # of one size


class BufferPool:
    """Aligned buffers by size. Safe from any thread, also from a finalizer of the collector's."""

    def __init__(self) -> None:
        self._free: dict[int, deque[mmap.mmap]] = {}  # never locked: a finalizer may come any time

    def take(self, nbytes: int) -> mmap.mmap:
        """At least `nbytes` bytes, with whatever was in them; give them back or lend them."""
        size = _size(nbytes)
        try:
            return self._free[size].pop()
        except (KeyError, IndexError):
            buffer = mmap.mmap(-1, size)
            with contextlib.suppress(OSError):  # a kernel without large pages has small ones
                buffer.madvise(mmap.MADV_HUGEPAGE)
            return buffer

    def give(self, buffer: mmap.mmap) -> None:
        """Take a buffer back; beyond a few of its size it is freed."""
        self._free.setdefault(
            len(buffer), deque(maxlen=max(4, _KEPT_NBYTES // len(buffer)))
        ).append(buffer)

    def lend(self, buffer: mmap.mmap, start: int, stop: int) -> memoryview:
        """A view of buffer[start:stop]; the buffer comes back once the last view on it is gone."""
        lent = _lent(len(buffer)).from_buffer(buffer)
        weakref.finalize(lent, self.give, buffer).atexit = False
        return memoryview(lent).cast("B")[start:stop]


def aligned(view: memoryview) -> bool:
    """Whether a view starts and ends on a page, so that O_DIRECT takes it as it is.

    Of memory that may not be written, as `bytes`, the address is not told: then it is copied.
    """
    if view.nbytes % PAGE or view.readonly:
        return False
    return not view.nbytes or ctypes.addressof(ctypes.c_char.from_buffer(view)) % PAGE == 0


@cache
def _lent(nbytes: int) -> type[ctypes.Array[ctypes.c_ubyte]]:
    """An array type over lent memory; a class of ours, since only those can be finalized."""
    return type("Lent", (ctypes.c_ubyte * nbytes,), {})


def _size(nbytes: int) -> int:
    """Few sizes, at most an eighth too large, so that buffers fit again."""
    step = max(PAGE, 1 << max(0, nbytes.bit_length() - 4))
    return -(-nbytes // step) * step
