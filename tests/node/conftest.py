import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest

from kvtier.core.blocks import Attention, BlockKey, BlockLayout, LayerGroup
from kvtier.core.tiers import Tier
from kvtier.engine.client import TierClient
from kvtier.testing.valkey import ValkeyServer
from kvtier.wire.pb import node_pb2, node_pb2_grpc
from tests.launching import DEADLINE_S, Process, wait_for

LAYOUT = BlockLayout((LayerGroup(Attention.FULL, 4, 2, 64),), 16, "float16")
BLOCK = LAYOUT.nbytes  # 32 KiB


def new_keys(count: int) -> list[BlockKey]:
    return [BlockKey(os.urandom(16)) for _ in range(count)]


def content(key: BlockKey) -> bytes:
    """The bytes that belong to a key: wrong ones are seen at once."""
    return (key * (BLOCK // 16 + 1))[:BLOCK]


def save(client: TierClient, keys: Sequence[BlockKey]) -> int:
    with client.write(keys) as lease:
        for index, slot in zip(lease.indexes, lease.slots, strict=True):
            client.arena.slot(slot)[:] = content(keys[index])
        lease.filled = len(lease.slots)
    return lease.filled


def restore(client: TierClient, keys: Sequence[BlockKey], wait_s: float = 60.0) -> list[Tier]:
    """Read what is held and check every byte of it."""
    with client.read(keys, wait_s=wait_s) as lease:
        for key, slot in zip(keys, lease.slots, strict=False):
            assert bytes(client.arena.slot(slot)) == content(key), "a wrong block"
    return lease.sources


def status(node: Process) -> node_pb2.NodeStatus:
    with grpc.insecure_channel(node.address) as channel:
        stub = node_pb2_grpc.NodeStub(channel)
        return stub.Status(node_pb2.NodeStatusRequest(), timeout=DEADLINE_S)


def lends_at(node: Process) -> str:
    """Where other nodes load blocks from it."""
    return status(node).lends_at


def blocks(node: Process) -> dict[int, int]:
    """Blocks by tier, of the one layout."""
    return {tier.tier - 1: tier.blocks for tier in status(node).layouts[0].tiers}


def wait_for_blocks(node: Process, tier: Tier, count: int) -> None:
    wait_for(f"{count} blocks in {tier.label}", lambda: blocks(node)[tier] >= count)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[ValkeyServer]:
    with ValkeyServer(folder=tmp_path / "valkey") as server:
        yield server
