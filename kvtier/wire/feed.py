"""What a source holds, told to every router that watches: a snapshot, then numbered deltas."""

import asyncio
import secrets
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from itertools import islice
from typing import Final

import grpc

from kvtier.core.blocks import BlockKey
from kvtier.core.tiers import Tier
from kvtier.wire.chains import Before, in_chains, tell, tell_gone
from kvtier.wire.pb import feed_pb2, feed_pb2_grpc
from kvtier.wire.rpc import KEYS_PER_MESSAGE

FLUSH_S: Final = 0.02  # changes are gathered for so long
HEARTBEAT_S: Final = 0.5
NEAR: Final = 1 << 16  # blocks of a snapshot among which those of one prompt are told together
MAX_BEHIND: Final = 1024  # messages that a slow watcher may be behind: 20 s of them
MAX_RECENT_NBYTES: Final = 4 << 20  # of the last messages, kept for watchers that missed some
MAX_WATCHERS: Final = 64

Residency = Mapping[Tier, Sequence[BlockKey]]


class FeedServicer(feed_pb2_grpc.FeedServicer):
    """Serves kvtier.v1.Feed for one source. Lives on one loop; `changed` is called on it.

    `held` gives the whole residency at the moment of the call, which stays as it is; `heartbeat`
    the source's state; `before` the block before one that is held, in its prompt.
    """

    def __init__(
        self,
        held: Callable[[], Residency],
        heartbeat: Callable[[], feed_pb2.Heartbeat],
        before: Before,
    ) -> None:
        self.epoch = secrets.randbits(63) | 1
        self._held = held
        self._heartbeat = heartbeat
        self._before = before
        self._seq = 0
        # The latest word on each (tier, key) since the last delta.
        self._changes: dict[tuple[Tier, BlockKey], bool] = {}
        self._recent: deque[feed_pb2.FeedMessage] = deque()  # for replays
        self._recent_nbytes = 0
        self._watchers: set[asyncio.Queue[feed_pb2.FeedMessage | None]] = set()
        self._flush_due: asyncio.TimerHandle | None = None
        self._closed = False
        self._watched = False  # ever

    def changed(self, changes: Iterable[tuple[Tier, BlockKey, bool]]) -> None:
        """Blocks came (True) or went (False); told to the watchers within FLUSH_S."""
        if not self._watched:  # the first to come begins with a snapshot
            return
        for tier, key, held in changes:
            self._changes[tier, key] = held
        if self._changes and self._flush_due is None:
            self._flush_due = asyncio.get_running_loop().call_later(FLUSH_S, self.flush)

    def flush(self) -> None:
        """Send what has changed as a delta, and soon the next where one does not hold it all."""
        if self._flush_due is not None:
            self._flush_due.cancel()
            self._flush_due = None
        piece = list(islice(self._changes.items(), KEYS_PER_MESSAGE))
        for change, _ in piece:
            del self._changes[change]
        if self._changes:
            self._flush_due = asyncio.get_running_loop().call_later(0, self.flush)
        if piece:
            self._seq += 1
            delta = feed_pb2.Delta(
                added=[
                    tell(tier, keys, self._before)
                    for tier, keys in _by_tier(key for key, held in piece if held).items()
                ],
                removed=[
                    tell_gone(tier, keys)
                    for tier, keys in _by_tier(key for key, held in piece if not held).items()
                ],
            )
            self._tell(feed_pb2.FeedMessage(epoch=self.epoch, seq=self._seq, delta=delta))

    def _tell(self, message: feed_pb2.FeedMessage) -> None:
        self._recent.append(message)
        self._recent_nbytes += message.ByteSize()
        while len(self._recent) > MAX_BEHIND or self._recent_nbytes > MAX_RECENT_NBYTES:
            self._recent_nbytes -= self._recent.popleft().ByteSize()
        for queue in list(self._watchers):
            if queue.qsize() >= MAX_BEHIND:
                self._watchers.discard(queue)
                queue.put_nowait(None)  # ends that stream; the watcher starts anew
            else:
                queue.put_nowait(message)

    def close(self) -> None:
        """End every stream. To be called before the server stops, which would cut them off."""
        self._closed = True
        for queue in self._watchers:
            queue.put_nowait(None)

    async def Watch(  # noqa: N802 - gRPC's name
        self, request: feed_pb2.WatchRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[feed_pb2.FeedMessage]:
        """See feed.proto."""
        if len(self._watchers) >= MAX_WATCHERS:
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED, f"feed: {MAX_WATCHERS} watchers already"
            )
        self._watched = True
        self.flush()
        queue: asyncio.Queue[feed_pb2.FeedMessage | None] = asyncio.Queue()
        self._watchers.add(queue)
        seq = self._seq
        try:
            missed = self._missed(request)
            if missed is None:
                async with aclosing(self._snapshot(seq)) as pieces:
                    async for piece in pieces:
                        yield piece
            for delta in missed or ():
                yield delta
            yield self._beat(seq)
            clock = asyncio.get_running_loop().time
            next_beat = clock() + HEARTBEAT_S
            while not self._closed:
                if clock() >= next_beat:
                    yield self._beat(seq)
                    next_beat = clock() + HEARTBEAT_S
                try:
                    async with asyncio.timeout_at(next_beat):
                        message = await queue.get()
                except TimeoutError:
                    continue
                if message is None:
                    break
                seq = message.seq
                yield message
            if not self._closed:
                await context.abort(grpc.StatusCode.ABORTED, "feed: too far behind, watch anew")
        finally:
            self._watchers.discard(queue)

    def _missed(self, request: feed_pb2.WatchRequest) -> list[feed_pb2.FeedMessage] | None:
        """The deltas after the client's last one; None where it needs a snapshot."""
        count = self._seq - request.after
        if request.epoch != self.epoch or not 0 <= count <= len(self._recent):
            return None
        return list(self._recent)[len(self._recent) - count :]

    def _beat(self, seq: int) -> feed_pb2.FeedMessage:
        return feed_pb2.FeedMessage(epoch=self.epoch, seq=seq, heartbeat=self._heartbeat())

    async def _snapshot(self, seq: int) -> AsyncGenerator[feed_pb2.FeedMessage, None]:
        """In pieces, each made when it is asked for: all at once would hold up the loop.

        Prompt by prompt as far as they lie near each other: what was saved in turn, as a disk has
        it, takes a router seven times as long to take in.
        """
        for tier, keys in self._held().items():
            for start in range(0, len(keys), NEAR):
                ordered: list[BlockKey] = []
                for step in in_chains(keys[start : start + NEAR], self._before):
                    ordered += step
                    await asyncio.sleep(0)
                for at in range(0, len(ordered), KEYS_PER_MESSAGE):
                    part = tell(tier, ordered[at : at + KEYS_PER_MESSAGE], self._before)
                    piece = feed_pb2.Snapshot(held=[part])
                    yield feed_pb2.FeedMessage(epoch=self.epoch, seq=seq, snapshot=piece)
        last = feed_pb2.Snapshot(last=True)
        yield feed_pb2.FeedMessage(epoch=self.epoch, seq=seq, snapshot=last)


def _by_tier(pairs: Iterable[tuple[Tier, BlockKey]]) -> dict[Tier, list[BlockKey]]:
    grouped: dict[Tier, list[BlockKey]] = {}
    for tier, key in pairs:
        grouped.setdefault(tier, []).append(key)
    return grouped
