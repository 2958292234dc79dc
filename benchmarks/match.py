"""What does a look-up cost? `TierClient.match` of 512 keys against a bare Unix-socket echo."""

import os
import socket
import threading
import time

from benchmarks.common import Bar, scratch, server, summary
from kvtier.core.blocks import Attention, BlockKey, BlockLayout, LayerGroup
from kvtier.engine.client import TierClient
from kvtier.wire import local

KEYS = 512
LAYOUT = BlockLayout((LayerGroup(Attention.FULL, 2, 1, 64),), 16, "float16")


def run(*, tiny: bool) -> dict[str, object]:
    rounds = 20 if tiny else 2000
    with scratch() as folder:
        toml = f"""
            [node]
            socket = "{folder}/node.sock"
            listen = "127.0.0.1:0"
            [host]
            bytes = "64MiB"
        """
        with server("node", toml, folder):
            return _measure(f"{folder}/node.sock", rounds)


def _measure(path: str, rounds: int) -> dict[str, object]:
    client = TierClient(path, LAYOUT)
    keys = [BlockKey(os.urandom(16)) for _ in range(KEYS)]
    with client.write(keys) as lease:
        lease.filled = len(lease.slots)
    assert client.match(keys).blocks == KEYS
    ours, mine = socket.socketpair(socket.AF_UNIX)
    child = os.fork()
    if child == 0:
        ours.close()
        while data := mine.recv(1 << 18):
            mine.sendall(data)
        os._exit(0)
    mine.close()
    message = local.encode(local.Op.MATCH, local.pack_keys(keys))
    matches: list[float] = []
    echoes: list[float] = []
    for _ in range(rounds):
        start = time.perf_counter()
        client.match(keys)
        matches.append(time.perf_counter() - start)
        start = time.perf_counter()
        ours.sendall(message)
        left = len(message)
        while left:
            left -= len(ours.recv(1 << 18))
        echoes.append(time.perf_counter() - start)
    ours.close()
    os.waitpid(child, 0)
    client.close()
    assert threading.active_count() == 1
    match, echo = summary(matches), summary(echoes)
    return {
        "keys": KEYS,
        "bytes": len(message),
        "times": {"match": match, "echo": echo},
        "bars": [
            Bar("match of 512 keys, p50 in ms", match["median_s"] * 1e3, at_most=0.4).as_dict(),
            Bar("match in units of a socket echo", match["median_s"] / echo["median_s"], at_most=30)
            .as_dict(),
        ],
    }  # fmt: skip
