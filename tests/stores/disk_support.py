"""What the tests of the disk store share."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvtier.core.blocks import BlockKey
from kvtier.stores.disk import DiskStore
from kvtier.testing.stores import content

ROOM = 64 * 2**20
PAGE = 4096


@contextlib.contextmanager
def opened(path: Path, capacity: int = ROOM, **more: object) -> Iterator[DiskStore]:
    store = DiskStore(path, capacity, **more)
    try:
        yield store
    finally:
        store.close()


def files(path: Path) -> list[Path]:
    return sorted((path / "segments").iterdir())


def bytes_on_disk(path: Path) -> int:
    """The larger of what the files say and what the file system has taken for them."""
    stats = [each.stat() for each in files(path)]
    return sum(max(each.st_size, each.st_blocks * 512) for each in stats)


def at(path: Path, of: BlockKey) -> tuple[Path, int]:
    """The file that holds a block's record, and the offset of the record."""
    for each in files(path):
        raw = each.read_bytes()
        found = raw.find(of)
        while found >= 0:
            if found % PAGE == 32 and raw[found - 32 : found - 28] == b"KVTR":
                return each, found - 32
            found = raw.find(of, found + 1)
    raise AssertionError(f"no record of {of.hex()}")


def overwrite(file: Path, offset: int, data: bytes) -> None:
    with file.open("r+b") as handle:
        handle.seek(offset)
        handle.write(data)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder whose file system has room for 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def whole(name: object, nbytes: int, frame: bytes | memoryview | None) -> bool:
    return frame is not None and bytes(frame) == content(name, nbytes)
