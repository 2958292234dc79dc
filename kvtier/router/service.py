"""The Router service: checks requests, turns them into token ids, and answers."""

import asyncio
import math
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final, TypeVar

import grpc

from kvtier import metrics
from kvtier.config import RouterConfig
from kvtier.errors import InvalidRequest, Overloaded, RequestError, UnknownModel, WorkerLost
from kvtier.router.generate import Job, generate, some
from kvtier.router.link import Link
from kvtier.router.members import Member, Members
from kvtier.router.placement import Placement, Prompt, Ranked
from kvtier.router.record import Recorder
from kvtier.router.text import Message, Text, TextPool, check_chat, check_text
from kvtier.wire.pb import router_pb2, router_pb2_grpc, worker_pb2
from kvtier.wire.rpc import refuse

MAX_TEMPERATURE: Final = 100.0
MAX_REQUEST_ID: Final = 128  # characters
MAX_WATCHERS: Final = 64
LONG: Final = 4096  # tokens from which on keys are computed off the loop

T = TypeVar("T")


class RouterService(router_pb2_grpc.RouterServicer):
    """Serves kvtier.v1.Router on one loop."""

    def __init__(
        self, config: RouterConfig, members: Members, placement: Placement, texts: TextPool,
        rng: random.Random,
    ) -> None:  # fmt: skip
        self._config = config
        self._members = members
        self._placement = placement
        self._texts = texts
        self._rng = rng
        self._recorder = Recorder()
        self._running = 0
        self._watchers = 0

    async def Route(  # noqa: N802 - gRPC's names
        self, request: router_pb2.RouteRequest, context: grpc.aio.ServicerContext
    ) -> router_pb2.RouteResponse:
        """See router.proto."""

        async def work(_deadline: float) -> router_pb2.RouteResponse:
            prompt, ranked = await self._ranked(request, self._rng.random)
            best, *others = ranked
            self._placement.sent(prompt, best, followed=False)
            self._recorder.tell(prompt, best.info, time.time(), 0)
            return router_pb2.RouteResponse(
                choice=best.proto(), fallbacks=[each.proto() for each in others],
                prompt_tokens=len(prompt.ids),
            )  # fmt: skip

        return await self._answer(context, work)

    async def Explain(  # noqa: N802
        self, request: router_pb2.RouteRequest, context: grpc.aio.ServicerContext
    ) -> router_pb2.ExplainResponse:
        """See router.proto."""

        async def work(_deadline: float) -> router_pb2.ExplainResponse:
            # Every router must say the same, so nothing is left to chance.
            prompt, ranked = await self._ranked(request, lambda: 0.0)
            choices = [each.proto() for each in ranked]
            return router_pb2.ExplainResponse(choices=choices, prompt_tokens=len(prompt.ids))

        return await self._answer(context, work, counted=False)

    async def Generate(  # noqa: N802
        self, request: router_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> None:
        """See router.proto."""

        async def work(deadline: float) -> None:
            _check_generate(request)
            prompt, links = await self._prompt(request.model, request.prompt)
            readers = {_digest(link) for link in links}

            def candidates() -> list[Link]:
                found = self._placement.candidates(prompt.model)
                return [each for each in found if _digest(each) in readers and _fits(prompt, each)]

            job = Job(request, prompt, candidates, deadline)
            attempts = self._config.max_attempts
            with self._recorder.recorded(prompt, links[0].info) as seen:

                async def write(response: router_pb2.GenerateResponse) -> None:
                    seen(len(response.chunk.ids))
                    await context.write(response)

                await generate(job, self._placement, attempts, self._rng, write)

        await self._answer(context, work)

    async def Watch(  # noqa: N802
        self, request: router_pb2.WatchMembersRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[router_pb2.Members]:
        """See router.proto."""
        if self._watchers >= MAX_WATCHERS:
            await refuse(context, Overloaded(f"{MAX_WATCHERS} watchers of the members already"))
        self._watchers += 1
        try:
            async for _ in self._members.changes():
                yield self._members.table()
        finally:
            self._watchers -= 1

    async def Record(  # noqa: N802
        self, request: router_pb2.RecordRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[router_pb2.RecordedRequest]:
        """See router.proto."""
        await context.send_initial_metadata(())  # the reader knows that nothing is missed now
        try:
            async for each in self._recorder.requests():
                yield each
        except Overloaded as error:
            await refuse(context, error)

    async def SetMembers(  # noqa: N802
        self, request: router_pb2.Members, context: grpc.aio.ServicerContext
    ) -> router_pb2.SetMembersResponse:
        """See router.proto."""
        members = [
            Member(each.node, each.daemon_address, each.worker_address, each.draining)
            for each in request.members
        ]
        try:
            applied = self._members.announce(request.version, members)
        except RequestError as error:
            await refuse(context, error)
        return router_pb2.SetMembersResponse(applied=applied)

    async def _answer(
        self, context: grpc.aio.ServicerContext, work: Callable[[float], Awaitable[T]],
        *, counted: bool = True,
    ) -> T:  # fmt: skip
        """What `work` returns, within the limits of time and number; errors end the call."""
        left_s = context.time_remaining()
        limit_s = self._config.timeout_s if left_s is None else left_s
        deadline = asyncio.get_running_loop().time() + limit_s
        status = "CANCELLED"
        try:
            async with asyncio.timeout_at(deadline):
                answer = await self._admitted(work, deadline)
                status = "OK"
                return answer
        except RequestError as error:
            status = error.grpc_status
            await refuse(context, error)
        except TimeoutError:
            status = "DEADLINE_EXCEEDED"
            code = grpc.StatusCode.DEADLINE_EXCEEDED
            await context.abort(code, f"not finished within {limit_s:g} s")
            raise
        finally:
            if counted:
                metrics.REQUESTS.labels(status).inc()

    async def _admitted(self, work: Callable[[float], Awaitable[T]], deadline: float) -> T:
        limit = self._config.max_requests
        if self._running >= limit:
            raise Overloaded(f"router: {limit} requests under way, which is max_requests")
        self._running += 1
        try:
            return await work(deadline)
        finally:
            self._running -= 1

    async def _ranked(
        self, request: router_pb2.RouteRequest, tie: Callable[[], float]
    ) -> tuple[Prompt, list[Ranked]]:
        prompt, links = await self._prompt(request.model, request.prompt)
        return prompt, self._placement.rank(prompt, links, tie)

    async def _prompt(self, model: str, asked: router_pb2.Prompt) -> tuple[Prompt, list[Link]]:
        """The prompt in token ids, and the workers that read these ids alike and can take it."""
        model = self._model(model)
        links = self._placement.candidates(model)
        if not links:
            raise WorkerLost(f"no worker of {model!r} is ready")
        kind = asked.WhichOneof("kind")
        if kind == "tokens":
            prompt = Prompt(model, asked.tokens.ids)
        else:
            text = _shared_text(links)
            links = [link for link in links if _digest(link) == text.digest]
            prompt = Prompt(model, await self._encode(text, asked))
        if not prompt.ids:
            raise InvalidRequest("prompt: no tokens")
        links = _fitting(prompt, links)
        infos = [link.info for link in links if link.info is not None]
        if len(prompt.ids) >= LONG:
            await self._texts.run(lambda: [prompt.keys(info) for info in infos])
        return prompt, links

    async def _encode(self, text: Text, asked: router_pb2.Prompt) -> list[int]:
        kind = asked.WhichOneof("kind")
        if kind == "text":
            check_text(asked.text, "prompt.text")
            return await self._texts.run(lambda: text.encode(asked.text))
        if kind == "chat":
            messages = [Message(each.role, each.content) for each in asked.chat.messages]
            check_chat(messages)
            return await self._texts.run(lambda: text.encode_chat(messages))
        raise InvalidRequest("prompt: must be text, chat or tokens")

    def _model(self, name: str) -> str:
        """The model that a request means.

        Raises:
            UnknownModel, InvalidRequest, WorkerLost: See the messages.
        """
        infos = [link.info for link in self._members.workers() if link.info is not None]
        served = sorted({info.model for info in infos})
        if not served:
            raise WorkerLost(f"no worker is ready; {len(self._members.workers())} connecting")
        if not name and len(served) == 1:
            return served[0]
        if not name:
            raise InvalidRequest(f"model: must be one of {some(served)}")
        if name not in served:
            raise UnknownModel(f"model {name[:200]!r} is not served; served: {some(served)}")
        return name


def _shared_text(links: list[Link]) -> Text:
    """The tokenizer that most of these workers use; among equals the first by digest."""
    texts = {link.text.digest: link.text for link in links if link.text is not None}
    if not texts:
        raise WorkerLost("no worker is ready")
    counts = Counter(_digest(link) for link in links)
    return texts[min(texts, key=lambda digest: (-counts[digest], digest))]


def _digest(link: Link) -> str | None:
    return link.text.digest if link.text is not None else None


def _fits(prompt: Prompt, link: Link) -> bool:
    return link.info is not None and _misfit(prompt, link.info) is None


def _misfit(prompt: Prompt, info: worker_pb2.WorkerInfo) -> str | None:
    """Why this worker can't take the prompt, or None."""
    if len(prompt.ids) + 1 > info.max_tokens:
        return (
            f"prompt: {len(prompt.ids)} tokens, and one more for the answer, but model "
            f"{info.model!r} takes {info.max_tokens} in all"
        )
    if prompt.highest >= info.vocab_size:
        return (
            f"prompt: token id {prompt.highest}, but model {info.model!r} has "
            f"{info.vocab_size} tokens"
        )
    return None


def _fitting(prompt: Prompt, links: list[Link]) -> list[Link]:
    """The workers that can take the prompt.

    Raises:
        InvalidRequest: None can; the numbers are those of the widest.
        WorkerLost: None was left while the text was read.
    """
    found = [link for link in links if _fits(prompt, link)]
    if found:
        return found
    infos = [link.info for link in links if link.info is not None]
    if not infos:
        raise WorkerLost(f"no worker of {prompt.model!r} is ready")
    widest = max(infos, key=lambda info: (info.max_tokens, info.vocab_size))
    raise InvalidRequest(_misfit(prompt, widest) or "prompt: fits no worker")


def _check_generate(request: router_pb2.GenerateRequest) -> None:
    if not (math.isfinite(request.temperature) and 0 <= request.temperature <= MAX_TEMPERATURE):
        raise InvalidRequest(
            f"temperature is {request.temperature:g}, must be 0 to {MAX_TEMPERATURE:g}"
        )
    if len(request.request_id) > MAX_REQUEST_ID:
        raise InvalidRequest(
            f"request_id has {len(request.request_id)} characters, limit {MAX_REQUEST_ID}"
        )
