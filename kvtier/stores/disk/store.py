"""The store itself: the index, several requests in flight, and what happens when a disk fails."""

import contextlib
import errno
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Final

from kvtier import metrics
from kvtier.core.blocks import BlockKey
from kvtier.errors import ConfigError, StoreUnavailable
from kvtier.stores.base import Parts, Placed
from kvtier.stores.disk.budget import WriteBudget
from kvtier.stores.disk.files import Folder
from kvtier.stores.disk.left import left_behind
from kvtier.stores.disk.record import PAGE, record_nbytes
from kvtier.stores.disk.room import NO_ROOM, Room
from kvtier.stores.disk.space import Place, Record, Segment, Space
from kvtier.stores.disk.transfer import Transfer, Write, at_once
from kvtier.stores.disk.trial import DiskTrial, ask
from kvtier.stores.disk.usage import Usage

# Of a read: this record is lost, the disk goes on.
_UNREADABLE: Final = {errno.EIO, errno.EBADMSG, errno.EUCLEAN, errno.ENODATA, errno.EILSEQ}

log = logging.getLogger(__name__)


class DiskStore:
    """Frames in the folder `path`, whose files take at most `capacity` bytes. See `Store`.

    A write is acknowledged once the kernel has the whole record (with O_DIRECT: the disk); it is
    not synced. A frame takes whole pages with its header: `usable` says how many bytes of frames
    fit. What an earlier process wrote is held again, the later of two records of one key; where
    `capacity` has shrunk, the segments that were not written for longest go. A record that cannot
    be read, or whose first page is not what was written, is dropped and counted, never returned;
    the frame's own checksum covers the rest.

    Args:
        path: Made where it is not there; other files in it are left alone.
        capacity: Bytes of all files.
        requests: Reads in flight at once, as many writes, and as many headers being erased.
        write_bytes_per_day: What may be written a day; more is refused. 0: no limit.
        clock: Monotonic seconds, for the budget.
        open_folder: How the folder is opened; a test passes one whose files fail.

    Raises:
        ConfigError: The folder cannot be used, or another process uses it.
    """

    def __init__(
        self,
        path: Path,
        capacity: int,
        *,
        requests: int = 4,
        write_bytes_per_day: int = 0,
        clock: Callable[[], float] = time.monotonic,
        open_folder: Callable[[Path], Folder] = Folder,
    ) -> None:
        self.path = path
        self.capacity = capacity
        self._clock = clock
        self._state = threading.Condition()  # over all below; no I/O under it
        self._space = Space(capacity)
        self._index: dict[BlockKey, Record] = {}  # oldest first
        self._budget = WriteBudget(write_bytes_per_day, clock())
        self._sequence = self._frames = self._accepted = self._written = 0
        self._moved = self._calls = 0
        self._closed = False
        self._before: Mapping[BlockKey, BlockKey] = {}
        self._folder = open_folder(path)
        self._transfer = Transfer()
        self._room = Room(self._folder, self._space, self._state, self._move_all)
        self.trial = partial(DiskTrial, self._room, self._space, self._state, self._budget, clock)
        self.probe = partial(ask, self._folder)
        self._read_pool = ThreadPoolExecutor(requests, thread_name_prefix="disk-read")
        self._write_pool = ThreadPoolExecutor(requests, thread_name_prefix="disk-write")
        self._erase_pool = ThreadPoolExecutor(requests, thread_name_prefix="disk-erase")
        try:
            self._load()
        except OSError as error:
            self.close()
            raise ConfigError(f"disk.path {path}: {error.strerror}: {error.filename}") from None

    @property
    def direct(self) -> bool:
        """Whether the file system takes O_DIRECT; else I/O is buffered."""
        return self._folder.direct

    @property
    def nbytes(self) -> int:
        """Bytes of all files now; never more than `capacity`."""
        with self._state:
            return self._space.nbytes

    def usable(self, frame_nbytes: int) -> int:
        """How many bytes of frames of `frame_nbytes` each fit below `capacity`."""
        return self._space.usable(frame_nbytes)

    def usage(self) -> Usage:
        """What is held, and what was written for it."""
        with self._state:
            held = Usage(len(self._index), self._frames, self._space.nbytes, self.capacity)
            return held._replace(accepted=self._accepted, written=self._written, moved=self._moved)

    def write(self, frames: Sequence[tuple[BlockKey, Parts]]) -> list[bool]:
        """See `Store.write`. A block is copied only where it is not aligned as the disk wants it.

        False where there is no room, also on the disk itself, or the day's budget is spent.
        """
        with self._call():
            writes: list[Write | None] = []
            failed: OSError | None = None
            for key, parts in frames:
                try:
                    writes.append(self._reserve(key, parts))
                except OSError as error:
                    failed = error
                    break
            kept, not_written = self._commit(at_once(self._write_pool, self._put, writes))
            if failed := failed or not_written:
                raise self._unavailable(failed) from failed
            return kept

    def read(self, keys: Sequence[BlockKey]) -> list[bytes | memoryview | None]:
        """See `Store.read`. The memory is page-aligned and used again once it is let go."""
        frames = self._read([(key, None) for key in keys])
        return [each for each in frames if not isinstance(each, Placed)]

    def read_into(
        self, keys: Sequence[BlockKey], places: Sequence[memoryview]
    ) -> list[bytes | memoryview | Placed | None]:
        """See `PlacingStore.read_into`; without a copy what `write` took without one."""
        return [*self._read(list(zip(keys, places, strict=True)))]

    def count(self, keys: Sequence[BlockKey]) -> int:
        """See `Store.count`; asks the index only."""
        with self._state:
            return next((i for i, key in enumerate(keys) if key not in self._index), len(keys))

    def delete(self, keys: Sequence[BlockKey]) -> None:
        """See `Store.delete`; a restart does not find them either."""
        with self._call():
            with self._state:
                gone = [self._unindex(key) for key in dict.fromkeys(keys) if key in self._index]
            if failed := self._free_all(gone):
                raise self._unavailable(failed) from failed

    def scan(self) -> Iterator[tuple[BlockKey, int]]:
        """See `Store.scan`; shows what was held when it began."""
        with self._state:
            return iter([(each, record.header.nbytes) for each, record in self._index.items()])

    def take_before(self) -> Mapping[BlockKey, BlockKey]:
        """See `ChainedStore.take_before`."""
        before, self._before = self._before, {}
        return before

    def close(self) -> None:
        """See `Store.close`; waits for calls under way, lets the next process have the folder."""
        with self._state:
            self._closed = True
            self._state.wait_for(lambda: self._calls == 0)
            segments = list(self._space.segments.values())
            self._space.segments.clear()
        for pool in (self._read_pool, self._write_pool, self._erase_pool):
            pool.shutdown()
        for segment in segments:
            segment.file.close()
        self._folder.close()

    @contextlib.contextmanager
    def _call(self) -> Iterator[None]:
        """A call under way: descriptors stay open until it has ended."""
        with self._state:
            if self._closed:
                raise StoreUnavailable(f"disk {self.path}: closed")
            self._calls += 1
        try:
            yield
        finally:
            with self._state:
                self._calls -= 1
                self._state.notify_all()

    def _unavailable(self, error: OSError) -> StoreUnavailable:
        return StoreUnavailable(f"disk {self.path}: {error.strerror}")

    # --- writing ----------------------------------------------------------------------

    def _reserve(self, key: BlockKey, parts: Parts) -> Write | None:
        """A slot for a frame, in the batch's order: what fits does not depend on timing."""
        views = [memoryview(part).cast("B") for part in parts]
        nbytes = sum(view.nbytes for view in views)
        needed = record_nbytes(nbytes)
        place = self._room.take(needed)
        if place is None:
            metrics.DISK_REFUSED.labels("room").inc()
            return None
        with self._state:
            if self._budget.spend(needed, self._clock()):
                self._sequence += 1
                return Write(key, views, nbytes, self._sequence, place)
            self._space.give(place)
        metrics.DISK_REFUSED.labels("budget").inc()
        return None

    def _put(self, write: Write | None) -> Record | OSError | None:
        """Write a frame; where that fails its slot is free again. None: it was refused before."""
        if write is None:
            return None
        try:
            record = self._transfer.put(write)
        except OSError as error:
            self._free(write.place, bad=error.errno not in NO_ROOM)
            return error
        with self._state:
            self._written += record_nbytes(write.nbytes)
        return record

    def _commit(
        self, outcomes: Sequence[Record | OSError | None]
    ) -> tuple[list[bool], OSError | None]:
        """Index what was written, in the batch's order, and free what it replaces."""
        replaced: list[Record] = []
        failed: OSError | None = None
        for each in outcomes:
            if isinstance(each, Record):
                with self._state:
                    replaced.extend(self._enter(each))
                    self._accepted += each.header.nbytes
                metrics.DISK_ACCEPTED_BYTES.inc(each.header.nbytes)
            elif each is not None and each.errno in NO_ROOM:
                metrics.DISK_REFUSED.labels("room").inc()
                self._room.full(each)
            elif each is not None:
                failed = each
        self._free_all(replaced)  # one that cannot be erased loses by its sequence at a start, too
        return [isinstance(each, Record) for each in outcomes], failed

    def _enter(self, record: Record) -> list[Record]:
        """Make a record the one of its key; gives those that no longer are."""
        key = record.header.key
        record.place.segment.records[record.place.slot] = record
        older = self._index.get(key)
        if older is not None and older.header.sequence > record.header.sequence:
            record.dead = True  # another thread began later and was faster
            return [record]
        replaced = [] if older is None else [self._unindex(key)]
        self._index[key] = record
        self._frames += record.header.nbytes
        return replaced

    def _unindex(self, key: BlockKey) -> Record:
        record = self._index.pop(key)
        record.dead = True
        self._frames -= record.header.nbytes
        return record

    def _move_all(self, records: Sequence[Record]) -> None:
        at_once(self._write_pool, self._move, records)

    def _move(self, record: Record) -> None:
        """Another slot for a record, with the same sequence; the caller is one of its readers."""
        frame = self._get(record, keep=True)
        if isinstance(frame, memoryview):
            nbytes = record.header.nbytes
            with self._state:
                place = self._space.take(record_nbytes(nbytes), waste=1.0)
            if place is not None:
                write = Write(record.header.key, [frame], nbytes, record.header.sequence, place)
                moved = self._put(write)
                if isinstance(moved, Record):
                    self._exchange(record, moved)
        self._release(record)

    def _exchange(self, record: Record, moved: Record) -> None:
        """Put a record's copy in its place, unless it was deleted or replaced meanwhile."""
        with self._state:
            moved.place.segment.records[moved.place.slot] = moved
            if record.dead:
                moved.dead = True
            else:
                self._index[record.header.key] = moved
                record.dead = True
            self._moved += record_nbytes(moved.header.nbytes)
            self._budget.charge(record_nbytes(moved.header.nbytes), self._clock())
        self._free_all([moved])

    # --- freeing slots ----------------------------------------------------------------

    def _free_all(self, records: Sequence[Record]) -> OSError | None:
        """Free the slots of dead records; one that is being read waits for its last reader."""
        with self._state:
            ending = [record.place for record in records if record.ends()]
        errors = [each for each in at_once(self._erase_pool, self._free, ending) if each]
        return errors[0] if errors else None

    def _free(self, place: Place, *, bad: bool = False) -> OSError | None:
        """Overwrite a slot's header, then let it be used again; a bad one is left alone."""
        error: OSError | None = None
        try:
            place.segment.file.erase(place.slot)
        except OSError as caught:
            error = caught
        written = 0 if error else PAGE
        with self._state:
            self._space.give(place, bad=bad or error is not None)
            self._written += written
            self._budget.charge(written, self._clock())
        metrics.DISK_WRITTEN_BYTES.inc(written)
        return error

    def _release(self, record: Record) -> None:
        with self._state:
            record.readers -= 1
            ends = record.ends()
        if ends:
            self._free(record.place, bad=record.bad)

    # --- reading ----------------------------------------------------------------------

    def _read(
        self, wanted: Sequence[tuple[BlockKey, memoryview | None]]
    ) -> list[memoryview | Placed | None]:
        with self._call():
            with self._state:
                records = [(self._index.get(key), place) for key, place in wanted]
                for record, _ in records:
                    if record is not None:
                        record.readers += 1
            found = at_once(self._read_pool, lambda one: self._get(*one), records)
            if failed := next((each for each in found if isinstance(each, OSError)), None):
                raise self._unavailable(failed) from failed
            return [each for each in found if not isinstance(each, OSError)]

    def _get(
        self, record: Record | None, place: memoryview | None = None, *, keep: bool = False
    ) -> memoryview | Placed | OSError | None:
        """The frame of a record that the caller was made a reader of, whole, or None.

        The caller is no reader any more, unless `keep`.
        """
        if record is None:
            return None
        try:
            frame = self._transfer.fetch(record, place)
        except OSError as error:
            if error.errno not in _UNREADABLE:
                return error
            record.bad = True
            self._lose(record, "not readable")
            metrics.DISK_UNREADABLE.inc()
            return None
        else:
            if frame is None:
                self._lose(record, "damaged")
                metrics.CORRUPT_FRAMES.labels("disk").inc()
            return frame
        finally:
            if not keep:
                self._release(record)

    def _lose(self, record: Record, what: str) -> None:
        """Drop a record that the disk does not give back; its last reader frees the slot."""
        log.warning("disk %s: block %s is %s; dropped", self.path, record.header.key.hex(), what)
        with self._state:
            if self._index.get(record.header.key) is record:
                self._unindex(record.header.key)

    # --- starting ---------------------------------------------------------------------

    def _load(self) -> None:
        """Index what earlier processes left, from the headers alone."""
        left = left_behind(self._folder, self._space, self._transfer)
        self._sequence = left.records[-1].header.sequence if left.records else 0
        replaced = [older for record in left.records for older in self._enter(record)]
        self._before = left.before
        for segment in left.segments:
            segment.free = [slot for slot in segment.free if slot not in segment.records]
        self._free_all(replaced)
        self._shrink()

    def _shrink(self) -> None:
        """Where `capacity` is smaller than before: the segments written longest ago go."""
        for segment in sorted(self._space.segments.values(), key=Segment.last_written):
            if self._space.nbytes <= self.capacity:
                return
            for record in segment.records.values():
                self._unindex(record.header.key)
            self._folder.remove(segment.shape)
            segment.file.close()
            self._space.drop(segment.shape)
