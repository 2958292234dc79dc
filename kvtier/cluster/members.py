"""The routing table on its way to the routers, and the drain of a node: gRPC, bounded waits."""

import asyncio
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Final, cast

import grpc

from kvtier.cluster.plan import Placed
from kvtier.config import parse_address
from kvtier.errors import one_line
from kvtier.wire.access import Access
from kvtier.wire.pb import node_pb2, node_pb2_grpc, router_pb2, router_pb2_grpc

_ANSWER_S: Final = 2.0
_REPLICAS: Final = 64  # addresses behind one name


def message(version: int, placed: Iterable[Placed]) -> router_pb2.Members:
    """The table as routers take it."""
    members = [
        router_pb2.Member(
            node=p.node, daemon_address=p.daemon, worker_address=p.worker, draining=p.draining
        )
        for p in placed
    ]
    return router_pb2.Members(version=version, members=members)


async def resolve(router: str) -> list[str]:
    """Every address behind host:port; none while the name is not known.

    One name may stand for many routers, as that of a headless Kubernetes Service does.
    """
    loop = asyncio.get_running_loop()
    host, port = parse_address(router, "routers")
    try:
        answers = await loop.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    except OSError:  # its pods may not be up yet
        return []
    found = set()
    for family, _, _, _, where in answers[:_REPLICAS]:
        ip = cast("str", where[0])
        found.add(f"[{ip}]:{port}" if family == socket.AF_INET6 else f"{ip}:{port}")
    return sorted(found)


@dataclass(slots=True)
class _Router:
    channel: grpc.aio.Channel
    version: int = 0
    error: str = "not told yet"


class Routers:
    """Tells routers their members, each name on its own, so that a slow one delays no other."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._routers: dict[str, dict[str, _Router]] = {}  # by name, then by address
        self._telling: dict[str, asyncio.Task[None]] = {}

    def tell(self, names: Iterable[str], members: router_pb2.Members) -> None:
        """Start to send `members` to each name that is not still busy with an earlier call.

        Meant to be called every round: a router that was told this version already, and is still
        connected, is left in peace; one that restarted has forgotten its members.
        """
        names = set(names)
        for name in (names | self._routers.keys()) - self._telling.keys():
            self._routers.setdefault(name, {})
            task = asyncio.create_task(self._tell(name, members, name in names))
            task.add_done_callback(partial(self._told, name))
            self._telling[name] = task

    def status(self) -> dict[str, tuple[int, str]]:
        """For each router address, the last version that it was told (0: none), and what failed."""
        told: dict[str, tuple[int, str]] = {}
        for name, routers in self._routers.items():
            told |= {a: (r.version, r.error) for a, r in routers.items()}
            if not routers:
                told[name] = (0, "no such host")
        return told

    async def close(self) -> None:
        """Stop telling and close every channel."""
        tasks = list(self._telling.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for name in list(self._routers):
            await self._keep(name, [])
        self._routers.clear()

    def _told(self, name: str, _: asyncio.Task[None]) -> None:
        del self._telling[name]

    async def _keep(self, name: str, addresses: list[str]) -> None:
        routers = self._routers[name]
        for address in routers.keys() - set(addresses):
            await routers.pop(address).channel.close()

    async def _tell(self, name: str, members: router_pb2.Members, wanted: bool) -> None:
        addresses = await resolve(name) if wanted else []
        await self._keep(name, addresses)
        if not wanted:
            del self._routers[name]
        routers = self._routers.get(name, {})
        for address in addresses:
            if address not in routers:
                routers[address] = _Router(self._access.channel(address))
        await asyncio.gather(*(_tell_one(r, members) for r in routers.values()))
        for address, router in routers.items():
            if router.error and self._access.secure:  # its certificates may be renewed by now
                failed, router.channel = router.channel, self._access.channel(address)
                await failed.close()


async def _tell_one(router: _Router, members: router_pb2.Members) -> None:
    connected = router.channel.get_state() is grpc.ChannelConnectivity.READY
    if connected and router.version == members.version and not router.error:
        return
    try:
        await router_pb2_grpc.RouterStub(router.channel).SetMembers(members, timeout=_ANSWER_S)
        router.version, router.error = members.version, ""
    except grpc.aio.AioRpcError as error:
        router.error = one_line(f"{error.code().name}: {error.details()}")


async def drain(daemon: str, deadline_s: float, access: Access) -> str:
    """Have a node daemon copy down what only it holds; what came of it, in one line.

    The daemon stays: until its node is taken away its blocks can still be read.
    """
    async with access.channel(daemon) as channel:
        request = node_pb2.NodeDrainRequest(deadline_s=deadline_s, stay=True)
        try:
            stub = node_pb2_grpc.NodeStub(channel)
            answer = await stub.Drain(request, timeout=deadline_s + _ANSWER_S)
        except grpc.aio.AioRpcError as error:
            return one_line(f"not drained: {error.code().name}: {error.details()}")
    return f"drained, {answer.undrained_blocks} blocks left behind"
