"""One address that the router follows: a worker's, or a node daemon's."""

import asyncio
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import grpc

from kvtier import metrics
from kvtier.config import RouterConfig
from kvtier.core.directory import Directory
from kvtier.core.score import Rates
from kvtier.core.tiers import Tier
from kvtier.errors import RemoteProtocolError
from kvtier.router.absence import EXPECTED_S
from kvtier.router.asking import Asks, TooOld
from kvtier.router.described import check
from kvtier.router.feed import FeedGap, FeedReader
from kvtier.router.pace import Pace
from kvtier.router.pauses import Pauses
from kvtier.router.said import Said
from kvtier.router.sent import Computed
from kvtier.router.text import Text, TextPool
from kvtier.wire.access import Access
from kvtier.wire.pb import feed_pb2, feed_pb2_grpc, worker_pb2, worker_pb2_grpc
from kvtier.wire.rpc import line_of, parsed

DESCRIBE_S: Final = 5.0
TOKENIZER_S: Final = 30.0
PAUSE_S: Final = (0.2, 1.0)  # before a first and before every later new try
LASTING_S: Final = 10.0  # for which a feed must hold not to have been watched in vain
SETTLE_S: Final = 60.0  # for which a starting router waits to hear all that a member holds
GIVE_UP: Final = 5  # times `stale_s` of silence after which a connection is taken for dead
MOST_WAITING: Final = float(1 << 63)  # tokens; `Terms` has 64 bits for them
DECODE_DRAG: Final = 0.02  # by so much each request in decode slows a prefill in the same batch

_REFUSED: Final = grpc.StatusCode.UNAUTHENTICATED
OPTIONS: Final = (
    ("grpc.max_receive_message_length", 64 << 20),  # tokenizer files are large
    ("grpc.max_send_message_length", 64 << 20),
    # A new life gets a connection of its own, without another channel's waiting time.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
)


class Serves(StrEnum):
    """What answers at an address."""

    WORKER = "worker"
    DAEMON = "daemon"


class State(StrEnum):
    """How an address is doing; only READY ones count, STALE ones where nothing else is left."""

    CONNECTING = "connecting"
    READY = "ready"
    STALE = "stale"


@dataclass(frozen=True, slots=True)
class Context:
    """What all links share."""

    config: RouterConfig
    directory: Directory
    texts: TextPool
    rng: random.Random
    pace: Pace
    changed: Callable[[], None]  # called at every change of a state
    access: Access


_TIERS: Final = {
    Serves.WORKER: (Tier.VRAM,),
    Serves.DAEMON: (Tier.HOST, Tier.DISK, Tier.SHARED),
}


class Link:
    """Follows one address: connects, asks a worker who it is, and watches the feed, for ever.

    `info`, `text`, `channel` and `asks` are those of the present life (`info` stays when it ends,
    to tell "none is ready" from "nobody serves that"). What the source held leaves the directory
    as soon as its stream breaks; a mere gap in the stream leaves the worker in use, but cold.
    """

    def __init__(self, serves: Serves, address: str, node: str, context: Context) -> None:
        self.serves = serves
        self.address = address
        self.node = node
        self.source = f"{serves}:{address}"
        self.state = State.CONNECTING
        self.info: worker_pb2.WorkerInfo | None = None
        self.roots: dict[tuple[str, str], bytes] = {}  # by adapter and tenant; of `info`
        self.text: Text | None = None
        self.channel: grpc.aio.Channel | None = None
        self.asks: Asks | None = None  # how a worker is asked, over `channel`
        self.heartbeat = feed_pb2.Heartbeat()
        self.settled = False  # it told all that it holds, or is not waited for
        self._context = context
        self.pulls_bytes_per_s = 0.0  # a daemon's, from other nodes; 0: it can't
        self._pull_bytes_per_s = 0.0  # of the daemon beside a worker
        self._heard_s = -math.inf  # when `heartbeat` came, on the loop's clock
        self._told = feed_pb2.Heartbeat()  # the one that `_rates` are of
        self._rates = Rates()
        self._pauses = Pauses(*PAUSE_S, LASTING_S, context.rng)
        self._said = Said(f"{serves} at {address}")
        self._blaming: asyncio.Task[None] | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._fed = False  # its feed has told what it holds, in this life
        self._silent = False  # its feed has said nothing for `stale_s`
        loop = asyncio.get_running_loop()
        self._left_s = loop.time()  # when it last ceased to take requests, or this began
        self._waiting = loop.call_later(SETTLE_S, self._wait_no_longer)
        self.task = loop.create_task(self._follow(), name=self.source)

    @property
    def expected(self) -> bool:
        """Whether it takes requests, or did so until a moment ago."""
        away = self.state is State.CONNECTING
        return not away or asyncio.get_running_loop().time() - self._left_s < EXPECTED_S

    def pulls_at(self, bytes_per_s: float) -> bool:
        """What its node's daemon says of pulls; whether the worker can have any."""
        if bytes_per_s != self._pull_bytes_per_s:
            self._pull_bytes_per_s = bytes_per_s
            self._rates = self._read_rates()
        return bytes_per_s > 0

    @property
    def waiting_tokens(self) -> int:
        """What the worker says that it has still to compute, as at the start of a prompt."""
        load = self.heartbeat.load
        said = load.waiting_as_first
        return round(said) if 0 < said < MOST_WAITING else load.waiting_tokens

    @property
    def computed(self) -> Computed:
        """How far the worker says that it is with the prompts whose first token is to come."""
        said = self.heartbeat.load.computed_as_first
        return Computed(said if 0 < said < MOST_WAITING else 0.0, self._heard_s)

    @property
    def rates(self) -> Rates:
        """What the worker has measured; 0 where it doesn't know yet, or says what cannot be."""
        if self._told is not self.heartbeat:
            self._told, self._rates = self.heartbeat, self._read_rates()
        return self._rates

    def _read_rates(self) -> Rates:
        load = self.heartbeat.load
        return Rates(
            peer_bytes_per_s=self._pull_bytes_per_s,
            doubles_at=self.info.doubles_at if self.info is not None else 0.0,
            decode_drag=DECODE_DRAG,
            prefill_tokens_per_s=_rate(load.prefill_tokens_per_s),
            host_bytes_per_s=_rate(load.host_bytes_per_s),
            disk_bytes_per_s=_rate(load.disk_bytes_per_s),
            shared_bytes_per_s=_rate(load.shared_bytes_per_s),
        )

    async def stop(self, grace_s: float) -> None:
        """Follow no more, forget what it held; calls under way have `grace_s` to end."""
        self._waiting.cancel()
        looks = [self._blaming] if self._blaming is not None else []
        for task in (self.task, *looks):
            task.cancel()
        self._end_life(grace_s, "the router follows it no more")
        await asyncio.gather(self.task, *looks, *self._closing, return_exceptions=True)

    async def _follow(self) -> None:
        while True:
            try:
                if self.channel is None:
                    self.channel = self._context.access.channel(self.address, OPTIONS)
                if self.serves is Serves.WORKER:
                    await self._describe(self.channel)
                    await self._begin_asking(self.channel)
                await self._watch(self.channel)
            except FeedGap as gap:
                metrics.FEED_GAPS.labels(self.node).inc()
                self._settle()  # nobody else waits for it
                self._said.gap(gap)
                if not gap.replay:
                    self._context.directory.remove(self.source)
            except (grpc.RpcError, RemoteProtocolError, TimeoutError) as error:
                metrics.MEMBER_FAILURES.labels(self.node).inc()
                why = line_of(error)
                self._said.away(why, asyncio.get_running_loop().time())
                self._look_into(error)
                silent = isinstance(error, TimeoutError)
                self._end_life(0 if silent else self._context.config.timeout_s, why)
                self._settle()
            await asyncio.sleep(self._pauses.next_s())

    def _look_into(self, error: Exception) -> None:
        """Find out beside the tries what is wrong, one thing at a time."""
        if self._blaming is None or self._blaming.done():
            blame = self._blame(error, self._pauses.tries)
            self._blaming = asyncio.get_running_loop().create_task(blame)

    async def _blame(self, error: Exception, tries: int) -> None:
        """Say once what a person must change for this connection to come about.

        At the second failure in a row only: somebody who is being started is nobody's mistake.
        """
        refused = isinstance(error, grpc.RpcError) and error.code() is _REFUSED
        if isinstance(error, TooOld):
            why = str(error)
        elif not refused and tries != 1:
            return
        else:
            why = await self._context.access.why(self.address, error)
        self._said.blame(why)

    async def _describe(self, channel: grpc.aio.Channel) -> None:
        stub = worker_pb2_grpc.WorkerStub(channel)
        info = parsed(await stub.Describe(worker_pb2.DescribeRequest(), timeout=DESCRIBE_S))
        check(info)
        if self.text is None or info != self.info:
            request = worker_pb2.TokenizerRequest()
            files = parsed(await stub.Tokenizer(request, timeout=TOKENIZER_S))
            self.text = await self._context.texts.load(dict(files.files))
        self.info = info
        self.roots = {(each.adapter, each.tenant): each.root for each in info.spaces}
        self.roots["", ""] = info.root

    async def _begin_asking(self, channel: grpc.aio.Channel) -> None:
        if self.asks is None:
            name = f"{self.serves} at {self.address}"
            self.asks = Asks(name, channel, self._context.rng, self._asks_changed)
        await self.asks.begin()

    def _asks_changed(self) -> None:
        """Its stream of requests was lost, or is there again, or the worker takes no more."""
        if self.asks is not None and self.asks.lost:
            metrics.MEMBER_FAILURES.labels(self.node).inc()
        self._judge()
        self._context.changed()

    async def _watch(self, channel: grpc.aio.Channel) -> None:
        """Reads one stream of the feed to its end; always raises."""
        context = self._context
        reader = FeedReader(context.directory, self.source, _TIERS[self.serves])
        epoch, after = reader.position or (0, 0)
        request = feed_pb2.WatchRequest(epoch=epoch, after=after)
        call = feed_pb2_grpc.FeedStub(channel).Watch(request)
        try:
            while True:
                message = await self._next(call)
                if self.asks is not None:
                    self.asks.check()
                try:
                    steps = reader.take(message)
                except FeedGap:
                    raise
                except RemoteProtocolError as error:
                    raise self._broken(error) from None
                await context.pace.through(steps)
                if reader.heartbeat is not None:
                    self._beat(reader.heartbeat)
                if reader.ready:
                    self._fed, self._silent = True, False
                    self._judge()
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.ABORTED:  # we were too slow for it
                raise FeedGap(str(error.details()), replay=reader.ready) from None
            raise
        finally:
            call.cancel()
            reader.close()

    def _broken(self, error: RemoteProtocolError) -> FeedGap:
        """Whoever breaks the protocol will do so again: said once, and asked ever more rarely."""
        gap = FeedGap(str(error))
        if self._said.refused(gap):
            self._pauses.slow()
        # What it said of its load would count for as long as it is refused, perhaps for ever.
        self.heartbeat = feed_pb2.Heartbeat(draining=self.heartbeat.draining)
        return gap

    async def _next(self, call: grpc.aio.UnaryStreamCall) -> feed_pb2.FeedMessage:
        """The next message; after `stale_s` of silence what is known is no longer trusted.

        Raises:
            TimeoutError: GIVE_UP times `stale_s` of silence.
            RemoteProtocolError: The stream ended, or what came is no message.
        """
        stale_s = self._context.config.stale_s
        # Not wait_for: a read that is cancelled ends the whole call.
        read = asyncio.ensure_future(call.read())
        try:
            for patience_s in (stale_s, (GIVE_UP - 1) * stale_s):
                done, _ = await asyncio.wait({read}, timeout=patience_s)
                if done:
                    break
                self._silent = True
                self._judge()
            else:
                raise TimeoutError(f"silent for {GIVE_UP * stale_s:g} s")
        finally:
            if not read.done():
                read.cancel()
        message = parsed(read.result())
        if message is grpc.aio.EOF:
            raise RemoteProtocolError("the feed ended")
        assert isinstance(message, feed_pb2.FeedMessage)
        return message

    def _beat(self, heartbeat: feed_pb2.Heartbeat) -> None:
        if self._pauses.holds(asyncio.get_running_loop().time()):
            self._said.lasts()
        if heartbeat.HasField("pulls"):
            usual = self._context.config.peer_bytes_per_s
            self.pulls_bytes_per_s = usual and (_rate(heartbeat.pulls.bytes_per_s) or usual)
        else:
            self.pulls_bytes_per_s = 0.0
        turned = heartbeat.draining != self.heartbeat.draining
        self.heartbeat, self._heard_s = heartbeat, asyncio.get_running_loop().time()
        if turned:
            self._context.changed()

    def _settle(self) -> None:
        if not self.settled:
            self.settled = True
            self._waiting.cancel()
            self._context.changed()

    def _wait_no_longer(self) -> None:
        metrics.MEMBERS_LATE.labels(self.node).inc()
        self._said.late(SETTLE_S)
        self._settle()

    def _judge(self) -> None:
        """Say how it is doing, by its feed and by its stream of requests."""
        state = State.CONNECTING
        if self._fed and not (self.asks is not None and self.asks.lost):
            state = State.STALE if self._silent else State.READY
        if state is State.READY:
            self._settle()
            self._said.back(asyncio.get_running_loop().time())
        if state is not self.state:
            self.state = state
            if state is State.CONNECTING:
                self._left_s = asyncio.get_running_loop().time()
            self._context.changed()

    def _end_life(self, grace_s: float, why: str) -> None:
        channel, self.channel = self.channel, None
        asks, self.asks = self.asks, None
        if channel is not None:
            closing = asyncio.get_running_loop().create_task(_close(channel, asks, grace_s, why))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
        self.text = None
        self.heartbeat = feed_pb2.Heartbeat()
        self.pulls_bytes_per_s = 0.0
        self._context.directory.remove(self.source)
        self._fed = self._silent = False
        self._judge()


async def _close(channel: grpc.aio.Channel, asks: Asks | None, grace_s: float, why: str) -> None:
    if asks is not None:
        asks.retire(why)
    await channel.close(grace_s or None)
    if asks is not None:
        await asks.close()


def _rate(said: float) -> float:
    return said if 0 <= said < math.inf else 0.0
