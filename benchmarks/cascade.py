"""Does the cascade keep up with the disk, and do saves stay out of a slow disk's way?

A real daemon whose host tier holds a quarter of what is written: blocks of 2 MiB are saved as
fast as they are taken, until all lie on the disk, then read back from there, in turn with the
same bytes through a `DiskStore` alone in the same file system. It is measured once the disk tier
is full and makes room for each block: a slot's first write costs the file system up to twice as
much as its later ones, and the store alone writes to the same few slots in every round. What both
do in the very first round is told, too.

Beside it: saves into a manager over a disk that takes 20 ms for each block, in turn with saves
where there is no lower tier. How often the saving thread gave up its processor is told, too:
whoever waits for I/O, or for a lock that somebody holds meanwhile, does.

What is compared uses the same memory. Two arenas of one process, both in large pages, were seen to
take copies at speeds up to twice apart for as long as they lived: a virtual machine does not see
what its memory is made of. So both managers here save into one arena, and the store alone reads
into the slots of the daemon's.
"""

import asyncio
import os
import resource
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import grpc

from benchmarks.common import Bar, paired_ratio, scratch, server, summary
from kvtier.arena import Arena
from kvtier.codec import codecs, frame
from kvtier.core.blocks import BEGINS, Attention, BlockKey, BlockLayout, LayerGroup
from kvtier.core.tiers import Tier, TierSpec
from kvtier.engine.client import TierClient
from kvtier.node.manager import TierManager
from kvtier.node.movers import LowerTier
from kvtier.stores.disk import DiskStore
from kvtier.stores.disk.files import Buffers, Folder, SegmentFile, Shape
from kvtier.wire.chains import TO_WIRE
from kvtier.wire.pb import node_pb2, node_pb2_grpc

LAYOUT = BlockLayout((LayerGroup(Attention.FULL, 32, 8, 64),), 32, "bfloat16")  # 2 MiB
BLOCK = LAYOUT.nbytes
BATCH = 16  # blocks of one save or read
SLOW_S = 0.02
ROUNDS_HELD = 2  # what the disk tier holds of
WASH = 64 << 20  # bytes that are copied between two saves, so that each finds the caches as cold


def new_keys(count: int) -> list[BlockKey]:
    return [BlockKey(os.urandom(16)) for _ in range(count)]


def run(*, tiny: bool) -> dict[str, object]:
    rounds, blocks = (2, 2 * BATCH) if tiny else (20, 12 * BATCH)
    with scratch() as folder:
        toml = f"""
            [node]
            socket = "{folder}/node.sock"
            listen = "127.0.0.1:0"
            [host]
            bytes = {blocks * BLOCK // 4 + BATCH * BLOCK}
            drain_at = 0.0
            [disk]
            path = "{folder}/disk"
            bytes = {ROUNDS_HELD * blocks * BLOCK}
        """
        with server("node", toml, folder) as address:
            bench = _Cascade(folder, address, blocks)
            try:
                bench.round()  # segments are made, memory is mapped
                first = bench.gb_per_s()
                for _ in range(ROUNDS_HELD):
                    bench.round()
                bench.forget()
                for _ in range(rounds):
                    bench.round()
                figures = bench.figures()
            finally:
                bench.close()
        saves = _Saves(folder / "slow", 4 if tiny else 80)
        asyncio.run(saves.measure())
        times = {**bench.times, **saves.times}
    write = paired_ratio(times["cascade write"], times["store write"])
    read = paired_ratio(times["cascade read"], times["store read"])
    waits = {name: sum(each) / len(each) for name, each in saves.waits.items()}
    slow = 1 / paired_ratio(times[SLOW], times[WITHOUT])
    return {
        "bytes": blocks * BLOCK,
        "times": {name: summary(each) for name, each in times.items()},
        **figures,
        "waits_a_save": waits,
        "first_round_gb_per_s": first,
        "bars": [
            Bar("cascade write, speed of the store alone", write, at_least=0.8).as_dict(),
            Bar("cascade read, speed of the store alone", read, at_least=0.8).as_dict(),
            Bar("save over a slow disk, in saves without one", slow, at_most=1.25).as_dict(),
            Bar("times that a save over a slow disk waits", waits[SLOW], at_most=0.1).as_dict(),
        ],
    }


class _Cascade:
    """One daemon, one engine's connection, and a store of the same size of its own."""

    def __init__(self, folder: Path, address: str, blocks: int) -> None:
        self._client = TierClient(f"{folder}/node.sock", LAYOUT)
        self._channel = grpc.insecure_channel(address)
        self._node = node_pb2_grpc.NodeStub(self._channel)
        self._store = DiskStore(folder / "alone", ROUNDS_HELD * blocks * BLOCK)
        self._pool = Arena.create(BLOCK, blocks)  # stands for VRAM
        self._pool.view[:] = os.urandom(1 << 20) * (len(self._pool.view) >> 20)
        self._blocks = blocks
        self.forget()

    def forget(self) -> None:
        """Begin to count anew."""
        self.times: dict[str, list[float]] = {
            f"{what} {way}": [] for what in ("store", "cascade") for way in ("write", "read")
        }
        self._written, self._cpu_s, self._rounds = self._counted(), self._cpu(), 0

    def round(self) -> None:
        """The same blocks through the store alone and through the daemon, down and up."""
        keys = new_keys(self._blocks)
        self._timed("store write", self._store_write, keys)
        self._timed("cascade write", self._cascade_write, keys)
        self._node.Clear(node_pb2.NodeClearRequest(tiers=[TO_WIRE[Tier.HOST]]))
        with self._lent():
            self._timed("store read", self._store_read, keys)
        self._timed("cascade read", self._cascade_read, keys)
        self._store.delete(keys)
        self._rounds += 1

    def gb_per_s(self) -> dict[str, float]:
        """The median of the rounds since `forget`."""
        nbytes = self._blocks * BLOCK
        return {
            name: round(nbytes / summary(each)["median_s"] / 1e9, 3)
            for name, each in self.times.items()
        }

    def figures(self) -> dict[str, object]:
        """Sustained speeds, what the daemon's processor did for a GB, and bytes on disk a byte."""
        saved = self._rounds * self._blocks * BLOCK
        return {
            "gb_per_s": self.gb_per_s(),
            "daemon_cpu_s_per_gb_in_and_out": round((self._cpu() - self._cpu_s) / saved * 1e9, 3),
            "write_amplification": round((self._counted() - self._written) / saved, 4),
            "direct_io": self._store.direct,
        }

    def close(self) -> None:
        self._client.close()
        self._channel.close()
        self._store.close()
        self._pool.close()

    def _timed(self, name: str, work: object, keys: Sequence[BlockKey]) -> None:
        assert callable(work)
        start = time.perf_counter()
        work(keys)
        self.times[name].append(time.perf_counter() - start)

    def _store_write(self, keys: Sequence[BlockKey]) -> None:
        for at in range(0, len(keys), BATCH):
            frames = [
                (key, frame.encode(key, BEGINS, self._pool.slot(at + i), LAYOUT, codecs.RAW))
                for i, key in enumerate(keys[at : at + BATCH])
            ]
            assert all(self._store.write(frames))

    def _store_read(self, keys: Sequence[BlockKey]) -> None:
        for at in range(0, len(keys), BATCH):
            found = self._store.read_into(keys[at : at + BATCH], self._places)
            assert all(each is not None for each in found)

    @contextmanager
    def _lent(self) -> Iterator[None]:
        """Slots of the daemon's arena, for the store alone to read into."""
        with self._client.write(new_keys(BATCH)) as lease:
            assert len(lease.slots) == BATCH
            self._places = [self._client.arena.slot(slot) for slot in lease.slots]
            yield
            lease.filled = 0

    def _cascade_write(self, keys: Sequence[BlockKey]) -> None:
        for at in range(0, len(keys), BATCH):
            left = list(range(at, at + BATCH))
            while left:  # a full host tier refuses; the disk makes room
                with self._client.write([keys[i] for i in left]) as lease:
                    for index, slot in zip(lease.indexes, lease.slots, strict=True):
                        self._client.arena.slot(slot)[:] = self._pool.slot(left[index])
                    lease.filled = len(lease.slots)
                left = left[lease.filled :]
                if left and not lease.filled:
                    time.sleep(0.001)
        ended = self._node.Drain(node_pb2.NodeDrainRequest(deadline_s=60, stay=True))
        assert ended.undrained_blocks == 0
        assert self._client.match(keys).blocks == len(keys)

    def _cascade_read(self, keys: Sequence[BlockKey]) -> None:
        for at in range(0, len(keys), BATCH):
            with self._client.read(keys[at : at + BATCH], wait_s=30.0) as lease:
                assert lease.sources == [Tier.DISK] * BATCH

    def _status(self) -> node_pb2.NodeStatus:
        return self._node.Status(node_pb2.NodeStatusRequest())

    def _counted(self) -> float:
        return self._status().counters["kvtier_disk_written_bytes_total"]

    def _cpu(self) -> float:
        """Seconds of processor time that the daemon has taken."""
        raw = self._client._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        pid = struct.unpack("3i", raw)[0]
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class _SlowFile(SegmentFile):
    """Each write takes SLOW_S more, as on a disk that has too much to do."""

    def write(self, slot: int, buffers: Buffers) -> None:
        time.sleep(SLOW_S)
        super().write(slot, buffers)


class _SlowFolder(Folder):
    def create(self, shape: Shape) -> SegmentFile:
        inner = super().create(shape)
        return _SlowFile(inner.path, inner.shape, inner._fd)


SLOW, WITHOUT = "save over a slow disk", "save without a disk"


class _Saves:
    """Saves of a batch into two managers over one arena: one has a slow disk, one has nothing."""

    def __init__(self, folder: Path, rounds: int) -> None:
        self.times: dict[str, list[float]] = {SLOW: [], WITHOUT: []}
        self.waits: dict[str, list[int]] = {SLOW: [], WITHOUT: []}
        self._folder, self._rounds = folder, rounds
        self._block = bytes(BLOCK)
        self._wash = [bytearray(WASH // 2), bytearray(WASH // 2)]

    async def measure(self) -> None:
        """Each round begins with the other one: neither always finds what the first one left."""
        blocks = (self._rounds + 1) * BATCH
        arena = Arena.create(BLOCK, blocks)
        host = TierSpec(tier=Tier.HOST, capacity=blocks * BLOCK, drain_at=0)
        disk = TierSpec(tier=Tier.DISK, capacity=blocks * BLOCK, drain_at=blocks * BLOCK)
        store = DiskStore(self._folder, 2 * blocks * BLOCK, open_folder=_SlowFolder)
        lower = LowerTier(Tier.DISK, store, codecs.RAW, 3, 1.0)
        slow = TierManager(LAYOUT, arena, [host, disk], [lower], lambda _: None)
        without = TierManager(LAYOUT, arena, [host], [], lambda _: None)
        managers = {SLOW: slow, WITHOUT: without}
        for manager in managers.values():
            await manager.start()
        for number in range(-1, self._rounds):
            for name in [*managers][:: 1 if number % 2 else -1]:
                self._save(name, managers[name], counts=number >= 0)
                await asyncio.sleep(0)  # the daemon's loop goes on: moves are started
                self._wash[0][:] = self._wash[1]
        assert slow.moves > 0, "the disk was not slow"
        await slow.close()
        await without.close()

    def _save(self, name: str, manager: TierManager, *, counts: bool) -> None:
        keys = new_keys(BATCH)
        waits = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
        start = time.perf_counter()
        lease = manager.write(1, keys, 0)
        assert len(lease.slots) == BATCH
        for slot in lease.slots:
            manager.arena.slot(slot)[:] = self._block
        manager.commit(lease.id, BATCH)
        if counts:
            self.times[name].append(time.perf_counter() - start)
            waits = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw - waits
            self.waits[name].append(waits)
