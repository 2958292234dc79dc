"""A vLLM engine, wherever it runs, behind kvtier's gRPC: Worker, and the feed of its VRAM."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Final, Protocol
from urllib.parse import urlsplit

import grpc

from kvtier.config import MAX_NAME, Config, node_name
from kvtier.core.breakeven import as_first
from kvtier.core.tiers import Tier
from kvtier.core.vllm_keys import SCHEME, prompt_keys
from kvtier.engine.answers import most_tokens, to_wire
from kvtier.engine.sequence import Done, Request, Started, Tokens
from kvtier.engine.vllm.events import Changes, Residency
from kvtier.engine.vllm.puller import NOTHING, Brought, Puller
from kvtier.engine.vllm.spaces import Spaces
from kvtier.engine.vllm.speeds import Speeds
from kvtier.engine.vllm.subscriber import Subscriber
from kvtier.errors import (
    InvalidRequest,
    Overloaded,
    RequestError,
    UnknownModel,
    WorkerLost,
)
from kvtier.wire.access import Access
from kvtier.wire.feed import FeedServicer
from kvtier.wire.muxed import MuxedServicer
from kvtier.wire.pb import feed_pb2, feed_pb2_grpc, worker_pb2, worker_pb2_grpc
from kvtier.wire.rpc import Server, refuse

DRAIN_S: Final = 30.0
MAX_REQUEST_ID: Final = 128  # characters
PROBE_S: Final = 1.0  # between two looks whether the engine lives

log = logging.getLogger(__name__)

Answer = AsyncGenerator[Started | Tokens | Done, None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What routers must know of an engine."""

    model: str
    revision: str
    block_tokens: int
    max_tokens: int
    vocab_size: int
    kv_bytes_per_token: int
    doubles_at: float  # see worker.proto
    eos_token_ids: tuple[int, ...]
    tokenizer_files: dict[str, bytes]
    none_hash: bytes
    root: bytes  # of the namespace
    events: str  # where its KV events come from; empty: nowhere
    replay: str
    spaces: Spaces


def http_address(url: str) -> str:
    """Where gateways reach an engine's HTTP API, as WorkerInfo says it; empty: not, as with TLS."""
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname:
        return ""
    here = parts.hostname in ("localhost", "127.0.0.1", "::1")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{'' if here else host}:{parts.port or 80}"


class Backend(Protocol):
    """One engine."""

    served: Served

    def answer(self, request: Request) -> Answer:
        """Compute a request that was checked. RequestError: it cannot be served."""
        ...

    async def clear(self) -> None:
        """Empty VRAM of what no request uses."""
        ...

    async def alive(self) -> bool:
        """Whether the engine answers."""
        ...

    async def close(self) -> None:
        """Let go of it."""
        ...


class GatewayServicer(MuxedServicer):
    """See worker.proto. Lives on one loop."""

    def __init__(self, config: Config, backend: Backend, puller: Puller | None = None) -> None:
        super().__init__()
        self.draining = False
        self.alive = True  # the engine, as last seen
        self.running: set[object] = set()
        self.rested = asyncio.Event()  # while nothing runs
        self.rested.set()
        self._backend = backend
        self._puller = puller
        self._limit = config.worker.max_running + config.worker.max_waiting
        self._http = http_address(config.worker.url) if config.worker.url else ""
        # For their first token: how much of their prompts is warm, and how long these are.
        self._waiting: dict[object, tuple[int, int]] = {}
        served = backend.served
        self._speeds = Speeds(served.kv_bytes_per_token, served.doubles_at)
        self.residency = Residency(
            served.none_hash, served.root, served.block_tokens, served.spaces.adapters
        )
        self.feed = FeedServicer(
            lambda: {Tier.VRAM: self.residency.keys()}, self._heartbeat, self.residency.before.get
        )
        self.node = node_name(config.worker.node)
        self.worker_id = f"{self.node}-{self.feed.epoch:016x}"

    async def Describe(  # noqa: N802 - gRPC's name
        self, request: worker_pb2.DescribeRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.WorkerInfo:
        """See worker.proto."""
        served = self._backend.served
        return worker_pb2.WorkerInfo(
            worker_id=self.worker_id, node=self.node, model=served.model,
            revision=served.revision, block_tokens=served.block_tokens,
            max_tokens=served.max_tokens, root=served.none_hash + served.root,
            eos_token_ids=served.eos_token_ids, vocab_size=served.vocab_size,
            kv_bytes_per_token=served.kv_bytes_per_token, key_scheme=SCHEME,
            doubles_at=served.doubles_at,
            http_address=self._http, loads_all=True,  # vLLM declines nothing
            pulls=self._puller is not None,
            spaces=[
                worker_pb2.Space(adapter=adapter, tenant=tenant, root=root)
                for adapter, tenant, root in served.spaces.roots(served.none_hash, served.root)
            ],
        )  # fmt: skip

    async def Tokenizer(  # noqa: N802
        self, request: worker_pb2.TokenizerRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.TokenizerFiles:
        """See worker.proto."""
        return worker_pb2.TokenizerFiles(files=self._backend.served.tokenizer_files)

    async def Clear(  # noqa: N802
        self, request: worker_pb2.ClearRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.ClearResponse:
        """See worker.proto; the number is of what the events told."""
        try:
            await self._backend.clear()
        except RequestError as error:
            await refuse(context, error)
        # vLLM tells of it only with the next step that has an answer.
        gone = self.residency.clear()
        self.changed(gone)
        return worker_pb2.ClearResponse(blocks=len(gone))

    async def answer(
        self, request: worker_pb2.WorkerRequest
    ) -> AsyncGenerator[worker_pb2.WorkerResponse, None]:
        """See `MuxedServicer`."""
        mark = object()
        try:
            wanted = self._check(request)
            self.running.add(mark)
            self.rested.clear()
            length = len(request.token_ids)
            self._waiting[mark] = min(request.warm_tokens, length - 1), length
            brought = await self._bring(wanted)
            async with contextlib.aclosing(self._backend.answer(wanted)) as answer:
                async for event in answer:
                    if isinstance(event, Started):
                        self._waiting.pop(mark, None)
                        self._speeds.measure(event)
                        event = brought.told(event, self._backend.served.block_tokens)
                    yield to_wire(event)
        finally:
            self.running.discard(mark)
            self._waiting.pop(mark, None)
            if not self.running:
                self.rested.set()

    def changed(self, changes: Changes) -> None:
        """VRAM's blocks came or went."""
        self.feed.changed((Tier.VRAM, key, held) for key, held in changes)

    def _check(self, request: worker_pb2.WorkerRequest) -> Request:
        served = self._backend.served
        if self.draining:
            raise WorkerLost("the worker is stopping")
        if len(self.running) >= self._limit:
            raise Overloaded(f"{len(self.running)} requests are under way, limit {self._limit}")
        if len(request.request_id) > MAX_REQUEST_ID:
            raise InvalidRequest(
                f"request_id has {len(request.request_id)} characters, limit {MAX_REQUEST_ID}"
            )
        if request.model not in ("", served.model):
            raise UnknownModel(f"model {request.model!r} is not served here: {served.model}")
        served.spaces.check(request.adapter, request.tenant)
        if request.return_first_logits:
            raise InvalidRequest("return_first_logits: vLLM gives no logits")
        room = served.max_tokens - len(request.token_ids)
        wanted = Request(
            token_ids=list(request.token_ids),
            max_tokens=min(most_tokens(request), max(1, room)),
            temperature=request.temperature, seed=request.seed, ignore_eos=request.ignore_eos,
            tenant=request.tenant, adapter=request.adapter, source=request.source[:MAX_NAME],
        )  # fmt: skip
        wanted.check(served.vocab_size, served.max_tokens)
        return wanted

    async def _bring(self, request: Request) -> Brought:
        """Have the node load what another one has of it, and VRAM has not; see `Puller`."""
        if self._puller is None or not request.source:
            return NOTHING
        begun, served = time.monotonic(), self._backend.served
        size = served.block_tokens
        reusable = (len(request.token_ids) - 1) // size * size  # the last token is computed
        root = served.spaces.root(served.none_hash, served.root, request.adapter, request.tenant)
        tokens = request.token_ids[:reusable]
        keys = await asyncio.to_thread(prompt_keys, root, tokens, size)
        held = self.residency.before
        first = next((at for at, key in enumerate(keys) if key not in held), len(keys))
        came = await self._puller.pull(keys, first, request.source)
        return Brought(came, time.monotonic() - begun)

    def _heartbeat(self) -> feed_pb2.Heartbeat:
        waiting, doubles_at = self._waiting.values(), self._backend.served.doubles_at
        return feed_pb2.Heartbeat(
            draining=self.draining or not self.alive,  # routers take it last
            load=feed_pb2.WorkerLoad(
                running=len(self.running),
                waiting_tokens=sum(length - warm for warm, length in waiting),
                waiting_as_first=sum(as_first(*each, doubles_at) for each in waiting),
                prefill_tokens_per_s=self._speeds.prefill,
                host_bytes_per_s=self._speeds.restore(Tier.HOST),
                disk_bytes_per_s=self._speeds.restore(Tier.DISK),
                shared_bytes_per_s=self._speeds.restore(Tier.SHARED),
            ),
        )


async def serve(
    config: Config, backend: Backend, puller: Puller | None = None, *,
    started: Callable[[str], None], stop: asyncio.Event,
) -> None:  # fmt: skip
    """Run a worker over `backend` until `stop`, or until the engine is dead.

    With `puller` it acts on the sources that requests name; whoever made it closes it.

    Raises:
        ConfigError: The address is taken, or one of ZMQ's is wrong.
    """
    services = ["kvtier.v1.Worker", "kvtier.v1.Feed"]
    server = Server(config.worker.listen, "worker.listen", services, access=Access(config))
    servicer = GatewayServicer(config, backend, puller)
    served = backend.served
    worker_pb2_grpc.add_WorkerServicer_to_server(servicer, server.grpc)
    feed_pb2_grpc.add_FeedServicer_to_server(servicer.feed, server.grpc)
    subscriber: Subscriber | None = None
    tasks: list[asyncio.Future[object]] = []
    if served.events:
        subscriber = Subscriber(served.events, served.replay, servicer.residency, servicer.changed)
        tasks.append(asyncio.ensure_future(subscriber.follow()))
    try:
        address = await server.start()
        log.info("worker %s serves %s at %s", servicer.worker_id, served.model, address)
        tasks.append(asyncio.ensure_future(_watch(backend, server, servicer, subscriber)))
        started(address)
        tasks.append(asyncio.ensure_future(_told(stop)))
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        await _stop(server, servicer, subscriber, tasks, backend)


async def _told(stop: asyncio.Event) -> None:
    await stop.wait()


async def _watch(
    backend: Backend, server: Server, servicer: GatewayServicer, subscriber: Subscriber | None
) -> None:
    """Say whether the engine lives; a dead one holds nothing."""
    healthy = None
    while True:
        alive = await backend.alive()
        if alive is not healthy:
            healthy = servicer.alive = alive
            await server.healthy(alive)
            if not alive and subscriber is not None:
                subscriber.forget()
        await asyncio.sleep(PROBE_S)


async def _stop(
    server: Server, servicer: GatewayServicer, subscriber: Subscriber | None,
    tasks: "list[asyncio.Future[object]]", backend: Backend,
) -> None:  # fmt: skip
    servicer.draining = True
    servicer.drain_streams()
    await server.healthy(False)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_S):
            await servicer.rested.wait()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    if subscriber is not None:
        subscriber.close()
    servicer.close_streams()
    servicer.feed.close()
    await server.stop(1.0)
    await backend.close()
