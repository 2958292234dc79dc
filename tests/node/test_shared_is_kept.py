"""What is shared is no node's to delete: two real daemons on a real server, and damaged blocks."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import grpc
import pytest
import redis

from kvtier.codec import frame
from kvtier.core.blocks import BlockKey
from kvtier.core.tiers import Tier
from kvtier.engine.client import TierClient
from kvtier.node.doubts import Doubts
from kvtier.stores.redis.resp import ENVELOPE_NBYTES
from kvtier.testing.stores import key
from kvtier.testing.valkey import ValkeyServer
from kvtier.wire.pb import node_pb2, node_pb2_grpc
from tests.launching import Process, disk_toml, node_toml, redis_toml, wait_for
from tests.node.conftest import LAYOUT, blocks, new_keys, restore, save, status, wait_for_blocks

REMOVING = ("del", "unlink", "getdel", "expireat", "pexpire", "flushdb", "flushall", "rename")


class Node:
    """A daemon, and an engine's connection to it."""

    def __init__(self, folder: Path, more: str) -> None:
        folder.mkdir()
        self.socket = f"{folder}/node.sock"
        self.process = Process("node", node_toml(folder, host="1MiB", more=more), folder)
        self.client = TierClient(self.socket, LAYOUT, "test")

    def restart(self) -> None:
        """What lay in host memory is gone."""
        self.client.close()
        self.process.kill()
        self.process.restart()
        self.client = TierClient(self.socket, LAYOUT, "test")

    def counter(self, name: str) -> float:
        return status(self.process).counters.get(f"kvtier_{name}_total", 0)

    def clear(self, tier: Tier) -> None:
        with grpc.insecure_channel(self.process.address) as channel:
            stub = node_pb2_grpc.NodeStub(channel)
            stub.Clear(node_pb2.NodeClearRequest(tiers=[tier + 1]), timeout=10)

    def emptied(self, tier: Tier) -> bool:
        """Clear it; whether nothing was in use or on its way."""
        self.clear(tier)
        return blocks(self.process)[tier] == 0

    def close(self) -> None:
        self.client.close()
        self.process.__exit__()


@pytest.fixture
def nodes(tmp_path: Path, valkey: ValkeyServer) -> Iterator[list[Node]]:
    with ExitStack() as stack:
        yield [
            stack.enter_context(closing(Node(tmp_path / name, patient(valkey)))) for name in "ab"
        ]


def patient(valkey: ValkeyServer) -> str:
    """A busy machine is no reason for a miss."""
    return redis_toml(valkey.url, 60.0)


def restored(node: Node, keys: Sequence[BlockKey]) -> list[Tier]:
    return restore(node.client, keys, wait_s=60.0)


def stored_at(key: BlockKey) -> str:
    return f"kvtier:3:main:{LAYOUT.id}:{{{key.hex()}}}"


def value_of(admin: redis.Redis, key: BlockKey) -> bytes:
    value = admin.get(stored_at(key))
    assert isinstance(value, bytes)
    return value


def removed(admin: redis.Redis) -> list[str]:
    """Commands that take values away, of those that the server was ever sent."""
    done = admin.info("commandstats")
    return [name for name in REMOVING if f"cmdstat_{name}" in done]


@pytest.mark.parametrize(
    ("damage", "counted"), [("bit", "corrupt_frames_total_shared"), ("part", "redis_incomplete")]
)
def test_a_damaged_shared_block_is_a_miss_a_node_until_one_writes_it_again(
    nodes: list[Node], valkey: ValkeyServer, damage: str, counted: str
) -> None:
    a, b = nodes
    keys = new_keys(6)
    counted = counted.removesuffix("_total_shared")

    def count(node: Node) -> float:
        counters = status(node.process).counters
        return counters[f"kvtier_{counted}_total" + ("_shared" if damage == "bit" else "")]

    with redis.Redis.from_url(valkey.url, protocol=2) as admin:
        assert save(a.client, keys) == 6
        wait_for_blocks(a.process, Tier.SHARED, 6)
        a.restart()
        good = value_of(admin, keys[3])
        damaged = bytearray(good)
        damaged[ENVELOPE_NBYTES + 1000] ^= 1
        wrong = bytes(damaged) if damage == "bit" else b"no part of a block"
        admin.set(stored_at(keys[3]), wrong, keepttl=True)

        for _ in range(3):  # found out once, then known; what comes before it is there
            assert len(restored(b, keys)) == 3
            assert count(b) == 1
        assert len(restored(a, keys)) == 3
        assert count(a) == 1, "each node finds out by itself"
        assert value_of(admin, keys[3]) == wrong, "what is shared was removed"
        assert admin.dbsize() == 6

        assert save(b.client, keys) >= 1, "what an engine computed again is wanted"
        wait_for("the right bytes", lambda: value_of(admin, keys[3]) != wrong)
        frame.verify(keys[3], value_of(admin, keys[3])[ENVELOPE_NBYTES:], LAYOUT.id)
        wait_for("a count of it", lambda: b.counter("corrupt_rewritten") == 1)
        b.restart()
        assert restored(b, keys) == [Tier.SHARED] * 6, "it is no miss any more"

        # The other node still takes it for damaged: until its own engine has computed it.
        assert len(restored(a, keys)) == 3
        assert save(a.client, keys) >= 1
        wait_for("the other's right bytes", lambda: a.counter("corrupt_rewritten") == 1)
        wait_for("an empty host tier", lambda: a.emptied(Tier.HOST))
        assert restored(a, keys) == [Tier.SHARED] * 6
        assert removed(admin) == []


def test_nothing_that_a_node_does_removes_what_is_shared(
    tmp_path: Path, valkey: ValkeyServer
) -> None:
    """Full tiers, cleared ones, a death and an end: all 120 blocks stay."""
    more = disk_toml(tmp_path, "1MiB") + patient(valkey) + 'bytes = "2MiB"\n'
    prompts: Sequence[list[BlockKey]] = [new_keys(10) for _ in range(12)]
    with redis.Redis.from_url(valkey.url, protocol=2) as admin:
        node = Node(tmp_path / "n", more)
        try:
            for number, prompt in enumerate(prompts, 1):  # 64 blocks fit in what it tracks
                assert save(node.client, prompt) == 10
                wait_for("all shared", lambda most=10 * number: admin.dbsize() == most)
            assert blocks(node.process)[Tier.SHARED] <= 64
            for tier in (Tier.DISK, Tier.HOST):  # the shared one cannot even be named
                node.clear(tier)
            for prompt in prompts:
                assert len(restored(node, prompt)) == 10
            node.restart()
            for prompt in prompts:
                assert len(restored(node, prompt)) == 10
        finally:
            node.client.close()
            assert node.process.terminate() == 0
        assert admin.dbsize() == 120
        assert removed(admin) == []


def test_what_is_doubted_is_bounded_and_the_oldest_is_forgotten() -> None:
    doubts = Doubts(3)
    keys = [key(n) for n in range(6)]
    assert doubts.leading(keys) == keys
    for each in keys[:5]:
        doubts.add(each, corrupt=True)
    doubts.add(keys[2], corrupt=True)  # the newest now
    doubts.add(keys[5], corrupt=False)
    assert len(doubts) == 3
    assert [doubts.leading([each]) == [] for each in keys] == [
        False,
        False,
        True,
        False,
        True,
        True,
    ]
    assert doubts.leading(keys) == keys[:2]
    assert doubts.written(keys[:4]) == 1
    assert doubts.written(keys) == 1, "the other is only not exact"
    assert doubts.leading(keys) == keys
