"""What the tests of the disk store share."""

import contextlib
import mmap
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from kvtier.codec.codecs import RAW
from kvtier.codec.frame import decode, decode_in_place, encode
from kvtier.core.blocks import BEGINS, Attention, BlockKey, BlockLayout, LayerGroup
from kvtier.errors import CorruptFrame
from kvtier.stores.base import Parts, Placed, PlacingStore
from kvtier.stores.disk import DiskStore
from kvtier.testing.stores import content, key

ROOM = 64 * 2**20
PAGE = 4096
LAYOUT = BlockLayout((LayerGroup(Attention.FULL, 4, 2, 64),), 16, "bfloat16")  # 32 KiB a block


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
    """Of all files; what the file system has taken for them is no more, but for its own maps."""
    stats = [each.stat() for each in files(path)]
    assert all(each.st_blocks * 512 <= each.st_size + 16 * PAGE for each in stats)
    return sum(each.st_size for each in stats)


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


def slot_of_arena(data: bytes) -> memoryview:
    """Bytes as an arena holds them: on pages of their own."""
    view = memoryview(mmap.mmap(-1, len(data)))
    view[:] = data
    return view


def blocks(names: Sequence[object]) -> list[tuple[BlockKey, Parts]]:
    """Real frames, of blocks of LAYOUT in an arena."""
    return [
        (
            key(name),
            encode(key(name), BEGINS, slot_of_arena(content(name, LAYOUT.nbytes)), LAYOUT, RAW),
        )
        for name in names
    ]


def loaded(store: PlacingStore, names: Sequence[object]) -> list[bytes | None]:
    """The blocks, as a node loads them into its arena: None where there is none, or a bad one."""
    slots = [slot_of_arena(b"x" * LAYOUT.nbytes) for _ in names]
    found: list[bytes | None] = []
    frames = store.read_into([key(name) for name in names], slots)
    for name, frame, slot in zip(names, frames, slots, strict=True):
        if not isinstance(frame, Placed):
            found.append(decoded(name, frame))
            continue
        try:
            decode_in_place(key(name), frame.head, slot, LAYOUT)
        except CorruptFrame:
            found.append(None)
        else:
            found.append(bytes(slot))
    return found


def decoded(name: object, frame: bytes | memoryview | None) -> bytes | None:
    """The block in a frame, as a restore gets it: None where there is none, or a bad one."""
    out = bytearray(LAYOUT.nbytes)
    if frame is None:
        return None
    try:
        decode(key(name), frame, memoryview(out), LAYOUT)
    except CorruptFrame:
        return None
    return bytes(out)


def whole(name: object, nbytes: int, frame: bytes | memoryview | None) -> bool:
    return frame is not None and bytes(frame) == content(name, nbytes)
