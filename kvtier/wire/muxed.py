"""A worker's Generate and Multiplex over one `answer`: a call a request, and a stream for many."""

import asyncio
import logging
from abc import abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from typing import Final

import grpc

from kvtier.core.mux import Answering, Part
from kvtier.errors import Overloaded, RemoteProtocolError, RequestError, one_line
from kvtier.wire.pb import worker_pb2, worker_pb2_grpc
from kvtier.wire.rpc import refuse

MAX_STREAMS: Final = 64  # routers
MAX_TIMEOUT_S: Final = 86_400.0
BATCH_NBYTES: Final = 1 << 20  # of one message, unless a single part is longer

End = worker_pb2.Done | worker_pb2.MuxError
_Part = Part[worker_pb2.Started, End]
Answer = AsyncGenerator[worker_pb2.WorkerResponse, None]

log = logging.getLogger(__name__)


class MuxedServicer(worker_pb2_grpc.WorkerServicer):
    """The two ways to ask a worker, see worker.proto. Lives on one loop."""

    def __init__(self) -> None:
        self._streams: set[_Stream] = set()
        self._stopping = False

    @abstractmethod
    def answer(self, request: worker_pb2.WorkerRequest) -> Answer:
        """Started, Tokens as they come, Done; closing it frees what the request holds.

        Raises:
            RequestError: It cannot be served, or not to its end.
        """

    async def Generate(  # noqa: N802 - gRPC's name
        self, request: worker_pb2.WorkerRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[worker_pb2.WorkerResponse]:
        """See worker.proto."""
        try:
            async with aclosing(self.answer(request)) as answer:
                async for message in answer:
                    yield message
        except RequestError as error:
            await refuse(context, error)

    async def Multiplex(  # noqa: N802
        self, requests: AsyncIterator[worker_pb2.MuxRequest], context: grpc.aio.ServicerContext
    ) -> None:
        """See worker.proto."""
        if len(self._streams) >= MAX_STREAMS:
            await refuse(context, Overloaded(f"{MAX_STREAMS} routers are connected, the limit"))
        stream = _Stream(self, context)
        self._streams.add(stream)
        try:
            if self._stopping:
                stream.drain()
            await stream.run(requests)
        except RemoteProtocolError as error:
            log.warning("a router's stream of requests: %s", error)
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        finally:
            self._streams.discard(stream)

    def drain_streams(self) -> None:
        """Tell routers to open nothing more; what is open goes on."""
        self._stopping = True
        for stream in self._streams:
            stream.drain()

    def close_streams(self) -> None:
        """End the routers' streams, once what is open has ended. Idempotent."""
        self.drain_streams()
        for stream in self._streams:
            stream.close()


class _Stream:
    """One router's requests: a task each, one that reads, and `run` that writes."""

    def __init__(self, servicer: MuxedServicer, context: grpc.aio.ServicerContext) -> None:
        self._servicer = servicer
        self._context = context
        self._mux = Answering[worker_pb2.Started, End]()
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._full: dict[int, asyncio.Event] = {}  # those that wait for room
        self._turn = asyncio.Event()  # there may be something to write
        self._draining = self._told = False
        self._closing = False
        self._broken: RemoteProtocolError | None = None

    def drain(self) -> None:
        self._draining = True
        self._turn.set()

    def close(self) -> None:
        self._closing = True
        self._turn.set()

    async def run(self, requests: AsyncIterator[worker_pb2.MuxRequest]) -> None:
        """Serve until the router ends the stream, or `close`.

        Raises:
            RemoteProtocolError: The router broke the protocol.
        """
        reading = asyncio.ensure_future(self._read(requests))
        try:
            await self._write()
            if reading.done():
                reading.result()
        finally:
            tasks = [reading, *self._tasks.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _write(self) -> None:
        hello = worker_pb2.MuxHello(max_open=self._mux.max_open)
        await self._context.write(worker_pb2.MuxResponse(hello=hello))
        while True:
            await self._turn.wait()
            self._turn.clear()
            if self._broken is not None:
                raise self._broken
            if parts := self._mux.take():
                self._turn.set()  # there may be more, but first what else there is to say
                self._wake(parts)
                for message in _messages(parts):
                    await self._context.write(message)
            if self._draining and not self._told:
                self._told = True
                await self._context.write(worker_pb2.MuxResponse(draining=True))
            if self._closing and not len(self._mux):
                return

    def _wake(self, parts: Sequence[_Part]) -> None:
        for part in parts:
            if self._full and (room := self._full.get(part.id)) is not None:
                room.set()

    async def _read(self, requests: AsyncIterator[worker_pb2.MuxRequest]) -> None:
        try:
            async for message in requests:
                for number in message.cancels:  # first: they make room for what is opened
                    self._cancel(number)
                for credit in message.credits:
                    self._mux.credit(credit.id, credit.tokens)
                    self._turn.set()
                for opened in message.opens:
                    self._open(opened)
        except RemoteProtocolError as error:
            self._broken = error
        finally:
            self._closing = True  # whoever asks no more may still wait for answers
            self._turn.set()

    def _open(self, opened: worker_pb2.MuxOpen) -> None:
        number = opened.id
        self._mux.opened(number, opened.credit)
        if not opened.timeout_s > 0:  # nor NaN
            self._fail(number, "INVALID_ARGUMENT", f"timeout_s is {opened.timeout_s}, must be > 0")
            return
        if self._draining:
            self._fail(number, "UNAVAILABLE", "the worker is stopping")
            return
        task = asyncio.ensure_future(self._one(number, opened.request))
        limit_s = min(opened.timeout_s, MAX_TIMEOUT_S)
        late = asyncio.get_running_loop().call_later(limit_s, self._expire, number, limit_s)
        self._tasks[number] = task

        def over(ended: asyncio.Task[None]) -> None:
            late.cancel()
            del self._tasks[number]
            self._ended(number, ended)

        task.add_done_callback(over)

    def _cancel(self, number: int) -> None:
        if self._mux.cancelled(number) and (task := self._tasks.get(number)) is not None:
            task.cancel()

    def _expire(self, number: int, timeout_s: float) -> None:
        self._tasks[number].cancel()
        self._fail(number, "DEADLINE_EXCEEDED", f"not finished within {timeout_s:g} s")

    async def _one(self, number: int, request: worker_pb2.WorkerRequest) -> None:
        """Hand one answer on; stops where nobody wants it any more."""
        mux = self._mux
        async with aclosing(self._servicer.answer(request)) as answer:
            async for message in answer:
                if number not in mux:
                    return
                body = message.WhichOneof("body")
                if body == "tokens":
                    if not mux.tokens(number, message.tokens.ids):
                        await self._room(number)
                elif body == "started":
                    mux.start(number, message.started)
                elif body == "done":
                    mux.end(number, message.done)
                    self._turn.set()
                    return
                self._turn.set()

    async def _room(self, number: int) -> None:
        self._turn.set()
        room = self._full[number] = asyncio.Event()
        try:
            while not self._mux.room(number):
                await room.wait()
                room.clear()
        finally:
            del self._full[number]

    def _ended(self, number: int, task: asyncio.Task[None]) -> None:
        """Its task is over: tell what ended it, unless it has told so itself."""
        error = None if task.cancelled() else task.exception()
        if isinstance(error, RequestError):
            retry_s = error.retry_s if isinstance(error, Overloaded) else 0.0
            self._fail(number, error.grpc_status, str(error), retry_s)
        elif error is not None:
            log.error("a request failed by a bug of ours", exc_info=error)
            self._fail(number, "UNKNOWN", f"{type(error).__name__}: {error}")
        elif task.cancelled():
            self._fail(number, "CANCELLED", "the worker stopped it")
        else:
            self._fail(number, "UNAVAILABLE", "its answer has no end")

    def _fail(self, number: int, status: str, line: str, retry_s: float = 0.0) -> None:
        """End a request that has not ended."""
        if self._mux.ending(number):
            return
        error = worker_pb2.MuxError(status=status, message=one_line(line), retry_s=retry_s)
        self._mux.end(number, error)
        self._turn.set()


def _messages(parts: Sequence[_Part]) -> Iterator[worker_pb2.MuxResponse]:
    """The parts in as few messages as BATCH_NBYTES allows: a router refuses longer ones."""
    message, room = worker_pb2.MuxResponse(), BATCH_NBYTES
    for part in parts:
        # Only checks ask for logits, which are long; tokens have at most five bytes each.
        nbytes = 5 * len(part.token_ids) + (len(part.started.first_logits) if part.started else 0)
        if message.parts and nbytes > room:
            yield message
            message, room = worker_pb2.MuxResponse(), BATCH_NBYTES
        room -= nbytes
        message.parts.append(_to_wire(part))
    yield message


def _to_wire(part: _Part) -> worker_pb2.MuxPart:
    end = part.end
    return worker_pb2.MuxPart(
        id=part.id,
        started=part.started,
        token_ids=part.token_ids,
        done=end if isinstance(end, worker_pb2.Done) else None,
        error=end if isinstance(end, worker_pb2.MuxError) else None,
    )
