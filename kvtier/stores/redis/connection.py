"""One connection to one server, and the connections that a server's callers share."""

import contextlib
import select
import socket
import ssl
import struct
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from kvtier import metrics
from kvtier.errors import ConfigError, RemoteProtocolError, StoreUnavailable
from kvtier.stores.redis.address import Address, Login
from kvtier.stores.redis.breaker import Breaker
from kvtier.stores.redis.resp import Buffer, Command, Reader, Reply, ReplyError, Sink, encode

MAX_CONNECTIONS = 64  # to one server: the most threads that a tier may have
WINDOW_NBYTES: Final = 4 * 2**20  # of replies that are asked for and not yet here
SEND_NBYTES: Final = 8 * 2**20  # of commands that go out before their replies are read
MAX_PIPELINE: Final = 1024  # commands whose replies are not yet here
_IOV_MAX: Final = 1024  # buffers that one sendmsg takes
_NO_ANSWER: Final = "no answer in time"

# Errors that say that the server cannot serve now, whatever it is asked.
_NOT_NOW: Final = {"LOADING", "MASTERDOWN", "CLUSTERDOWN", "BUSY", "NOAUTH", "WRONGPASS"}


class Deadline:
    """When a call must have ended, on the monotonic clock. More bytes than a round get more."""

    def __init__(self, seconds: float) -> None:
        self._at = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds that are left, above 0.

        Raises:
            TimeoutError: There are none.
        """
        left = self._at - time.monotonic()
        if left <= 0:
            raise TimeoutError(_NO_ANSWER)
        return left

    def extend(self, seconds: float) -> None:
        """Allow more time."""
        self._at += seconds


@dataclass(slots=True)
class Ask:
    """One command, what it costs, and what became of it.

    `name` is the key that decides which server of a cluster is asked.
    """

    name: bytes
    command: Command
    sends: int = 0  # bytes
    receives: int = 0  # bytes, as far as they are known
    sink: Sink | None = None
    reply: Reply = None


@dataclass(frozen=True, slots=True)
class Options:
    """How to connect. Times in seconds."""

    login: Login
    tls: ssl.SSLContext | None
    timeout_s: float
    retry_s: float


class Connection:
    """One socket with its login done. Not for two threads at once.

    Any exception leaves it out of step: close it.

    Raises:
        OSError: It could not be opened, broke, or gave no answer before the deadline.
        RemoteProtocolError: What came is not RESP2, or the login was refused.
    """

    def __init__(self, address: Address, options: Options, deadline: Deadline) -> None:
        self._socket = _open(address, options.tls, deadline)
        # The kernel's timeouts bound whole transfers, in one system call a transfer; TLS does
        # its own buffering and takes Python's.
        self._tls = isinstance(self._socket, ssl.SSLSocket)
        if not self._tls:
            self._socket.settimeout(None)
        self._reader = Reader(self._receive)
        self._deadline = deadline
        try:
            self._log_in(options.login)
        except BaseException:
            self.close()
            raise

    def pipeline(self, asks: Sequence[Ask], deadline: Deadline, *, asking: bool) -> None:
        """Send all and fill in each reply; few bytes are under way at a time.

        So the server never has more than a few large requests of ours to work off at once, and
        serves others in between. `asking`: for a slot that is on its way to this server.
        """
        self._deadline = deadline
        waiting: deque[Ask] = deque()
        sends = receives = at = 0
        while at < len(asks) or waiting:
            packed: list[Buffer] = []
            while at < len(asks) and len(waiting) < MAX_PIPELINE:
                ask = asks[at]
                full = sends + ask.sends > SEND_NBYTES or receives + ask.receives > WINDOW_NBYTES
                if full and waiting:
                    break
                if asking:
                    packed += encode([b"ASKING"])
                packed += encode(ask.command)
                waiting.append(ask)
                sends, receives, at = sends + ask.sends, receives + ask.receives, at + 1
            if packed:
                self._send(packed)
            if asking:
                self._reader.reply()
            ask = waiting.popleft()
            ask.reply = self._reader.reply(ask.sink)
            sends, receives = sends - ask.sends, receives - ask.receives

    def call(self, *command: bytes) -> Reply:
        """One command with a short reply, within the deadline of the last pipeline or login."""
        self._send(encode(command))
        return self._reader.reply()

    def in_step(self) -> bool:
        """Whether it is idle as it should be: not hung up, and no stray bytes have come."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return not poll.poll(0)

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def _log_in(self, login: Login) -> None:
        if login.password:
            words = [login.user.encode()] if login.user else []
            self._must(b"AUTH", *words, login.password.encode())
        if login.db:
            self._must(b"SELECT", b"%d" % login.db)

    def _must(self, *command: bytes) -> None:
        reply = self.call(*command)
        if isinstance(reply, ReplyError):
            raise RemoteProtocolError(str(reply))

    def _send(self, buffers: list[Buffer]) -> None:
        if self._tls:
            for each in _joined(buffers):
                self._socket.settimeout(self._deadline.left())
                self._socket.sendall(each)
            return
        left = deque(buffers)
        while left:
            self._bound(socket.SO_SNDTIMEO)
            try:
                sent = self._socket.sendmsg([left[n] for n in range(min(len(left), _IOV_MAX))])
            except BlockingIOError:
                raise TimeoutError(_NO_ANSWER) from None
            while left and sent >= len(left[0]):
                sent -= len(left.popleft())
            if sent:
                left[0] = memoryview(left[0])[sent:]

    def _receive(self, view: memoryview, whole: bool) -> int:
        if self._tls:
            self._socket.settimeout(self._deadline.left())
            return self._socket.recv_into(view)
        self._bound(socket.SO_RCVTIMEO)
        try:
            return self._socket.recv_into(view, 0, socket.MSG_WAITALL if whole else 0)
        except BlockingIOError:
            raise TimeoutError(_NO_ANSWER) from None

    def _bound(self, option: int) -> None:
        left_us = max(int(self._deadline.left() * 1e6), 1000)
        self._socket.setsockopt(
            socket.SOL_SOCKET, option, struct.pack("@ll", *divmod(left_us, 10**6))
        )


class Link:
    """The connections to one server, and the breaker before them. For any number of threads."""

    def __init__(self, address: Address, options: Options) -> None:
        self.address = address
        self._options = options
        self._idle: list[Connection] = []
        self._room = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._lock = threading.Lock()
        self._breaker = Breaker(options.retry_s / 8, options.retry_s)
        self._closed = False
        self._why = ""  # the last failure

    def pipeline(self, asks: Sequence[Ask], deadline: Deadline, *, asking: bool = False) -> None:
        """See `Connection.pipeline`.

        Raises:
            StoreUnavailable: The breaker is open, or the server failed.
        """
        with self.connection(deadline) as connection:
            connection.pipeline(asks, deadline, asking=asking)
            for ask in asks:
                if isinstance(ask.reply, ReplyError) and ask.reply.code in _NOT_NOW:
                    self._why = str(ask.reply)
                    raise StoreUnavailable(f"redis {self.address}: {self._why}")

    @contextlib.contextmanager
    def connection(self, deadline: Deadline) -> Iterator[Connection]:
        """A connection for the `with` block; kept for others after it unless the block raises.

        Raises:
            StoreUnavailable: The breaker is open, the server cannot be reached, or the block
                raised an OSError or a RemoteProtocolError.
        """
        with self._lock:
            allowed = self._breaker.allow(time.monotonic())
        if not allowed:
            raise StoreUnavailable(f"redis {self.address}: left alone after: {self._why}")
        well = False
        try:
            with self._borrowed(deadline) as connection:
                yield connection
            well = True
        except (OSError, RemoteProtocolError) as error:
            self._why = str(error) or type(error).__name__
            raise StoreUnavailable(f"redis {self.address}: {self._why}") from None
        finally:
            with self._lock:
                if well:
                    self._breaker.succeeded()
                elif self._breaker.failed(time.monotonic()):
                    metrics.REDIS_BREAKER_OPENED.inc()

    def close(self) -> None:
        """Hang up; connections in use are hung up by those who use them."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for each in idle:
            each.close()

    @contextlib.contextmanager
    def _borrowed(self, deadline: Deadline) -> Iterator[Connection]:
        if not self._room.acquire(timeout=deadline.left()):
            raise TimeoutError(f"all {MAX_CONNECTIONS} connections are in use")
        connection: Connection | None = None
        try:
            connection = self._take() or Connection(self.address, self._options, deadline)
            yield connection
            connection = self._put(connection)
        finally:
            if connection is not None:
                connection.close()
            self._room.release()

    def _take(self) -> Connection | None:
        while True:
            with self._lock:
                if not self._idle:
                    return None
                connection = self._idle.pop()
            if connection.in_step():
                return connection
            connection.close()

    def _put(self, connection: Connection) -> Connection | None:
        """Keep it for later; gives it back where it must be closed instead."""
        with self._lock:
            if self._closed:
                return connection
            self._idle.append(connection)
            return None


def _open(address: Address, tls: ssl.SSLContext | None, deadline: Deadline) -> socket.socket:
    if not address.port:
        opened = socket.socket(socket.AF_UNIX)
        try:
            opened.settimeout(deadline.left())
            opened.connect(address.host)
        except BaseException:
            opened.close()
            raise
        return opened
    try:
        opened = socket.create_connection(address, timeout=deadline.left())
    except UnicodeError:
        raise ConfigError(f"redis.url: {address.host[:64]!r} is not a host's name") from None
    try:
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if tls is None:
            return opened
        opened.settimeout(deadline.left())
        return tls.wrap_socket(opened, server_hostname=address.host)
    except BaseException:
        opened.close()
        raise


def _joined(buffers: list[Buffer]) -> Iterator[Buffer]:
    """Short buffers together, long ones as they are: TLS makes records of what it gets."""
    short = bytearray()
    for each in buffers:
        if len(each) < 16 * 1024:
            short += each
            continue
        if short:
            yield bytes(short)
            short.clear()
        yield each
    if short:
        yield bytes(short)
