"""A folder on a local disk: one file a frame, the index in its file names.

    LOCK                                      held by the one process that may use the folder
    blocks/<first byte of key>/<sequence>-<key>-<bytes>       a frame that is whole
    blocks/<first byte of key>/<sequence>-<key>-<bytes>.tmp   one that is being written

A file gets its name once all of it is written, is never changed afterwards, and is read through
a descriptor of its own: a read of a file that is deleted meanwhile ends well. A start lists names
and opens nothing. Space comes back with the file, so there is no garbage to count and nothing to
compact. Nothing is synced: after a loss of power a frame may be short or old zeros, which its own
checksum shows at the first read.
"""

import contextlib
import errno
import fcntl
import os
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvtier.core.blocks import KEY_NBYTES, BlockKey
from kvtier.errors import ConfigError, StoreUnavailable
from kvtier.stores.base import Parts

_NAME = re.compile(
    rf"([0-9a-f]{{12,16}})-([0-9a-f]{{{2 * KEY_NBYTES}}})-([0-9a-f]{{1,10}})(\.tmp)?"
)
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_MOST_PARTS = 512  # of one writev; the kernel's limit is 1024


@dataclass(frozen=True, slots=True)
class _File:
    key: BlockKey
    sequence: int  # in the order of writing, over restarts
    nbytes: int

    @property
    def name(self) -> str:
        return f"{self.key.hex()[:2]}/{self.sequence:012x}-{self.key.hex()}-{self.nbytes:x}"


class DiskStore:
    """Frames in the folder `path`, at most `capacity` bytes of them. See `Store`.

    A frame counts from before it is written until after its file is gone, so the files never
    hold more than `capacity`; a key that is written again counts twice for a moment. The unit is
    the ledger's, so that both always agree on what fits; the file system takes up to 4095 bytes
    more for each frame. What an earlier process wrote is held again, the later of two frames of
    one key, oldest dropped where `capacity` has shrunk. Other files in the folder are left alone.

    Raises:
        ConfigError: The folder cannot be used, or another process uses it.
    """

    def __init__(self, path: Path, capacity: int) -> None:
        self.path = path
        self.capacity = capacity
        self._blocks = path / "blocks"
        self._lock = threading.Lock()  # over the four below; no I/O under it
        self._index: dict[BlockKey, _File] = {}  # oldest first
        self._nbytes = 0  # of all files, those being written and deleted too
        self._sequence = 0
        self._lock_fd = _lock_folder(path)
        try:
            self._load()
        except OSError as error:
            self.close()
            raise ConfigError(f"disk.path {path}: {error.strerror}: {error.filename}") from None

    @property
    def nbytes(self) -> int:
        """Bytes of all files now; never more than `capacity`."""
        with self._lock:
            return self._nbytes

    def write(self, frames: Sequence[tuple[BlockKey, Parts]]) -> list[bool]:
        """See `Store.write`; no copy is made. False also where the disk itself is full."""
        return [self._write(key, parts) for key, parts in frames]

    def read(self, keys: Sequence[BlockKey]) -> list[bytes | memoryview | None]:
        """See `Store.read`; a frame that the disk cannot give back is dropped."""
        return [self._read(key) for key in keys]

    def count(self, keys: Sequence[BlockKey]) -> int:
        """See `Store.count`; asks the index only."""
        with self._lock:
            return next((i for i, key in enumerate(keys) if key not in self._index), len(keys))

    def delete(self, keys: Sequence[BlockKey]) -> None:
        """See `Store.delete`."""
        with self._lock:
            files = [self._index.pop(key) for key in keys if key in self._index]
        for file in files:
            self._unlink(file)

    def scan(self) -> Iterator[tuple[BlockKey, int]]:
        """See `Store.scan`; shows what was held when it began."""
        with self._lock:
            held = [(file.key, file.nbytes) for file in self._index.values()]
        return iter(held)

    def close(self) -> None:
        """See `Store.close`; lets the next process have the folder."""
        with self._lock:
            fd, self._lock_fd = self._lock_fd, -1
        if fd >= 0:
            os.close(fd)

    def _write(self, key: BlockKey, parts: Parts) -> bool:
        views = [memoryview(part).cast("B") for part in parts]
        with self._lock:
            self._sequence += 1
            file = _File(key, self._sequence, sum(view.nbytes for view in views))
            if self._nbytes + file.nbytes > self.capacity:
                return False
            self._nbytes += file.nbytes
        try:
            _create(self._blocks / file.name, views)
        except OSError as error:
            self._unlink(file, ".tmp")
            if error.errno in _NO_ROOM:
                return False
            raise StoreUnavailable(f"disk {self.path}: {error.strerror}") from error
        with self._lock:
            beaten = self._index.get(key)
            if beaten is None or beaten.sequence < file.sequence:
                self._index.pop(key, None)
                self._index[key] = file
            else:  # another thread began later and was faster: a restart must choose the same
                beaten = file
        if beaten is not None:
            self._unlink(beaten)
        return True

    def _read(self, key: BlockKey) -> bytes | None:
        seen: _File | None = None
        while True:
            with self._lock:
                file = self._index.get(key)
                if file is not None and file is seen:
                    del self._index[key]  # not replaced meanwhile: the file itself is bad
            if file is None:
                return None
            if file is seen:
                self._unlink(file)
                return None
            try:
                return _read_all(self._blocks / file.name, file.nbytes)
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.EIO):
                    raise StoreUnavailable(f"disk {self.path}: {error.strerror}") from error
            seen = file

    def _unlink(self, file: _File, suffix: str = "") -> None:
        """Remove a file that the index no longer has and, only then, give back its room."""
        try:
            Path(f"{self._blocks / file.name}{suffix}").unlink(missing_ok=True)
        except OSError as error:
            raise StoreUnavailable(f"disk {self.path}: {error.strerror}") from error
        with self._lock:
            self._nbytes -= file.nbytes

    def _load(self) -> None:
        """Index what earlier processes left; remove what they were still writing or replaced."""
        found: list[_File] = []
        unwanted: list[Path] = []
        for shard in range(256):
            folder = self._blocks / f"{shard:02x}"
            folder.mkdir(parents=True, exist_ok=True)
            with os.scandir(folder) as entries:
                for entry in entries:
                    match = _NAME.fullmatch(entry.name)
                    if match is None:
                        continue
                    key = BlockKey(bytes.fromhex(match[2]))
                    file = _File(key, int(match[1], 16), int(match[3], 16))
                    if match[4]:
                        unwanted.append(Path(entry.path))
                    elif file.name == f"{shard:02x}/{entry.name}":
                        found.append(file)
        found.sort(key=lambda file: file.sequence)
        latest = {file.key: file for file in found}
        total = sum(file.nbytes for file in latest.values())
        for file in found:
            if latest[file.key] is file and total <= self.capacity:
                self._index[file.key] = file
                self._nbytes += file.nbytes
                continue
            if latest[file.key] is file:
                total -= file.nbytes
            unwanted.append(self._blocks / file.name)
        self._sequence = found[-1].sequence if found else 0
        for each in unwanted:
            each.unlink(missing_ok=True)


def _lock_folder(path: Path) -> int:
    """A descriptor that holds `path` for this process, the folder made where it was not there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        fd = os.open(path / "LOCK", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"disk.path {path}: {error.strerror}") from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise ConfigError(f"disk.path {path}: another kvtier process uses it") from None
        raise ConfigError(f"disk.path {path}: cannot be locked: {error.strerror}") from None
    return fd


def _create(path: Path, views: list[memoryview]) -> None:
    """A new file with the bytes of `views`, under its name only when it is whole."""
    temporary = Path(f"{path}.tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        while views:
            done = os.writev(fd, views[:_MOST_PARTS])
            while views and done >= views[0].nbytes:
                done -= views.pop(0).nbytes
            if views:
                views[0] = views[0][done:]
    finally:
        with contextlib.suppress(OSError):  # the kernel has the bytes, or said so at writev
            os.close(fd)
    temporary.rename(path)


def _read_all(path: Path, nbytes: int) -> bytes:
    """At most `nbytes` of a file; fewer where it was cut short."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        left = min(nbytes, os.fstat(fd).st_size)  # a name read at the start may claim anything
        pieces = [os.read(fd, left)]
        while (left := left - len(pieces[-1])) > 0 and pieces[-1]:
            pieces.append(os.read(fd, left))  # the kernel reads at most 2 GiB at once
    finally:
        os.close(fd)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)
