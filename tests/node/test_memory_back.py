"""The memory of a layout that is not open any more goes back, whatever Python's collector does."""

import fcntl
import os
import socket
from pathlib import Path

import pytest

from kvtier.core.blocks import Attention, BlockLayout, LayerGroup
from kvtier.engine.client import TierClient
from kvtier.errors import ConfigError
from kvtier.wire import local
from tests.launching import Process, disk_toml, node_toml, wait_for
from tests.node.conftest import LAYOUT

OTHER = BlockLayout((LayerGroup(Attention.FULL, 4, 2, 64),), 32, "float16")


def arenas(node: Process) -> int:
    maps = Path(f"/proc/{node.pid}/maps").read_text()
    return sum("kvtier-arena" in line for line in maps.splitlines())


def test_a_layout_that_cannot_be_opened_keeps_no_memory(tmp_path: Path) -> None:
    with Process("node", node_toml(tmp_path, more=disk_toml(tmp_path)), tmp_path) as node:
        folder = tmp_path / "disk" / LAYOUT.id
        folder.mkdir(parents=True)
        held = os.open(folder / "LOCK", os.O_RDWR | os.O_CREAT)
        fcntl.flock(held, fcntl.LOCK_EX)  # as `kvtier check` does
        os.write(held, b"1\n")
        for _ in range(3):
            with pytest.raises(ConfigError, match="uses it"):
                TierClient(f"{tmp_path}/node.sock", LAYOUT)
        os.close(held)
        wait_for("all arenas to go", lambda: arenas(node) == 0)


@pytest.mark.parametrize("found", [False, True])
def test_a_layout_that_gives_way_gives_its_memory_back(tmp_path: Path, found: bool) -> None:
    toml = node_toml(tmp_path, more=disk_toml(tmp_path))
    toml = toml.replace("[host]", "max_layouts = 1\n[host]")
    if found:  # of an earlier life
        folder = tmp_path / "disk" / LAYOUT.id
        folder.mkdir(parents=True)
        (folder / "layout.json").write_text(LAYOUT.describe())
    with Process("node", toml, tmp_path) as node:
        for layout in (LAYOUT, OTHER, LAYOUT, OTHER)[found:]:
            TierClient(f"{tmp_path}/node.sock", layout).close()
        wait_for("all arenas but the open one to go", lambda: arenas(node) == 1)


def test_a_refused_engine_that_comes_again_and_again_costs_no_memory(tmp_path: Path) -> None:
    with Process("node", node_toml(tmp_path), tmp_path) as node:

        def kib() -> int:
            lines = Path(f"/proc/{node.pid}/status").read_text().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

        def refused() -> None:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(f"{tmp_path}/node.sock")
                sock.sendall(local.encode(local.Op.HELLO, 1, LAYOUT.describe(), "old"))
                assert b"protocol version" in sock.recv(4096)

        for _ in range(20):
            refused()
        before = kib()
        for _ in range(200):
            refused()
        wait_for("what they took to go", lambda: kib() - before < 200 * 20)
