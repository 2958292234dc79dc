"""The HTTP server: uvicorn on the router's own loop."""

import asyncio
import contextlib
import math
import random
import socket
from collections.abc import Generator
from typing import Final

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from kvtier.config import parse_address
from kvtier.errors import ConfigError
from kvtier.router.front import Front
from kvtier.router.http.app import make_app
from kvtier.router.http.guard import guarded
from kvtier.router.members import Members
from kvtier.wire.access import Access

# Idle connections live longer than a client or proxy keeps them (httpx 5 s, nginx and AWS 60 s):
# one that closes first meets a request that is on its way, which then fails.
KEEP_ALIVE_S: Final = 75


class _Server(uvicorn.Server):
    """Leaves signals to the process that it is a part of."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


class _Connection(HttpToolsProtocol):
    """Every request of a connection hears that it was lost.

    uvicorn tells the last that has come, be it only waiting for the one before it to be answered:
    that one would go on for nobody, with a line in the log for each piece of its answer.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._open: list[RequestResponseCycle] = []
        super().connection_made(transport)

    def on_headers_complete(self) -> None:
        self._open = [each for each in self._open if not each.response_complete]
        before = self.cycle
        super().on_headers_complete()
        if self.cycle is not before:
            self._open.append(self.cycle)

    def connection_lost(self, exc: Exception | None) -> None:
        for each in self._open:
            each.disconnected = not each.response_complete
            each.message_event.set()
        super().connection_lost(exc)


class HttpServer:
    """Serves the OpenAI-compatible API at `listen`, which the setting router.http gives.

    Raises:
        ConfigError: The address is taken or not this machine's.
    """

    name = "http"

    def __init__(
        self, listen: str, front: Front, members: Members, rng: random.Random, access: Access
    ) -> None:
        host, port = parse_address(listen, "router.http")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        # Named as TCP: only then asyncio turns Nagle's algorithm off, which costs 40 ms an answer.
        self._socket = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind((host.strip("[]"), port))
            self._socket.listen(1024)
        except OSError as error:
            self._socket.close()
            raise ConfigError(f"router.http: cannot listen on {listen}: {error.strerror}") from None
        self.address = f"{host}:{self._socket.getsockname()[1]}"
        config = uvicorn.Config(
            guarded(make_app(front, members, rng), access), lifespan="off", log_config=None,
            http=_Connection, log_level="warning", access_log=False, server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
        )  # fmt: skip
        access.warn_if_open("router.http", self.address)
        config.load()
        config.ssl = access.tls_context()
        self._server = _Server(config)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Answer from now on; connections made before wait in the socket's queue."""
        self._task = asyncio.get_running_loop().create_task(
            self._server.serve(sockets=[self._socket])
        )

    async def healthy(self, yes: bool) -> None:
        """Nothing to do: /health looks at the members when it is asked."""

    async def stop(self, grace_s: float) -> None:
        """No new requests; those under way have `grace_s` to end."""
        self._server.config.timeout_graceful_shutdown = math.ceil(grace_s)
        self._server.should_exit = True
        if self._task is not None:
            await self._task
        self._socket.close()
