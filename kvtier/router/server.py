"""The router's process: `serve` is all of it."""

import asyncio
import gc
import logging
import random
from collections.abc import Callable
from typing import Final, Protocol

from kvtier.config import Config, RouterConfig
from kvtier.core.directory import Directory
from kvtier.router.epp.pick import Picker
from kvtier.router.epp.server import EndpointPicker
from kvtier.router.front import Front
from kvtier.router.members import Members
from kvtier.router.placement import Placement
from kvtier.router.prompts import Prompts
from kvtier.router.service import RouterService
from kvtier.router.text import TextPool
from kvtier.wire.access import Access
from kvtier.wire.pb import router_pb2_grpc
from kvtier.wire.rpc import Server

# Objects born before the collector looks at the young, and how often the older have their turn.
GC_AFTER: Final = (10_000, 10, 10)  # Python's 700 is looked at once in a few requests: 5% of all
GRACE_S: Final = 10.0  # for requests under way when the router is told to stop
SERVICE: Final = "kvtier.v1.Router"

log = logging.getLogger(__name__)


class _Health(Protocol):
    async def healthy(self, yes: bool) -> None: ...


class _Side(_Health, Protocol):
    """A server of another protocol in this process."""

    name: str
    address: str

    async def start(self) -> None: ...

    async def stop(self, grace_s: float) -> None: ...


def _log(name: str, address: str) -> None:
    log.info("%s at %s", name, address)


async def serve(
    config: Config, *, started: Callable[[str], None], stop: asyncio.Event,
    beside: Callable[[str, str], None] = _log,
) -> None:  # fmt: skip
    """Route until `stop` is set, then let running requests end for up to GRACE_S.

    `started` is called once with the "host:port" that was bound, and before it `beside` with the
    name and address of each other server (`http`, `epp`). Healthy while a worker is ready.

    Raises:
        ConfigError: An address or port of the config can't be used.
    """
    settings = config.router
    loop = asyncio.get_running_loop()
    collected_after = gc.get_threshold()
    rng = random.Random()  # noqa: S311 - for ties and pauses, not for secrets
    directory, texts = Directory(), TextPool()
    access = Access(config)
    server = Server(settings.listen, "router.listen", [SERVICE], access=access)
    members = Members(settings, directory, texts, rng, access)
    sides: list[_Side] = []
    try:
        placement = Placement(settings, members, directory, loop.time)
        prompts = Prompts(members, placement, texts)
        front = Front(settings, placement, prompts, rng, loop.time)
        picker = Picker(settings, prompts, placement, rng.random)
        sides += _sides(settings, front, picker, members, rng, access)
        router_pb2_grpc.add_RouterServicer_to_server(RouterService(front, members), server.grpc)
        access.serve_metrics(settings.metrics_host, settings.metrics_port, "router")
        await server.healthy(False)
        address = await server.start()
        for side in sides:
            await side.start()
            beside(side.name, side.address)
        gc.collect()
        gc.set_threshold(*GC_AFTER)
        gc.freeze()  # what was loaded until now stays: a pass over it takes 4 ms
        started(address)
        await _run([server, *sides], members, stop)
    finally:
        gc.unfreeze()
        gc.set_threshold(*collected_after)
        members.end_changes()
        await asyncio.gather(server.stop(GRACE_S), *(side.stop(GRACE_S) for side in sides))
        await members.close()
        texts.close()


def _sides(
    settings: RouterConfig, front: Front, picker: Picker, members: Members, rng: random.Random,
    access: Access,
) -> list[_Side]:  # fmt: skip
    """The servers beside the gRPC service, those that are configured."""
    sides: list[_Side] = []
    if settings.http:
        from kvtier.router.http.server import HttpServer  # needs the extra `http`

        sides.append(HttpServer(settings.http, front, members, rng, access))
    if settings.epp:
        sides.append(EndpointPicker(settings, front, picker, access))
    return sides


async def _run(servers: list[_Health], members: Members, stop: asyncio.Event) -> None:
    """Keep the health up to date until `stop`; a bug of ours in a link ends it with its error."""
    health = asyncio.ensure_future(_follow_health(servers, members))
    stopped = asyncio.ensure_future(stop.wait())
    try:
        waits = (health, stopped, members.failed)
        done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for each in done:
            each.result()
    finally:
        health.cancel()
        stopped.cancel()
        await asyncio.gather(health, stopped, return_exceptions=True)


async def _follow_health(servers: list[_Health], members: Members) -> None:
    async for _ in members.changes():
        for server in servers:
            await server.healthy(members.serving())
