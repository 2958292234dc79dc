"""The folder of a disk store as files: the lock, segments, and I/O that ends whole or fails."""

import contextlib
import errno
import mmap
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from kvtier.errors import ConfigError
from kvtier.held import HeldElsewhere, hold
from kvtier.stores.disk.record import PAGE

_NAME = re.compile(r"([0-9a-f]{8,15})-([0-9a-f]{4,14})-([0-9a-f]{1,6})\.seg")
_ZERO_PAGE: Final = mmap.mmap(-1, PAGE)  # aligned, as O_DIRECT wants it

Buffers = Sequence[memoryview | mmap.mmap]


class Shape(NamedTuple):
    """All that a segment's name says: its number and its slots."""

    number: int
    slot_nbytes: int
    slots: int

    @property
    def nbytes(self) -> int:
        """Of the whole file."""
        return self.slot_nbytes * self.slots

    @property
    def name(self) -> str:
        """Of the file."""
        return f"{self.number:08x}-{self.slot_nbytes:x}-{self.slots:x}.seg"


def parse_name(name: str) -> Shape | None:
    """The shape that a file's name tells; None: not a segment of ours."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    shape = Shape(*(int(part, 16) for part in match.groups()))
    whole = 0 < shape.nbytes < 2**62 and shape.slot_nbytes % PAGE == 0
    return shape if whole and shape.name == name else None


class SegmentFile:
    """One open segment. Any thread may use it; raises OSError as the system says it."""

    def __init__(self, path: Path, shape: Shape, fd: int) -> None:
        self.path = path
        self.shape = shape
        self._fd = fd

    def read(self, slot: int, *buffers: memoryview) -> int:
        """Fill all buffers, one after the other, from the start of a slot on.

        Gives the bytes that were read; fewer than there is room for only where the file ends.
        """
        at = slot * self.shape.slot_nbytes
        left = _after(buffers, 0)
        done = 0
        while left:
            got = os.preadv(self._fd, left, at + done)
            done += got
            if got == 0 or done % PAGE:  # an end that is cut can't be read on, aligned
                break
            left = _after(left, got)
        return done

    def write(self, slot: int, buffers: Buffers) -> None:
        """Write all buffers, one after the other, from the start of a slot on."""
        at = slot * self.shape.slot_nbytes
        left = _after([memoryview(buffer) for buffer in buffers], 0)
        while left:
            done = os.pwritev(self._fd, left, at)
            if done == 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            at += done
            left = _after(left, done)

    def erase(self, slot: int) -> None:
        """Overwrite a record's header, so that no restart finds it."""
        self.write(slot, [_ZERO_PAGE])

    def linked(self) -> bool:
        """Whether the file still has its name: what is written to one that was removed is lost."""
        return os.fstat(self._fd).st_nlink > 0

    def close(self) -> None:
        """Close the descriptor."""
        with contextlib.suppress(OSError):  # nothing is delayed until a close
            os.close(self._fd)


class Folder:
    """A folder that this process alone uses, until `close`.

    Raises:
        ConfigError: It cannot be made, locked or written, or holds something older.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.segments = path / "segments"
        self._lock_fd = lock(path)
        try:
            if (path / "blocks").is_dir():
                raise ConfigError(
                    f"disk.path {path}: holds the format of an earlier kvtier, which is not read "
                    f"any more; remove {path / 'blocks'}"
                )
            self.segments.mkdir(exist_ok=True)
            self.direct = self.probe()
        except OSError as error:
            self.close()
            raise ConfigError(f"disk.path {path}: {error.strerror}: {error.filename}") from None
        except ConfigError:
            self.close()
            raise

    def shapes(self) -> list[Shape]:
        """The segments that are there, by number; other files are left alone."""
        found = (parse_name(entry.name) for entry in os.scandir(self.segments))
        return sorted(shape for shape in found if shape is not None)

    def create(self, shape: Shape) -> SegmentFile:
        """A new segment whose bytes are all taken from the disk now."""
        path = self.segments / shape.name
        fd = os.open(path, self._flags() | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            _preallocate(fd, shape.nbytes)
        except OSError:
            os.close(fd)
            path.unlink(missing_ok=True)
            raise
        return SegmentFile(path, shape, fd)

    def open(self, shape: Shape) -> SegmentFile:
        """A segment of an earlier life; made whole where it was cut and the disk has room."""
        path = self.segments / shape.name
        fd = os.open(path, self._flags())
        with contextlib.suppress(OSError):  # then writes to the missing part fail, and say so
            if os.fstat(fd).st_size < shape.nbytes:
                _preallocate(fd, shape.nbytes)
        return SegmentFile(path, shape, fd)

    def remove(self, shape: Shape) -> None:
        """Give a segment's room back to the disk."""
        (self.segments / shape.name).unlink(missing_ok=True)

    def probe(self) -> bool:
        """Whether the file system takes O_DIRECT; also shows that it can be written at all."""
        path = self.segments / "probe.tmp"
        path.unlink(missing_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_DIRECT)
            try:
                os.pwritev(fd, [_ZERO_PAGE], 0)
                return os.preadv(fd, [mmap.mmap(-1, PAGE)], 0) == PAGE
            finally:
                os.close(fd)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSPC, errno.EFBIG):
                return False
            raise
        finally:
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let the next process have the folder. Idempotent."""
        fd, self._lock_fd = self._lock_fd, -1
        if fd >= 0:
            os.close(fd)

    def _flags(self) -> int:
        return os.O_RDWR | os.O_CLOEXEC | (os.O_DIRECT if self.direct else 0)


def lock(path: Path) -> int:
    """A descriptor that holds `path` for this process, the folder made where it was not there.

    Raises:
        ConfigError: It cannot be made or locked, or another process holds it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        return hold(path / "LOCK")
    except HeldElsewhere as other:
        raise ConfigError(f"disk.path {path}: {other} uses it") from None
    except OSError as error:
        raise ConfigError(f"disk.path {path}: cannot be locked: {error.strerror}") from None


def _after(views: Sequence[memoryview], nbytes: int) -> list[memoryview]:
    """What is left of `views` once their first `nbytes` are done."""
    left: list[memoryview] = []
    for view in views:
        if nbytes < view.nbytes:
            left.append(view[nbytes:])
        nbytes = max(0, nbytes - view.nbytes)
    return left


def _preallocate(fd: int, nbytes: int) -> None:
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(fd, nbytes)  # a full disk is then met by a write
