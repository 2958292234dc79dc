"""A worker as the router asks it: one stream that carries all its requests, kept open."""

import asyncio
import logging
import random
from collections.abc import Callable
from typing import Final

import grpc

from kvtier.core.mux import WINDOW, Asking, Part
from kvtier.errors import InvalidRequest, RemoteProtocolError, WorkerLost
from kvtier.router.pauses import Pauses
from kvtier.wire.pb import worker_pb2, worker_pb2_grpc
from kvtier.wire.rpc import MAX_MESSAGE, line_of, parsed

HELLO_S: Final = 5.0
PAUSE_S: Final = (0.05, 1.0)  # before a first and before every later try to open it anew
BATCH_NBYTES: Final = 1 << 20  # of requests in one message, unless a single one is longer
MAX_NBYTES: Final = MAX_MESSAGE - (64 << 10)  # of one request; a longer message ends the stream

End = worker_pb2.Done | worker_pb2.MuxError
_UNKNOWN_METHOD: Final = grpc.StatusCode.UNIMPLEMENTED
_Part = Part[worker_pb2.Started, End]

log = logging.getLogger(__name__)


class TooOld(RemoteProtocolError):
    """The worker has no such stream: it is of a release before this router's."""


class Ask:
    """One request that was opened."""

    def __init__(self, stream: "_Stream", number: int) -> None:
        self._stream = stream
        self._number = number

    async def read(self) -> _Part:
        """All that came since the last time, as soon as there is something; not behind the end.

        How much may come meanwhile is bounded: a slow reader holds up its own answer only. The end
        is a MuxError where the worker was lost.
        """
        return await self._stream.read(self._number)

    def cancel(self) -> None:
        """Want no more of it. Idempotent; nothing to do behind its end."""
        self._stream.cancel(self._number)


class Asks:
    """Keeps a stream to one worker open, over one channel, until it is retired. Of one loop.

    `changed` is called whenever `open` or `draining` may have changed.
    """

    def __init__(
        self, name: str, channel: grpc.aio.Channel, rng: random.Random,
        changed: Callable[[], None],
    ) -> None:  # fmt: skip
        self._name = name
        self._stub = worker_pb2_grpc.WorkerStub(channel)
        self._pauses = Pauses(*PAUSE_S, PAUSE_S[1], rng)
        self._changed = changed
        self._stream: _Stream | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._retired = False
        self._why = ""

    @property
    def open(self) -> bool:
        """Whether requests can be asked."""
        return not self._retired and self._stream is not None and self._stream.mux.open

    @property
    def lost(self) -> bool:
        """Whether it is being opened anew: nothing can be asked for a moment."""
        return self._stream is None or not self._stream.mux.max_open

    @property
    def draining(self) -> bool:
        """Whether the worker has said that it takes no more."""
        return self._stream is not None and self._stream.mux.draining

    async def begin(self) -> None:
        """Open the stream for the first time; from then on it is kept open.

        Raises:
            grpc.RpcError, RemoteProtocolError: It cannot be opened; TooOld: nor ever will.
        """
        if self._keeping is None:
            self._stream = stream = await self._opened()
            self._keeping = asyncio.get_running_loop().create_task(self._keep(stream))

    def check(self) -> None:
        """Raise what ended the keeping of the stream; only a bug of ours does."""
        task = self._keeping
        if task is not None and task.done() and not task.cancelled() and task.exception():
            task.result()

    def ask(self, request: worker_pb2.WorkerRequest, timeout_s: float) -> Ask:
        """Ask the worker, which ends the request itself after `timeout_s`.

        Raises:
            WorkerLost: The stream is not open.
            Overloaded: Too many requests of this router are open there.
            InvalidRequest: The request is too long.
        """
        if self._stream is None or self._retired:
            raise WorkerLost("not connected")
        return Ask(self._stream, self._stream.ask(request, timeout_s))

    def retire(self, why: str = "the router stops") -> None:
        """Ask nothing more; what is open goes on, and then the stream ends. Idempotent.

        What is open when the channel is closed, or this, ends with the first `why`.
        """
        if not self._retired:
            self._retired, self._why = True, why
        if self._stream is not None:
            self._stream.retire(self._why)

    async def close(self) -> None:
        """End at once."""
        self.retire()
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)

    async def _keep(self, stream: "_Stream") -> None:
        clock = asyncio.get_running_loop().time
        again: _Stream | None = stream
        while again is not None:
            self._stream = again
            self._pauses.holds(clock())
            self._changed()
            why = await again.run(self._changed)
            self._stream = None
            self._pauses.holds(clock())
            again = await self._opened_anew(why)

    async def _opened_anew(self, why: str) -> "_Stream | None":
        """A new stream, however often it takes; None once retired."""
        said = ""
        if not self._retired:
            if not self._pauses.tries:
                log.info("%s: its stream of requests is lost: %s", self._name, why)
            self._changed()
        while not self._retired:
            await asyncio.sleep(self._pauses.next_s())
            try:
                return await self._opened()
            except (grpc.RpcError, RemoteProtocolError) as error:
                # Whose feed is there still is `connecting` for a reason that nobody else tells.
                if self._pauses.tries > 1 and (line := line_of(error)) != said:
                    said = line
                    log.warning("%s: its stream of requests cannot be opened: %s", self._name, line)
        return None

    async def _opened(self) -> "_Stream":
        call = self._stub.Multiplex()
        stream = _Stream(call)
        try:
            async with asyncio.timeout(HELLO_S):
                await stream.hello()
        except BaseException as error:
            call.cancel()
            if isinstance(error, TimeoutError):
                raise RemoteProtocolError(f"no hello within {HELLO_S:g} s") from None
            if isinstance(error, grpc.RpcError) and error.code() is _UNKNOWN_METHOD:
                raise TooOld(
                    "it has no kvtier.v1.Worker/Multiplex: it is of an earlier release than this "
                    "router and gets no requests; upgrade the worker"
                ) from None
            raise
        if self._retired:
            stream.retire(self._why)
        return stream


class _Stream:
    """The stream from one opening to its end."""

    def __init__(self, call: grpc.aio.StreamStreamCall) -> None:
        self.mux = Asking[worker_pb2.Started, End]()
        self._call = call
        self._opens: dict[int, tuple[worker_pb2.MuxOpen, int]] = {}  # not written yet; bytes
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._turn = asyncio.Event()  # there may be something to write
        self._retired = False
        self._retired_for = "nothing can be sent to it"

    async def hello(self) -> None:
        """Wait for the other side's first message."""
        message = parsed(await self._call.read())
        if message is grpc.aio.EOF:
            raise RemoteProtocolError("the stream ended before it began")
        self.mux.hello(message.hello.max_open)
        self._take(message)

    def ask(self, request: worker_pb2.WorkerRequest, timeout_s: float) -> int:
        opened = worker_pb2.MuxOpen(request=request, timeout_s=timeout_s, credit=WINDOW)
        if (nbytes := opened.ByteSize()) > MAX_NBYTES:
            raise InvalidRequest(f"prompt: {nbytes} bytes as token ids, limit {MAX_NBYTES}")
        opened.id = number = self.mux.ask()
        self._opens[number] = opened, nbytes
        self._turn.set()
        return number

    async def read(self, number: int) -> _Part:
        while not (part := self.mux.take(number)):
            came = self._waiting[number] = asyncio.get_running_loop().create_future()
            try:
                await came
            finally:
                del self._waiting[number]
        if self.mux.owes or self._retired:
            self._turn.set()
        return part

    def cancel(self, number: int) -> None:
        sent = self._opens.pop(number, None) is None
        if self.mux.cancel(number, sent=sent):
            self._turn.set()

    def retire(self, why: str) -> None:
        self._retired, self._retired_for = True, why
        self._turn.set()

    async def run(self, changed: Callable[[], None]) -> str:
        """Carry requests until the stream ends; then all that is open has ended. Why it ended."""
        writing = asyncio.ensure_future(self._write())
        # A writer that fails takes the stream with it.
        writing.add_done_callback(
            lambda task: task.cancelled() or task.exception() is None or self._call.cancel()
        )
        why = ""
        try:
            while (message := await self._call.read()) is not grpc.aio.EOF:
                if self._take(parsed(message)):
                    changed()
            why = "the worker ended its stream of requests"
        except (grpc.aio.AioRpcError, RemoteProtocolError) as error:
            why = line_of(error)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise  # or not we were cancelled but the call, with its channel
        finally:
            why = why or self._retired_for
            self._break(why)
            self._call.cancel()
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)
        return why

    def _take(self, message: worker_pb2.MuxResponse) -> bool:
        """What came; whether the worker takes no more from here on."""
        for part in message.parts:
            number = part.id
            body = part.WhichOneof("end")
            end = None if body is None else part.done if body == "done" else part.error
            started = part.started if part.HasField("started") else None
            self.mux.receive(Part(number, started, list(part.token_ids), end))
            self._wake(number)
        if message.draining:
            self.mux.drain()
        return message.draining

    def _wake(self, number: int) -> None:
        came = self._waiting.get(number)
        if came is not None and not came.done():
            came.set_result(None)

    def _break(self, why: str) -> None:
        self._opens.clear()
        for number in self.mux.broken(worker_pb2.MuxError(status="UNAVAILABLE", message=why)):
            self._wake(number)

    async def _write(self) -> None:
        while not self._retired or len(self.mux):
            await self._turn.wait()
            self._turn.clear()
            while (message := self._next()) is not None:
                await self._call.write(message)
        await self._call.done_writing()

    def _next(self) -> worker_pb2.MuxRequest | None:
        """What the worker must be told now."""
        more, cancels = self.mux.outgoing()
        opens: list[worker_pb2.MuxOpen] = []
        room = BATCH_NBYTES
        for number, (opened, nbytes) in [*self._opens.items()]:
            if opens and nbytes > room:
                break
            room -= nbytes
            opens.append(opened)
            del self._opens[number]
        if not (opens or more or cancels):
            return None
        granted = [worker_pb2.MuxCredit(id=n, tokens=tokens) for n, tokens in more.items()]
        return worker_pb2.MuxRequest(opens=opens, credits=granted, cancels=cancels)
