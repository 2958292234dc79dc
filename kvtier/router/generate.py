"""One request's stream: from the best worker, and from the next where that one is lost."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

import grpc

from kvtier import metrics
from kvtier.errors import Overloaded, RequestError, WorkerLost
from kvtier.router.asking import Ask
from kvtier.router.link import Link
from kvtier.router.placement import Placement, Prompt, Ranked
from kvtier.router.prompts import some
from kvtier.router.sent import Sent
from kvtier.router.text import Decoder
from kvtier.wire.pb import router_pb2, worker_pb2

SLACK_S: Final = 1.0  # that a worker gets more than the router, whose words then end the request
DEFAULT_TOKENS: Final = 128  # of an answer whose request sets no max_tokens, see worker.proto

Write = Callable[[Sequence[router_pb2.GenerateResponse]], Awaitable[object]]  # ready together

# What ends a request whose worker, or the way to it, is gone; anything else is an answer.
_LOST: Final = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.CANCELLED,  # by the worker as it stops: we never cancel and go on
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,  # a handler that crashed
    }
)


class Relayed(RequestError):
    """What a worker answered, in its words; `grpc_status` is the worker's."""

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
    candidates: Callable[[Prompt], list[Link]]  # at the moment of the call
    deadline: float  # on the loop's clock
    fill: bool = False  # without max_tokens: all the room that the model has
    fallbacks: int | None = 0  # that Routed names behind the best; None: no Routed at all
    apart: bool = False  # a Chunk for each token, however many come together


@dataclass(slots=True)
class _Answer:
    """What the caller has of the answer so far, whichever workers gave it."""

    ids: list[int] = field(default_factory=list)  # kept only where it may have to be resumed
    tokens: int = 0
    started: bool = False
    saved: int = 0
    decoder: Decoder | None = None


async def generate(
    job: Job, placement: Placement, max_attempts: int, rng: random.Random, write: Write
) -> None:
    """Write Routed (if wanted), Started, Chunks and the end to `write`, trying worker after worker.

    A worker lost before its first token is replaced, at most `max_attempts` being lost; a full
    one is passed over. One lost later is replaced where the request says `resume`.

    Raises:
        WorkerLost: No worker is left, or the last was lost in mid-answer.
        Overloaded: Every worker is full.
        Relayed: A worker refused the request.
    """
    avoided: dict[str, Outcome] = {}  # by address
    answer = _Answer()
    lost = 0
    while lost < max_attempts:
        prompt = _with_answer(job.prompt, answer.ids)
        links = [link for link in job.candidates(prompt) if link.address not in avoided]
        if not links:
            break
        best, *others = placement.rank(prompt, links, rng.random, most=1 + (job.fallbacks or 0))
        attempt = _Attempt(job, prompt, answer, best, write)
        if lost:
            (metrics.RESUMES if answer.ids else metrics.RETRIES).inc()
        sent = placement.sent(prompt, best, followed=True)  # before others are ranked meanwhile
        try:
            if job.fallbacks is not None:
                routed = router_pb2.Routed(
                    choice=best.proto(), others=[each.proto() for each in others],
                    attempt=len(avoided) + 1, resumed_tokens=len(answer.ids),
                )  # fmt: skip
                await write([router_pb2.GenerateResponse(routed=routed)])
            outcome = await attempt.run(sent)
        finally:
            sent.began()
        if outcome is Outcome.ANSWERED:
            return
        avoided[best.link.address] = outcome
        lost += outcome is Outcome.LOST
        if (reason := _ended(job, answer, best)) is not None:
            done = worker_pb2.Done(
                finish_reason=reason, completion_tokens=answer.tokens, saved_tokens=answer.saved
            )
            await write([router_pb2.GenerateResponse(finished=done)])
            return
    _give_up(job.prompt.model, avoided, lost, answer.tokens)


def _with_answer(prompt: Prompt, answer: Sequence[int]) -> Prompt:
    if not answer:
        return prompt
    ids = [*prompt.ids, *answer]
    return Prompt(prompt.model, ids, prompt.adapter, prompt.tenant, prompt.session)


def _ended(job: Job, answer: _Answer, last: Ranked) -> worker_pb2.FinishReason | None:
    """How an answer had ended, had its worker lived to say so; None: it goes on."""
    if not answer.ids:
        return None
    if answer.tokens >= (job.request.max_tokens or DEFAULT_TOKENS):
        return worker_pb2.FINISH_REASON_LENGTH
    if not job.request.ignore_eos and answer.ids[-1] in last.info.eos_token_ids:
        return worker_pb2.FINISH_REASON_STOP
    return None


def _give_up(model: str, avoided: dict[str, Outcome], lost: int, tokens: int) -> None:
    told = some([f"{address} {what}" for address, what in avoided.items()])
    if avoided and not lost:
        raise Overloaded(f"every worker of {model!r} is full: {told}")
    did = f"go on after {tokens} tokens" if tokens else "begin"
    raise WorkerLost(f"no worker of {model!r} could {did}: {told or 'none is ready'}")


def _status(name: str) -> grpc.StatusCode:
    """Of an error; one that says OK, which no call can be aborted with, says nothing."""
    code = grpc.StatusCode.__members__.get(name, grpc.StatusCode.UNKNOWN)
    return grpc.StatusCode.UNKNOWN if code is grpc.StatusCode.OK else code


class _Attempt:
    """One request to one worker."""

    def __init__(self, job: Job, prompt: Prompt, answer: _Answer, to: Ranked, write: Write) -> None:
        self._job = job
        self._prompt = prompt
        self._answer = answer
        self._to = to
        self._write = write
        self._tokens = 0  # passed on by this worker
        self._started: worker_pb2.Started | None = None
        text = to.link.text
        if answer.decoder is None and text is not None:
            answer.decoder = text.decoder()

    async def run(self, sent: Sent) -> Outcome:
        """Pass on the whole answer; without `resume`, all or nothing was passed on.

        Raises:
            WorkerLost: After the first token, and the request is not to be resumed.
            Relayed: The worker refused.
        """
        asks = self._to.link.asks
        if asks is None:  # lost since it was ranked
            return Outcome.LOST
        left_s = self._job.deadline - asyncio.get_running_loop().time()
        try:
            ask = asks.ask(self._request(), max(0.0, left_s) + SLACK_S)
        except WorkerLost:
            return Outcome.LOST
        except Overloaded:
            return Outcome.FULL
        try:
            return await self._pass_on(ask, sent)
        finally:
            ask.cancel()

    async def _pass_on(self, ask: Ask, sent: Sent) -> Outcome:
        while True:
            part = await ask.read()
            if part.started is not None:
                self._started = part.started  # goes out with the first token
                sent.told(part.started, self._to.info)
            ready: list[router_pb2.GenerateResponse] = []
            done = part.end if isinstance(part.end, worker_pb2.Done) else None
            if part.token_ids:
                sent.began()
            if part.token_ids or done is not None:
                ready += self._begin()
            if self._job.apart:
                ready += [self._chunk((each,)) for each in part.token_ids]
            elif part.token_ids:
                ready.append(self._chunk(part.token_ids))
            if done is not None:
                if self._tokens != self._answer.tokens:  # others had a part in it
                    done.completion_tokens = self._answer.tokens
                ready.append(router_pb2.GenerateResponse(finished=done))
            if ready:
                await self._write(ready)
            if done is not None:
                return Outcome.ANSWERED
            if isinstance(part.end, worker_pb2.MuxError):
                return self._judge(_status(part.end.status), part.end.message or part.end.status)

    def _begin(self) -> list[router_pb2.GenerateResponse]:
        """Started, where nothing of the answer was passed on yet."""
        started, self._started = self._started, None
        if started is None or self._answer.started:
            return []
        self._answer.started = True
        return [router_pb2.GenerateResponse(started=started)]

    def _chunk(self, token_ids: Sequence[int]) -> router_pb2.GenerateResponse:
        answer = self._answer
        self._tokens += len(token_ids)
        answer.tokens += len(token_ids)
        if self._job.request.resume:
            answer.ids.extend(token_ids)
        text = answer.decoder.push(token_ids) if answer.decoder is not None else ""
        return router_pb2.GenerateResponse(chunk=router_pb2.Chunk(ids=token_ids, text=text))

    def _judge(self, code: grpc.StatusCode, details: str) -> Outcome:
        """What a bad end means; see `run`."""
        if code in _LOST and self._tokens and not self._job.request.resume:
            name = self._to.info.worker_id
            raise WorkerLost(f"worker {name} was lost after {self._tokens} tokens: {details}")
        if code in _LOST:
            return Outcome.LOST
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED and not self._tokens:
            return Outcome.FULL
        raise Relayed(code, details)

    def _request(self) -> worker_pb2.WorkerRequest:
        asked, ids = self._job.request, self._prompt.ids
        max_tokens = asked.max_tokens or None
        if self._job.fill and max_tokens is None:
            max_tokens = self._to.info.max_tokens - len(ids)
        elif self._answer.ids:
            max_tokens = (max_tokens or DEFAULT_TOKENS) - len(self._answer.ids)
        return worker_pb2.WorkerRequest(
            request_id=asked.request_id, token_ids=ids, max_tokens=max_tokens,
            temperature=asked.temperature, seed=asked.seed, ignore_eos=asked.ignore_eos,
            return_first_logits=asked.return_first_logits, model=self._to.info.model,
            adapter=self._prompt.adapter, tenant=self._prompt.tenant,
            source=self._to.pull_from, warm_tokens=self._to.there_tokens,
        )  # fmt: skip
