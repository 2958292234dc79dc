"""Blocks of this node for other nodes' daemons: pinned, framed, and sent in small parts."""

import asyncio
from bisect import bisect_left
from collections.abc import Coroutine, Mapping
from itertools import count
from typing import Final

import grpc

from kvtier import metrics
from kvtier.codec import frame
from kvtier.codec.codecs import RAW
from kvtier.config import PeersConfig
from kvtier.core.blocks import BlockKey
from kvtier.core.lease import Lease
from kvtier.errors import InvalidRequest, Overloaded, RemoteProtocolError
from kvtier.node.manager import TierManager
from kvtier.node.peer import MAX_BLOCKS
from kvtier.node.reading import Reading
from kvtier.wire import local
from kvtier.wire.pb import node_pb2
from kvtier.wire.rpc import refuse

PART_NBYTES: Final = 512 << 10  # copied on the loop at once: 0.1 ms
MOST_S: Final = 30.0  # that one Fetch may take, however slowly the other side reads
RETRY_S: Final = 0.1


class Lender:
    """Serves `Node.Fetch`. Lives on the daemon's loop.

    Args:
        config: How many at once; None: nobody gets anything.
        layouts: What the daemon has, by layout.
    """

    def __init__(self, config: PeersConfig | None, layouts: Mapping[str, TierManager]) -> None:
        self._most = config.lends if config else 0
        self._layouts = layouts
        self._clients = count(-2, -1)  # of the ledgers; engines' numbers begin at 1
        self._serving = 0

    @property
    def lends(self) -> bool:
        """Whether anybody gets anything."""
        return self._most > 0

    async def fetch(
        self, request: node_pb2.FetchRequest, context: grpc.aio.ServicerContext
    ) -> None:
        """Write the blocks that are held to `context`, each in parts, as they come to memory."""
        if not self.lends:
            metrics.LENDS_REFUSED.labels("off").inc()
            status = grpc.StatusCode.FAILED_PRECONDITION
            await context.abort(status, "this node lends no blocks; see [peers] of its settings")
        try:
            keys = _checked(request)
        except (InvalidRequest, RemoteProtocolError) as error:
            await refuse(context, InvalidRequest(str(error)))
        if self._serving >= self._most:
            metrics.LENDS_REFUSED.labels("busy").inc()
            text = f"{self._most} other nodes are being served, the limit peers.lends"
            await refuse(context, Overloaded(text, RETRY_S))
        manager = self._layouts.get(request.layout)
        if manager is None:
            return
        self._serving += 1
        left_s = min(MOST_S, context.time_remaining() or MOST_S)
        try:
            async with asyncio.timeout(left_s):
                await self._lend(manager, keys, request.first, left_s, context)
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "not read in time")
        finally:
            self._serving -= 1

    def close(self) -> None:
        """Serve nobody any more; those being served are ended by their server."""
        self._most = 0

    async def _lend(
        self, manager: TierManager, keys: list[BlockKey], first: int, left_s: float,
        context: grpc.aio.ServicerContext,
    ) -> None:  # fmt: skip
        held = first + _owned(manager, keys[first:])
        if held == first:
            return
        client, sent = next(self._clients), 0
        reading = Reading(client, keys[:held], first, 1, left_s)
        lease: Lease | None = None
        try:
            lease = await _now(manager.read(reading))
            while sent < lease.arrived():
                for at in range(sent, lease.arrived()):
                    await self._send(manager, lease, at, context)
                    sent += 1
                if sent < len(lease.keys):
                    lease = await _now(manager.more(lease.id, sent))
        finally:
            metrics.LENT_BLOCKS.inc(sent)
            if lease is not None:
                manager.release(lease.id)
            else:
                manager.disconnect(client)

    @staticmethod
    async def _send(
        manager: TierManager, lease: Lease, at: int, context: grpc.aio.ServicerContext
    ) -> None:
        """One block of the lease as a frame."""
        key, block = lease.keys[at], manager.arena.slot(lease.slots[at])
        made = key, block, manager.layout, RAW, manager.lineage.of(key)
        if block.nbytes > PART_NBYTES:  # its checksum takes a while
            header, payload = await asyncio.to_thread(frame.encode, *made)
        else:
            header, payload = frame.encode(*made)
        for start in range(0, block.nbytes, PART_NBYTES):
            part = bytes(payload[start : start + PART_NBYTES])
            message = node_pb2.FetchPart(header=b"" if start else bytes(header), payload=part)
            await context.write(message)


def _checked(request: node_pb2.FetchRequest) -> list[BlockKey]:
    """The path up to the last block that is wanted.

    Raises:
        InvalidRequest, RemoteProtocolError: A field is out of its limits.
    """
    keys = local.unpack_keys(request.keys)
    if request.first > len(keys):
        raise InvalidRequest(f"first is {request.first}, there are {len(keys)} keys")
    if not 1 <= request.blocks <= MAX_BLOCKS:
        raise InvalidRequest(f"blocks is {request.blocks}, must be 1 to {MAX_BLOCKS}")
    return keys[: request.first + request.blocks]


def _owned(manager: TierManager, keys: list[BlockKey]) -> int:
    """How many of `keys`, from the first on, lie here: the shared store is the other's to ask."""

    def reaches_shared(count: int) -> bool:
        by_tier = manager.match(keys[:count]).by_tier
        found = zip(manager.specs, by_tier, strict=True)
        return any(blocks for spec, blocks in found if spec.shared)

    held = manager.match(keys).blocks
    return bisect_left(range(1, held + 1), True, key=reaches_shared)


async def _now(lease: Lease | Coroutine[None, None, Lease]) -> Lease:
    return lease if isinstance(lease, Lease) else await lease
