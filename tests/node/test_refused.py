"""An engine that is refused lives on, and may be copying just then: its slots stay its own."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from kvtier.config import Config, HostConfig, NodeConfig
from kvtier.core.blocks import BlockLayout
from kvtier.core.ledger import Lease
from kvtier.engine.client import TierClient
from kvtier.node import connection
from kvtier.node.connection import Connection
from kvtier.node.daemon import NodeDaemon
from kvtier.node.manager import TierManager
from kvtier.node.reading import Reading
from kvtier.wire import local
from kvtier.wire.local import Op
from tests.launching import DEADLINE_S, Process, node_toml, wait_for
from tests.node.conftest import LAYOUT, new_keys, restore, save, status
from tests.node.test_hung_disk import until

AT_ONCE = "from kvtier.node import connection; connection.LINGER_S = 0.0"
ALL = 32  # blocks of the arena

# Says what it has, breaks the protocol, hears that it is refused, and copies on at each line.
SLOW = """
import sys
from kvtier.engine.client import TierClient
from kvtier.wire import local
from tests.node.conftest import BLOCK, LAYOUT, content
keys, path, way = {keys!r}, {path!r}, {way!r}
client = TierClient(path, LAYOUT, "slow")
def refused():
    client._socket.sendall(local.encode(99))
    while client._socket.recv(65536):
        pass
    print("refused", flush=True)
    sys.stdin.readline()
if way == "read":
    with client.read(keys) as lease:
        refused()
        for key, slot in zip(keys, lease.slots, strict=True):
            assert bytes(client.arena.slot(slot)) == content(key), "it restored a wrong block"
else:
    with client.write(keys) as lease:
        refused()
        for slot in lease.slots:
            client.arena.slot(slot)[:] = b"x" * BLOCK
        print("copied", flush=True)
        sys.stdin.readline()
"""


@contextmanager
def slow_engine(folder: Path, keys: list[bytes], way: str) -> Iterator["subprocess.Popen[str]"]:
    code = SLOW.format(keys=keys, path=f"{folder}/node.sock", way=way)
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert says(process, "refused")
            yield process
        finally:
            process.kill()


def says(process: "subprocess.Popen[str]", word: str) -> bool:
    assert process.stdout is not None
    return process.stdout.readline() == f"{word}\n"


def go_on(process: "subprocess.Popen[str]") -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def test_what_a_refused_engine_still_writes_is_in_nobodys_block(tmp_path: Path) -> None:
    with Process("node", node_toml(tmp_path, host="1MiB"), tmp_path, AT_ONCE) as node:
        other = TierClient(f"{tmp_path}/node.sock", LAYOUT)
        keys = new_keys(ALL)
        with slow_engine(tmp_path, [*new_keys(ALL // 2)], "write") as slow:
            for _ in range(10):  # the daemon has had its time to hang up
                status(node)
                save(other, keys)
            assert other.match(keys).blocks == ALL // 2, "there are but so many slots"
            go_on(slow)
            assert says(slow, "copied")
            restore(other, keys)
            assert status(node).layouts[0].leases == 1
        wait_for("its slots are free", lambda: status(node).layouts[0].leases == 0)
        save(other, keys)
        assert len(restore(other, keys)) == ALL
        other.close()


def test_what_a_refused_engine_still_reads_stays_where_it_is(tmp_path: Path) -> None:
    with Process("node", node_toml(tmp_path, host="1MiB"), tmp_path, AT_ONCE) as node:
        other = TierClient(f"{tmp_path}/node.sock", LAYOUT)
        keys = new_keys(ALL)
        assert save(other, keys) == ALL
        with slow_engine(tmp_path, [*keys], "read") as slow:
            for _ in range(10):
                status(node)
                assert save(other, new_keys(ALL)) == 0, "all are pinned"
            go_on(slow)
            assert slow.wait(DEADLINE_S) == 0
        wait_for("its slots are free", lambda: status(node).layouts[0].leases == 0)
        assert save(other, new_keys(ALL)) == ALL
        other.close()


def test_one_that_has_had_no_slots_is_hung_up_on(tmp_path: Path) -> None:
    """Strangers that never hang up take no place of an engine's."""
    with Process("node", node_toml(tmp_path), tmp_path, AT_ONCE) as node:
        code = f"""
import socket, sys
s = socket.socket(socket.AF_UNIX)
s.connect({str(tmp_path / "node.sock")!r})
s.sendall(b"\\xff" * 4)
while s.recv(65536):
    pass
print("refused", flush=True)
sys.stdin.readline()
"""
        with subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as stranger:
            assert says(stranger, "refused")
            wait_for("its place is free", lambda: status(node).clients == 0)
            stranger.kill()


# --- refused while something of it is under way ---------------------------------------

HELLO = local.encode(Op.HELLO, local.VERSION, LAYOUT.describe(), "test")
KEYS = local.pack_keys(new_keys(3))


class Staying(asyncio.Protocol):
    """Does not hang up when it is told why it should."""

    def eof_received(self) -> bool:
        return True


@asynccontextmanager
async def greeted(folder: Path) -> AsyncIterator[tuple[NodeDaemon, Connection, asyncio.Transport]]:
    """A daemon, the connection of an engine that has said hello, and the engine's end of it."""
    path = f"{folder}/node.sock"
    config = Config(node=NodeConfig(socket=path), host=HostConfig(bytes=2**20))
    node = NodeDaemon(config)
    await node.local.start()
    loop = asyncio.get_running_loop()
    engine, _ = await loop.create_unix_connection(Staying, path)
    try:
        async with asyncio.timeout(DEADLINE_S):
            await until("an engine", lambda: node.local.clients == 1)
            (it,) = node.local._gate.inside
            engine.write(HELLO)
            await until("its hello", lambda: it._task is not None or it.manager is not None)
            yield node, it, engine
    finally:
        engine.close()
        await node.close(0.0)


async def test_nobody_goes_on_listening_to_one_whose_read_ends_after_it_was_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its notes are not read any more, and were looked for 200 times a second until it left."""
    loaded, real = asyncio.Event(), TierManager.read

    async def read(self: TierManager, asked: Reading) -> Lease:
        await loaded.wait()
        result = real(self, asked)
        return result if isinstance(result, Lease) else await result

    monkeypatch.setattr(TierManager, "read", read)
    async with greeted(tmp_path) as (node, it, engine):
        await until("the tiers", lambda: node.layouts and it._task is None)
        engine.write(local.encode(Op.READ, KEYS, 0, 3, 0, 0, 0, 0, -1))
        await until("a read", lambda: it._task is not None)
        engine.write(local.encode(99))
        await until("a refusal", lambda: it._refused)
        loaded.set()
        await until("the end of the read", lambda: it._task is None)
        assert [manager.leases for manager in node.layouts.values()] == [1]
        assert not node.local._gate.hearing._pipes


async def test_one_that_is_refused_while_its_tiers_are_opened_is_a_stranger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It never had a slot, and would keep its place until it hangs up."""
    opened, real = asyncio.Event(), NodeDaemon.open_layout
    monkeypatch.setattr(connection, "LINGER_S", DEADLINE_S)

    async def open_layout(self: NodeDaemon, layout: BlockLayout) -> TierManager:
        await opened.wait()
        return await real(self, layout)

    monkeypatch.setattr(NodeDaemon, "open_layout", open_layout)
    async with greeted(tmp_path) as (node, it, engine):
        engine.write(local.encode(Op.MATCH, KEYS))
        await until("a refusal", lambda: it._refused)
        opened.set()
        await until("the end of the hello", lambda: it._task is None)
        (manager,) = node.layouts.values()
        assert not node.local.attached(manager)
        it._close_on_stranger()  # once it has had its time to read why
        await until("its place", lambda: node.local.clients == 0)
