"""The engine behind gRPC: kvtier.v1.Worker, the feed of what VRAM holds, health, reflection."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from typing import Final

import grpc

from kvtier.config import MAX_NAME, Config, node_name
from kvtier.core.blocks import BlockKey
from kvtier.core.tiers import Tier
from kvtier.engine.answers import most_tokens, to_wire
from kvtier.engine.model import LoadedModel, load
from kvtier.engine.pool import Changes
from kvtier.engine.sequence import Done, Event, Failed, Request
from kvtier.engine.transformers import STOPPING, Engine, Handle, MakeTiers
from kvtier.errors import InvalidRequest, RequestError, UnknownModel, WorkerLost
from kvtier.wire.access import Access
from kvtier.wire.feed import FeedServicer
from kvtier.wire.muxed import MuxedServicer
from kvtier.wire.pb import feed_pb2, feed_pb2_grpc, worker_pb2, worker_pb2_grpc
from kvtier.wire.rpc import Server, refuse

DRAIN_S: Final = 30.0  # for running requests, once the worker is told to stop
MAX_REQUEST_ID: Final = 128  # characters

log = logging.getLogger(__name__)


class WorkerServicer(MuxedServicer):
    """See worker.proto. Lives on one loop; the engine has a thread of its own.

    Args:
        config: All settings.
        loaded: The model.
        make_tier: See `Engine`.
        loop: Where this lives.
    """

    def __init__(
        self,
        config: Config,
        loaded: LoadedModel,
        make_tier: MakeTiers,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        super().__init__()
        self.draining = False
        self._pulls = bool(config.worker.socket)  # or there is nobody to ask
        self._loop = loop
        # As far as the feed was told, each with the block before it.
        self._held: dict[BlockKey, BlockKey] = {}
        self._loaded = loaded
        self._loads_all = config.worker.loads == "always"
        self.feed = FeedServicer(
            lambda: {Tier.VRAM: list(self._held)}, self._heartbeat, self._held.get
        )
        self.node = node_name(config.worker.node)
        self.worker_id = f"{self.node}-{self.feed.epoch:016x}"
        self.engine = Engine(loaded, config.worker, make_tier, self._on_change)

    async def Describe(  # noqa: N802 - gRPC's name
        self, request: worker_pb2.DescribeRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.WorkerInfo:
        """See worker.proto."""
        loaded = self._loaded
        return worker_pb2.WorkerInfo(
            worker_id=self.worker_id,
            node=self.node,
            model=loaded.name,
            revision=loaded.revision,
            layout=loaded.layout.describe(),
            block_tokens=loaded.layout.block_tokens,
            max_tokens=loaded.max_tokens,
            root=loaded.namespace().root(),
            eos_token_ids=sorted(loaded.eos_token_ids),
            vocab_size=loaded.vocab_size,
            kv_bytes_per_token=loaded.layout.nbytes_per_token,
            loads_all=self._loads_all,
            pulls=self._pulls,
            doubles_at=self.engine.doubles_at,
            spaces=[
                worker_pb2.Space(tenant=name, root=loaded.namespace(name).root())
                for name in loaded.tenants
            ],
        )

    async def Tokenizer(  # noqa: N802
        self, request: worker_pb2.TokenizerRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.TokenizerFiles:
        """See worker.proto."""
        return worker_pb2.TokenizerFiles(files=self._loaded.tokenizer_files)

    async def Clear(  # noqa: N802
        self, request: worker_pb2.ClearRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.ClearResponse:
        """See worker.proto."""
        try:
            dropped = await asyncio.wrap_future(self.engine.clear())
        except RequestError as error:
            await refuse(context, error)
        return worker_pb2.ClearResponse(blocks=dropped)

    async def answer(
        self, request: worker_pb2.WorkerRequest
    ) -> AsyncGenerator[worker_pb2.WorkerResponse, None]:
        """See `MuxedServicer`."""
        # Started, as many Tokens as the model has room for, and Done: it is never full.
        events: asyncio.Queue[Event] = asyncio.Queue(self._loaded.max_tokens + 2)
        handle = self._submit(request, events)
        try:
            while True:
                event = await events.get()
                if isinstance(event, Failed):
                    raise event.error
                yield to_wire(event)
                if isinstance(event, Done):
                    return
        finally:
            handle.cancel()

    def _submit(self, request: worker_pb2.WorkerRequest, events: asyncio.Queue[Event]) -> Handle:
        if self.draining:
            raise WorkerLost(STOPPING)
        if len(request.request_id) > MAX_REQUEST_ID:
            raise InvalidRequest(
                f"request_id has {len(request.request_id)} characters, limit {MAX_REQUEST_ID}"
            )
        if request.model not in ("", self._loaded.name):
            raise UnknownModel(f"model {request.model!r} is not served here: {self._loaded.name}")
        if request.adapter:
            raise UnknownModel(
                f"adapter {request.adapter[:200]!r} is not served here: {self._loaded.name} "
                "has no adapters"
            )
        wanted = Request(
            token_ids=request.token_ids,
            max_tokens=most_tokens(request),
            temperature=request.temperature,
            seed=request.seed,
            ignore_eos=request.ignore_eos,
            return_first_logits=request.return_first_logits,
            tenant=request.tenant,
            source=request.source[:MAX_NAME],
            warm_tokens=request.warm_tokens,
        )
        return self.engine.submit(
            wanted, lambda event: self._on_loop(lambda: events.put_nowait(event))
        )

    def _on_change(self, changes: Changes) -> None:
        self._on_loop(lambda: self._changed(changes))

    def _on_loop(self, work: Callable[[], None]) -> None:
        """From the engine's thread; `serve` ends that thread before its loop ends."""
        self._loop.call_soon_threadsafe(work)

    def _changed(self, changes: Changes) -> None:
        for key in changes.removed:
            self._held.pop(key, None)
        self._held.update(zip(changes.added, changes.before, strict=True))
        self.feed.changed((Tier.VRAM, key, False) for key in changes.removed)
        self.feed.changed((Tier.VRAM, key, True) for key in changes.added)

    def _heartbeat(self) -> feed_pb2.Heartbeat:
        load = self.engine.load()
        return feed_pb2.Heartbeat(
            draining=self.draining,
            load=feed_pb2.WorkerLoad(
                running=load.running,
                waiting=load.waiting,
                waiting_tokens=load.waiting_tokens,
                waiting_as_first=load.waiting_as_first,
                computed_as_first=load.computed_as_first,
                prefill_tokens_per_s=load.prefill_tokens_per_s,
                host_bytes_per_s=load.bytes_per_s.get(Tier.HOST, 0.0),
                disk_bytes_per_s=load.bytes_per_s.get(Tier.DISK, 0.0),
                shared_bytes_per_s=load.bytes_per_s.get(Tier.SHARED, 0.0),
            ),
        )


async def serve(
    config: Config,
    *,
    started: Callable[[str], None],
    stop: asyncio.Event,
    make_tier: MakeTiers,
    drain_s: float = DRAIN_S,
) -> None:
    """Run a worker until `stop`; `started` gets the address, once the model is loaded.

    When it is told to stop it refuses new requests with UNAVAILABLE, gives those it has
    `drain_s` to end and fails the rest.

    Raises:
        ConfigError: The address is taken, or the model cannot be loaded.
        Exception: Whatever bug ended the engine's thread; the worker is of no more use then.
    """
    loop = asyncio.get_running_loop()
    services = ["kvtier.v1.Worker", "kvtier.v1.Feed"]
    server = Server(config.worker.listen, "worker.listen", services, access=Access(config))
    loaded = await asyncio.to_thread(load, config.worker, log.info)
    servicer = await asyncio.to_thread(WorkerServicer, config, loaded, make_tier, loop)
    worker_pb2_grpc.add_WorkerServicer_to_server(servicer, server.grpc)
    feed_pb2_grpc.add_FeedServicer_to_server(servicer.feed, server.grpc)
    try:
        address = await server.start()
        await server.healthy(True)
        log.info("worker %s serves %s at %s", servicer.worker_id, loaded.name, address)
        started(address)
        await _until(stop, servicer.engine)
    finally:
        servicer.draining = True
        servicer.drain_streams()
        await server.healthy(False)
        try:
            await asyncio.to_thread(servicer.engine.close, drain_s)
        finally:
            servicer.close_streams()
            servicer.feed.close()
            await server.stop(1.0)


async def _until(stop: asyncio.Event, engine: Engine) -> None:
    """Wait for `stop`, or for the end of the engine's thread, which only a bug brings about."""
    stopped = asyncio.ensure_future(stop.wait())
    ended = asyncio.wrap_future(engine.ended)
    await asyncio.wait((stopped, ended), return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if ended.done():
        log.error("the engine's thread ended: %r", ended.exception())
