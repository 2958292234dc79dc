"""Blocks that another node's daemon holds, beside the same blocks from the shared store.

Three real daemons and a Valkey, all on this machine: A saves, B pulls from A's host memory, C reads
what A has put into Valkey, in turn and both into their host tiers. So it is what the processes take
and no network; on two cores four of them share what two have. One engine asks, 16 MiB or 8 blocks
at a time, whichever is less. Also how long another engine's look-up takes at A while B pulls 64 MiB
from there: sending must not hold up A's loop.
"""

import os
import threading
import time
from contextlib import ExitStack, closing
from pathlib import Path

import grpc

from benchmarks.common import Bar, paired_ratio, scratch, server, summary, until
from kvtier.core.blocks import Attention, BlockKey, BlockLayout, LayerGroup
from kvtier.core.tiers import Tier
from kvtier.engine.client import TierClient
from kvtier.testing.valkey import ValkeyServer
from kvtier.wire.chains import TO_WIRE
from kvtier.wire.pb import node_pb2, node_pb2_grpc

LAYERS = {"512KiB": 8, "2MiB": 32, "16MiB": 256}  # of 64 KiB each
ROUNDS = {"512KiB": 60, "2MiB": 40, "16MiB": 25}
WARM_UP = 2
BATCH_NBYTES = 16 << 20
BATCH_BLOCKS = 8
WAIT_S = 30.0
BAR = 0.8


def run(*, tiny: bool) -> dict[str, object]:
    sizes = {"512KiB": 3} if tiny else ROUNDS
    measured = {size: _measure(LAYERS[size], rounds) for size, rounds in sizes.items()}
    speed = {
        size: paired_ratio(each["pull from a node"], each["read from Valkey"])
        for size, each in measured.items()
    }
    nbytes = {size: _blocks(_layout(LAYERS[size])) * _layout(LAYERS[size]).nbytes for size in sizes}
    return {
        "bytes": nbytes,
        "times": {
            f"{size} {way}": summary(times)
            for size, each in measured.items()
            for way, times in each.items()
        }
        | {f"look-up at A {when}": summary(times) for when, times in _look_ups(tiny).items()},
        "gb_per_s": {
            f"{size} {way}": nbytes[size] / summary(times)["median_s"] / 1e9
            for size, each in measured.items()
            for way, times in each.items()
        },
        "bars": [
            Bar(
                f"{size} pull, speed of the shared store", each, at_least=0.0 if tiny else BAR
            ).as_dict()
            for size, each in speed.items()
        ],
    }


def _layout(layers: int) -> BlockLayout:
    return BlockLayout((LayerGroup(Attention.FULL, layers, 8, 64),), 32, "bfloat16")


def _blocks(layout: BlockLayout) -> int:
    return max(1, min(BATCH_BLOCKS, BATCH_NBYTES // layout.nbytes))


def _measure(layers: int, rounds: int) -> dict[str, list[float]]:
    layout = _layout(layers)
    with ExitStack() as stack:
        folder = stack.enter_context(scratch())
        shared = f'[redis]\nurl = "{stack.enter_context(ValkeyServer()).url}"\n'
        a = stack.enter_context(server("node", _toml(folder, "a", "[peers]\n" + shared), folder))
        status = node_pb2_grpc.NodeStub(stack.enter_context(grpc.insecure_channel(a)))
        members = f'[peers]\nmembers = [{{ node = "a", address = "{_lends_at(a)}" }}]\n'
        stack.enter_context(server("node", _toml(folder, "b", members), folder))
        stack.enter_context(server("node", _toml(folder, "c", shared), folder))
        at_a, at_b, at_c = (
            stack.enter_context(closing(TierClient(f"{folder}/{name}.sock", layout)))
            for name in "abc"
        )
        times: dict[str, list[float]] = {"pull from a node": [], "read from Valkey": []}
        drained = 0
        for number in range(WARM_UP + rounds):
            keys = [BlockKey(os.urandom(16)) for _ in range(_blocks(layout))]
            _save(at_a, keys)
            drained += len(keys)
            until(lambda wanted=drained: _in_valkey(status) >= wanted)
            for at, way in sorted(enumerate(times), reverse=number % 2 == 1):
                start = time.perf_counter()
                came = _pull(at_b, keys) if at == 0 else _read(at_c, keys)
                if number >= WARM_UP:
                    times[way].append(time.perf_counter() - start)
                assert came == len(keys), f"{way}: {came} of {len(keys)} blocks"
        return times


def _look_ups(tiny: bool) -> dict[str, list[float]]:
    """Of 32 blocks at A: with nothing beside them, and while B pulls 64 MiB."""
    layout, rounds = _layout(LAYERS["2MiB"]), 2 if tiny else 25
    with ExitStack() as stack:
        folder = stack.enter_context(scratch())
        a = stack.enter_context(server("node", _toml(folder, "a", "[peers]\n"), folder))
        members = f'[peers]\nmembers = [{{ node = "a", address = "{_lends_at(a)}" }}]\n'
        stack.enter_context(server("node", _toml(folder, "b", members), folder))
        at_a, other, at_b = (
            stack.enter_context(closing(TierClient(f"{folder}/{name}.sock", layout)))
            for name in "aab"
        )
        times: dict[str, list[float]] = {"alone": [], "beside a pull": []}

        def look_up(keys: list[BlockKey], when: str) -> None:
            start = time.perf_counter()
            other.match(keys)
            times[when].append(time.perf_counter() - start)

        for _ in range(rounds):
            keys = [BlockKey(os.urandom(16)) for _ in range(32)]
            _save(at_a, keys)
            for _ in range(100):
                look_up(keys, "alone")
            pulling = threading.Thread(
                target=at_b.pull, args=(keys, 0, "a"), kwargs={"wait_s": WAIT_S}
            )
            pulling.start()
            while pulling.is_alive():
                look_up(keys, "beside a pull")
            pulling.join()
            assert at_b.match(keys).blocks == len(keys)
        return times


def _lends_at(address: str) -> str:
    with grpc.insecure_channel(address) as channel:
        return node_pb2_grpc.NodeStub(channel).Status(node_pb2.NodeStatusRequest()).lends_at


def _toml(folder: Path, name: str, more: str) -> str:
    return f"""
        [node]
        name = "{name}"
        socket = "{folder}/{name}.sock"
        listen = "127.0.0.1:0"
        [host]
        bytes = "160MiB"
        drain_at = {0.0 if name == "a" else 1.0}
        {more}
    """


def _save(client: TierClient, keys: list[BlockKey]) -> None:
    with client.write(keys) as lease:
        for slot in lease.slots:
            client.arena.slot(slot)[:16] = os.urandom(16)
        lease.filled = len(lease.slots)
    assert lease.filled == len(keys)


def _pull(client: TierClient, keys: list[BlockKey]) -> int:
    client.pull(keys, 0, "a", wait_s=WAIT_S)
    with client.read(keys, wait_s=WAIT_S) as lease:
        return lease.arrived


def _read(client: TierClient, keys: list[BlockKey]) -> int:
    with client.read(keys, wait_s=WAIT_S) as lease:
        return lease.arrived


def _in_valkey(node: node_pb2_grpc.NodeStub) -> int:
    layouts = node.Status(node_pb2.NodeStatusRequest()).layouts
    return sum(t.blocks for e in layouts for t in e.tiers if t.tier == TO_WIRE[Tier.SHARED])
