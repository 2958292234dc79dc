"""One request's stream: from the best worker, and from the next where that one is lost."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import grpc

from kvtier import metrics
from kvtier.errors import Overloaded, RequestError, WorkerLost
from kvtier.router.link import Link
from kvtier.router.placement import Placement, Prompt, Ranked
from kvtier.wire.pb import router_pb2, worker_pb2, worker_pb2_grpc

MAX_LINE: Final = 1000  # characters of an error; what gRPC carries of them is limited
SLACK_S: Final = 1.0  # that a worker gets more than the router, whose words then end the request
_NAMED: Final = 8  # of a list in an error

Write = Callable[[router_pb2.GenerateResponse], Awaitable[object]]

# What a call ends with when its worker, or the way to it, is gone; anything else is an answer.
_LOST: Final = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.CANCELLED,  # by the worker as it stops: we never cancel and go on
        grpc.StatusCode.INTERNAL,  # a broken HTTP/2 stream
        grpc.StatusCode.UNKNOWN,  # a handler that crashed
    }
)


class Relayed(RequestError):
    """What a worker answered, word for word; `grpc_status` is the worker's."""

    def __init__(self, status: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self.grpc_status = status.name


class Outcome(StrEnum):
    """How one worker's attempt ended, where another may follow."""

    ANSWERED = "answered"
    LOST = "lost"  # before its first token
    FULL = "full"


@dataclass(frozen=True, slots=True)
class Job:
    """A request that was checked: what is asked, of whom it may be asked, and until when."""

    request: router_pb2.GenerateRequest
    prompt: Prompt
    candidates: Callable[[], list[Link]]  # at the moment of the call
    deadline: float  # on the loop's clock


async def generate(
    job: Job, placement: Placement, max_attempts: int, rng: random.Random, write: Write
) -> None:
    """Write Routed, Started, Chunks and the end to `write`, trying worker after worker.

    A worker lost before its first token is replaced, at most `max_attempts` being lost; a full
    one is passed over.

    Raises:
        WorkerLost: No worker is left, or the last was lost in mid-answer.
        Overloaded: Every worker is full.
        Relayed: A worker refused the request.
    """
    avoided: dict[str, Outcome] = {}  # by address
    lost = 0
    while lost < max_attempts:
        links = [link for link in job.candidates() if link.address not in avoided]
        if not links:
            break
        ranked = placement.rank(job.prompt, links, rng.random)
        best = ranked[0]
        attempt = _Attempt(job, best, write)
        routed = router_pb2.Routed(
            choice=best.proto(), others=[each.proto() for each in ranked[1:]],
            attempt=len(avoided) + 1,
        )  # fmt: skip
        if lost:
            metrics.RETRIES.inc()
        await write(router_pb2.GenerateResponse(routed=routed))
        outcome = await attempt.run(placement)
        if outcome is Outcome.ANSWERED:
            return
        avoided[best.link.address] = outcome
        lost += outcome is Outcome.LOST
    _give_up(job.prompt.model, avoided, lost)


def some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _give_up(model: str, avoided: dict[str, Outcome], lost: int) -> None:
    told = some([f"{address} {what}" for address, what in avoided.items()])
    if avoided and not lost:
        raise Overloaded(f"every worker of {model!r} is full: {told}")
    raise WorkerLost(f"no worker of {model!r} could begin: {told or 'none is ready'}")


class _Attempt:
    """One call of one worker."""

    def __init__(self, job: Job, to: Ranked, write: Write) -> None:
        self._job = job
        self._to = to
        self._write = write
        self._tokens = 0  # passed on
        self._started: worker_pb2.Started | None = None
        text = to.link.text
        self._decoder = text.decoder() if text is not None else None

    async def run(self, placement: Placement) -> Outcome:
        """Pass on the whole answer; nothing was passed on if the outcome is not ANSWERED.

        Raises:
            WorkerLost: After the first token.
            Relayed: The worker refused.
        """
        channel = self._to.link.channel
        if channel is None:  # lost since it was ranked
            return Outcome.LOST
        sent = placement.sent(self._job.prompt, self._to, followed=True)
        left_s = self._job.deadline - asyncio.get_running_loop().time()
        stub = worker_pb2_grpc.WorkerStub(channel)
        call = stub.Generate(self._request(), timeout=left_s + SLACK_S)
        try:
            return await self._pass_on(call, sent.began)
        except grpc.aio.AioRpcError as error:
            return self._judge(error.code(), error.details() or error.code().name)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # Not we were cancelled but the call, with the channel of a worker that fell silent.
            return self._judge(grpc.StatusCode.CANCELLED, "it fell silent")
        finally:
            call.cancel()
            sent.began()

    async def _pass_on(self, call: grpc.aio.UnaryStreamCall, began: Callable[[], None]) -> Outcome:
        while True:
            message = await call.read()
            if message is grpc.aio.EOF:
                return self._judge(grpc.StatusCode.UNAVAILABLE, "its answer has no end")
            body = message.WhichOneof("body")
            if body == "started":
                self._started = message.started  # goes out with the first token
            elif body == "tokens":
                began()
                await self._send_started()
                await self._send_tokens(message.tokens)
            elif body == "done":
                await self._send_started()
                await self._write(router_pb2.GenerateResponse(finished=message.done))
                return Outcome.ANSWERED

    async def _send_started(self) -> None:
        started, self._started = self._started, None
        if started is not None:
            await self._write(router_pb2.GenerateResponse(started=started))

    async def _send_tokens(self, tokens: worker_pb2.Tokens) -> None:
        self._tokens += len(tokens.ids)
        text = self._decoder.push(tokens.ids) if self._decoder is not None else ""
        chunk = router_pb2.Chunk(ids=tokens.ids, text=text)
        await self._write(router_pb2.GenerateResponse(chunk=chunk))

    def _judge(self, code: grpc.StatusCode, details: str) -> Outcome:
        """What the call's bad end means; see `run`."""
        if code in _LOST and self._tokens:
            name = self._to.info.worker_id
            line = f"worker {name} was lost after {self._tokens} tokens: {details}"
            raise WorkerLost(line[:MAX_LINE])
        if code in _LOST:
            return Outcome.LOST
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED and not self._tokens:
            return Outcome.FULL
        raise Relayed(code, details)

    def _request(self) -> worker_pb2.WorkerRequest:
        asked = self._job.request
        return worker_pb2.WorkerRequest(
            request_id=asked.request_id, token_ids=self._job.prompt.ids,
            max_tokens=asked.max_tokens, temperature=asked.temperature, seed=asked.seed,
            ignore_eos=asked.ignore_eos, return_first_logits=asked.return_first_logits,
            model=self._to.info.model,
        )  # fmt: skip
