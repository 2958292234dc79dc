import contextlib
import errno
import os
import random
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.codec.codecs import by_name
from kvtier.codec.frame import encode, verify
from kvtier.core.blocks import Attention, BlockLayout, LayerGroup
from kvtier.errors import ConfigError, CorruptFrame, StoreUnavailable
from kvtier.stores.base import Store
from kvtier.stores.disk import DiskStore
from kvtier.testing.stores import StoreTests, content, frames, key

LAYOUT = BlockLayout((LayerGroup(Attention.FULL, 2, 2, 64),), 16, "bfloat16")
ROOM = 64 * 2**20


@contextlib.contextmanager
def opened(path: Path, capacity: int = ROOM) -> Iterator[DiskStore]:
    store = DiskStore(path, capacity)
    try:
        yield store
    finally:
        store.close()


def files(path: Path) -> list[Path]:
    return sorted(each for each in (path / "blocks").rglob("*") if each.is_file())


def bytes_on_disk(path: Path) -> int:
    return sum(each.stat().st_size for each in files(path))


class TestDiskStore(StoreTests):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Store]:
        with opened(tmp_path / "disk") as store:
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
        assert store.nbytes == bytes_on_disk(tmp_path) == 48 * 3000 + 5000
        store.write(frames(["later"]))
        assert [*store.scan()] == [*held, (key("later"), 1000)]
    with opened(tmp_path) as store:
        assert [*store.scan()] == [*held, (key("later"), 1000)]


def test_a_smaller_capacity_drops_the_oldest(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.write(frames(range(10), 8192))
    with opened(tmp_path, 4 * 8192 - 1) as store:
        assert [each for each, _ in store.scan()] == [key(7), key(8), key(9)]
        assert store.nbytes == bytes_on_disk(tmp_path) == 3 * 8192


def test_of_two_files_of_one_key_the_later_counts(tmp_path: Path) -> None:
    """A process that dies while it replaces a frame leaves both."""
    with opened(tmp_path) as store:
        store.write(frames(["a"], 100))
        (old,) = files(tmp_path)
        kept = old.read_bytes()
        store.write(frames(["a"], 200))
    old.write_bytes(kept)
    with opened(tmp_path) as store:
        assert [*store.scan()] == [(key("a"), 200)]
        assert store.read([key("a")]) == [content("a", 200)]
        assert store.nbytes == bytes_on_disk(tmp_path) == 200


def test_foreign_files_are_left_alone(tmp_path: Path) -> None:
    name = f"{1:012x}-{key('x').hex()}-1"
    foreign = ["layout.json", "blocks/notes.txt", "blocks/00/README", "blocks/00/" + name + ".bak"]
    for each in foreign:
        (tmp_path / each).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / each).write_text("mine")
    with opened(tmp_path) as store:
        assert [*store.scan()] == []
        store.write(frames(["a"]))
        store.delete([key("a")])
    assert [(tmp_path / each).read_text() for each in foreign] == ["mine"] * 4


WRITER = """
import sys, threading
from pathlib import Path
from kvtier.stores.disk import DiskStore
from kvtier.testing.stores import frames, key

store = DiskStore(Path(sys.argv[1]), 64 * 2**20)
lock = threading.Lock()

def work(thread):
    for turn in range(10**9):
        name = f"{thread}-{turn % 40}-{turn}"
        assert store.write(frames([name], 200_000)) == [True]
        with lock:
            print("wrote", name, flush=True)
        if turn >= 40:
            gone = f"{thread}-{turn % 40}-{turn - 40}"
            with lock:
                print("deletes", gone, flush=True)
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
    said += [line.split() for line in rest.decode().splitlines() if line.count(" ") == 1]
    deleted = {name for verb, name in said if verb == "deletes"}
    kept = {name for verb, name in said if verb == "wrote"} - deleted
    assert kept
    with opened(tmp_path) as store:
        for name in kept:
            assert store.read([key(name)]) == [content(name, 200_000)]
        for found, nbytes in store.scan():  # one more a thread may be there, but whole
            (frame,) = store.read([found])
            assert frame is not None
            assert len(frame) == nbytes == 200_000
        assert store.nbytes == bytes_on_disk(tmp_path) <= ROOM
        assert not [each for each in files(tmp_path) if each.suffix == ".tmp"]


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
        assert str(caught.value) == f"disk.path {tmp_path}: another kvtier process uses it"
        other.kill()
    with opened(tmp_path) as store, pytest.raises(ConfigError, match="another kvtier process"):
        DiskStore(tmp_path, ROOM)
    assert store.write(frames(["a"])) == [True]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=f"disk.path {path}: "):
            DiskStore(path, ROOM)
    (tmp_path / "half" / "blocks").mkdir(parents=True)
    (tmp_path / "half" / "blocks" / "7f").write_text("in the way")
    for _ in range(2):  # the lock was given back
        with pytest.raises(ConfigError, match=r"half: .*blocks/7f"):
            DiskStore(tmp_path / "half", ROOM)


def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    if os.access(tmp_path, os.W_OK):
        pytest.skip("root may write anywhere")
    with pytest.raises(ConfigError, match=f"disk.path {tmp_path}: Permission denied"):
        DiskStore(tmp_path, ROOM)


# Capacity


def test_a_frame_without_room_is_refused_and_the_rest_of_its_batch_is_not(tmp_path: Path) -> None:
    with opened(tmp_path, 2000) as store:
        assert store.write([*frames(["a"], 1500), *frames(["b"], 501), *frames(["c"], 500)]) == [
            True,
            False,
            True,
        ]
        assert store.write(frames(["d"], 1)) == [False]
        assert store.write(frames(["c"], 1)) == [False]  # both would be there for a moment
        assert store.read([key("c")]) == [content("c", 500)]
        store.delete([key("a")])
        assert store.write([*frames(["d"], 1000), *frames(["c"], 500)]) == [True, True]
        assert bytes_on_disk(tmp_path) == store.nbytes == 1500


@settings(max_examples=30, deadline=None)
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
            assert kept == (sum(model.values()) + nbytes <= capacity)
            if kept:
                model[name] = nbytes
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


def test_capacity_holds_at_every_moment_with_many_writers(tmp_path: Path) -> None:
    capacity = 130_000
    over: list[int] = []
    ended = threading.Event()

    with opened(tmp_path, capacity) as store:

        def write(thread: int) -> None:
            for turn in range(60):
                name = (thread, turn % 5)
                if not store.write(frames([name], 10_000))[0]:
                    store.delete([key((thread, n)) for n in range(5)])

        def watch() -> None:
            while not ended.is_set():
                total = 0
                for each in files(tmp_path):
                    with contextlib.suppress(FileNotFoundError):
                        total += each.stat().st_size
                # A listing is no snapshot: only the store's own count is exact.
                if store.nbytes > capacity or total > 2 * capacity:
                    over.append(total)

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


# A disk that fails


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder whose file system has room for about 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_refuses_and_recovers(full_disk: Path) -> None:
    with opened(full_disk) as store:
        kept = store.write(frames(range(10), 200_000))
        assert kept[0]
        assert not kept[-1]
        assert store.nbytes == bytes_on_disk(full_disk) == sum(kept) * 200_000
        assert store.count([key(n) for n in range(10)]) == sum(kept)
        assert store.read([key(0)]) == [content(0, 200_000)]
        store.delete([key(0)])
        assert store.write(frames(["new"], 200_000)) == [True]
        assert store.read([key("new")]) == [content("new", 200_000)]


def test_a_file_size_limit_refuses(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with opened(tmp_path) as store:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
        try:
            kept = store.write([*frames(["a"], 40_000), *frames(["b"], 60_000)])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert kept == [True, False]
        assert store.nbytes == bytes_on_disk(tmp_path) == 40_000
        assert store.read([key("a"), key("b")]) == [content("a", 40_000), None]


def test_a_read_only_disk_gives_no_answer_to_a_write_and_can_be_read(full_disk: Path) -> None:
    blocks = str(full_disk / "blocks")
    with opened(full_disk) as store:
        store.write(frames(["a"]))
        subprocess.run(["mount", "--bind", blocks, blocks], check=True)
        try:
            subprocess.run(["mount", "-o", "remount,bind,ro", blocks], check=True)
            with pytest.raises(StoreUnavailable, match=f"disk {full_disk}: Read-only file system"):
                store.write(frames(["b"]))
            assert store.read([key("a"), key("b")]) == [content("a", 1000), None]
            with pytest.raises(StoreUnavailable, match="Read-only file system"):
                store.delete([key("a")])
        finally:
            subprocess.run(["umount", "-l", blocks], check=True)
        assert store.write(frames(["b"])) == [True]


def test_a_disk_that_takes_a_little_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writev = os.writev

    def partial(fd: int, views: list[memoryview]) -> int:
        return writev(fd, [views[0][:7]])

    monkeypatch.setattr(os, "writev", partial)
    parts = [content("a", 5), b"", content("b", 1000), content("c", 3)]
    with opened(tmp_path) as store:
        assert store.write([(key("a"), parts)]) == [True]
        assert store.read([key("a")]) == [b"".join(parts)]


def test_a_folder_that_is_taken_away_gives_no_answer(tmp_path: Path) -> None:
    with opened(tmp_path / "disk") as store:
        store.write(frames(["a"]))
        shutil.rmtree(tmp_path / "disk")
        with pytest.raises(StoreUnavailable, match=os.strerror(errno.ENOENT)):
            store.write(frames(["b"]))
        assert store.read([key("a")]) == [None]
        assert store.count([key("a")]) == 0


def test_too_many_open_files_is_no_miss(tmp_path: Path) -> None:
    """Nor does it lose the frame."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with opened(tmp_path) as store:
        store.write(frames(["a"]))
        lowest_free = os.dup(0)
        os.close(lowest_free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
        try:
            with pytest.raises(StoreUnavailable, match=os.strerror(errno.EMFILE)):
                store.read([key("a")])
            with pytest.raises(StoreUnavailable, match=os.strerror(errno.EMFILE)):
                store.write(frames(["b"]))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert store.read([key("a"), key("b")]) == [content("a", 1000), None]
        assert store.nbytes == bytes_on_disk(tmp_path)


@pytest.mark.parametrize("seed", range(3))
def test_garbled_and_cut_files_never_pass_the_frame_check(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    codec = by_name("raw")
    blocks = {key(n): rng.randbytes(LAYOUT.nbytes) for n in range(60)}
    with opened(tmp_path) as store:
        for of, block in blocks.items():
            store.write([(of, encode(of, memoryview(block), LAYOUT, codec))])
    for path in rng.sample(files(tmp_path), 40):
        data = bytearray(path.read_bytes())
        if rng.random() < 0.5:
            del data[rng.randrange(len(data)) :]
        else:
            data[rng.randrange(len(data))] ^= rng.randrange(1, 256)
        path.write_bytes(data)
    with opened(tmp_path) as store:
        assert store.count([*blocks]) == 60  # names are all that a start reads
        good = 0
        for of, block in blocks.items():
            (frame,) = store.read([of])
            assert frame is not None
            try:
                verify(of, frame, LAYOUT.id)
            except CorruptFrame:
                store.delete([of])
                continue
            assert bytes(frame[64:]) == block
            good += 1
        assert good == 20
    assert len(files(tmp_path)) == 20


def test_a_read_gets_all_of_a_frame_whatever_happens_to_it_meanwhile(tmp_path: Path) -> None:
    """Of one that is only replaced it gets the old or the new one, never none."""
    wrong: list[object] = []
    ended = threading.Event()
    with opened(tmp_path) as store:
        store.write(frames(["replaced"], 100))

        def read() -> None:
            may_be = {
                name: (content(name, 200_000), content(name, 100))
                for name in ("replaced", "deleted")
            }
            while not ended.is_set():
                for name, whole in may_be.items():
                    (frame,) = store.read([key(name)])
                    if frame not in whole and (frame is not None or name == "replaced"):
                        wrong.append((name, None if frame is None else len(frame)))

        readers = [threading.Thread(target=read) for _ in range(3)]
        for thread in readers:
            thread.start()
        both = [frames(["replaced", "deleted"], nbytes) for nbytes in (200_000, 100)]
        for turn in range(1000):
            assert store.write(both[turn % 2]) == [True, True]
            store.delete([key("deleted")])
        ended.set()
        for thread in readers:
            thread.join()
        assert wrong == []
        assert store.nbytes == bytes_on_disk(tmp_path) == 100


def test_a_frame_that_the_disk_cannot_read_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bad_sector(fd: int, nbytes: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with opened(tmp_path) as store:
        store.write(frames(["a", "b"]))
        with monkeypatch.context() as patch:
            patch.setattr(os, "read", bad_sector)
            assert store.read([key("a")]) == [None]
        assert store.read([key("a"), key("b")]) == [None, content("b", 1000)]
        assert store.nbytes == bytes_on_disk(tmp_path) == 1000


def test_a_name_that_claims_any_length_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.write(frames(["a"], 100))
    (path,) = files(tmp_path)
    path.rename(path.with_name(path.name.rsplit("-", 1)[0] + "-ffffffffff"))
    with opened(tmp_path, 2**41) as store:
        assert store.read([key("a")]) == [content("a", 100)]
