"""Records to and from their slots: layout in memory, checks, no bookkeeping and no lock."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple, TypeVar

from kvtier import metrics
from kvtier.codec.frame import before_of
from kvtier.core.blocks import BlockKey
from kvtier.stores.base import Placed
from kvtier.stores.disk.buffers import BufferPool, aligned
from kvtier.stores.disk.files import Buffers
from kvtier.stores.disk.record import (
    HEADER_NBYTES,
    PAGE,
    Header,
    head_check,
    pages,
    record_nbytes,
    unpack,
)
from kvtier.stores.disk.space import Place, Record, Segment

_MOST_PARTS: Final = 512  # of one pwritev; the kernel's limit is 1024

A = TypeVar("A")
B = TypeVar("B")


def at_once(pool: ThreadPoolExecutor, work: Callable[[A], B], items: Sequence[A]) -> list[B]:
    """`work` on all items, as many at once as `pool` has threads.

    All have ended when it returns, also where one raises: none writes to memory that the caller
    has given to somebody else by then.
    """
    if len(items) < 2:
        return [work(item) for item in items]
    begun = [pool.submit(work, item) for item in items]
    try:
        return [each.result() for each in begun]
    finally:
        for each in begun:
            each.exception()


class Write(NamedTuple):
    """A frame with the slot that it goes to."""

    key: BlockKey
    views: list[memoryview]
    nbytes: int
    sequence: int
    place: Place


class Transfer:
    """Reads and writes records. Any thread may use it."""

    def __init__(self) -> None:
        self._buffers = BufferPool()

    def put(self, write: Write) -> Record:
        """Write a record, from where its frame lies if it is aligned.

        Raises:
            OSError: As the system says it; the slot may hold anything then.
        """
        segment, slot = write.place
        start = self._start_in_place(write.views)
        total = record_nbytes(write.nbytes)
        buffer = self._buffers.take(PAGE if start else total)
        try:
            if start:
                buffer[:PAGE] = bytes(PAGE)
                buffer[start:PAGE] = write.views[0]
                buffers: Buffers = [buffer[:PAGE], *write.views[1:]]
            else:
                at = HEADER_NBYTES
                for view in write.views:
                    buffer[at : at + view.nbytes] = view
                    at += view.nbytes
                buffer[at:total] = bytes(total - at)
                buffers = [buffer[:total]]
            start = start or HEADER_NBYTES
            header = Header(
                segment=segment.shape.number,
                slot=slot,
                start=start,
                sequence=write.sequence,
                key=write.key,
                nbytes=write.nbytes,
                check=head_check(buffer[start : min(PAGE, start + write.nbytes)]),
            )
            buffer[:HEADER_NBYTES] = header.pack()
            segment.file.write(slot, buffers)
        finally:
            self._buffers.give(buffer)
        metrics.DISK_WRITTEN_BYTES.inc(total)
        return Record(header, write.place)

    def fetch(self, record: Record, place: memoryview | None) -> memoryview | Placed | None:
        """The frame of a record; None where its first page is not what was written.

        The memory is the caller's until the last view on it is gone. Where all that follows the
        first page fits `place` exactly, it is read to there.

        Raises:
            OSError: As the system says it.
        """
        segment, slot = record.place
        start, end = record.header.start, record.header.start + record.header.nbytes
        placed = place is not None and end - PAGE == place.nbytes and aligned(place)
        buffer = self._buffers.take(PAGE if placed else pages(end))
        try:
            if placed and place is not None:
                got = segment.file.read(slot, buffer[:PAGE], place)
            else:
                got = segment.file.read(slot, buffer[: pages(end)])
        except OSError:
            self._buffers.give(buffer)
            raise
        found = unpack(buffer, segment.shape.number, slot, segment.shape.slot_nbytes)
        whole = got >= end and found == record.header
        whole = whole and head_check(buffer[start : min(PAGE, end)]) == record.header.check
        if whole and not placed:
            return self._buffers.lend(buffer, start, end)
        head = bytes(buffer[start:PAGE])
        self._buffers.give(buffer)
        return Placed(head) if whole else None

    def headers(self, segment: Segment) -> list[tuple[Record, BlockKey | None]]:
        """The records of a segment by their headers, and the block before each by its frame's.

        One that cannot be read is left out, and counted.
        """
        records: list[tuple[Record, BlockKey | None]] = []
        buffer = self._buffers.take(PAGE)
        page = buffer[:PAGE]
        number, slot_nbytes, slots = segment.shape
        for slot in range(slots):
            try:
                got = segment.file.read(slot, page)
            except OSError:
                metrics.DISK_UNREADABLE.inc()
                continue
            if not got:
                break  # a name may claim any length
            header = unpack(page[:got], number, slot, slot_nbytes)
            if header is not None:
                before = before_of(header.key, page[header.start : got])
                records.append((Record(header, Place(segment, slot)), before))
        self._buffers.give(buffer)
        return records

    def _start_in_place(self, views: Sequence[memoryview]) -> int:
        """Where a frame starts that is written as it lies in memory; 0: it must be copied."""
        if not 2 <= len(views) <= _MOST_PARTS or not 0 < views[0].nbytes <= PAGE - HEADER_NBYTES:
            return 0
        if not all(aligned(view) for view in views[1:]):
            return 0
        return PAGE - views[0].nbytes
