"""Follows one vLLM engine's KV events over ZMQ: in order, without a gap, or from nothing."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Final

import zmq
import zmq.asyncio

from kvtier import metrics
from kvtier.engine.vllm.events import MAX_EVENT_NBYTES, Changes, Residency, decode
from kvtier.errors import ConfigError, RemoteProtocolError

REPLAY_S: Final = 5.0  # of silence after which a replay is given up
FIRST_LOOK_S: Final = 1.0  # between asking an engine that may not be up yet
QUEUE: Final = 100_000  # messages that may wait here
_SEQ: Final = 8  # bytes, big-endian
_END: Final = b"\xff" * _SEQ

log = logging.getLogger(__name__)


class Subscriber:
    """Keeps `residency` as the engine at `endpoint` tells it, and says every change.

    A gap is filled from `replay`, where the engine keeps its last batches. What cannot be filled
    is forgotten, all of it: the router then believes too little, never too much. A sequence that
    goes backwards is another engine's.

    Raises:
        ConfigError: An address is none of ZMQ's.
    """

    def __init__(
        self, endpoint: str, replay: str, residency: Residency, changed: Callable[[Changes], None]
    ) -> None:
        self._residency = residency
        self._changed = changed
        self._next = 0  # the sequence number that comes next
        self._context = zmq.asyncio.Context()
        self._replay_at = replay
        self._events = self._context.socket(zmq.SUB)
        self._events.setsockopt(zmq.RCVHWM, QUEUE)
        self._events.setsockopt(zmq.MAXMSGSIZE, MAX_EVENT_NBYTES)
        self._events.setsockopt(zmq.SUBSCRIBE, b"")
        try:
            self._events.connect(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError(f"worker.events is {endpoint!r}: {error}") from None

    async def follow(self) -> None:
        """Follow until cancelled."""
        await self._sure(self._fill(None))
        while True:
            await self._sure(self._take(await self._events.recv_multipart()))

    async def _sure(self, taking: Coroutine[None, None, None]) -> None:
        """Take what came; what cannot be read leaves nothing to rely on."""
        try:
            await taking
        except RemoteProtocolError as error:
            metrics.FEED_GAPS.labels("vllm").inc()
            log.warning("%s; forgetting what VRAM holds", error)
            self._forget()

    def forget(self) -> None:
        """The engine is gone, and its VRAM with it."""
        self._forget()
        self._next = 0

    def close(self) -> None:
        """End the connections. Idempotent."""
        self._context.destroy(linger=0)

    async def _take(self, frames: list[bytes]) -> None:
        if len(frames) != 3 or len(frames[1]) != _SEQ:
            raise RemoteProtocolError("KV events: not three frames with a number")
        seq = int.from_bytes(frames[1], "big")
        if seq < self._next:
            log.info("KV events begin anew at %d: another engine", seq)
            self._forget()
            self._next = 0
        if seq > self._next:
            await self._fill(seq)
        if seq >= self._next:  # else the replay has brought it already
            self._apply(seq, frames[2])

    def _apply(self, seq: int, payload: bytes) -> None:
        self._next = seq + 1
        changes = self._residency.apply(decode(payload))
        if changes:
            self._changed(changes)

    async def _fill(self, until: int | None) -> None:
        """Ask for the batches from the next one on; forget all where they are not there."""
        if not self._replay_at:
            if until is not None:
                self._lost(until)
            return
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        try:
            socket.connect(self._replay_at)
            await socket.send_multipart([b"", self._next.to_bytes(_SEQ, "big")])
            async with asyncio.timeout(REPLAY_S if until is not None else FIRST_LOOK_S):
                while True:
                    frames = await socket.recv_multipart()
                    if len(frames) != 4 or frames[2] == _END:
                        break
                    self._replayed(int.from_bytes(frames[2], "big"), frames[3])
        except TimeoutError:
            pass
        except zmq.ZMQError as error:
            log.warning("worker.replay is %r: %s", self._replay_at, error)
        finally:
            socket.close()
        if until is not None and self._next < until:
            self._lost(until)

    def _replayed(self, seq: int, payload: bytes) -> None:
        if seq > self._next:
            self._lost(seq)
        if seq >= self._next:
            self._apply(seq, payload)

    def _lost(self, seq: int) -> None:
        """The batches before `seq` are gone for good."""
        metrics.FEED_GAPS.labels("vllm").inc()
        log.warning("KV events %d to %d were missed", self._next, seq - 1)
        self._forget()
        self._next = seq

    def _forget(self) -> None:
        changes = self._residency.clear()
        if changes:
            self._changed(changes)
