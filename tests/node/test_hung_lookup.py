"""A name of a peer whose look-up hangs: neither engines nor a daemon's last copies wait for it."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import grpc

from kvtier.core.tiers import Tier
from kvtier.engine.client import TierClient
from kvtier.wire.pb import node_pb2, node_pb2_grpc
from tests.launching import DEADLINE_S, disk_toml, node_toml, wait_for
from tests.node.conftest import LAYOUT, new_keys, save
from tests.node.nodes import members

# `kvtier node` that no name server answers. What hangs does so longer than any test.
PROGRAM = """
import socket
import sys
import threading
from kvtier.cli import main, serve

found = socket.getaddrinfo

def hang(host, *rest, **more):
    if host != "nowhere":
        return found(host, *rest, **more)
    print("hanging", file=sys.stderr, flush=True)
    threading.Event().wait()

serve._ENDS_WITHIN_S["node"] = 1000.0
socket.getaddrinfo = hang
sys.exit(main(["node", "--config", {config!r}]))
"""


@contextmanager
def without_names(folder: Path, toml: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process, and its address."""
    config, program = folder / "kvtier.toml", folder / "program.py"
    config.write_text(toml)
    program.write_text(PROGRAM.format(config=str(config)))
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, str(program)], stdout=subprocess.PIPE, stderr=log, text=True
        )
    watchdog = threading.Timer(2 * DEADLINE_S, process.kill)
    watchdog.start()
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().rsplit(" ", 1)[1].strip()
    finally:
        watchdog.cancel()
        process.kill()
        process.communicate()


def test_a_look_up_that_hangs_holds_up_no_engine_and_no_last_copies(tmp_path: Path) -> None:
    toml = node_toml(tmp_path, more=members(a="nowhere:7461") + disk_toml(tmp_path))
    toml = toml.replace("drain_at = 0.0", "drain_at = 1.0")  # nothing is copied before the end
    with (
        without_names(tmp_path, toml) as (process, address),
        closing(TierClient(f"{tmp_path}/node.sock", LAYOUT, "test")) as client,
        grpc.insecure_channel(address) as channel,
    ):
        stub = node_pb2_grpc.NodeStub(channel)

        def on_disk() -> int:
            status = stub.Status(node_pb2.NodeStatusRequest(), timeout=DEADLINE_S)
            tiers = {Tier(tier.tier - 1): tier.blocks for tier in status.layouts[0].tiers}
            return tiers[Tier.DISK]

        assert client.pull(new_keys(2), 0, "a", wait_s=0.1) == 0
        wait_for("the look-up", lambda: "hanging" in (tmp_path / "log").read_text())
        assert save(client, new_keys(4)) == 4
        assert on_disk() == 0
        process.terminate()
        wait_for("the last copies", lambda: on_disk() == 4)
