"""One other node's daemon: blocks of it, by gRPC, straight into slots of our arena. Blocks."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, NamedTuple

import grpc

from kvtier import metrics
from kvtier.codec import frame
from kvtier.core.blocks import BlockKey, BlockLayout
from kvtier.core.fidelity import Fidelity
from kvtier.errors import CorruptFrame, RemoteProtocolError
from kvtier.wire.access import Access
from kvtier.wire.pb import node_pb2, node_pb2_grpc

MAX_BLOCKS: Final = 256  # of one Fetch
LABEL: Final = "peer"  # in metrics, beside the tiers'
_OPTIONS: Final = (("grpc.enable_http_proxy", 0), ("grpc.max_receive_message_length", 2 << 20))


class Result(StrEnum):
    """How a pull ended."""

    OK = "ok"  # with all that was asked for
    LESS = "less"  # the peer has fewer
    LATE = "late"  # the deadline cut it
    FAILED = "failed"  # the peer is away, refuses us, or sent what cannot be right
    BUSY = "busy"  # the peer serves, or we pull, as many as may be
    LEFT_ALONE = "left_alone"  # it failed too often a moment ago
    UNKNOWN = "unknown"  # no such peer


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


class Peer:
    """The daemon at one address. Any thread may call any method."""

    def __init__(self, node: str, address: str, access: Access) -> None:
        self.node = node
        self._address = address
        self._access = access
        self._lock = threading.Lock()
        self._channel: grpc.Channel | None = None  # for the next call
        self._calls: dict[grpc.Channel, int] = {}  # under way, by what they go through
        self._closed = False

    def fetch(self, order: Order, timeout_s: float) -> Fetched:
        """Ask for the blocks and wait for them, at most `timeout_s`. Raises nothing."""
        channel = self._take() if timeout_s > 0 else None
        if channel is None:
            return Fetched(result=Result.LATE)
        fetched = Fetched()
        try:
            self._ask(channel, order, timeout_s, fetched)
        finally:
            self._give(channel)
        return fetched

    def close(self) -> None:
        """Cut off the calls under way, and make no other."""
        with self._lock:
            self._closed = True
            unused = {self._channel: 0} if self._channel is not None else {}
            for channel in {**unused, **self._calls}:
                channel.close()

    def _ask(self, channel: grpc.Channel, order: Order, timeout_s: float, fetched: Fetched) -> None:
        request = node_pb2.FetchRequest(
            layout=order.layout.id, keys=b"".join(order.keys), first=order.first,
            blocks=len(order.places),
        )  # fmt: skip
        frames = Frames(order, fetched.fidelities)
        try:
            call = node_pb2_grpc.NodeStub(channel).Fetch(request, timeout=timeout_s)
            try:
                for part in call:
                    frames.take(part)
            finally:
                call.cancel()
            frames.end()
            if len(fetched.fidelities) == len(order.places):
                fetched.result = Result.OK
        except _Inexact:
            metrics.INEXACT_FRAMES.labels(LABEL).inc()
        except grpc.RpcError as error:
            self._judge(error, fetched, channel)
        except ValueError:  # the channel was closed just before
            fetched.result = Result.LATE
        except (CorruptFrame, RemoteProtocolError) as error:
            metrics.CORRUPT_FRAMES.labels(LABEL).inc()
            fetched.result, fetched.why = Result.FAILED, str(error)

    def _judge(self, error: grpc.RpcError, fetched: Fetched, channel: grpc.Channel) -> None:
        code = error.code()
        fetched.why = f"{code.name}: {error.details()}"
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
            fetched.result = Result.BUSY
        elif code is grpc.StatusCode.CANCELLED or (
            code is grpc.StatusCode.DEADLINE_EXCEEDED and fetched.fidelities
        ):
            fetched.result = Result.LATE
        else:
            fetched.result = Result.FAILED
            with self._lock:  # the next one has a new connection, with the certificates of then
                if self._channel is channel:
                    self._channel = None

    def _take(self) -> grpc.Channel | None:
        """What a call goes through; None: there is no more calling."""
        with self._lock:
            if self._closed:
                return None
            if self._channel is None:
                self._channel = self._access.blocking_channel(self._address, _OPTIONS)
            self._calls[self._channel] = self._calls.get(self._channel, 0) + 1
            return self._channel

    def _give(self, channel: grpc.Channel) -> None:
        """A call is over; hang up after the last one, where the next ones go another way."""
        with self._lock:
            self._calls[channel] -= 1
            if not self._calls[channel]:
                del self._calls[channel]
                if channel is not self._channel:
                    channel.close()


class Frames:
    """Puts the parts of frames together, each block in its own place; `whole` grows with them."""

    def __init__(self, order: Order, whole: list[Fidelity]) -> None:
        self._order = order
        self._whole = whole
        self._header = b""  # of the frame that is under way
        self._filled = 0

    def take(self, part: node_pb2.FetchPart) -> None:
        """The next part.

        Raises:
            CorruptFrame: It completes a frame that fails a check; nothing of it counts.
            RemoteProtocolError: It cannot be the next one.
            _Inexact: It completes a block that may not be used here.
        """
        order, at = self._order, len(self._whole)
        if at == len(order.places):
            raise RemoteProtocolError(f"more than the {at} blocks that were asked for")
        if bool(part.header) is bool(self._header):
            raise RemoteProtocolError(f"block {at}: a part out of its order")
        self._header = self._header or part.header
        place, payload = order.places[at], part.payload
        end = self._filled + len(payload)
        if not payload or end > len(place):
            raise RemoteProtocolError(f"block {at}: {end} bytes, it has {len(place)}")
        place[self._filled : end] = payload
        self._filled = end
        if end == len(place):
            key = order.keys[order.first + at]
            info = frame.decode_in_place(key, self._header, place, order.layout)
            if info.fidelity and not order.lossy:
                raise _Inexact
            self._whole.append(info.fidelity)
            self._header, self._filled = b"", 0

    def end(self) -> None:
        """No part comes any more.

        Raises:
            RemoteProtocolError: In the middle of a frame.
        """
        if self._header:
            raise RemoteProtocolError(f"block {len(self._whole)}: its end is missing")
