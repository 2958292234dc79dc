"""A disk that is full, fails, lies, loses files or is cut and garbled, and what is told then."""

import errno
import os
import random
import resource
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvtier.errors import ConfigError, StoreUnavailable
from kvtier.metrics import REGISTRY
from kvtier.stores.disk import DiskStore
from kvtier.stores.disk.files import Buffers, Folder, SegmentFile, Shape
from kvtier.testing.stores import content, frames, key
from tests.stores.disk_support import (
    LAYOUT,
    PAGE,
    ROOM,
    at,
    blocks,
    bytes_on_disk,
    decoded,
    files,
    loaded,
    opened,
    overwrite,
    small_disk,
    whole,
)

__all__ = ["small_disk"]

Fault = Callable[[str, int], None]  # told "read", "write" or "create"; raises what goes wrong


class FaultyFile(SegmentFile):
    def __init__(self, inner: SegmentFile, fault: Fault) -> None:
        super().__init__(inner.path, inner.shape, inner._fd)
        self.fault = fault

    def read(self, slot: int, *buffers: memoryview) -> int:
        self.fault("read", slot)
        return super().read(slot, *buffers)

    def write(self, slot: int, buffers: Buffers) -> None:
        self.fault("write", slot)
        super().write(slot, buffers)


class FaultyFolder(Folder):
    def __init__(self, path: Path, fault: Fault) -> None:
        self.fault = fault
        super().__init__(path)

    def create(self, shape: Shape) -> SegmentFile:
        self.fault("create", shape.number)
        return FaultyFile(super().create(shape), self.fault)

    def open(self, shape: Shape) -> SegmentFile:
        return FaultyFile(super().open(shape), self.fault)


class Broken:
    """Fails the operations that are set, with an error each."""

    def __init__(self) -> None:
        self.errors: dict[str, int] = {}

    def __call__(self, operation: str, where: int) -> None:
        if number := self.errors.get(operation):
            raise OSError(number, os.strerror(number))

    def folder(self, path: Path) -> Folder:
        return FaultyFolder(path, self)


def counter(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"kvtier_{name}_total", labels) or 0.0


# Full


def test_a_full_disk_refuses_and_recovers(
    small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(small_disk) as store:
        kept = store.write(frames(range(10), 200_000))
        assert kept[0]
        assert not kept[-1]
        full = f"disk {small_disk}: {os.strerror(errno.ENOSPC)}; it takes no more for now"
        assert caplog.messages == [full], "one line, however many blocks found no room"
        assert bytes_on_disk(small_disk) == store.nbytes <= 2**20
        assert store.count([key(n) for n in range(10)]) == sum(kept)
        assert store.read([key(0)]) == [content(0, 200_000)]
        store.delete([key(0)])
        assert store.write(frames(["new"], 200_000)) == [True]
        assert store.read([key("new")]) == [content("new", 200_000)]
    with opened(small_disk) as store:
        assert store.read([key("new"), key(0)]) == [content("new", 200_000), None]


def test_a_file_size_limit_refuses_what_is_above_it(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with opened(tmp_path) as store:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
        try:
            kept = store.write([*frames(["a"], 40_000), *frames(["b"], 60_000)])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert kept == [True, False]
        assert store.read([key("a"), key("b")]) == [content("a", 40_000), None]
        assert store.write(frames(["b"], 60_000)) == [True]


def test_a_disk_that_turns_out_full_at_a_write_refuses(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As where the file system could not take the room beforehand."""
    disk = Broken()
    refused = counter("disk_refused", reason="room")
    with opened(tmp_path, open_folder=disk.folder) as store:
        disk.errors = {"write": errno.ENOSPC}
        assert store.write(frames(["a", "b"])) == [False, False]
        assert counter("disk_refused", reason="room") == refused + 2
        assert [os.strerror(errno.ENOSPC) in line for line in caplog.messages] == [True]
        disk.errors = {}
        assert store.write(frames(["a", "b"])) == [True, True]
        assert store.read([key("a"), key("b")]) == [content("a", 1000), content("b", 1000)]


# Failing


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS])
def test_a_write_that_fails_is_no_answer_and_nothing_of_it_is_ever_found(
    tmp_path: Path, number: int
) -> None:
    disk = Broken()
    with opened(tmp_path, open_folder=disk.folder) as store:
        store.write(frames(["a"]))
        disk.errors = {"write": number}
        with pytest.raises(StoreUnavailable, match=f"disk {tmp_path}: {os.strerror(number)}"):
            store.write(frames(["b", "c"]))
        assert store.read([key("a"), key("b"), key("c")]) == [content("a", 1000), None, None]
        with pytest.raises(StoreUnavailable, match=os.strerror(number)):
            store.delete([key("a")])
        assert store.count([key("a")]) == 0
        disk.errors = {}
        assert store.write(frames(["b"])) == [True]
        assert store.read([key("b")]) == [content("b", 1000)]
    with opened(tmp_path) as store:
        assert store.read([key("b"), key("c")]) == [content("b", 1000), None]


def test_a_segment_that_cannot_be_made_is_no_answer(tmp_path: Path) -> None:
    disk = Broken()
    with opened(tmp_path, open_folder=disk.folder) as store:
        disk.errors = {"create": errno.EMFILE}
        with pytest.raises(StoreUnavailable, match=os.strerror(errno.EMFILE)):
            store.write(frames(["a"]))
        assert store.nbytes == bytes_on_disk(tmp_path) == 0
        disk.errors = {}
        assert store.write(frames(["a"])) == [True]


def test_a_frame_that_the_disk_cannot_read_is_dropped_and_its_place_left_alone(
    tmp_path: Path,
) -> None:
    disk = Broken()
    unreadable = counter("disk_unreadable")
    with opened(tmp_path, 64 * PAGE, open_folder=disk.folder) as store:
        store.write(frames(range(64)))
        disk.errors = {"read": errno.EIO}
        assert store.read([key(0)]) == [None]
        assert counter("disk_unreadable") == unreadable + 1
        disk.errors = {"read": errno.ENOMEM}
        with pytest.raises(StoreUnavailable, match=os.strerror(errno.ENOMEM)):
            store.read([key(1), key(2)])
        disk.errors = {}
        assert store.read([key(0), key(1)]) == [None, content(1, 1000)]
        assert store.write(frames(["new"])) == [False]  # the bad slot is not tried again
        store.delete([key(1)])
        assert store.write(frames(["new"])) == [True]


@pytest.mark.parametrize("number", [errno.EIO, errno.EBADMSG])  # the second: a bad checksum
@pytest.mark.parametrize("into", [True, False])
def test_a_block_that_cannot_be_read_costs_no_other_of_the_same_call(
    tmp_path: Path, number: int, into: bool
) -> None:
    """All are in flight at once, and another thread asks for the same ones."""
    bad: list[int] = []

    def fault(operation: str, slot: int) -> None:
        if operation == "read" and slot in bad:
            raise OSError(number, os.strerror(number))

    names = [*range(4)]
    together = threading.Barrier(2)

    def read() -> list[bytes | None]:
        together.wait()
        if into:
            return loaded(store, names)
        raw = store.read([key(name) for name in names])
        return [decoded(name, frame) for name, frame in zip(names, raw, strict=True)]

    with opened(tmp_path, open_folder=lambda path: FaultyFolder(path, fault)) as store:
        assert all(store.write(blocks(names)))
        slot = store._index[key(1)].place.slot
        bad.append(slot)
        with ThreadPoolExecutor(2) as pool:
            both = [each.result() for each in [pool.submit(read), pool.submit(read)]]
        right = [content(name, LAYOUT.nbytes) for name in names]
        assert both == [[right[0], None, *right[2:]]] * 2
        assert store.count([key(0)]) == 1
        assert store.count([key(1)]) == 0


def test_what_a_disk_cannot_read_at_a_start_is_counted(tmp_path: Path) -> None:
    disk = Broken()
    with opened(tmp_path, 64 * PAGE, open_folder=disk.folder) as store:
        store.write(frames(range(4)))
    unreadable = counter("disk_unreadable")
    disk.errors = {"read": errno.EIO}
    with opened(tmp_path, 64 * PAGE, open_folder=disk.folder) as store:
        assert list(store.scan()) == []
    assert counter("disk_unreadable") >= unreadable + 4


def test_a_disk_that_takes_a_little_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwritev, preadv = os.pwritev, os.preadv
    monkeypatch.setattr(os, "pwritev", lambda fd, views, at: pwritev(fd, [views[0][:PAGE]], at))
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:PAGE]], at))
    with opened(tmp_path) as store:
        assert store.write(frames(["a", "b"], 50_000)) == [True, True]
        assert store.read([key("a"), key("b")]) == [content("a", 50_000), content("b", 50_000)]
        assert store.write(blocks(["c"])) == [True]
        assert loaded(store, ["c", "none"]) == [content("c", LAYOUT.nbytes), None]


def test_a_folder_that_cannot_be_made_or_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=f"disk.path {path}: "):
            DiskStore(path, ROOM)
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "segments").write_text("in the way")
    for _ in range(2):  # the lock was given back
        with pytest.raises(ConfigError, match=r"half: .*half/segments"):
            DiskStore(tmp_path / "half", ROOM)
    tmp_path.chmod(0o500)
    if os.access(tmp_path, os.W_OK):
        pytest.skip("root may write anywhere")
    with pytest.raises(ConfigError, match=f"disk.path {tmp_path}/new: Permission denied"):
        DiskStore(tmp_path / "new", ROOM)


def test_too_many_open_files_is_no_miss(tmp_path: Path) -> None:
    """Nor does it lose a frame: what is there is read through descriptors that are open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with opened(tmp_path) as store:
        store.write(frames(["a"]))
        lowest_free = os.dup(0)
        os.close(lowest_free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
        try:
            assert store.read([key("a")]) == [content("a", 1000)]
            with pytest.raises(StoreUnavailable, match=os.strerror(errno.EMFILE)):
                store.write(frames(["b"], 200_000))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert store.read([key("a"), key("b")]) == [content("a", 1000), None]


# Taken away


def test_a_file_that_was_removed_is_read_while_it_can_be_and_never_written_again(
    tmp_path: Path,
) -> None:
    with opened(tmp_path) as store:
        store.write(frames(["a"]))
        (gone,) = files(tmp_path)
        gone.unlink()
        assert store.read([key("a")]) == [content("a", 1000)]
        assert store.write(frames(["b"])) == [True]
        assert store.read([key("b")]) == [content("b", 1000)]
    with opened(tmp_path) as store:
        assert store.read([key("a"), key("b")]) == [None, content("b", 1000)]


def test_a_file_that_is_cut_under_us_loses_what_was_in_it_only(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.write(frames(range(8), 200_000))
        file, record = at(tmp_path, key(5))
        with file.open("r+b") as handle:
            handle.truncate(record + 10_000)
        # Alone and first: dropping what lay behind the cut makes the file longer again, and then
        # the end of this one is zeros, which are for the frame's own checksum to find.
        assert store.read([key(5)]) == [None]
        found = store.read([key(n) for n in range(8)])
        for n, frame in enumerate(found):
            assert frame is None or whole(n, 200_000, frame)
        assert whole(0, 200_000, found[0])
        assert store.write(frames(["new"], 200_000)) == [True]
        assert store.read([key("new")]) == [content("new", 200_000)]


def test_a_folder_that_is_taken_away_gives_no_answer(tmp_path: Path) -> None:
    with opened(tmp_path / "disk") as store:
        store.write(frames(["a"]))
        shutil.rmtree(tmp_path / "disk")
        with pytest.raises(StoreUnavailable, match=os.strerror(errno.ENOENT)):
            store.write(frames(["b"]))
        assert store.read([key("a")]) == [content("a", 1000)]  # the kernel still has it
        assert store.count([key("b")]) == 0


# Garbled


@pytest.mark.parametrize("seed", range(12))
def test_cut_and_garbled_files_cost_what_was_hit_and_nothing_wrong_is_returned(
    tmp_path: Path, seed: int
) -> None:
    """Torn, reordered, misplaced and lost writes, as a loss of power leaves them."""
    rng = random.Random(seed)
    names = [*range(60)]
    slot = 9 * PAGE
    right = {name: content(name, LAYOUT.nbytes) for name in range(160)}
    with opened(tmp_path, 60 * slot) as store:
        assert all(store.write(blocks(names)))
    where = {name: at(tmp_path, key(name)) for name in names}
    hit = rng.sample(names, 20)
    for name in hit:
        file, record = where[name]
        other_file, other = where[rng.choice(names)]
        match rng.randrange(4):
            case 0:  # garbled
                overwrite(file, record + rng.randrange(LAYOUT.nbytes), rng.randbytes(40))
            case 1:  # torn: some page was never written
                overwrite(file, record + PAGE * rng.randrange(9), bytes(PAGE))
            case 2:  # a page of another block in its place
                overwrite(file, record, other_file.read_bytes()[other : other + PAGE])
            case 3:  # another block in its place
                overwrite(file, record, other_file.read_bytes()[other : other + slot])
    cut = rng.choice(files(tmp_path))
    with cut.open("r+b") as handle:
        handle.truncate(rng.randrange(cut.stat().st_size))
    spared = {name for name in names if name not in hit and where[name][0] != cut}
    with opened(tmp_path, 60 * slot) as store:
        copied = [
            decoded(name, frame)
            for name, frame in zip(names, store.read([key(n) for n in names]), strict=True)
        ]
        assert loaded(store, names) == copied
        for name, block in zip(names, copied, strict=True):
            assert block in ([right[name]] if name in spared else [None, right[name]])
        later = [*range(100, 160)]
        written = store.write(blocks(later))
        for name, frame in zip(later, store.read([key(n) for n in later]), strict=True):
            assert decoded(name, frame) == (right[name] if written[name - 100] else None)
        assert loaded(store, later) == [right[n] if written[n - 100] else None for n in later]
        for name in spared:
            assert decoded(name, store.read([key(name)])[0]) == right[name]
        assert store.nbytes == bytes_on_disk(tmp_path) <= 60 * slot


def test_of_two_records_of_one_key_the_later_counts(tmp_path: Path) -> None:
    """A process that dies while it replaces a frame leaves both."""
    with opened(tmp_path) as store:
        store.write(frames(["a"], 100))
        file, record = at(tmp_path, key("a"))
        old = file.read_bytes()[record : record + PAGE]
        store.write(frames(["a"], 200))
    overwrite(file, record, old)
    with opened(tmp_path) as store:
        assert [*store.scan()] == [(key("a"), 200)]
        assert store.read([key("a")]) == [content("a", 200)]
        assert store.usage().frames == 200
    assert file.read_bytes()[record : record + PAGE] == bytes(PAGE)


def test_a_damaged_header_is_counted_and_its_place_used_again(tmp_path: Path) -> None:
    corrupt = counter("corrupt_frames", tier="disk")
    with opened(tmp_path) as store:
        store.write(frames(["a", "b"], 10_000))
        file, record = at(tmp_path, key("a"))
        overwrite(file, record + 25, b"rot")
        assert store.read([key("a"), key("b")]) == [None, content("b", 10_000)]
        assert counter("corrupt_frames", tier="disk") == corrupt + 1
        assert store.count([key("a")]) == 0
        assert store.write(frames(["a"], 10_000)) == [True]
        assert at(tmp_path, key("a")) == (file, record)
        assert store.read([key("a")]) == [content("a", 10_000)]


@pytest.mark.parametrize("place", ["copied", "in place"])
def test_a_frame_s_bytes_on_the_first_page_are_proven_by_the_store(
    tmp_path: Path, place: str
) -> None:
    """Whoever passes a frame on without looking into it gets no garbled one."""
    with opened(tmp_path) as store:
        made = frames(["a"]) if place == "copied" else blocks(["a"])
        assert store.write([*made, *frames(["b"])]) == [True, True]
        file, record = at(tmp_path, key("a"))
        where = record + (PAGE - 10 if place == "in place" else 100)
        byte = file.read_bytes()[where]
        overwrite(file, where, bytes([byte ^ 1]))
        corrupt = counter("corrupt_frames", tier="disk")
        assert store.read([key("a"), key("b")]) == [None, content("b", 1000)]
        assert counter("corrupt_frames", tier="disk") == corrupt + 1
        assert store.count([key("a")]) == 0


def test_a_name_that_claims_any_length_is_not_believed(tmp_path: Path) -> None:
    (tmp_path / "segments").mkdir()
    (tmp_path / "segments" / "00000007-1000-ffffff.seg").write_bytes(bytes(PAGE))
    with opened(tmp_path) as store:
        assert store.write(frames(["a"])) == [True]
        assert store.nbytes == bytes_on_disk(tmp_path) <= ROOM
        assert [*store.scan()] == [(key("a"), 1000)]


# Meanwhile


def test_a_read_gets_all_of_a_frame_whatever_happens_to_it_meanwhile(tmp_path: Path) -> None:
    """Of one that is only replaced it gets the old or the new one, never none."""
    wrong: list[object] = []
    ended = threading.Event()
    with opened(tmp_path, 60 * PAGE) as store:
        store.write(frames(["replaced"], 100))

        def read() -> None:
            may_be = {
                name: (content(name, 60_000), content(name, 100))
                for name in ("replaced", "deleted")
            }
            while not ended.is_set():
                for name, either in may_be.items():
                    (frame,) = store.read([key(name)])
                    if frame not in either and (frame is not None or name == "replaced"):
                        wrong.append((name, None if frame is None else len(frame)))

        readers = [threading.Thread(target=read) for _ in range(3)]
        for thread in readers:
            thread.start()
        both = [frames(["replaced", "deleted"], nbytes) for nbytes in (60_000, 100)]
        for turn in range(400):
            store.write(both[turn % 2])
            store.delete([key("deleted")])
        ended.set()
        for thread in readers:
            thread.join()
        assert wrong == []
        assert store.nbytes == bytes_on_disk(tmp_path) <= 60 * PAGE


def test_a_trial_on_a_disk_that_fails_is_no_answer_and_leaves_its_slots_free(
    tmp_path: Path,
) -> None:
    disk = Broken()
    with opened(tmp_path, open_folder=disk.folder) as store:
        trial = store.trial(32 << 10, 4)
        assert trial.write(32 << 10)
        for operation, use in (("write", trial.write), ("read", trial.read)):
            disk.errors[operation] = errno.EIO
            with pytest.raises(StoreUnavailable):
                use(32 << 10)
            disk.errors.clear()
        trial.close()
        assert all(store.write(frames(range(64))))
    disk.errors["create"] = errno.EROFS
    with opened(tmp_path / "new", open_folder=disk.folder) as store:
        with pytest.raises(StoreUnavailable):
            store.trial(32 << 10, 4)
        disk.errors.clear()
        assert all(store.write(frames(range(4))))
