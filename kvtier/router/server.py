"""The router's process: `serve` is all of it."""

import asyncio
import random
from collections.abc import Callable
from typing import Final

from kvtier import metrics
from kvtier.config import Config
from kvtier.core.directory import Directory
from kvtier.router.members import Members
from kvtier.router.placement import Placement
from kvtier.router.service import RouterService
from kvtier.router.text import TextPool
from kvtier.wire.pb import router_pb2_grpc
from kvtier.wire.rpc import Server

GRACE_S: Final = 10.0  # for requests under way when the router is told to stop
SERVICE: Final = "kvtier.v1.Router"


async def serve(config: Config, *, started: Callable[[str], None], stop: asyncio.Event) -> None:
    """Route until `stop` is set, then let running requests end for up to GRACE_S.

    `started` is called once with the "host:port" that was bound. Healthy while a worker is ready.

    Raises:
        ConfigError: An address or port of the config can't be used.
    """
    settings = config.router
    loop = asyncio.get_running_loop()
    rng = random.Random()  # noqa: S311 - for ties and pauses, not for secrets
    directory, texts = Directory(), TextPool()
    server = Server(settings.listen, "router.listen", [SERVICE])
    members = Members(settings, directory, texts, rng)
    try:
        placement = Placement(settings, members, directory, loop.time)
        service = RouterService(settings, members, placement, texts, rng)
        router_pb2_grpc.add_RouterServicer_to_server(service, server.grpc)
        metrics.serve(settings.metrics_port, "router.metrics_port")
        await server.healthy(False)
        started(await server.start())
        await _run(server, members, stop)
    finally:
        members.end_changes()
        await server.stop(GRACE_S)
        await members.close()
        texts.close()


async def _run(server: Server, members: Members, stop: asyncio.Event) -> None:
    """Keep the health up to date until `stop`; a bug of ours in a link ends it with its error."""
    health = asyncio.ensure_future(_follow_health(server, members))
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


async def _follow_health(server: Server, members: Members) -> None:
    async for _ in members.changes():
        await server.healthy(members.any_ready())
