"""Node daemons that lend to each other, for tests, and engines of theirs."""

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from kvtier.core.blocks import Attention, BlockKey, BlockLayout, LayerGroup
from kvtier.engine.client import TierClient
from kvtier.wire import local
from kvtier.wire.local import Op
from tests.launching import Process, node_toml, wait_for
from tests.node.conftest import LAYOUT, status

WAIT_S = 60.0  # for a pull that is to end by itself
LARGE = BlockLayout((LayerGroup(Attention.FULL, 11, 8, 256),), 16, "float16")  # 1.4 MiB


def members(**nodes: str) -> str:
    listed = ", ".join(f'{{ node = "{node}", address = "{at}" }}' for node, at in nodes.items())
    return f"[peers]\nretry_s = 0.1\nmembers = [{listed}]\n"


@contextmanager
def started(
    folder: Path, name: str, more: str = "", host: str = "4MiB", setup: str = ""
) -> Iterator[Process]:
    home = folder / name
    home.mkdir()
    toml = node_toml(home, host=host, more=more).replace('name = "n"', f'name = "{name}"')
    with Process("node", toml, home, setup) as process:
        yield process


@contextmanager
def engine(folder: Path, name: str, layout: BlockLayout = LAYOUT) -> Iterator[TierClient]:
    client = TierClient(f"{folder}/{name}/node.sock", layout, "test")
    try:
        yield client
    finally:
        client.close()


def counter(node: Process, name: str) -> float:
    return status(node).counters.get(f"kvtier_{name}", 0.0)


def nothing_leased(*nodes: Process) -> None:
    for node in nodes:
        wait_for("no lease", lambda node=node: not any(e.leases for e in status(node).layouts))


@contextmanager
def asking(socket_path: Path, keys: Sequence[BlockKey], wait_s: int = 2) -> Iterator[None]:
    """An engine that goes away with its pull unanswered."""
    with socket.socket(socket.AF_UNIX) as raw:
        raw.connect(str(socket_path))
        raw.sendall(local.encode(Op.HELLO, local.VERSION, LAYOUT.describe(), "leaving"))
        _, fds, _, _ = socket.recv_fds(raw, 65536, 2)
        for fd in fds:
            os.close(fd)
        raw.sendall(local.encode(Op.PULL, b"".join(keys), "a", 0, wait_s * 1000, 0, 0, 0, -1))
        yield


def pulled_all(client: TierClient, keys: Sequence[BlockKey]) -> bool:
    client.pull(keys, 0, "a", wait_s=WAIT_S)
    return client.match(keys).blocks == len(keys)
