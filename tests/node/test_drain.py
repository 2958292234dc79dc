"""A node that is to go: `kvtier drain`, and SIGTERM, copy down what only host memory holds."""

import subprocess
import sys
from pathlib import Path

from kvtier.core.tiers import Tier
from kvtier.engine.client import TierClient
from tests.launching import DEADLINE_S, Process, disk_toml, node_toml, redis_toml
from tests.node.conftest import LAYOUT, blocks, new_keys, restore, save, status


def drain(*arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "kvtier.cli", "drain", *arguments],
        capture_output=True, text=True, timeout=DEADLINE_S,
    )  # fmt: skip
    assert (done.stdout + done.stderr).count("\n") == 1
    return done.returncode, (done.stdout + done.stderr).strip()


def lazy(folder: Path, more: str) -> str:
    """A node that copies nothing down by itself."""
    return node_toml(folder, more=more).replace("drain_at = 0.0", "drain_at = 1.0", 1)


def test_what_is_drained_is_on_the_disk_and_routers_hear_of_it(tmp_path: Path) -> None:
    with Process("node", lazy(tmp_path, disk_toml(tmp_path)), tmp_path) as node:
        client = TierClient(f"{tmp_path}/node.sock", LAYOUT, "test")
        assert save(client, keys := new_keys(20)) == 20
        assert blocks(node)[Tier.DISK] == 0
        said = f"node at {node.address}: drained, 0 blocks not copied down"
        assert drain(node.address, "--stay", "--seconds", "60") == (0, said)
        assert blocks(node)[Tier.DISK] == 20
        assert not status(node).draining
        assert drain(node.address) == (0, said)
        assert status(node).draining
        client.close()
        node.kill()
        node.restart()
        client = TierClient(f"{tmp_path}/node.sock", LAYOUT, "test")
        assert restore(client, keys) == [Tier.DISK] * 20
        client.close()


def test_a_stop_drains_too(tmp_path: Path) -> None:
    with Process("node", lazy(tmp_path, disk_toml(tmp_path)), tmp_path) as node:
        client = TierClient(f"{tmp_path}/node.sock", LAYOUT, "test")
        save(client, keys := new_keys(20))
        assert blocks(node)[Tier.DISK] == 0
        client.close()
        assert node.terminate() == 0
        node.restart()
        client = TierClient(f"{tmp_path}/node.sock", LAYOUT, "test")
        assert restore(client, keys) == [Tier.DISK] * 20
        client.close()


def test_what_cannot_be_saved_is_told(tmp_path: Path) -> None:
    with Process("node", lazy(tmp_path, redis_toml("redis://127.0.0.1:1")), tmp_path) as node:
        client = TierClient(f"{tmp_path}/node.sock", LAYOUT, "test")
        save(client, new_keys(3))
        line = f"node at {node.address}: drained, 3 blocks not copied down"
        assert drain(node.address, "--seconds", "0.2") == (1, line)
        client.close()
        code, line = drain(node.address, "--seconds", "0")
        assert (code, line) == (2, "kvtier: --seconds is 0, must be above 0 and up to 3600")
    code, line = drain(node.address)
    assert code == 2
    assert line.startswith(f"kvtier: no drain of the node daemon at {node.address}: ")
