"""KV events over real ZMQ sockets: order, gaps, replays, and another engine at the same place."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import msgpack
import pytest
import zmq
import zmq.asyncio

from kvtier.core.vllm_keys import block_hashes, keys_of, none_hash
from kvtier.engine.vllm.events import Residency
from kvtier.engine.vllm.subscriber import Subscriber
from kvtier.errors import ConfigError

BLOCK = 4
ROOT = b"root"
TOKENS = list(range(40))
HASHES = block_hashes(none_hash(), TOKENS, BLOCK)
KEYS = keys_of(ROOT, HASHES)


def stored(index: int) -> bytes:
    """The batch that tells of one more block of the prompt."""
    event = {
        "type": "BlockStored", "block_hashes": [HASHES[index]], "block_size": BLOCK,
        "parent_block_hash": HASHES[index - 1] if index else None, "lora_id": None,
        "token_ids": TOKENS[index * BLOCK : (index + 1) * BLOCK], "medium": "GPU",
        "lora_name": None, "group_idx": 0,
    }  # fmt: skip
    return msgpack.packb([0.0, [event], 0])


class Publisher:
    """vLLM's end: PUB for batches, ROUTER for replays of those it has kept."""

    def __init__(self, folder: Path) -> None:
        self.endpoint, self.replay = f"ipc://{folder}/events", f"ipc://{folder}/replay"
        self.context = zmq.asyncio.Context()
        self.pub = self.context.socket(zmq.XPUB)
        self.pub.bind(self.endpoint)
        self.router = self.context.socket(zmq.ROUTER)
        self.router.bind(self.replay)
        self.kept: dict[int, bytes] = {}
        self.asked = asyncio.Event()
        self.task = asyncio.ensure_future(self._replays())

    async def subscribed(self) -> None:
        await self.pub.recv()

    async def send(self, seq: int, payload: bytes, *, kept: bool = True, sent: bool = True) -> None:
        if kept:
            self.kept[seq] = payload
        if sent:
            await self.pub.send_multipart([b"kv", seq.to_bytes(8, "big"), payload])

    async def _replays(self) -> None:
        while True:
            name, _, start = await self.router.recv_multipart()
            self.asked.set()
            for seq in sorted(self.kept):
                if seq >= int.from_bytes(start, "big"):
                    number = seq.to_bytes(8, "big")
                    await self.router.send_multipart([name, b"", b"kv", number, self.kept[seq]])
            await self.router.send_multipart([name, b"", b"", b"\xff" * 8, b""])

    def close(self) -> None:
        self.task.cancel()
        self.context.destroy(linger=0)


class Follower:
    """A subscriber, and what it has told so far."""

    def __init__(self, publisher: Publisher, *, replay: bool = True) -> None:
        self.held: set[bytes] = set()
        self.residency = Residency(none_hash(), ROOT, BLOCK)
        where = publisher.replay if replay else ""
        self.subscriber = Subscriber(publisher.endpoint, where, self.residency, self._changed)
        self.task = asyncio.ensure_future(self.subscriber.follow())

    def _changed(self, changes: list[tuple[bytes, bool]]) -> None:
        for key, held in changes:
            (self.held.add if held else self.held.discard)(key)

    async def has(self, keys: list[bytes]) -> None:
        async with asyncio.timeout(60):
            while self.held != set(keys):
                assert not self.task.done(), self.task.exception()
                await asyncio.sleep(0.01)
        assert set(self.residency.keys()) == set(keys)

    async def close(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        self.subscriber.close()


@pytest.fixture
async def publisher(tmp_path: Path) -> AsyncIterator[Publisher]:
    it = Publisher(tmp_path)
    yield it
    it.close()


@pytest.fixture
async def follower(publisher: Publisher) -> AsyncIterator[Follower]:
    it = Follower(publisher)
    await publisher.subscribed()
    await publisher.asked.wait()
    yield it
    await it.close()


async def test_batches_in_order(publisher, follower):
    for seq in range(3):
        await publisher.send(seq, stored(seq))
    await follower.has(KEYS[:3])


async def test_what_was_told_before_is_asked_for(publisher):
    for seq in range(3):
        await publisher.send(seq, stored(seq), sent=False)
    late = Follower(publisher)
    await late.has(KEYS[:3])
    await late.close()


async def test_a_gap_is_filled_by_a_replay(publisher, follower):
    await publisher.send(0, stored(0))
    await publisher.send(1, stored(1), sent=False)
    await publisher.send(2, stored(2))
    await follower.has(KEYS[:3])


async def test_a_gap_that_cannot_be_filled_forgets_everything(publisher, follower):
    await publisher.send(0, stored(0), kept=False)
    await follower.has(KEYS[:1])
    # The parents of this block are unknown, so it is not taken either; whole hashes prove it.
    publisher.kept.clear()
    await publisher.send(5, msgpack.packb([0.0, [{"type": "AllBlocksCleared"}], 0]), kept=False)
    await follower.has([])
    await publisher.send(6, stored(0), kept=False)
    await follower.has(KEYS[:1])


async def test_without_replays_a_gap_forgets_everything(publisher):
    follower = Follower(publisher, replay=False)
    await publisher.subscribed()
    await publisher.send(0, stored(0))
    await follower.has(KEYS[:1])
    await publisher.send(2, stored(0))
    await publisher.send(3, stored(1))
    await follower.has(KEYS[:2])
    await follower.close()


async def test_a_sequence_that_goes_backwards_is_another_engine(publisher, follower):
    for seq in range(3):
        await publisher.send(seq, stored(seq))
    await follower.has(KEYS[:3])
    publisher.kept.clear()
    await publisher.send(0, stored(0))
    await follower.has(KEYS[:1])


async def test_what_makes_no_sense_costs_what_was_known_and_no_more(publisher, follower):
    await publisher.send(0, stored(0))
    await follower.has(KEYS[:1])
    await publisher.send(1, b"\xc1")
    await follower.has([])
    await publisher.send(2, stored(0))
    await follower.has(KEYS[:1])


@pytest.mark.parametrize("bad", [b"\xc1", msgpack.packb([0.0, [{"type": "BlockStored"}], 0])])
async def test_a_first_replay_that_makes_no_sense_is_no_end(publisher, bad):
    await publisher.send(0, stored(0), sent=False)
    await publisher.send(1, bad, sent=False)
    await publisher.send(2, stored(0), sent=False)
    late = Follower(publisher)
    await publisher.subscribed()
    await publisher.asked.wait()
    await publisher.send(3, stored(1))  # what came after the bad one is asked for again
    await late.has(KEYS[:2])
    await late.close()


async def test_a_dead_engine_holds_nothing(publisher, follower):
    await publisher.send(0, stored(0))
    await follower.has(KEYS[:1])
    follower.subscriber.forget()
    await follower.has([])


async def test_an_address_that_is_none_is_named():
    with pytest.raises(ConfigError, match=r"worker\.events is 'nowhere'"):
        Subscriber("nowhere", "", Residency(none_hash(), ROOT, BLOCK), lambda changes: None)
