"""The node daemon's gRPC service: what it holds, emptying a tier, draining."""

from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from typing import Final, Protocol

import grpc

from kvtier.core.tiers import Tier
from kvtier.node.lender import Lender
from kvtier.node.manager import TierManager
from kvtier.node.record import Recorder
from kvtier.node.server import LocalServer
from kvtier.wire.chains import TO_WIRE
from kvtier.wire.pb import node_pb2, node_pb2_grpc
from kvtier.wire.recording import recorded

DEFAULT_DRAIN_S: Final = 30.0
MAX_DRAIN_S: Final = 3600.0
_FROM_WIRE: Final[dict[int, Tier]] = {wire: tier for tier, wire in TO_WIRE.items()}


class Daemon(Protocol):
    """What the service shows of a daemon."""

    name: str
    epoch: int
    draining: bool
    layouts: dict[str, TierManager]
    local: LocalServer
    recorder: Recorder
    lender: Lender

    async def drain(self, deadline_s: float) -> int:
        """Copy down what has no lower copy; how many blocks were left at the deadline."""
        ...

    def counters(self) -> Mapping[str, float]:
        """Every counter by its name."""
        ...


class NodeServicer(node_pb2_grpc.NodeServicer):
    """See node.proto."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    async def Status(  # noqa: N802 - gRPC's name
        self, request: node_pb2.NodeStatusRequest, context: grpc.aio.ServicerContext
    ) -> node_pb2.NodeStatus:
        """See node.proto."""
        daemon = self._daemon
        daemon.local.hear()
        return node_pb2.NodeStatus(
            node=daemon.name,
            epoch=daemon.epoch,
            draining=daemon.draining,
            clients=daemon.local.clients,
            counters=daemon.counters(),
            layouts=[_layout_status(manager) for manager in daemon.layouts.values()],
            lends_at=daemon.lender.address,
        )

    async def Clear(  # noqa: N802
        self, request: node_pb2.NodeClearRequest, context: grpc.aio.ServicerContext
    ) -> node_pb2.NodeClearResponse:
        """See node.proto."""
        owned = {TO_WIRE[Tier.HOST], TO_WIRE[Tier.DISK]}
        if not request.tiers or not owned.issuperset(request.tiers):
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT, "tiers must be HOST, DISK or both"
            )
        self._daemon.local.hear()
        dropped = sum(
            manager.clear(_FROM_WIRE[tier])
            for manager in self._daemon.layouts.values()
            for tier in request.tiers
        )
        return node_pb2.NodeClearResponse(blocks=dropped)

    async def Drain(  # noqa: N802
        self, request: node_pb2.NodeDrainRequest, context: grpc.aio.ServicerContext
    ) -> node_pb2.NodeDrainResponse:
        """See node.proto."""
        deadline_s = request.deadline_s or DEFAULT_DRAIN_S
        if not 0 < deadline_s <= MAX_DRAIN_S:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"deadline_s is {deadline_s:g}, must be above 0 and at most {MAX_DRAIN_S:g}",
            )
        if not request.stay:
            self._daemon.draining = True
        self._daemon.local.hear()
        return node_pb2.NodeDrainResponse(undrained_blocks=await self._daemon.drain(deadline_s))

    async def Record(  # noqa: N802
        self, request: node_pb2.NodeRecordRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[node_pb2.RecordedUse]:
        """See node.proto."""
        async with aclosing(recorded(self._daemon.recorder, context)) as told:
            async for each in told:
                yield each


def _layout_status(manager: TierManager) -> node_pb2.LayoutStatus:
    tiers = [
        node_pb2.TierStatus(
            tier=TO_WIRE[spec.tier],
            blocks=used.blocks,
            used_bytes=used.nbytes,
            capacity_bytes=spec.capacity,
            available=available,
        )
        for spec, used, available in manager.usage()
    ]
    for tier, lower in zip(tiers[1:], manager.lower, strict=True):
        tier.codec = lower.codec_in_use.name
        tier.codec_chosen = lower.tuner is not None
        if lower.tuner is not None and (measured := lower.tuner.measured):
            tier.write_bytes_per_s, tier.read_bytes_per_s, tier.measured_by = measured
    return node_pb2.LayoutStatus(
        layout=manager.layout.describe(),
        leases=manager.leases,
        moves=manager.moves,
        tiers=tiers,
    )
