"""One other node's daemon: blocks of it, by TCP, straight into slots of our arena. Blocks."""

import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, NamedTuple

from kvtier import metrics
from kvtier.codec import frame
from kvtier.config import parse_address
from kvtier.core.blocks import BlockKey, BlockLayout
from kvtier.core.fidelity import Fidelity
from kvtier.errors import ConfigError, CorruptFrame, RemoteProtocolError
from kvtier.node.stream import Stream, prepare
from kvtier.wire import lending, local
from kvtier.wire.access import Access
from kvtier.wire.lending import Kind, Wanted

LABEL: Final = "peer"  # in metrics, beside the tiers'
CONNECT_S: Final = 3.0  # at most, for a connection with its handshake
KEPT_S: Final = 120.0  # that an idle connection is; less than the other side waits
_LENGTH: Final = struct.Struct("<I")


class Result(StrEnum):
    """How a pull ended."""

    OK = "ok"  # with all that was asked for
    LESS = "less"  # the peer has fewer
    LATE = "late"  # the deadline cut it
    FAILED = "failed"  # the peer is away, refuses us, or sent what cannot be right
    BUSY = "busy"  # the peer serves, or we pull, as many as may be
    LEFT_ALONE = "left_alone"  # it failed too often a moment ago
    UNKNOWN = "unknown"  # no such peer
    GAVE_WAY = "gave_way"  # our layout did, to another one: nobody could use what comes
    JOINED = "joined"  # another request's pull had it under way


class Order(NamedTuple):
    """What to fetch: keys[first:] of a path from its root on, each into its place.

    Places are of layout.nbytes, and nobody else's until `Peer.fetch` returns. `lossy`: also
    blocks that are not exact may come.
    """

    layout: BlockLayout
    keys: Sequence[BlockKey]
    first: int
    places: Sequence[memoryview]
    lossy: bool


@dataclass(slots=True)
class Fetched:
    """The leading blocks that are whole in their places, by what they are; and how it ended."""

    fidelities: list[Fidelity] = field(default_factory=list)
    result: Result = Result.LESS
    why: str = ""


class _Inexact(Exception):
    """A block that is not exact has come, and no lossy codec is set here."""


class _Busy(Exception):
    """The peer serves as many as it may."""


class Peer:
    """The daemon of `node` at one address. Any thread may call any method.

    Connections are kept, as many as there were fetches at once.
    """

    def __init__(self, node: str, address: str, access: Access) -> None:
        self.node = node
        self.address = address
        self._access = access
        self._lock = threading.Lock()
        self._idle: list[tuple[float, Stream]] = []  # since when, the oldest first
        self._used: dict[Stream, bool] = {}  # whether it had been kept
        self._closed = False

    def take(self) -> Stream | None:
        """A connection that is left from an earlier fetch, for `fetch` or `give_back`."""
        while True:
            with self._lock:
                if not self._idle:
                    return None
                _, stream = self._idle.pop()
                self._used[stream] = True
            if stream.in_step():
                return stream
            self._give(stream, well=False)

    def connect(self, timeout_s: float) -> Stream | Fetched:
        """A new one, at most after `timeout_s`; or how it failed. Raises nothing."""
        stream, failed = None, Fetched()
        with self._explained(failed):
            stream = self._connect(time.monotonic() + timeout_s)
        return stream or failed

    def give_back(self, stream: Stream) -> None:
        """Nothing is asked on it for now."""
        self._give(stream, well=True)

    def fetch(self, order: Order, timeout_s: float, stream: Stream | None = None) -> Fetched:
        """Ask for the blocks and wait for them, at most `timeout_s`. Raises nothing.

        Without a `stream` it takes or makes one. One that was kept and that broke before a block of
        the answer was whole says nothing of the peer as it is now, which may have lost its power
        and come back since: it is asked once more, on a new one.
        """
        fetched, deadline = Fetched(), time.monotonic() + timeout_s
        if timeout_s <= 0 or self._closed:
            if stream is not None:
                self.give_back(stream)
            fetched.result = Result.LATE
            return fetched
        with self._explained(fetched):
            stream = stream or self.take() or self._connect(deadline)
            if not self._fetch(stream, order, deadline, fetched):
                self._fetch(self._connect(deadline), order, deadline, fetched)
            if len(fetched.fidelities) == len(order.places):
                fetched.result = Result.OK
        return fetched

    @contextmanager
    def _explained(self, fetched: Fetched) -> Iterator[None]:
        """What goes wrong becomes a result."""
        try:
            yield
        except _Inexact:
            metrics.INEXACT_FRAMES.labels(LABEL).inc()
        except _Busy as error:
            fetched.result, fetched.why = Result.BUSY, str(error)
        except TimeoutError as error:
            late = self._closed or fetched.fidelities
            fetched.result, fetched.why = Result.LATE if late else Result.FAILED, str(error)
        except (OSError, ConfigError) as error:  # SSLError is one
            fetched.result = Result.LATE if self._closed else Result.FAILED
            fetched.why = self._explain(error)
        except (CorruptFrame, RemoteProtocolError) as error:
            metrics.CORRUPT_FRAMES.labels(LABEL).inc()
            fetched.result, fetched.why = Result.FAILED, str(error)

    def close(self) -> None:
        """Cut off the fetches under way, and make no other."""
        with self._lock:
            self._closed = True
            for stream in self._used:
                stream.cut()
        self._drop_idle()

    def tidy(self) -> None:
        """Hang up on what has been idle for KEPT_S; meant to be called now and then."""
        before = time.monotonic() - KEPT_S
        with self._lock:
            old = [each for each in self._idle if each[0] < before]
            del self._idle[: len(old)]
        for _, stream in old:
            stream.close()

    def _fetch(self, stream: Stream, order: Order, deadline: float, fetched: Fetched) -> bool:
        """Whether there was an answer, else it is to be asked for again on a new connection."""
        well, kept = False, self._used[stream]
        try:
            keys, wait_s = list(order.keys), deadline - time.monotonic()
            wanted = Wanted(order.layout.id, keys, order.first, len(order.places), wait_s)
            stream.send([wanted.encode()], deadline)
            try:
                _receive(stream, order, deadline, fetched.fidelities)
            except _Busy:
                well = True
                raise
            well = True
        except OSError as error:
            if not kept or fetched.fidelities or isinstance(error, ConnectionRefusedError):
                raise  # the last: it was said in words
            self._drop_idle()  # as old as this one
            if isinstance(error, TimeoutError) or self._closed:
                raise
            return False
        finally:
            self._give(stream, well)
        return True

    def _drop_idle(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for _, stream in idle:
            stream.close()

    def _give(self, stream: Stream, well: bool) -> None:
        with self._lock:
            self._used.pop(stream, None)
            if well and not self._closed:
                self._idle.append((time.monotonic(), stream))
                return
        stream.close()

    def _connect(self, deadline: float) -> Stream:
        """A new connection, on which we have said who we are."""
        host, port = parse_address(self.address, "address")
        deadline = min(deadline, time.monotonic() + CONNECT_S)
        left_s = max(deadline - time.monotonic(), 0.001)
        try:
            plain = socket.create_connection((host.strip("[]"), port), timeout=left_s)
        except ValueError:  # Python's, which does not ask for the address of such a name
            raise ConnectionError(f"{host!r} is no name of a host") from None
        try:
            prepare(plain)
            sock = self._wrapped(plain, host, deadline)
        except BaseException:
            plain.close()
            raise
        stream = Stream(sock)
        with self._lock:
            self._used[stream] = False
            if self._closed:
                stream.cut()
        try:
            stream.send([local.encode(lending.VERSION, self._access.token)], deadline)
            node = lending.parse_welcome(_message(stream, deadline))
            if node != self.node:
                raise RemoteProtocolError(f"{self.address} is node {node}")
        except BaseException as error:
            self._give(stream, well=False)
            if isinstance(error, RemoteProtocolError):  # no frame was damaged
                raise ConnectionError(str(error)) from None
            raise
        return stream

    def _wrapped(self, plain: socket.socket, host: str, deadline: float) -> socket.socket:
        contexts = self._access.contexts
        if contexts is None:
            return plain
        plain.settimeout(max(deadline - time.monotonic(), 0.001))
        return contexts.asking().wrap_socket(plain, server_hostname=contexts.name_of(host))

    def _explain(self, error: Exception) -> str:
        if isinstance(error, ssl.SSLCertVerificationError):
            return f"the certificate of {self.address} is not accepted: {error.verify_message}"
        said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return f"{self.address}: {said or type(error).__name__}"


def _message(stream: Stream, deadline: float) -> list[local.Value]:
    """One message of the other side's."""
    prefix = bytearray(_LENGTH.size)
    stream.receive(prefix, deadline)
    (length,) = _LENGTH.unpack(prefix)
    if length > lending.MAX_HELLO:
        raise RemoteProtocolError(f"message of {length} bytes, limit {lending.MAX_HELLO}")
    body = bytearray(length)
    stream.receive(body, deadline)
    (message,) = local.Decoder(lending.MAX_HELLO).feed(bytes(prefix + body))
    return message


def _receive(stream: Stream, order: Order, deadline: float, whole: list[Fidelity]) -> None:
    """The answer to a request, each block into its place; `whole` grows with them.

    Raises:
        CorruptFrame: A frame fails a check; nothing of it counts.
        RemoteProtocolError: What came cannot be right.
        _Inexact: A block came that may not be used here.
        _Busy: None came for now.
    """
    data = bytearray(lending.HEAD_NBYTES)
    while True:
        stream.receive(data, deadline)
        head, at = lending.parse_head(data), len(whole)
        if head.kind is not Kind.BLOCK:
            text = bytearray(head.nbytes)
            stream.receive(text, deadline)
            said = text.decode(errors="replace")
            if head.kind is Kind.BUSY:
                raise _Busy(said)
            if head.kind is Kind.REFUSED:
                raise ConnectionRefusedError(said)
            return
        if at == len(order.places):
            raise RemoteProtocolError(f"more than the {at} blocks that were asked for")
        place = order.places[at]
        if head.nbytes != place.nbytes:
            raise RemoteProtocolError(f"block {at} has {head.nbytes} bytes, not {place.nbytes}")
        stream.receive(place, deadline)
        key = order.keys[order.first + at]
        info = frame.decode_in_place(key, head.header, place, order.layout)
        if info.fidelity and not order.lossy:
            raise _Inexact
        whole.append(info.fidelity)
