import ctypes
import mmap
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.errors import ConfigError, StoreUnavailable
from kvtier.stores.base import Placed, Store
from kvtier.stores.disk import DiskStore
from kvtier.stores.disk.buffers import BufferPool, aligned
from kvtier.stores.disk.transfer import at_once
from kvtier.testing.stores import StoreTests, content, frames, key
from tests.stores.disk_support import (
    LAYOUT,
    PAGE,
    ROOM,
    blocks,
    bytes_on_disk,
    decoded,
    files,
    opened,
    slot_of_arena,
)


class TestDiskStore(StoreTests):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Store]:
        with opened(tmp_path / "disk") as store:
            yield store


class TestBuffered(StoreTests):
    """Where the file system has no O_DIRECT."""

    @pytest.fixture
    def store(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
        monkeypatch.setattr("kvtier.stores.disk.files.Folder.probe", lambda folder: False)
        with opened(tmp_path / "disk") as store:
            assert not store.direct
            yield store


# Restart


def test_a_restart_finds_everything_acknowledged_oldest_first(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        names = [*range(50)]
        assert all(store.write(frames(names, 3000)))
        store.delete([key(7)])
        store.write(frames([3], 5000))
        held = [*store.scan()]
    with opened(tmp_path) as store:
        assert [*store.scan()] == held
        assert held[-1] == (key(3), 5000)
        assert store.read([key(3), key(7), key(8)]) == [content(3, 5000), None, content(8, 3000)]
        assert store.nbytes == bytes_on_disk(tmp_path)
        assert store.usage().frames == 48 * 3000 + 5000
        store.write(frames(["later"]))
        assert [*store.scan()] == [*held, (key("later"), 1000)]
    with opened(tmp_path) as store:
        assert [*store.scan()] == [*held, (key("later"), 1000)]


def test_a_restart_writes_where_the_last_one_had_room(tmp_path: Path) -> None:
    with opened(tmp_path, 40 * PAGE) as store:
        assert all(store.write(frames(range(40))))
        store.delete([key(n) for n in range(0, 40, 2)])
    with opened(tmp_path, 40 * PAGE) as store:
        assert all(store.write(frames(range(100, 120))))
        assert store.write(frames(["more"])) == [False]
        odd = [*range(1, 40, 2), *range(100, 120)]
        assert store.read([key(n) for n in odd]) == [content(n, 1000) for n in odd]
        assert store.nbytes == bytes_on_disk(tmp_path) <= 40 * PAGE


def test_a_smaller_capacity_keeps_what_was_written_last(tmp_path: Path) -> None:
    with opened(tmp_path, 64 * PAGE) as store:
        assert all(store.write(frames(range(64))))
    with opened(tmp_path, 16 * PAGE) as store:
        assert [each for each, _ in store.scan()] == [key(n) for n in range(48, 64)]
        assert store.read([key(63)]) == [content(63, 1000)]
        assert store.nbytes == bytes_on_disk(tmp_path) == 16 * PAGE


def test_foreign_files_are_left_alone(tmp_path: Path) -> None:
    foreign = ["layout.json", "segments/notes.txt", "segments/00000001-1000-1.seg.bak",
               "segments/1-1000-1.seg", "segments/00000001-1001-1.seg"]  # fmt: skip
    for each in foreign:
        (tmp_path / each).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / each).write_text("mine")
    with opened(tmp_path) as store:
        assert [*store.scan()] == []
        store.write(frames(["a"]))
        store.delete([key("a")])
    assert [(tmp_path / each).read_text() for each in foreign] == ["mine"] * 5


def test_the_format_of_an_earlier_kvtier_is_refused_in_one_line(tmp_path: Path) -> None:
    old = tmp_path / "blocks" / "7f" / "000000000001-7f000000000000000000000000000000-3e8"
    old.parent.mkdir(parents=True)
    old.write_text("a frame")
    with pytest.raises(ConfigError) as caught:
        DiskStore(tmp_path, ROOM)
    assert str(caught.value) == (
        f"disk.path {tmp_path}: holds the format of an earlier kvtier, which is not read any more; "
        f"remove {tmp_path}/blocks"
    )
    assert old.read_text() == "a frame"
    shutil.rmtree(tmp_path / "blocks")
    with opened(tmp_path) as store:
        assert store.write(frames(["a"])) == [True]


WRITER = """
import os, sys, threading
from pathlib import Path
from kvtier.stores.disk import DiskStore
from kvtier.stores.disk.buffers import BufferPool, aligned
from kvtier.stores.disk.transfer import at_once
from kvtier.testing.stores import frames, key

store = DiskStore(Path(sys.argv[1]), 64 * 2**20)
lock = threading.Lock()

def say(line):
    os.write(1, line.encode() + b"\\n")  # at once: a kill never leaves half a line

def work(thread):
    for turn in range(10**9):
        name = f"{thread}-{turn % 40}-{turn}"
        assert store.write(frames([name], 200_000)) == [True]
        with lock:
            say(f"wrote {name}")
        if turn >= 40:
            gone = f"{thread}-{turn % 40}-{turn - 40}"
            with lock:
                say(f"deletes {gone}")
            store.delete([key(gone)])

for n in range(3):
    threading.Thread(target=work, args=(n,)).start()
"""


@pytest.mark.parametrize("lines", [1, 10, 400])
def test_kill_9_while_it_writes_loses_nothing_acknowledged(tmp_path: Path, lines: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert process.stdout is not None
        said = [process.stdout.readline().decode().split() for _ in range(lines)]
    finally:
        process.kill()
        rest, _ = process.communicate()
    said += [line.split() for line in rest.decode().splitlines()]
    deleted = {name for verb, name in said if verb == "deletes"}
    kept = {name for verb, name in said if verb == "wrote"} - deleted
    assert kept
    with opened(tmp_path) as store:
        for name in kept:
            assert store.read([key(name)]) == [content(name, 200_000)]
        assert len([*store.scan()]) <= len(kept) + 2 * 3  # one more written, one not yet deleted
        for found, nbytes in [*store.scan()]:
            (frame,) = store.read([found])
            assert frame is None or len(frame) == nbytes == 200_000
        assert store.nbytes == bytes_on_disk(tmp_path) <= ROOM
        assert store.write(frames(["more"], 200_000)) == [True]


# One process at a time, and a folder that can be used


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    opens = "import sys, pathlib; from kvtier.stores.disk import DiskStore;s = DiskStore("
    opens += "pathlib.Path(sys.argv[1]), 2**20); print('open', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", opens, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"open\n"
        with pytest.raises(ConfigError) as caught:
            DiskStore(tmp_path, ROOM)
        process = f"another kvtier process (pid {other.pid})"
        assert str(caught.value) == f"disk.path {tmp_path}: {process} uses it"
        other.kill()
    with opened(tmp_path) as store:
        with pytest.raises(ConfigError, match="another kvtier process"):
            DiskStore(tmp_path, ROOM)
        assert store.write(frames(["a"])) == [True]


def test_a_closed_store_gives_no_answer(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.write(frames(["a"]))
    for call in (lambda: store.read([key("a")]), lambda: store.write(frames(["b"]))):
        with pytest.raises(StoreUnavailable, match=f"disk {tmp_path}: closed"):
            call()


# Capacity


def test_frames_of_one_size_fill_the_capacity_and_every_slot_is_used_again(tmp_path: Path) -> None:
    capacity = 3 * 2**20 + 4000
    with opened(tmp_path, capacity) as store:
        most = store.usable(30_000) // 30_000
        assert most == capacity // (8 * PAGE)
        names = [*range(most)]
        assert store.write(frames([*names, "more"], 30_000)) == [True] * most + [False]
        rng = random.Random(1)
        for turn in range(300):
            gone = rng.choice(names)
            names.remove(gone)
            store.delete([key(gone)])
            names.append(("new", turn))
            assert store.write(frames([names[-1]], 30_000)) == [True]
            assert store.nbytes == bytes_on_disk(tmp_path) <= capacity
        assert store.read([key(n) for n in names]) == [content(n, 30_000) for n in names]
        usage = store.usage()
        assert usage.moved == 0
        assert usage.write_amplification == (8 * PAGE * (most + 300) + 300 * PAGE) / (
            30_000 * (most + 300)
        )


def test_a_frame_without_room_is_refused_and_the_rest_of_its_batch_is_not(tmp_path: Path) -> None:
    with opened(tmp_path, 3 * PAGE) as store:
        assert store.write([*frames(["a"], 5000), *frames(["b"], 5000), *frames(["c"], 500)]) == [
            True,
            False,
            True,
        ]
        assert store.write(frames(["c"], 1)) == [False]  # both would be there for a moment
        assert store.read([key("c")]) == [content("c", 500)]
        store.delete([key("a")])
        assert store.write([*frames(["d"], 1000), *frames(["c"], 600)]) == [True, True]
        assert store.read([key("c"), key("d")]) == [content("c", 600), content("d", 1000)]
        assert store.write(frames(["e"], 50_000)) == [False]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("wwwdr"), st.integers(0, 7), st.integers(1, 30_000)), max_size=40
    )
)
def test_capacity_holds_and_content_too_whatever_is_done(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, int]]
) -> None:
    path = tmp_path_factory.mktemp("churn")
    capacity = 80_000
    model: dict[int, int] = {}
    store = DiskStore(path, capacity)
    for action, name, nbytes in steps:
        if action == "w":
            (kept,) = store.write(frames([name], nbytes))
            if kept:
                model[name] = nbytes
            else:
                assert sum(model.values()) + nbytes > capacity // 4
        elif action == "d":
            store.delete([key(name)])
            model.pop(name, None)
        else:
            store.close()
            store = DiskStore(path, capacity)
        assert store.nbytes == bytes_on_disk(path) <= capacity
        assert dict(store.scan()) == {key(each): size for each, size in model.items()}
        for each in range(8):
            expected = content(each, model[each]) if each in model else None
            assert store.read([key(each)]) == [expected]
    store.close()
    shutil.rmtree(path)


def test_other_sizes_get_the_room_of_idle_slots_at_a_bounded_cost(tmp_path: Path) -> None:
    """As after a change of the codec: large slots are idle, small frames come."""
    capacity = 4 * 2**20
    with opened(tmp_path, capacity) as store:
        large = [*range(capacity // (8 * PAGE))]
        assert all(store.write(frames(large, 30_000)))
        kept = large[::4]
        store.delete([key(n) for n in large if n not in kept])
        before = store.usage()
        small = [("small", n) for n in range(300)]
        assert all(store.write(frames(small, 8000)))
        after = store.usage()
        assert store.nbytes == bytes_on_disk(tmp_path) <= capacity
        assert store.read([key(n) for n in kept]) == [content(n, 30_000) for n in kept]
        assert store.read([key(n) for n in small]) == [content(n, 8000) for n in small]
        assert 0 < after.moved <= (after.accepted - before.accepted) / 2
    with opened(tmp_path, capacity) as store:
        assert store.read([key(n) for n in kept]) == [content(n, 30_000) for n in kept]
        assert store.count([key(n) for n in small]) == 300


def test_segments_more_than_half_full_are_never_moved(tmp_path: Path) -> None:
    """Small frames then take the large slots that are free."""
    with opened(tmp_path, 2**22) as store:
        large = [*range(2**22 // (8 * PAGE))]
        assert all(store.write(frames(large, 30_000)))
        kept = [name for name in large if name % 4]
        store.delete([key(n) for n in large if n % 4 == 0])
        small = [("small", n) for n in large[::4]]
        assert all(store.write(frames(small, 3000)))
        assert store.write(frames(["more"], 3000)) == [False]
        assert store.usage().moved == 0
        assert store.read([key(n) for n in kept]) == [content(n, 30_000) for n in kept]
        assert store.read([key(n) for n in small]) == [content(n, 3000) for n in small]


def test_capacity_holds_at_every_moment_with_many_writers(tmp_path: Path) -> None:
    capacity = 40 * PAGE
    over: list[int] = []
    ended = threading.Event()

    with opened(tmp_path, capacity) as store:

        def write(thread: int) -> None:
            for turn in range(60):
                name = (thread, turn % 5)
                if not store.write(frames([name], 10_000 - 3000 * (turn % 3)))[0]:
                    store.delete([key((thread, n)) for n in range(5)])

        def watch() -> None:
            while not ended.is_set():
                if store.nbytes > capacity:
                    over.append(store.nbytes)

        writers = [threading.Thread(target=write, args=(n,)) for n in range(4)]
        watcher = threading.Thread(target=watch)
        for thread in [*writers, watcher]:
            thread.start()
        for thread in writers:
            thread.join()
        ended.set()
        watcher.join()
        assert not over
        assert store.nbytes == bytes_on_disk(tmp_path) <= capacity
        names = [(thread, n) for thread in range(4) for n in range(5)]
        for name, frame in zip(names, store.read([key(n) for n in names]), strict=True):
            assert frame is None or frame == content(name, len(frame))


# The life of an SSD


def test_a_days_writes_are_bounded_and_come_back_with_time(tmp_path: Path) -> None:
    now = [0.0]
    hour = 10 * 8 * PAGE
    with opened(tmp_path, write_bytes_per_day=24 * hour, clock=lambda: now[0]) as store:
        assert store.write(frames(range(12), 30_000)) == [True] * 10 + [False] * 2
        now[0] += 360  # a tenth of an hour
        assert store.write(frames(["one", "two"], 30_000)) == [True, False]
        now[0] += 10**6  # no more than an hour's worth is saved up
        assert sum(store.write(frames([("day", n) for n in range(20)], 30_000))) == 10
        now[0] -= 10**6  # a clock that goes back earns nothing
        assert store.write(frames(["three"], 30_000)) == [False]
        assert store.read([key("one"), key("two")]) == [content("one", 30_000), None]
        store.delete([key("one")])  # is always done, and paid for
        now[0] += 360
        assert store.write(frames(["four"], 30_000)) == [False]
        now[0] += 360
        assert store.write(frames(["four"], 30_000)) == [True]


def test_a_budget_below_one_frame_an_hour_lets_one_through_in_its_time(tmp_path: Path) -> None:
    now = [0.0]
    with opened(tmp_path, write_bytes_per_day=24 * PAGE, clock=lambda: now[0]) as store:
        assert store.write(frames(["a", "b"], 3 * PAGE - 100)) == [True, False]
        now[0] += 3600
        assert store.write(frames(["b"], 3 * PAGE - 100)) == [False]
        now[0] += 2 * 3600 + 1
        assert store.write(frames(["b"], 3 * PAGE - 100)) == [True]
    assert len(files(tmp_path)) == 1


# Memory


def test_a_block_is_read_into_the_place_it_is_for_and_nothing_else_is(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        names = ["a", "b", "small", "c", "none"]
        assert store.write([*blocks(["a", "b", "c"]), *frames(["small"], 1000)]) == [True] * 4
        slots = [slot_of_arena(b"x" * LAYOUT.nbytes) for _ in names]
        shifted = memoryview(mmap.mmap(-1, 2 * LAYOUT.nbytes))[64 : 64 + LAYOUT.nbytes]
        offered = [slots[0], shifted, slots[2], slots[3][PAGE:], slots[4]]
        found = store.read_into([key(name) for name in names], offered)
        head = bytes(blocks(["a"])[0][1][0])
        assert found[0] == Placed(head)
        assert slots[0] == content("a", LAYOUT.nbytes)
        # A place off the pages or of another size is left alone, and the frame comes as it is.
        assert decoded("b", found[1]) == content("b", LAYOUT.nbytes)
        assert found[2] == content("small", 1000)
        assert decoded("c", found[3]) == content("c", LAYOUT.nbytes)
        assert found[4] is None
        assert not any(shifted)
        assert all(each == b"x" * LAYOUT.nbytes for each in slots[2:])


def test_a_buffer_is_used_again_once_nobody_looks_at_it() -> None:
    pool = BufferPool()
    buffer = pool.take(2 * 2**20 + PAGE)
    buffer[:4] = b"mine"
    view = pool.lend(buffer, 1, 3)
    assert bytes(view) == b"in"
    assert pool.take(2 * 2**20 + PAGE) is not buffer
    part = view[:1]
    del view
    assert pool.take(2 * 2**20 + PAGE) is not buffer
    assert bytes(part) == b"i"
    del part
    assert pool.take(2 * 2**20 + PAGE) is buffer


def test_no_read_goes_on_once_one_of_its_batch_has_raised() -> None:
    slow = threading.Event()
    ended: list[int] = []

    def work(item: int) -> int:
        if item == 0:
            raise MemoryError
        slow.wait(60)
        ended.append(item)
        return item

    with ThreadPoolExecutor(3) as pool:
        threading.Timer(0.05, slow.set).start()
        with pytest.raises(MemoryError):
            at_once(pool, work, [0, 1, 2, 3, 4])
        assert sorted(ended) == [1, 2, 3, 4]


@pytest.mark.parametrize("nbytes", [PAGE, 70_000, 2**20 + PAGE, 2 * 2**20 + PAGE, 5 * 2**20])
def test_buffers_do_not_overlap_and_a_block_in_one_begins_a_large_page(nbytes: int) -> None:
    pool = BufferPool()
    buffers = [pool.take(nbytes) for _ in range(9)]
    for n, buffer in enumerate(buffers):
        assert aligned(buffer)
        assert buffer.nbytes >= nbytes
        buffer[:] = bytes([n]) * buffer.nbytes
    assert [(min(each), max(each)) for each in buffers] == [(n, n) for n in range(9)]
    if nbytes > 2 * 2**20:
        starts = [ctypes.addressof(ctypes.c_char.from_buffer(each[PAGE:])) for each in buffers]
        assert [start % 2**21 for start in starts] == [0] * 9


def test_only_whole_pages_go_to_the_disk_as_they_lie() -> None:
    memory = mmap.mmap(-1, 4 * PAGE)
    view = memoryview(memory)
    assert aligned(view)
    assert aligned(view[PAGE : 3 * PAGE])
    assert not aligned(view[64 : PAGE + 64])
    assert not aligned(view[: PAGE - 1])
    assert not aligned(memoryview(bytes(PAGE)))
