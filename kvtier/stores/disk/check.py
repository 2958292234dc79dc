"""Looks at a disk store's folder from outside: what lies there, and whether it is whole."""

import mmap
import os
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from kvtier.codec.frame import before_of, verify
from kvtier.core.blocks import BlockKey
from kvtier.errors import ConfigError, CorruptFrame
from kvtier.stores.disk.files import SegmentFile, Shape, parse_name
from kvtier.stores.disk.record import HEADER_NBYTES, PAGE, Header, head_check, pages, unpack


class State(StrEnum):
    """What a slot holds."""

    FREE = "free"
    BLOCK = "block"  # a header that is whole; where payloads are read, all of it
    DAMAGED = "damaged"


class Slot(NamedTuple):
    """One slot of a segment; `header` is None where there is none that is whole.

    `before` is the block before; None where the frame's own header is not one of this version.
    """

    shape: Shape
    slot: int
    state: State
    header: Header | None = None
    why: str = ""  # damaged: which check failed
    before: BlockKey | None = None


def stores_below(path: Path) -> list[Path]:
    """The folder itself if it is one of a store, else those right below it that are.

    Raises:
        ConfigError: None is, or the folder cannot be read.
    """
    try:
        found = [each for each in (path, *sorted(path.iterdir())) if (each / "segments").is_dir()]
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    if not found:
        raise ConfigError(f"{path}: holds no disk tier")
    return found


def slots(path: Path, *, payloads: bool) -> Iterator[Slot]:
    """Every slot of the store in `path`, segment by segment, changing nothing.

    `payloads`: also read each frame and check it, as a restore would. Without it a store can be
    looked at while a daemon uses it.

    Raises:
        ConfigError: A file cannot be opened.
    """
    try:
        shapes = [parse_name(entry.name) for entry in os.scandir(path / "segments")]
        for shape in sorted(shape for shape in shapes if shape is not None):
            file_path = path / "segments" / shape.name
            file = SegmentFile(file_path, shape, os.open(file_path, os.O_RDONLY | os.O_CLOEXEC))
            try:
                yield from _slots_of(file, payloads=payloads)
            finally:
                file.close()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}: {error.filename}") from None


def _slots_of(file: SegmentFile, *, payloads: bool) -> Iterator[Slot]:
    shape = file.shape
    memory = memoryview(mmap.mmap(-1, shape.slot_nbytes if payloads else PAGE))
    for slot in range(shape.slots):
        try:
            got = file.read(slot, memory[:PAGE])
        except OSError as error:
            yield Slot(shape, slot, State.DAMAGED, None, error.strerror or "cannot be read")
            continue
        header = unpack(memory[:PAGE], shape.number, slot, shape.slot_nbytes)
        if got < HEADER_NBYTES:
            yield Slot(shape, slot, State.DAMAGED, None, "the file ends before it")
        elif header is None:
            free = not any(memory[:PAGE])
            yield Slot(shape, slot, State.FREE if free else State.DAMAGED, None, "header")
        elif payloads and (why := _fault(file, header, memory)):
            yield Slot(shape, slot, State.DAMAGED, header, why)
        else:
            before = before_of(header.key, memory[header.start : PAGE])
            yield Slot(shape, slot, State.BLOCK, header, before=before)


def _fault(file: SegmentFile, header: Header, memory: memoryview) -> str:
    """Which check the frame behind a header fails; empty: none."""
    end = header.start + header.nbytes
    try:
        if file.read(header.slot, memory[: pages(end)]) < end:
            return "the file ends within it"
    except OSError as error:
        return error.strerror or "cannot be read"
    frame = memory[header.start : end]
    if head_check(frame[: PAGE - header.start]) != header.check:
        return "checksum of the first page"
    try:
        verify(BlockKey(header.key), frame)
    except CorruptFrame as error:
        return str(error)
    return ""
