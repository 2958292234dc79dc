"""An engine that is refused lives on, and may be copying just then: its slots stay its own."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvtier.engine.client import TierClient
from tests.launching import DEADLINE_S, Process, node_toml, wait_for
from tests.node.conftest import LAYOUT, new_keys, restore, save, status

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
