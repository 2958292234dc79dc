"""Codec `auto` on a real daemon, over a real server behind a slow line."""

import itertools
import random
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest

from kvtier.codec.codecs import RAW
from kvtier.codec.frame import encode, frame_nbytes
from kvtier.core.blocks import BEGINS, Attention, BlockKey, BlockLayout, LayerGroup
from kvtier.core.tiers import Tier
from kvtier.engine.client import TierClient
from kvtier.node.tuner import SAMPLES, Tuner
from kvtier.stores.faulty import Fault, FaultyStore
from kvtier.stores.memory import MemoryStore
from kvtier.testing.valkey import ValkeyServer
from kvtier.wire.chains import TO_WIRE
from kvtier.wire.pb import node_pb2, node_pb2_grpc
from tests.launching import Process, disk_toml, node_toml, wait_for
from tests.node.conftest import blocks, new_keys, status, wait_for_blocks

LAYOUT = BlockLayout((LayerGroup(Attention.FULL, 4, 4, 64),), 32, "bfloat16")
BLOCK = LAYOUT.nbytes  # 128 KiB
BATCH = 8
SLOW = 4 << 20  # bytes a second: every codec is faster, on any machine


def kv(key: BlockKey) -> bytes:
    """Numbers as a model's are: near each other in size, all else noise."""
    numbers = np.random.default_rng(list(key)).standard_normal(BLOCK // 2, np.float32)
    return (numbers.view(np.uint32) >> 16).astype(np.uint16).tobytes()


def save(client: TierClient, keys: Sequence[BlockKey]) -> None:
    with client.write(keys) as lease:
        assert len(lease.slots) == len(keys)
        for key, slot in zip(keys, lease.slots, strict=True):
            client.arena.slot(slot)[:] = kv(key)
        lease.filled = len(lease.slots)


def restore(client: TierClient, keys: Sequence[BlockKey]) -> list[Tier]:
    with client.read(keys, wait_s=60.0) as lease:
        for key, slot in zip(keys, lease.slots, strict=True):
            assert bytes(client.arena.slot(slot)) == kv(key), "a wrong block"
    return lease.sources


def codec_of(node: Process, tier: Tier) -> tuple[str, bool]:
    found = {each.tier: each for each in status(node).layouts[0].tiers}[TO_WIRE[tier]]
    return found.codec, found.codec_chosen


def clear_host(node: Process) -> None:
    with grpc.insecure_channel(node.address) as channel:
        request = node_pb2.NodeClearRequest(tiers=[TO_WIRE[Tier.HOST]])
        node_pb2_grpc.NodeStub(channel).Clear(request, timeout=30)


@contextmanager
def slow_line(port: int) -> Iterator[int]:
    """A port that leads to `port`, at SLOW each way."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        stop, threads = threading.Event(), []

        def accept() -> None:
            while True:
                client, _ = listener.accept()
                if stop.is_set():
                    client.close()
                    return
                server = socket.create_connection(("127.0.0.1", port))
                threads.append(threading.Thread(target=_carry, args=(client, server, stop)))
                threads[-1].start()

        accepting = threading.Thread(target=accept)
        accepting.start()
        try:
            yield listener.getsockname()[1]
        finally:
            stop.set()
            socket.create_connection(listener.getsockname()).close()
            for thread in (accepting, *threads):
                thread.join()


def _carry(one: socket.socket, two: socket.socket, stop: threading.Event) -> None:
    with one, two, selectors.DefaultSelector() as ready:
        ready.register(one, selectors.EVENT_READ, two)
        ready.register(two, selectors.EVENT_READ, one)
        while not stop.is_set():
            for key, _ in ready.select(0.1):
                source = key.fileobj
                assert isinstance(source, socket.socket)
                try:
                    data = source.recv(1 << 16)
                    key.data.sendall(data)
                except OSError:
                    data = b""
                if not data:
                    return
                time.sleep(len(data) / SLOW)


def test_a_slow_shared_tier_gets_a_codec_and_the_same_bytes_come_back(
    tmp_path: Path, valkey: ValkeyServer
) -> None:
    port = int(valkey.url.split("/")[2].rpartition(":")[2])
    with slow_line(port) as slow:
        redis = f"""
[redis]
url = "redis://127.0.0.1:{slow}"
timeout_s = 60.0
codec = "auto"
"""
        toml = node_toml(tmp_path, host="16MiB", more=redis)
        with Process("node", toml, tmp_path) as node, _client(tmp_path) as client:
            prompts: list[list[BlockKey]] = []

            def went_over() -> bool:
                prompts.append(new_keys(BATCH))
                save(client, prompts[-1])
                wait_for_blocks(node, Tier.SHARED, BATCH * len(prompts))
                return codec_of(node, Tier.SHARED)[0] != "raw"

            wait_for("auto to leave raw", went_over)
            went_over()
            codec, chosen = codec_of(node, Tier.SHARED)
            assert chosen
            counters = status(node).counters
            assert counters["kvtier_encoded_blocks_total_shared_raw"] >= SAMPLES
            assert counters[f"kvtier_encoded_blocks_total_shared_{codec}"] >= 1
            assert counters[f"kvtier_codec_changes_total_shared_{codec}"] >= 1
            assert f"MiB  {codec} by auto\n" in _inspect(node)
            clear_host(node)
            for keys in prompts:  # raw frames and others, in one tier
                assert restore(client, keys) == [Tier.SHARED] * BATCH


def test_blocks_without_numbers_are_stored_raw_whatever_is_chosen(tmp_path: Path) -> None:
    disk = disk_toml(tmp_path) + 'codec = "auto"\n'
    with Process("node", node_toml(tmp_path, host="16MiB", more=disk), tmp_path) as node:
        with _client(tmp_path) as client:
            noise = random.Random(3)
            keys = new_keys(6 * BATCH)
            content = {key: noise.randbytes(BLOCK) for key in keys}
            for at in range(0, len(keys), BATCH):
                with client.write(keys[at : at + BATCH]) as lease:
                    for key, slot in zip(keys[at:], lease.slots, strict=False):
                        client.arena.slot(slot)[:] = content[key]
                    lease.filled = len(lease.slots)
                wait_for_blocks(node, Tier.DISK, at + BATCH)
            wait_for("raw to be chosen", lambda: codec_of(node, Tier.DISK) == ("raw", True))
            clear_host(node)
            with client.read(keys, wait_s=60.0) as lease:
                assert lease.sources == [Tier.DISK] * len(keys)
                for key, slot in zip(keys, lease.slots, strict=True):
                    assert bytes(client.arena.slot(slot)) == content[key]
        assert blocks(node)[Tier.DISK] == len(keys)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16", "int8"])
def test_the_tuner_goes_over_and_comes_back_once_blocks_no_longer_shrink(dtype: str) -> None:
    """On a clock that only the store turns: codecs take no time here."""
    layout = BlockLayout((LayerGroup(Attention.FULL, 4, 4, 64),), 32, dtype)
    now, nbytes = [0.0], [0]
    tuner = Tuner("disk", layout, 2, 2, period_s=10.0, clock=lambda: now[0])

    def take() -> None:
        now[0] += 0.001 + 1e-7 * nbytes[0]

    store = tuner.metered(FaultyStore(MemoryStore(1 << 30), lambda _: Fault.SLOW, wait=take))
    values = np.random.default_rng(1).standard_normal(layout.nbytes // layout.itemsize, np.float32)
    as_dtype = {
        "bfloat16": (values.view(np.uint32) >> 16).astype(np.uint16),
        "float32": values,
        "float16": values.astype(np.float16),
        "int8": np.zeros(layout.nbytes, np.uint8),
    }[dtype]
    noise = np.frombuffer(random.Random(2).randbytes(layout.nbytes), np.uint8)
    seen = []
    for step in range(200):
        block = (as_dtype if step < 100 else noise).data.cast("B")
        tuner.offer(block)
        key = BlockKey(step.to_bytes(16))
        parts = encode(key, BEGINS, block, layout, tuner.codec)
        nbytes[0] = frame_nbytes(parts)
        assert store.write([(key, parts)]) == [True]
        now[0] += 1.0
        seen.append(tuner.codec)
    assert seen[0] is RAW, "before anything is known"
    assert seen[99] is not RAW
    assert seen[-1] is RAW
    assert sum(one is not two for one, two in itertools.pairwise(seen)) == 2


@contextmanager
def _client(folder: Path) -> Iterator[TierClient]:
    client = TierClient(f"{folder}/node.sock", LAYOUT, "test")
    try:
        yield client
    finally:
        client.close()


def _inspect(node: Process) -> str:
    command = [sys.executable, "-m", "kvtier.cli", "inspect", node.address]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
