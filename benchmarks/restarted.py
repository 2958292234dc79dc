"""What a node daemon tells of its disk when it was killed and started again, for `index`.

A real daemon and an engine that saves prompts as engines fill their blocks: in pieces, many prompts
in turn. Then SIGKILL, a second life with the same settings, and its feed as a router hears it.
"""

import asyncio
import signal
import time
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import grpc

from benchmarks.common import scratch, server
from kvtier.core.blocks import Attention, BlockKey, BlockLayout, LayerGroup
from kvtier.core.directory import Directory
from kvtier.core.tiers import Tier
from kvtier.engine.client import TierClient
from kvtier.router.feed import FeedReader
from kvtier.router.link import OPTIONS
from kvtier.router.pace import Pace
from kvtier.wire.pb import feed_pb2, feed_pb2_grpc

# As small as a block can be: a record of one page on the disk, since only keys count here.
LAYOUT = BlockLayout((LayerGroup(Attention.FULL, 1, 1, 8),), 16, "float16")
TIERS = (Tier.HOST, Tier.DISK, Tier.SHARED)
RECORD = 4096
SAVED_S = 120.0


class Told(NamedTuple):
    """A second life's snapshot, and how long it took."""

    messages: list[bytes]
    blocks: int
    ready_s: float  # from the start of the process until it says so: its disk was read
    told_s: float  # from then on, until the snapshot was whole for a watcher


def restarted(paths: list[list[BlockKey]], piece: int) -> Told:
    """The feed of a daemon that holds `paths` on its disk from an earlier life."""
    blocks = len({key for path in paths for key in path})
    with scratch() as folder:
        toml = _toml(folder, blocks)
        with server("node", toml, folder, end=signal.SIGKILL) as address:
            _save(folder, paths, piece)
            asyncio.run(_on_disk(address, blocks))
        begun = time.perf_counter()
        with server("node", toml, folder, end=signal.SIGKILL) as address:
            ready_s = time.perf_counter() - begun
            messages, told_s = asyncio.run(_snapshot(address))
    return Told(messages, blocks, ready_s, told_s)


def _toml(folder: Path, blocks: int) -> str:
    return f"""
        [node]
        name = "n"
        socket = "{folder}/node.sock"
        listen = "127.0.0.1:0"
        [host]
        bytes = {blocks * LAYOUT.nbytes + (1 << 20)}
        drain_at = 0.0
        [disk]
        path = "{folder}/disk"
        bytes = {2 * blocks * RECORD + (64 << 20)}
        drain_at = 0.0
    """


def _save(folder: Path, paths: list[list[BlockKey]], piece: int) -> None:
    with closing(TierClient(f"{folder}/node.sock", LAYOUT)) as client:
        for start in range(0, len(paths[0]), piece):
            for path in paths:
                end = start + piece
                while client.match(path[:end]).blocks < end:  # what is not granted is asked again
                    with client.write(path[:end], start) as lease:
                        lease.filled = len(lease.slots)


async def _on_disk(address: str, blocks: int) -> None:
    """Return once the daemon tells of all `blocks` that they are on its disk."""
    directory, pace = Directory(), Pace()
    reader = FeedReader(directory, "daemon", TIERS)
    async with asyncio.timeout(SAVED_S), grpc.aio.insecure_channel(address, OPTIONS) as channel:
        async for message in feed_pb2_grpc.FeedStub(channel).Watch(feed_pb2.WatchRequest()):
            await pace.through(reader.take(message))
            if reader.ready and directory.counts("daemon")[Tier.DISK] >= blocks:
                return


async def _snapshot(address: str) -> tuple[list[bytes], float]:
    begun = time.perf_counter()
    messages: list[bytes] = []
    async with asyncio.timeout(SAVED_S), grpc.aio.insecure_channel(address, OPTIONS) as channel:
        async for message in feed_pb2_grpc.FeedStub(channel).Watch(feed_pb2.WatchRequest()):
            messages.append(message.SerializeToString())
            if message.snapshot.last:
                break
    return messages, time.perf_counter() - begun
