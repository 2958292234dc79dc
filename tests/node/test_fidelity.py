"""A lossy codec on real daemons and a real shared store: what is exact stays exact, and is told."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from kvtier.arena import Arena
from kvtier.codec import frame
from kvtier.config import RedisConfig
from kvtier.core.blocks import BlockKey
from kvtier.core.fidelity import Fidelity
from kvtier.core.tiers import Tier, TierSpec
from kvtier.engine.client import TierClient
from kvtier.node.manager import TierManager
from kvtier.stores.redis import RedisStore
from kvtier.testing.codecs import numbers
from kvtier.testing.valkey import ValkeyServer
from tests.launching import Process, node_toml, redis_toml, wait_for
from tests.node.conftest import LAYOUT, new_keys, status, wait_for_blocks


def kv(key: BlockKey) -> bytes:
    return numbers(LAYOUT, int.from_bytes(key, "big"))


def save(client: TierClient, path: Sequence[BlockKey]) -> int:
    with client.write(path) as lease:
        for index, slot in zip(lease.indexes, lease.slots, strict=True):
            client.arena.slot(slot)[:] = kv(path[index])
        lease.filled = len(lease.slots)
    return lease.filled


def restore(client: TierClient, path: Sequence[BlockKey]) -> list[bytes]:
    with client.read(path, wait_s=60) as lease:
        return [bytes(client.arena.slot(slot)) for slot in lease.slots]


def fidelities(url: str, keys: Sequence[BlockKey]) -> list[Fidelity]:
    store = RedisStore(RedisConfig(url=url, timeout_s=10), LAYOUT.id)
    try:
        found = store.read(keys)
    finally:
        store.close()
    assert None not in found
    return [frame.verify(key, raw).fidelity for key, raw in zip(keys, found, strict=True) if raw]


def test_what_is_not_exact_is_marked_and_takes_no_exact_block_s_place(
    tmp_path: Path, valkey: ValkeyServer
) -> None:
    folders = [tmp_path / name for name in ("exact", "lossy")]
    for folder in folders:
        folder.mkdir()
    exact_toml, lossy_toml = (node_toml(each, more=redis_toml(valkey.url)) for each in folders)
    path, mine = new_keys(6), new_keys(6)
    with (
        Process("node", exact_toml, folders[0]) as exact_node,
        Process("node", lossy_toml + 'codec = "int8-tok"\n', folders[1]) as lossy_node,
    ):
        lossy = TierClient(f"{folders[1]}/node.sock", LAYOUT, "lossy")
        assert save(lossy, path[:3]) == save(lossy, mine[:3]) == 3
        wait_for_blocks(lossy_node, Tier.SHARED, 6)
        assert fidelities(valkey.url, [*path[:3], *mine[:3]]) == [Fidelity.CODED] * 6
        assert restore(lossy, path[:3]) == [kv(key) for key in path[:3]], "host is exact"

        # A node that did not ask for a lossy codec never gets what one made: its engine computes
        # the blocks itself, and what follows comes to the store as exact.
        exact = TierClient(f"{folders[0]}/node.sock", LAYOUT, "exact")
        assert restore(exact, path[:3]) == []
        # The read was over with the first block; the other loads may not be.
        wait_for("the loads to end", lambda: not status(exact_node).layouts[0].moves)
        assert save(exact, path) == 6
        wait_for_blocks(exact_node, Tier.SHARED, 6)
        assert fidelities(valkey.url, path[3:]) == [Fidelity.EXACT] * 3

        # After a restart the lossy node has only what is in the store: an engine computes on it.
        lossy.close()
        lossy_node.kill()
        lossy_node.restart()
        lossy = TierClient(f"{folders[1]}/node.sock", LAYOUT, "lossy")
        found = restore(lossy, mine[:3])
        assert len(found) == 3
        for key, got in zip(mine, found, strict=False):
            x, y = (np.frombuffer(each, np.float16).astype(np.float32) for each in (kv(key), got))
            assert 0 < np.linalg.norm(x - y) <= 0.03 * np.linalg.norm(x)
        assert save(lossy, mine) == 3
        wait_for_blocks(lossy_node, Tier.SHARED, 6)
        assert fidelities(valkey.url, mine[3:]) == [Fidelity.DERIVED | Fidelity.CODED] * 3

        # It computes the exact node's prompt as well, without having looked: nothing is replaced.
        assert save(lossy, path) == 6
        wait_for_blocks(lossy_node, Tier.SHARED, 12)
        assert fidelities(valkey.url, path[3:]) == [Fidelity.EXACT] * 3
        exact.close()
        lossy.close()


def test_a_shared_frame_that_is_refused_is_fetched_once_and_then_replaced_by_an_exact_one(
    tmp_path: Path, valkey: ValkeyServer
) -> None:
    folders = [tmp_path / name for name in ("exact", "lossy")]
    for folder in folders:
        folder.mkdir()
    exact_toml, lossy_toml = (node_toml(each, more=redis_toml(valkey.url, 60)) for each in folders)
    path = new_keys(3)
    with (
        Process("node", exact_toml, folders[0]) as exact_node,
        Process("node", lossy_toml + 'codec = "int8-tok"\n', folders[1]) as lossy_node,
        closing(TierClient(f"{folders[1]}/node.sock", LAYOUT, "lossy")) as lossy,
        closing(TierClient(f"{folders[0]}/node.sock", LAYOUT, "exact")) as exact,
    ):
        assert save(lossy, path) == 3
        wait_for_blocks(lossy_node, Tier.SHARED, 3)
        assert fidelities(valkey.url, path) == [Fidelity.CODED] * 3
        for _ in range(3):
            assert restore(exact, path) == []
            # The read was over with the first block; the other loads may not be.
            wait_for("the loads to end", lambda: not status(exact_node).layouts[0].moves)
            counters = status(exact_node).counters
            assert counters["kvtier_inexact_frames_total_shared"] == 3, "fetched again"

        # What its engine computes is no copy of what lies there: it is written, for all.
        assert save(exact, path) == 3
        wait_for("exact frames", lambda: fidelities(valkey.url, path) == [Fidelity.EXACT] * 3)
        assert status(exact_node).counters.get("kvtier_corrupt_rewritten_total", 0) == 0
        exact.close()
        exact_node.kill()
        exact_node.restart()
        with closing(TierClient(f"{folders[0]}/node.sock", LAYOUT, "exact")) as again:
            assert restore(again, path) == [kv(key) for key in path]


async def test_what_was_never_filled_is_not_remembered() -> None:
    host = TierSpec(tier=Tier.HOST, capacity=8 * LAYOUT.nbytes, drain_at=0)
    manager = TierManager(LAYOUT, Arena.create(LAYOUT.nbytes, 8), [host], [], lambda _: None)
    first, *keys = new_keys(4)
    manager.commit(manager.write(1, [first], 0).id, 1)
    manager.lineage.loaded(first, Fidelity.CODED)
    manager.commit(manager.write(1, [first, *keys], 0).id, 2)
    assert len(manager.lineage) == 3
    assert manager.lineage.of(keys[1]) is Fidelity.DERIVED
    for _ in range(10):
        manager.commit(manager.write(1, [first, *new_keys(4)], 0).id, 0)
        manager.release(manager.write(1, [first, *new_keys(4)], 0).id)
        manager.write(2, [first, *new_keys(4)], 0)
        manager.disconnect(2)
    assert len(manager.lineage) == 3
    assert manager.clear(Tier.HOST) == 3
    assert len(manager.lineage) == 0
    await manager.close()
