"""COMMIT and RELEASE wake nobody, and yet nobody sees the world as it was before them."""

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import grpc
import pytest

from kvtier.core.blocks import BlockKey
from kvtier.core.tiers import Tier
from kvtier.engine.client import TierClient
from kvtier.errors import ArenaLost, RemoteProtocolError
from kvtier.testing.valkey import ValkeyServer
from kvtier.wire import local
from kvtier.wire.pb import feed_pb2, feed_pb2_grpc, node_pb2, node_pb2_grpc
from tests.launching import Process, disk_toml, node_toml, redis_toml, wait_for
from tests.node.conftest import LAYOUT, blocks, content, new_keys, restore, save, status

PAGE = 4096


def connect(folder: Path) -> TierClient:
    return TierClient(f"{folder}/node.sock", LAYOUT)


def test_what_one_engine_has_committed_the_next_request_of_any_engine_finds(tmp_path: Path) -> None:
    with Process("node", node_toml(tmp_path), tmp_path):
        one, two = connect(tmp_path), connect(tmp_path)
        for _ in range(50):
            keys = new_keys(2)
            assert save(one, keys) == 2
            assert two.match(keys).blocks == 2
            assert restore(two, keys) == [Tier.HOST] * 2
        one.close()
        two.close()


def test_slots_that_one_engine_has_released_another_can_have_at_once(tmp_path: Path) -> None:
    with Process("node", node_toml(tmp_path, host="1MiB"), tmp_path):  # 32 blocks
        one, two = connect(tmp_path), connect(tmp_path)
        for _ in range(20):
            keys = new_keys(32)
            assert save(one, keys) == 32
            with one.read(keys) as lease:
                assert save(two, new_keys(1)) == 0, "all are pinned"
                assert len(lease.slots) == 32
            assert save(two, new_keys(32)) == 32
        one.close()
        two.close()


@pytest.mark.parametrize("commits", [True, False])
def test_an_engine_killed_after_its_copy_has_saved_what_it_committed(
    tmp_path: Path, commits: bool
) -> None:
    keys = new_keys(3)
    end = "lease.filled = 3" if commits else "os.kill(os.getpid(), 9)"
    code = f"""
import os
from kvtier.engine.client import TierClient
from tests.node.conftest import LAYOUT, content
keys = {keys!r}
client = TierClient({str(tmp_path / "node.sock")!r}, LAYOUT)
with client.write(keys) as lease:
    for index, slot in zip(lease.indexes, lease.slots):
        client.arena.slot(slot)[:] = content(keys[index])
    {end}
os.kill(os.getpid(), 9)
"""
    with Process("node", node_toml(tmp_path), tmp_path) as node:
        done = subprocess.run([sys.executable, "-c", code], timeout=120, check=False)
        assert done.returncode == -signal.SIGKILL
        wait_for("the engine is gone", lambda: status(node).clients == 0)
        assert status(node).layouts[0].leases == 0
        client = connect(tmp_path)
        assert restore(client, keys) == [Tier.HOST] * 3 * commits
        assert blocks(node)[Tier.HOST] == 3 * commits, "the slots of an abandoned write are free"
        client.close()


def test_a_drain_takes_along_what_was_committed_before_it(tmp_path: Path) -> None:
    toml = node_toml(tmp_path, more=disk_toml(tmp_path)).replace("drain_at = 0.0", "drain_at = 1.0")
    with Process("node", toml, tmp_path) as node:
        client = connect(tmp_path)
        with grpc.insecure_channel(node.address) as channel:
            stub = node_pb2_grpc.NodeStub(channel)
            for count in range(1, 6):
                save(client, new_keys(2))
                request = node_pb2.NodeDrainRequest(deadline_s=60, stay=True)
                assert stub.Drain(request, timeout=90).undrained_blocks == 0
                assert blocks(node)[Tier.DISK] == 2 * count
        client.close()


def test_routers_hear_of_a_commit_that_no_request_follows(tmp_path: Path) -> None:
    with Process("node", node_toml(tmp_path), tmp_path) as node:
        client = connect(tmp_path)
        with grpc.insecure_channel(node.address) as channel:
            feed = feed_pb2_grpc.FeedStub(channel).Watch(feed_pb2.WatchRequest(), timeout=120)
            assert _told(feed, ()) == set()
            keys = new_keys(3)
            save(client, keys)
            assert _told(feed, keys) >= set(keys)
            feed.cancel()
        client.close()


def _told(feed: grpc.Call, wanted: Sequence[BlockKey]) -> set[bytes]:
    """The blocks that came, read until all that are `wanted` have; at first, the snapshot's."""
    told: set[bytes] = set()
    for message in feed:
        news = message.snapshot.held if message.HasField("snapshot") else message.delta.added
        for each in news:
            told |= {each.keys[at : at + 16] for at in range(0, len(each.keys), 16)}
        if told.issuperset(wanted) and (wanted or message.snapshot.last):
            return told
    raise AssertionError("the feed ended")


def test_more_words_than_the_pipe_holds_are_heard_in_order(tmp_path: Path) -> None:
    with Process("node", node_toml(tmp_path), tmp_path) as node:
        client = connect(tmp_path)
        fcntl.fcntl(client._notes, fcntl.F_SETPIPE_SZ, PAGE)
        keys = new_keys(1)
        save(client, keys)
        with ExitStack() as leases:
            for _ in range(600):
                leases.enter_context(client.read(keys))
            assert status(node).layouts[0].leases == 600
            os.kill(node.pid, signal.SIGSTOP)  # or it would read between
        os.kill(node.pid, signal.SIGCONT)
        assert client.match(keys).blocks == 1
        assert status(node).layouts[0].leases == 0
        assert restore(client, keys) == [Tier.HOST]
        client.close()


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"\xff\xff\xff\xff", "limit"),
        (local.encode(local.Op.MATCH, b""), "MATCH has an answer"),
        (local.encode(local.Op.COMMIT, 1 << 40, 0), "which is not open"),
    ],
)
def test_words_without_sense_end_that_engine_only(tmp_path: Path, raw: bytes, said: str) -> None:
    with Process("node", node_toml(tmp_path), tmp_path) as node:
        good, bad = connect(tmp_path), connect(tmp_path)
        keys, others = new_keys(2), new_keys(2)
        save(good, keys)
        with good.read(keys) as lease, suppress(ArenaLost), bad.write(others):
            os.write(bad._notes, raw)
            with pytest.raises(RemoteProtocolError, match=said):
                bad.match(keys)
            assert [bytes(good.arena.slot(slot)) for slot in lease.slots] == [*map(content, keys)]
        wait_for("the bad one is gone", lambda: status(node).clients == 1)
        assert good.match(others).blocks == 0
        assert status(node).layouts[0].leases == 0
        assert restore(good, keys) == [Tier.HOST] * 2
        good.close()
        bad.close()


def test_an_engine_that_comes_and_goes_leaves_no_descriptor(tmp_path: Path) -> None:
    with Process("node", node_toml(tmp_path), tmp_path) as node:
        connect(tmp_path).close()
        wait_for("the first is gone", lambda: status(node).clients == 0)
        before, ours = shared_fds(node.pid), shared_fds(os.getpid())
        for _ in range(10):
            client = connect(tmp_path)
            save(client, new_keys(1))
            client.close()
            del client  # a mapping goes with its last view
        wait_for("all are gone", lambda: status(node).clients == 0)
        wait_for("their descriptors", lambda: shared_fds(node.pid) <= before)
        assert shared_fds(os.getpid()) <= ours


def shared_fds(pid: int) -> int:
    """The pipes and arenas that a process has open."""
    found = 0
    for each in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # the one that lists them
            found += str(each.readlink()).startswith(("pipe:", "/memfd:kvtier-arena"))
    return found


def test_a_lease_may_end_by_the_socket_while_a_read_waits(
    tmp_path: Path, valkey: ValkeyServer
) -> None:
    toml = node_toml(tmp_path, more=redis_toml(valkey.url))
    with Process("node", toml, tmp_path) as node:
        client = connect(tmp_path)
        keys = new_keys(2)
        assert save(client, keys) == 2
        pipe, full = client._notes, os.pipe2(os.O_NONBLOCK)
        with suppress(BlockingIOError):
            while True:
                os.write(full[1], bytes(PAGE))
        os.kill(valkey.pid, signal.SIGSTOP)
        try:
            with client.read(keys[:1], wait_s=0.0):
                # The shared store is asked for the unknown one, and does not answer.
                asked = client.read([*keys, *new_keys(1)], wait_s=60.0)
                client._notes = full[1]
            client._notes = pipe
            wait_for("the lease to end", lambda: status(node).layouts[0].leases == 0)
        finally:
            os.kill(valkey.pid, signal.SIGCONT)
        with asked as lease:
            assert lease.arrived == 2
        assert restore(client, keys) == [Tier.HOST] * 2
        client.close()
        for fd in full:
            os.close(fd)


def test_a_request_before_the_answer_to_another_ends_the_connection(tmp_path: Path) -> None:
    with Process("node", node_toml(tmp_path), tmp_path) as node:
        client = connect(tmp_path)
        keys = new_keys(2)
        save(client, keys)
        client.read(keys)  # asked for, and dropped
        with pytest.raises(ArenaLost, match="MATCH while an earlier request has no answer"):
            client.match(keys)
        wait_for("the lease to end", lambda: status(node).layouts[0].leases == 0)
        other = connect(tmp_path)
        assert restore(other, keys) == [Tier.HOST] * 2
        other.close()
