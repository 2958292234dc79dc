"""Page-aligned memory that is used again: taking 2 MiB afresh costs as much as reading them.

It lies in large pages where the kernel has them. A disk is told where a buffer's bytes are in
pieces of memory that are physically one; 2 MiB of small pages are up to 512 of those, and a
request takes only some of them (docs/decisions/0021-large-pages.md).
"""

import contextlib
import ctypes
import mmap
import weakref
from collections import deque
from functools import cache
from typing import Final

from kvtier.stores.disk.record import PAGE

_KEPT_NBYTES: Final = 64 << 20  # of one size
_LARGE: Final = 2 << 20  # a large page


class BufferPool:
    """Aligned buffers by size. Safe from any thread, also from a finalizer of the collector's."""

    def __init__(self) -> None:
        self._free: dict[int, deque[memoryview]] = {}  # never locked: a finalizer may come any time

    def take(self, nbytes: int) -> memoryview:
        """At least `nbytes` bytes, with whatever was in them; give them back or lend them."""
        size = _size(nbytes)
        try:
            return self._free[size].pop()
        except (KeyError, IndexError):
            first, *more = _made(size)
            for each in more:
                self.give(each)
            return first

    def give(self, buffer: memoryview) -> None:
        """Take a buffer back; beyond a few of its size it is freed."""
        self._free.setdefault(
            buffer.nbytes, deque(maxlen=max(4, _KEPT_NBYTES // buffer.nbytes))
        ).append(buffer)

    def lend(self, buffer: memoryview, start: int, stop: int) -> memoryview:
        """A view of buffer[start:stop]; the buffer comes back once the last view on it is gone."""
        lent = _lent(buffer.nbytes).from_buffer(buffer)
        weakref.finalize(lent, self.give, buffer).atexit = False
        return memoryview(lent).cast("B")[start:stop]


def aligned(view: memoryview) -> bool:
    """Whether a view starts and ends on a page, so that O_DIRECT takes it as it is.

    Of memory that may not be written, as `bytes`, the address is not told: then it is copied.
    """
    if view.nbytes % PAGE or view.readonly:
        return False
    return not view.nbytes or _address(view) % PAGE == 0


def _made(size: int) -> list[memoryview]:
    """New buffers of `size` bytes: one, or as many as a large page has room for.

    The second page of one begins a large page, since a block lies there and a header before it.
    """
    memory = mmap.mmap(-1, max(size, _LARGE) + _LARGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    view = memoryview(memory)
    large = -_address(view) % _LARGE or _LARGE  # where the first large page begins
    small = size < _LARGE
    start, count = (large, _LARGE // size) if small else (large - PAGE, 1)
    nbytes = _LARGE if small else (size - PAGE) // _LARGE * _LARGE
    with contextlib.suppress(OSError):  # a kernel without large pages has small ones
        memory.madvise(mmap.MADV_NOHUGEPAGE)  # or what lies around would take 2 MiB more
        memory.madvise(mmap.MADV_HUGEPAGE, large, nbytes)
    return [view[start + n * size : start + (n + 1) * size] for n in range(count)]


def _address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


@cache
def _lent(nbytes: int) -> type[ctypes.Array[ctypes.c_ubyte]]:
    """An array type over lent memory; a class of ours, since only those can be finalized."""
    return type("Lent", (ctypes.c_ubyte * nbytes,), {})


def _size(nbytes: int) -> int:
    """Few sizes, at most an eighth too large, so that buffers fit again."""
    step = max(PAGE, 1 << max(0, nbytes.bit_length() - 4))
    return -(-nbytes // step) * step
