"""A disk that takes only what a second request has used, on a real daemon."""

from pathlib import Path

from kvtier.core.policy import Use
from kvtier.core.tiers import Tier
from kvtier.engine.client import TierClient
from tests.launching import Process, disk_toml, node_toml, wait_for
from tests.node.conftest import LAYOUT, blocks, content, new_keys, status

REFUSED = "kvtier_disk_refused_total_admission"


def save(client: TierClient, keys: list, request: int) -> int:
    with client.write(keys, use=Use(request=request)) as lease:
        for index, slot in zip(lease.indexes, lease.slots, strict=True):
            client.arena.slot(slot)[:] = content(keys[index])
        lease.filled = len(lease.slots)
    return lease.filled


def restore(client: TierClient, keys: list, request: int) -> list[Tier]:
    with client.read(keys, wait_s=60.0, use=Use(request=request)) as lease:
        for key, slot in zip(keys, lease.slots, strict=False):
            assert bytes(client.arena.slot(slot)) == content(key), "a wrong block"
    return lease.sources


def test_only_a_second_use_costs_a_write(tmp_path: Path) -> None:
    disk = disk_toml(tmp_path) + 'admission = "second-use"\n'
    # 32 blocks in host memory; `more` begins in its section
    toml = node_toml(tmp_path, host="1MiB", more=f'policy = "lru"\n{disk}')
    with Process("node", toml, tmp_path) as node:
        client = TierClient(f"{tmp_path}/node.sock", LAYOUT, "test")
        try:
            used_twice, used_once = new_keys(4), new_keys(4)
            assert save(client, used_twice, 1) == 4
            assert save(client, used_once, 2) == 4
            assert restore(client, used_twice, 3) == [Tier.HOST] * 4
            wait_for("what was used again", lambda: blocks(node)[Tier.DISK] == 4)
            for request in range(4, 12):  # host memory is filled twice over
                assert save(client, new_keys(8), request) == 8
            counters = status(node).counters
            assert counters[REFUSED] >= 64 + 4 - 32
            assert blocks(node)[Tier.DISK] == 4
            assert restore(client, used_twice, 20) == [Tier.DISK] * 4
            assert restore(client, used_once, 21) == []
            assert save(client, used_once, 22) == 4  # computed again: its second use
            wait_for("what came back", lambda: blocks(node)[Tier.DISK] == 8)
        finally:
            client.close()
        assert node.terminate() == 0
    with Process("node", toml, tmp_path) as node:
        wait_for("the layout", lambda: status(node).layouts)
        assert blocks(node)[Tier.DISK] == 8, "the drain at the end wrote nothing more"


def test_by_default_everything_is_written(tmp_path: Path) -> None:
    with Process("node", node_toml(tmp_path, more=disk_toml(tmp_path)), tmp_path) as node:
        client = TierClient(f"{tmp_path}/node.sock", LAYOUT, "test")
        try:
            assert save(client, new_keys(4), 1) == 4
            wait_for("all blocks", lambda: blocks(node)[Tier.DISK] == 4)
            assert REFUSED not in status(node).counters
        finally:
            client.close()
