"""What every gRPC server of kvtier has: a port of its own, limits, health, reflection."""

import socket
from collections.abc import Iterable
from typing import Final, NoReturn, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from kvtier.config import Config, parse_address
from kvtier.errors import ConfigError, Overloaded, RemoteProtocolError, RequestError, one_line
from kvtier.wire.access import Access

MAX_MESSAGE: Final = 16 << 20  # bytes received; larger ones end with RESOURCE_EXHAUSTED
KEYS_PER_MESSAGE: Final = 2048  # one takes a few ms to make, and holds the loop up for so long
PUSHBACK: Final = "grpc-retry-pushback-ms"

M = TypeVar("M")

OPTIONS: Final = (
    ("grpc.max_receive_message_length", MAX_MESSAGE),
    ("grpc.so_reuseport", 0),  # a taken port must be an error, not a shared one
)


class Server:
    """A grpc.aio server with health (of "" and of each service) and reflection.

    Who may call it is up to `access`; health is for everybody. Without it all may, in plain text.
    The names in `alive` serve as soon as it runs, whatever `healthy` says of the others.

    Raises:
        ConfigError: The address `listen`, which the setting `name` gives, is taken or not this
            machine's; said before anything that takes long.
    """

    def __init__(
        self, listen: str, name: str, services: Iterable[str], alive: Iterable[str] = (),
        *, access: Access | None = None,
    ) -> None:  # fmt: skip
        self._host, self._port = parse_address(listen, name)
        self.address = listen
        self._name = name
        check_free(listen, name)
        self._access = access or Access(Config())
        self.grpc = grpc.aio.server(options=OPTIONS, interceptors=self._access.interceptors)
        self._services = ["", *services]
        self._alive = list(alive)
        self._health = health_aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc)
        names = [*self._services[1:], health_pb2.DESCRIPTOR.services_by_name["Health"].full_name]
        reflection.enable_server_reflection([*names, reflection.SERVICE_NAME], self.grpc)

    async def start(self) -> str:
        """Bind and serve (not yet healthy); the address that was bound.

        Raises:
            ConfigError: The address was taken since.
        """
        try:
            if credentials := self._access.server_credentials():
                bound = self.grpc.add_secure_port(self.address, credentials)
            else:
                bound = self.grpc.add_insecure_port(self.address)
        except RuntimeError:
            bound = 0
        if not bound or (self._port and bound != self._port):
            raise ConfigError(f"{self._name}: cannot listen on {self.address}: in use, or not ours")
        self.address = f"{self._host}:{bound}"
        self._access.warn_if_open(self._name, self.address)
        await self.grpc.start()
        for service in self._alive:
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        return self.address

    async def healthy(self, yes: bool) -> None:
        """Say SERVING or NOT_SERVING for all services."""
        status = health_pb2.HealthCheckResponse.ServingStatus
        for service in self._services:
            await self._health.set(service, status.SERVING if yes else status.NOT_SERVING)

    async def stop(self, grace_s: float) -> None:
        """No new calls; those under way have `grace_s` to end."""
        await self._health.enter_graceful_shutdown()
        await self.grpc.stop(grace_s)


def check_free(listen: str, name: str) -> None:
    """Bind as gRPC will, and let go: it would write lines of its own about a failure.

    Raises:
        ConfigError: The address `listen`, which the setting `name` gives, is taken or not this
            machine's.
    """
    host, _ = parse_address(listen, name)
    if host.strip("[]") != "::":  # gRPC takes all of IPv4 where there is no IPv6
        bind_tcp(listen, name).close()


def bind_tcp(listen: str, name: str) -> socket.socket:
    """A TCP socket that is bound to the address `listen`, which the setting `name` gives.

    Raises:
        ConfigError: It is taken or not this machine's.
    """
    host, port = parse_address(listen, name)
    try:
        family, kind, _, _, at = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(at)
        except BaseException:
            sock.close()
            raise
    except OSError as error:
        raise ConfigError(f"{name}: cannot listen on {listen}: {error.strerror}") from None
    except UnicodeError:
        raise ConfigError(f"{name}: cannot listen on {listen}: no name of a host") from None
    return sock


def parsed(message: M | None) -> M:
    """What a call gave; grpc gives None, and logs why, for bytes that are no such message.

    Raises:
        RemoteProtocolError: They were none.
    """
    if message is None:
        raise RemoteProtocolError("it sent bytes that are no message")
    return message


def line_of(error: BaseException) -> str:
    """One line on what a call ended with, for a sentence that says that somebody is not there.

    So UNAVAILABLE, which says no more than that, is left out where there are words beside it.
    """
    if not isinstance(error, grpc.aio.AioRpcError):
        return one_line(str(error))
    details = one_line(error.details() or "")
    if details and error.code() is grpc.StatusCode.UNAVAILABLE:
        return details
    return f"{error.code().name}: {details}"


async def refuse(context: grpc.aio.ServicerContext, error: RequestError) -> NoReturn:
    """End a call with the error's status and its one line.

    RESOURCE_EXHAUSTED says when to come again, in the trailer that gRPC clients' own retries obey
    (grpc/proposal A6).
    """
    trailers: tuple[tuple[str, str], ...] = ()
    if isinstance(error, Overloaded):
        trailers = ((PUSHBACK, str(int(error.retry_s * 1000))),)
    await context.abort(grpc.StatusCode[error.grpc_status], str(error), trailers)
    raise AssertionError("abort returned")
