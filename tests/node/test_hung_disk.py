"""A disk that hangs for good: a daemon that is told to stop ends all the same."""

import os
import subprocess
import sys
from contextlib import closing, suppress
from pathlib import Path

import pytest

from kvtier.engine.client import TierClient
from kvtier.errors import ConfigError
from tests.launching import DEADLINE_S, disk_toml, node_toml, wait_for
from tests.node.conftest import LAYOUT, new_keys, save

# `kvtier node` whose disk answers nothing, with shorter limits.
PROGRAM = """
import sys
import threading
from functools import partial
from kvtier.cli import main, serve
from kvtier.node import daemon
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
