"""A disk that hangs: its tier is left alone until it answers, and a daemon ends all the same."""

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from pathlib import Path

import pytest

from kvtier import metrics
from kvtier.arena import Arena
from kvtier.codec import codecs
from kvtier.config import Config, DiskConfig, HostConfig, NodeConfig
from kvtier.core.blocks import BlockKey, BlockLayout
from kvtier.core.ledger import Lease
from kvtier.core.tiers import Tier, TierSpec
from kvtier.engine.client import TierClient
from kvtier.errors import ConfigError, StoreUnavailable
from kvtier.node import daemon, opening
from kvtier.node.manager import TierManager
from kvtier.node.movers import FORGET_BLOCKS, LowerTier
from kvtier.node.reading import Reading
from kvtier.stores.base import Parts
from kvtier.stores.disk import DiskStore
from kvtier.stores.disk.files import Buffers, Folder, SegmentFile, Shape
from kvtier.stores.memory import MemoryStore
from tests.launching import DEADLINE_S, disk_toml, node_toml, wait_for
from tests.node.conftest import BLOCK, LAYOUT, content, new_keys, restore, save
from tests.node.test_arrivals import NEVER_S, at_rest

# `kvtier node` whose disk answers nothing, with shorter limits.
PROGRAM = """
import sys
import threading
from functools import partial
from kvtier.cli import main, serve
from kvtier.node import daemon, opening
from kvtier.stores.disk import DiskStore
from kvtier.stores.disk.files import Folder, SegmentFile

def hang(*_):
    print("hanging", file=sys.stderr, flush=True)
    threading.Event().wait()

class Hung(Folder):
    pass

serve._ENDS_WITHIN_S["node"] = 2.0
daemon.DRAIN_S = 0.5
if {where!r} == "start":
    Hung.shapes = hang
else:
    SegmentFile.write = hang
daemon.DiskStore = partial(DiskStore, open_folder=Hung)
sys.exit(main(["node", "--config", {config!r}]))
"""


def attached(folder: Path) -> TierClient:
    """An engine's connection, as soon as the daemon listens: a socket's file is there before."""
    found: list[TierClient] = []

    def tried() -> bool:
        with suppress(ConfigError):
            found.append(TierClient(f"{folder}/node.sock", LAYOUT, "test"))
        return bool(found)

    wait_for("a daemon that listens", tried)
    return found[0]


@pytest.mark.parametrize("where", ["start", "probe", "save"])
def test_a_daemon_whose_disk_hangs_ends_when_it_is_told_to(tmp_path: Path, where: str) -> None:
    config, log, program = (tmp_path / name for name in ("kvtier.toml", "log", "program.py"))
    codec = 'codec = "auto"' if where == "probe" else ""
    config.write_text(node_toml(tmp_path, more=disk_toml(tmp_path) + codec))
    program.write_text(PROGRAM.format(where=where, config=str(config)))
    if where == "start":  # as an earlier life left it
        folder = tmp_path / "disk" / LAYOUT.id
        folder.mkdir(parents=True)
        (folder / "layout.json").write_text(LAYOUT.describe())
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, str(program)], stdout=subprocess.DEVNULL, stderr=out
        )
    try:
        if where != "start":
            with closing(attached(tmp_path)) as client:
                assert save(client, new_keys(4)) == 4
        wait_for("a call that hangs", lambda: "hanging" in log.read_text())
        process.terminate()
        assert process.wait(DEADLINE_S) == 1
        assert "ended as it is" in log.read_text()
    finally:
        process.kill()
        process.wait()


def test_one_that_cannot_even_say_so_ends_as_well(tmp_path: Path) -> None:
    """Its log goes to where nobody reads any more, such as a file on that very disk."""
    config, program = tmp_path / "kvtier.toml", tmp_path / "program.py"
    config.write_text(node_toml(tmp_path, more=disk_toml(tmp_path)))
    program.write_text(PROGRAM.format(where="save", config=str(config)))
    read, write = os.pipe()
    process = subprocess.Popen(
        [sys.executable, str(program)], stdout=subprocess.DEVNULL, stderr=write
    )
    try:
        with closing(attached(tmp_path)) as client:
            assert save(client, new_keys(4)) == 4
        said = b""
        while b"hanging" not in said:
            said += os.read(read, 4096)
        full = os.open(f"/proc/self/fd/{write}", os.O_WRONLY | os.O_NONBLOCK)
        for size in (4096, 1):
            with suppress(BlockingIOError):
                while os.write(full, b"x" * size):
                    pass
        os.close(full)
        process.terminate()
        assert process.wait(DEADLINE_S) == 1
    finally:
        process.kill()
        process.wait()
        os.close(read)
        os.close(write)


# `kvtier node` whose loop gets stuck in a log that nobody reads, with a shorter limit.
STUCK = """
import os
import sys
from kvtier.cli import main, serve
from kvtier.node.manager import TierManager

read, write = os.pipe()
os.set_blocking(write, False)
try:
    while True:
        os.write(write, bytes(4096))
except BlockingIOError:
    os.set_blocking(write, True)

def commit(*_):
    sys.stderr.write("stuck\\n")
    sys.stderr.flush()
    os.write(write, bytes(4096))

serve._ENDS_WITHIN_S["node"] = 2.0
TierManager.commit = commit
sys.exit(main(["node", "--config", {config!r}]))
"""


def test_one_whose_loop_is_stuck_before_it_is_told_ends_as_well(tmp_path: Path) -> None:
    config, log, program = (tmp_path / name for name in ("kvtier.toml", "log", "program.py"))
    config.write_text(node_toml(tmp_path, more=disk_toml(tmp_path)))
    program.write_text(STUCK.format(config=str(config)))
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, str(program)], stdout=subprocess.DEVNULL, stderr=out
        )
    try:
        with closing(attached(tmp_path)) as client:
            save(client, new_keys(4))
            wait_for("a loop that is stuck", lambda: "stuck" in log.read_text())
            process.terminate()
            assert process.wait(DEADLINE_S) == 1
        assert "ended as it is" in log.read_text()
    finally:
        process.kill()
        process.wait()


# --- a tier that is left alone --------------------------------------------------------

SLOTS = 16
THREADS = 2
PATH = [BlockKey(bytes([9, i]) * 8) for i in range(5)]


class Hanging(MemoryStore):
    """Calls named in `hangs` end only once `gate` is open; `away` is raised by a probe."""

    def __init__(self) -> None:
        super().__init__(1 << 30)
        self.hangs: set[str] = set()
        self.gate = threading.Event()
        self.inside = 0
        self.probes = 0
        self.away = False
        self.failing = False
        self.counting = threading.Event()
        self.counting.set()
        self.lock = threading.Lock()

    @contextmanager
    def call(self, name: str) -> Iterator[None]:
        if name in self.hangs:
            with self.lock:
                self.inside += 1
            assert self.gate.wait(DEADLINE_S)
        yield

    def read(self, keys: Sequence[BlockKey]) -> list[bytes | memoryview | None]:
        with self.call("read"):
            return super().read(keys)

    def write(self, frames: Sequence[tuple[BlockKey, Parts]]) -> list[bool]:
        with self.call("write"):
            if self.failing:
                raise StoreUnavailable("the disk gives errors now")
            return super().write(frames)

    def count(self, keys: Sequence[BlockKey]) -> int:
        assert self.counting.wait(DEADLINE_S)
        return super().count(keys)

    def probe(self) -> None:
        self.probes += 1
        with self.call("probe"):
            if self.away:
                raise StoreUnavailable("the disk gives errors now")


def fill(manager: TierManager, keys: Sequence[BlockKey]) -> int:
    lease = manager.write(1, keys, 0)
    for key, slot in zip(lease.keys, lease.slots, strict=True):
        manager.arena.slot(slot)[:BLOCK] = content(key)
    manager.commit(lease.id, len(lease.keys))
    return len(lease.keys)


async def read(manager: TierManager, keys: Sequence[BlockKey]) -> int:
    """How many blocks come, every byte of them right. Only a tier that hangs makes it wait."""
    result = manager.read(Reading(1, keys, 0, len(keys), NEVER_S))
    lease = result if isinstance(result, Lease) else await result
    for key, slot in zip(lease.keys, lease.slots, strict=True):
        assert bytes(manager.arena.slot(slot)) == content(key)
    count = len(lease.keys)
    manager.release(lease.id)
    return count


def answers(manager: TierManager) -> bool:
    return manager.usage()[1][2]


async def until(what: str, condition: object) -> None:
    assert callable(condition)
    while not condition():  # noqa: ASYNC110 - the deadline is that of the test
        await asyncio.sleep(0.005)


def hung() -> float:
    return metrics.STORE_HUNG.labels("disk")._value.get()


@asynccontextmanager
async def noded(store: Hanging | None = None) -> AsyncIterator[tuple[TierManager, Hanging]]:
    specs = [
        TierSpec(tier=Tier.HOST, capacity=SLOTS * BLOCK, drain_at=0),
        TierSpec(tier=Tier.DISK, capacity=80 * BLOCK, drain_at=80 * BLOCK),
    ]
    store = store or Hanging()
    lower = [LowerTier(Tier.DISK, store, codecs.RAW, THREADS, 0.02, hung_s=2.0)]
    manager = TierManager(LAYOUT, Arena.create(BLOCK, SLOTS), specs, lower, lambda _: None)
    await manager.start()
    try:
        async with asyncio.timeout(DEADLINE_S):
            yield manager, store
    finally:
        store.gate.set()
        await manager.close()


async def test_who_waits_for_a_disk_that_hangs_is_let_go_and_nobody_else_waits() -> None:
    before = hung()
    async with noded() as (manager, store):
        fill(manager, PATH)
        await at_rest(manager)
        manager.clear(Tier.HOST)
        store.hangs = {"read"}
        assert await read(manager, PATH) == 0  # long before its own deadline
        assert not answers(manager)
        assert hung() - before == 1
        assert store.inside <= THREADS
        for _ in range(3):
            assert await read(manager, PATH) == 0
        assert store.inside <= THREADS, "a disk that hangs is asked again"
        # What it has is known elsewhere soon: an engine computes it and saves it.
        assert fill(manager, PATH) == len(PATH)
        assert await read(manager, PATH) == len(PATH)
        store.hangs = set()
        store.gate.set()
        await until("an answer", lambda: answers(manager))
        await at_rest(manager)
        assert await read(manager, PATH) == len(PATH)
        manager.clear(Tier.HOST)
        assert await read(manager, PATH) == len(PATH)
        await at_rest(manager)
        manager.clear(Tier.HOST)
        assert fill(manager, new_keys(SLOTS)) == SLOTS, "a slot was lost"
        assert hung() - before == 1


async def test_what_lies_in_host_memory_stays_while_copies_down_hang() -> None:
    async with noded() as (manager, store):
        store.hangs = {"write"}
        fill(manager, PATH)
        await until("a pause", lambda: not answers(manager))
        assert store.inside <= THREADS
        assert await read(manager, PATH) == len(PATH)
        assert fill(manager, new_keys(SLOTS)) >= SLOTS - len(PATH)  # what no call has is let go
        store.hangs = set()
        store.gate.set()
        await until("an answer", lambda: answers(manager))
        await at_rest(manager)
        manager.clear(Tier.HOST)
        assert fill(manager, new_keys(SLOTS)) == SLOTS, "a slot was lost"


async def test_a_disk_that_hung_is_used_again_only_once_it_does_io() -> None:
    """Its index would answer at once, and the next load would hang again."""
    async with noded() as (manager, store):
        fill(manager, PATH)
        await at_rest(manager)
        manager.clear(Tier.HOST)
        store.hangs = {"read"}
        assert await read(manager, PATH) == 0
        asked = store.probes
        store.away = True
        store.gate.set()
        await until("two probes", lambda: store.probes >= asked + 2)
        assert not answers(manager)
        store.away = False
        await until("an answer", lambda: answers(manager))
        store.hangs = set()
        assert await read(manager, PATH) == len(PATH)


# The same of a real disk store in a daemon: reads hang as long as a file is there.
FLAGGED = """
import sys
import time
from pathlib import Path
from kvtier.cli import main
from kvtier.stores.disk.files import Folder, SegmentFile

flag, real, probe = Path({flag!r}), SegmentFile.read, Folder.probe

def read(*args):
    while flag.exists():
        time.sleep(0.01)
    return real(*args)

SegmentFile.read = read
sys.exit(main(["node", "--config", {config!r}]))
"""


def test_a_daemon_goes_on_without_a_disk_that_hangs_and_comes_back_to_it(tmp_path: Path) -> None:
    config, log, program, flag = (
        tmp_path / name for name in ("kvtier.toml", "log", "program.py", "flag")
    )
    config.write_text(node_toml(tmp_path, more=disk_toml(tmp_path) + "hung_s = 1.0"))
    program.write_text(FLAGGED.format(flag=str(flag), config=str(config)))
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, str(program)], stdout=subprocess.DEVNULL, stderr=out
        )
    try:
        with closing(attached(tmp_path)) as client:
            keys, more = new_keys(20), new_keys(128)  # an arena of 128 blocks
            assert save(client, keys) == 20
            wait_for("copies", lambda: _saved_over(client, keys, more))
            flag.touch()
            assert restore(client, keys, wait_s=60.0) == []
            assert "disk tier: it hangs" in log.read_text()
            assert restore(client, more[:1]) == [Tier.HOST]  # a path gives way from its end
            flag.unlink()
            wait_for("an answer", lambda: "disk tier answers again" in log.read_text())
            wait_for("its blocks", lambda: len(restore(client, keys)) == 20)
        process.terminate()
        assert process.wait(DEADLINE_S) == 0
    finally:
        process.kill()
        process.wait()


def _saved_over(client: TierClient, keys: Sequence[BlockKey], more: Sequence[BlockKey]) -> bool:
    """Whether `keys` lie on the disk alone, once `more` have taken their place."""
    save(client, more)
    restore(client, more)  # what of them has given way to others of them, while `keys` had to stay
    found, there = client.match(keys), client.match(more).by_tier[Tier.HOST]
    return found.by_tier[Tier.HOST] == 0 and found.blocks == len(keys) and there == len(more)


async def test_an_answer_to_what_was_asked_before_it_hung_does_not_do() -> None:
    """It comes from the index, which hangs no more than a second."""
    before = hung()
    async with noded() as (manager, store):
        other = [BlockKey(bytes([8, i]) * 8) for i in range(5)]
        fill(manager, PATH)
        fill(manager, other)
        await at_rest(manager)
        manager.clear(Tier.HOST)
        store.hangs = {"read"}
        reads = [asyncio.create_task(read(manager, path)) for path in (PATH, other)]
        await until("no thread to ask anything", lambda: store.inside == THREADS)
        store.failing = True
        fill(manager, new_keys(1))
        await until("a pause and a question that waits", lambda: not answers(manager))
        await until("that it hangs", lambda: hung() > before)
        assert await asyncio.gather(*reads) == [0, 0]
        store.failing, store.hangs, asked = False, set(), store.probes
        store.counting.clear()
        store.gate.set()
        await until("that no call hangs", lambda: not manager._outages._hung)
        store.counting.set()
        await until("an answer", lambda: answers(manager))
        assert store.probes > asked, "it was used again without any I/O"


async def test_many_blocks_are_deleted_by_many_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """A start may find a disk full of old frames: one call for all of them would seem to hang."""
    calls: list[int] = []
    real = MemoryStore.delete

    def delete(self: MemoryStore, keys: Sequence[BlockKey]) -> None:
        calls.append(len(keys))
        if len(calls) == 2:
            raise StoreUnavailable("one of them could not be erased")
        real(self, keys)

    monkeypatch.setattr(MemoryStore, "delete", delete)
    old = new_keys(4 * FORGET_BLOCKS - 1)
    store = Hanging()
    assert all(store.write([(key, [b"KVTF\x01"]) for key in old]))
    async with noded(store) as (manager, _):
        await until("the calls", lambda: sum(calls) == len(old))
        assert max(calls) == FORGET_BLOCKS
        await until("the last call", lambda: len([*store.scan()]) == FORGET_BLOCKS)
        assert fill(manager, PATH) == len(PATH)
        await at_rest(manager)


# --- a layout that gives way ----------------------------------------------------------


OTHER = BlockLayout(LAYOUT.groups, 32, LAYOUT.dtype)


@asynccontextmanager
async def full(
    folder: Path, monkeypatch: pytest.MonkeyPatch, layouts: int
) -> AsyncIterator[tuple[daemon.NodeDaemon, threading.Event]]:
    """A daemon whose disk hangs in a write of LAYOUT's, until the event; it may have so many."""
    gate, inside = threading.Event(), threading.Event()
    real = SegmentFile.write

    def write(self: SegmentFile, slot: int, buffers: Buffers) -> None:
        inside.set()
        assert gate.wait(DEADLINE_S)
        real(self, slot, buffers)

    monkeypatch.setattr(SegmentFile, "write", write)
    monkeypatch.setattr(daemon, "DRAIN_S", 0.05)
    monkeypatch.setattr(daemon, "CLOSE_S", 0.05)
    config = Config(
        node=NodeConfig(socket=f"{folder}/node.sock", max_layouts=layouts),
        host=HostConfig(bytes=SLOTS * BLOCK, drain_at=0.0),
        disk=DiskConfig(path=f"{folder}/disk", bytes=64 << 20, drain_at=0.0),
    )
    node = daemon.NodeDaemon(config)
    try:
        async with asyncio.timeout(DEADLINE_S):
            fill(await node.open_layout(LAYOUT), PATH)
            await until("a call that hangs", inside.is_set)
            yield node, gate
    finally:
        gate.set()
        await node.close(0.0)


async def test_a_layout_that_gave_way_and_hangs_takes_no_place_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder is its own until it has closed: another's place would not help it."""
    async with full(tmp_path, monkeypatch, 2) as (node, gate):
        await node.open_layout(OTHER)
        third = BlockLayout(LAYOUT.groups, 48, LAYOUT.dtype)
        with pytest.raises(ConfigError, match="one that gives way"):
            await node.open_layout(third)
        for _ in range(2):
            with pytest.raises(ConfigError, match="one that gives way"):
                await node.open_layout(LAYOUT)
            assert [*node.layouts] == [OTHER.id]
        gate.set()
        await until("the end of the first", lambda: not node._closing)
        assert fill(await node.open_layout(LAYOUT), new_keys(3)) == 3


async def test_a_layout_whose_disk_hangs_does_not_keep_others_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with full(tmp_path, monkeypatch, 1) as (node, gate):
        for wanted in (OTHER, OTHER, LAYOUT):
            with pytest.raises(ConfigError, match=r"max_layouts \(1\); one that gives way"):
                await node.open_layout(wanted)
        gate.set()
        await until("the end of the first", lambda: not node._closing)
        monkeypatch.setattr(daemon, "CLOSE_S", DEADLINE_S)
        for wanted in (OTHER, LAYOUT):
            assert fill(await node.open_layout(wanted), new_keys(3)) == 3


async def test_a_layout_whose_disk_hangs_as_it_is_opened_keeps_no_other_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    real = Folder.shapes

    def shapes(self: Folder) -> list[Shape]:
        assert self.path.name != LAYOUT.id or gate.wait(DEADLINE_S)
        return real(self)

    monkeypatch.setattr(Folder, "shapes", shapes)
    config = Config(
        node=NodeConfig(socket=f"{tmp_path}/node.sock", max_layouts=2),
        host=HostConfig(bytes=SLOTS * BLOCK, drain_at=0.0),
        disk=DiskConfig(path=f"{tmp_path}/disk", bytes=64 << 20, drain_at=0.0),
    )
    node = daemon.NodeDaemon(config)
    try:
        async with asyncio.timeout(DEADLINE_S):
            with monkeypatch.context() as patch:
                patch.setattr(opening, "OPEN_S", 0.05)
                with pytest.raises(ConfigError, match=f"{LAYOUT.id} is not open after 0.05 s"):
                    await node.open_layout(LAYOUT)
            assert fill(await node.open_layout(OTHER), new_keys(3)) == 3
            with pytest.raises(ConfigError, match=f"{LAYOUT.id} is not open after"):
                await node.open_layout(LAYOUT)  # at once: nobody else waits behind it
            gate.set()
            await until("it to open", lambda: LAYOUT.id in node.layouts)
            assert fill(await node.open_layout(LAYOUT), new_keys(3)) == 3
            assert {*node.layouts} == {LAYOUT.id, OTHER.id}
    finally:
        gate.set()
        await node.close(0.0)


async def test_a_daemon_that_closes_waits_for_what_it_still_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What that has opened is closed, too: another daemon may use the folder then."""
    gate = threading.Event()
    real = Folder.shapes

    def shapes(self: Folder) -> list[Shape]:
        assert gate.wait(DEADLINE_S)
        return real(self)

    monkeypatch.setattr(Folder, "shapes", shapes)
    monkeypatch.setattr(opening, "OPEN_S", 0.05)
    path = tmp_path / "disk"
    config = Config(
        node=NodeConfig(socket=f"{tmp_path}/node.sock"),
        host=HostConfig(bytes=SLOTS * BLOCK, drain_at=0.0),
        disk=DiskConfig(path=str(path), bytes=64 << 20, drain_at=0.0),
    )
    node = daemon.NodeDaemon(config)
    async with asyncio.timeout(DEADLINE_S):
        with pytest.raises(ConfigError, match="is not open"):
            await node.open_layout(LAYOUT)
        closing = asyncio.create_task(node.close(0.0))
        asyncio.get_running_loop().call_soon(gate.set)
        await closing
    assert not node.layouts
    DiskStore(path / LAYOUT.id, 64 << 20).close()
