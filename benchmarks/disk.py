"""The disk store against the bare disk, and against one file a block; its start; what it writes.

`plain` is pwritev and preadv on one preallocated file, opened as the store opens its own, with as
many requests in flight: what this disk gives to Python. `files` is a store of one file a block,
written beside and renamed, with the same flags. All write out of one arena, and read into memory
of one kind, the store's own: how fast a disk reads depends on that more than on anything else
(docs/decisions/0021-large-pages.md), and `plain` into small pages stands beside it. All take turns
within a round; every place on the disk has been written before, as in a store that has been full
once.
"""

import mmap
import os
import random
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.common import Bar, paired_ratio, scratch, summary
from kvtier.arena import Arena
from kvtier.codec.codecs import RAW
from kvtier.codec.frame import HEADER_NBYTES, decode, encode
from kvtier.core.blocks import BEGINS, Attention, BlockKey, BlockLayout, LayerGroup, Slot
from kvtier.stores.disk import DiskStore
from kvtier.stores.disk.buffers import BufferPool
from kvtier.stores.disk.files import SegmentFile, Shape
from kvtier.stores.disk.record import PAGE, Header, record_nbytes

REQUESTS = 4
MIB = 2**20

Timed = dict[str, Callable[[int], object]]


class _Plain:
    """The bound: one file, no names, no checks."""

    def __init__(self, path: Path, nbytes: int, blocks: int, flags: int) -> None:
        self.nbytes = nbytes
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o600)
        os.posix_fallocate(self.fd, 0, nbytes * blocks)
        self.pool = ThreadPoolExecutor(REQUESTS)

    def write(self, first: int, views: list[memoryview]) -> None:
        def put(n: int) -> None:
            assert os.pwritev(self.fd, [views[n]], (first + n) * self.nbytes) == self.nbytes

        list(self.pool.map(put, range(len(views))))

    def read(self, first: int, views: list[memoryview]) -> None:
        def get(n: int) -> None:
            assert os.preadv(self.fd, [views[n]], (first + n) * self.nbytes) == self.nbytes

        list(self.pool.map(get, range(len(views))))

    def close(self) -> None:
        self.pool.shutdown()
        os.close(self.fd)


class _Files:
    """One file a block, as a peer's file tier keeps it."""

    def __init__(self, folder: Path, flags: int) -> None:
        self.folder = folder
        self.flags = flags
        folder.mkdir()
        self.pool = ThreadPoolExecutor(REQUESTS)

    def write(self, first: int, views: list[memoryview]) -> None:
        def put(n: int) -> None:
            name = self.folder / f"{first + n}"
            fd = os.open(f"{name}.tmp", os.O_WRONLY | os.O_CREAT | self.flags, 0o600)
            assert os.pwritev(fd, [views[n]], 0) == views[n].nbytes
            os.close(fd)
            Path(f"{name}.tmp").rename(name)

        list(self.pool.map(put, range(len(views))))

    def read(self, first: int, views: list[memoryview]) -> None:
        def get(n: int) -> None:
            fd = os.open(self.folder / f"{first + n}", os.O_RDONLY | self.flags)
            assert os.preadv(fd, [views[n]], 0) == views[n].nbytes
            os.close(fd)

        list(self.pool.map(get, range(len(views))))

    def remove(self, first: int, count: int) -> None:
        for n in range(first, first + count):
            (self.folder / f"{n}").unlink()

    def close(self) -> None:
        self.pool.shutdown()


def _noise(views: list[memoryview]) -> list[memoryview]:
    """The same views, every page of them taken."""
    noise = random.Random(len(views)).randbytes(views[0].nbytes)
    for view in views:
        view[:] = noise
    return views


def _large(nbytes: int, blocks: int) -> list[memoryview]:
    """Memory of the kind that the store reads into."""
    pool = BufferPool()
    return _noise([pool.take(PAGE + nbytes)[PAGE : PAGE + nbytes] for _ in range(blocks)])


def _small(nbytes: int, blocks: int) -> list[memoryview]:
    """Memory as the kernel gives it to whoever does not ask for large pages."""
    view = memoryview(mmap.mmap(-1, nbytes * blocks))
    return _noise([view[n * nbytes : (n + 1) * nbytes] for n in range(blocks)])


def _layout(nbytes: int) -> BlockLayout:
    layout = BlockLayout((LayerGroup(Attention.FULL, nbytes // 32768, 1, 512),), 16, "bfloat16")
    assert layout.nbytes == nbytes
    return layout


def _keys(first: int, count: int) -> list[BlockKey]:
    return [BlockKey(n.to_bytes(16, "big")) for n in range(first, first + count)]


def _throughput(
    folder: Path, nbytes: int, batch: int, batches: int, rounds: int
) -> tuple[dict, float]:
    """Seconds of each operation on a batch of blocks, by who did it; the arena's large pages."""
    layout, target, small = _layout(nbytes), _large(nbytes, batch), _small(nbytes, batch)
    arena = Arena.create(nbytes, 2 * batch)
    source = _noise([arena.slot(Slot(n)) for n in range(batch)])
    decoded = [arena.slot(Slot(n)) for n in range(batch, 2 * batch)]
    capacity = record_nbytes(nbytes + 64) * batch * batches
    store = DiskStore(folder / "store", capacity, requests=REQUESTS)
    flags = os.O_DIRECT if store.direct else 0
    plain = _Plain(folder / "plain", nbytes, batch * batches, flags)
    files = _Files(folder / "files", flags)

    def frames(first: int) -> list:
        keys = _keys(first, batch)
        return [
            (key, encode(key, BEGINS, view, layout, RAW))
            for key, view in zip(keys, source, strict=True)
        ]

    def delete(first: int) -> None:
        store.delete(_keys(first, batch))
        files.remove(first, batch)

    made: dict[int, list] = {}
    writes: Timed = {
        "store": lambda first: store.write(made[first]),
        "plain": lambda first: plain.write(first, source),
        "files": lambda first: files.write(first, source),
    }
    reads: Timed = {
        "store": lambda first: store.read(_keys(first, batch)),
        "plain": lambda first: plain.read(first, target),
        "files": lambda first: files.read(first, target),
        "plain into small pages": lambda first: plain.read(first, small),
    }
    times: dict = {f"write {who}": [] for who in writes} | {f"read {who}": [] for who in reads}
    times["read store and decode"] = []
    for number in range(batches + rounds):
        first = number % batches * batch
        if number >= batches:
            delete(first)
        made = {first: frames(first)}
        for what, work in (("write", writes), ("read", reads)):
            # What is read was written long ago: no cache of the disk's own is asked.
            at = (
                first
                if what == "write" or number < batches
                else (first + batch) % (batch * batches)
            )
            for who in _in_turn(list(work), number):
                start = time.perf_counter()
                done = work[who](at)
                if number >= batches:
                    times[f"{what} {who}"].append(time.perf_counter() - start)
                if what == "write" and who == "store":
                    assert all(done)  # type: ignore[call-overload]
                del done
        if number >= batches:
            start = time.perf_counter()
            keys = _keys(at, batch)
            for key, frame, out in zip(keys, store.read(keys), decoded, strict=True):
                assert frame is not None
                decode(key, frame, out, layout)
            del frame
            times["read store and decode"].append(time.perf_counter() - start)
    large = arena.large_nbytes / (nbytes * batch * 2)
    for each in (plain, files, store, arena):
        each.close()
    return times, large


def _in_turn(names: list[str], number: int) -> list[str]:
    """The names, another one first each time."""
    first = number % len(names)
    return names[first:] + names[:first]


def _sparse(folder: Path, blocks: int, frame_nbytes: int) -> int:
    """A store of that many blocks whose headers are there and whose payloads are holes.

    Each names the one before it.
    """
    slot_nbytes = record_nbytes(frame_nbytes)
    segments = 256
    slots = -(-blocks // segments)
    (folder / "segments").mkdir(parents=True)
    page = memoryview(mmap.mmap(-1, PAGE))
    layout, (before,) = (
        _layout(32768),
        _keys(1 << 64, 1),
    )  # of frames only the first bytes are looked at
    block = memoryview(bytes(layout.nbytes))
    made = 0
    for number in range(1, segments + 1):
        shape = Shape(number, slot_nbytes, slots)
        fd = os.open(folder / "segments" / shape.name, os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(fd, shape.nbytes)
        file = SegmentFile(folder, shape, fd)
        for slot in range(min(slots, blocks - made)):
            (key,) = _keys(made, 1)
            head = encode(key, before, block, layout, RAW)[0]
            header = Header(number, slot, PAGE - len(head), made + 1, key, frame_nbytes, 0)
            page[: len(packed)] = (packed := header.pack())
            page[PAGE - len(head) :] = head
            before = key
            file.write(slot, [page])
            made += 1
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        file.close()
    return slot_nbytes * slots * segments


def _start(folder: Path, blocks: int, turns: int) -> list[float]:
    """Seconds to open a store of that many 2 MiB blocks."""
    capacity = _sparse(folder, blocks, 2 * MIB + HEADER_NBYTES)
    times = []
    for _ in range(turns):
        start = time.perf_counter()
        store = DiskStore(folder, capacity, requests=REQUESTS)
        times.append(time.perf_counter() - start)
        assert store.usage().blocks == len(store.take_before()) == blocks
        store.close()
    return times


def _churn(folder: Path, blocks: int, nbytes: int, writes: int, share: tuple[float, float]) -> dict:
    """A full store whose blocks go in any order: what is written for what was to be written.

    Frames take `share` of `nbytes`, as a codec leaves them.
    """
    rng = random.Random(1)
    data = memoryview(mmap.mmap(-1, nbytes))
    store = DiskStore(folder, blocks * record_nbytes(nbytes), requests=REQUESTS)
    held: list[BlockKey] = []
    fill = 0.0
    for (key,) in (_keys(n, 1) for n in range(writes)):
        parts = [data[: int(nbytes * rng.uniform(*share))]]
        while not store.write([(key, parts)])[0]:
            usage = store.usage()
            fill = max(fill, usage.frames / usage.capacity)
            at = rng.randrange(len(held))
            held[at], held[-1] = held[-1], held[at]
            store.delete([held.pop()])
        held.append(key)
    usage = store.usage()
    store.close()
    return {"write_amplification": usage.write_amplification, "moved": usage.moved,
            "accepted": usage.accepted, "most_filled": fill}  # fmt: skip


def run(*, tiny: bool) -> dict[str, object]:
    sizes = ((2 * MIB, 2, 2, 3),) if tiny else ((2 * MIB, 16, 12, 36), (16 * MIB, 4, 8, 24))
    times: dict[str, object] = {}
    bars: list[Bar] = []
    rates: dict[str, float] = {}
    of_files: dict[str, float] = {}
    large: dict[str, float] = {}
    with scratch() as folder:
        for nbytes, batch, batches, rounds in sizes:
            name = f"{nbytes // MIB} MiB"
            (folder / name).mkdir()
            each, large[name] = _throughput(folder / name, nbytes, batch, batches, rounds)
            times[name] = {what: summary(seconds) for what, seconds in each.items()}
            for what, seconds in each.items():
                rates[f"{name} {what} GB/s"] = nbytes * batch / sorted(seconds)[rounds // 2] / 1e9
            for what in ("write", "read"):
                ratio = paired_ratio(each[f"{what} store"], each[f"{what} plain"])
                bars.append(Bar(f"disk {what} {name}, in units of plain", ratio, at_least=0.8))
                of_files[f"{what} {name}"] = paired_ratio(
                    each[f"{what} store"], each[f"{what} files"]
                )
        blocks = 1000 if tiny else 100_000
        start = _start(folder / "start", blocks, 2 if tiny else 5)
        times["start"] = summary(start)
        bars.append(
            Bar(f"disk start over {blocks} blocks, s", statistics.median(start), at_most=5.0)
        )
        size = (16, 64 * 1024, 64) if tiny else (256, 2 * MIB, 1024)
        churn = {
            "blocks of one size": _churn(folder / "raw", *size, (1.0, 1.0)),
            "frames of 0.6 to 0.75": _churn(folder / "mixed", *size, (0.6, 0.75)),
        }
        for what, figures in churn.items():
            name, amplified = f"disk write amplification, {what}", figures["write_amplification"]
            bars.append(Bar(name, amplified, at_most=2.0 if tiny else 1.05))
    return {
        "requests_in_flight": REQUESTS,
        "blocks_of_a_batch": {f"{nbytes // MIB} MiB": batch for nbytes, batch, *_ in sizes},
        "gigabytes_per_second": rates,
        "share_of_the_arena_in_large_pages": large,
        "in_units_of_one_file_a_block": of_files,
        "churn": churn,
        "times": times,
        "bars": [bar.as_dict() for bar in bars],
    }
