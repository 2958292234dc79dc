"""The Router service: kvtier.v1.Router over gRPC."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Final, TypeVar

import grpc

from kvtier.errors import Overloaded, RequestError
from kvtier.router.front import Front
from kvtier.router.members import Member, Members
from kvtier.router.prompts import LONG
from kvtier.wire.pb import router_pb2, router_pb2_grpc
from kvtier.wire.recording import recorded
from kvtier.wire.rpc import refuse

MAX_WATCHERS: Final = 64
MAX_PENDING: Final = 64  # requests of one RouteStream under way

T = TypeVar("T")
_Answers = asyncio.Queue[router_pb2.RouteStreamResponse | None]


class RouterService(router_pb2_grpc.RouterServicer):
    """Serves kvtier.v1.Router on one loop."""

    def __init__(self, front: Front, members: Members) -> None:
        self._front = front
        self._members = members
        self._watchers = 0

    async def Route(  # noqa: N802 - gRPC's names
        self, request: router_pb2.RouteRequest, context: grpc.aio.ServicerContext
    ) -> router_pb2.RouteResponse:
        """See router.proto."""
        return await self._answer(context, lambda _: self._front.route(request), wait=False)

    async def RouteStream(  # noqa: N802
        self,
        requests: AsyncIterator[router_pb2.RouteStreamRequest],
        context: grpc.aio.ServicerContext,
    ) -> AsyncIterator[router_pb2.RouteStreamResponse]:
        """See router.proto."""
        answers: _Answers = asyncio.Queue()  # never more than `room` gives
        room = asyncio.Semaphore(MAX_PENDING)
        reading = asyncio.ensure_future(self._read(requests, answers, room))
        try:
            while (answer := await answers.get()) is not None:
                yield answer
                room.release()
            await reading
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def Explain(  # noqa: N802
        self, request: router_pb2.RouteRequest, context: grpc.aio.ServicerContext
    ) -> router_pb2.ExplainResponse:
        """See router.proto."""
        work = self._front.explain
        return await self._answer(context, lambda _: work(request), wait=False, counted=False)

    async def Generate(  # noqa: N802
        self, request: router_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> None:
        """See router.proto."""
        held: list[router_pb2.GenerateResponse] = []

        async def write(ready: Sequence[router_pb2.GenerateResponse]) -> None:
            if not request.together:
                for each in ready:
                    await context.write(each)
                return
            held.extend(ready)
            if held[-1].WhichOneof("body") != "routed":  # it goes with the first token
                first, *others = held
                held.clear()
                first.then.extend(others)
                await context.write(first)

        async def work(deadline: float) -> None:
            await self._front.generate(request, deadline, write)

        await self._answer(context, work, wait=True)

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
        async with aclosing(recorded(self._front.recorder, context)) as told:
            async for each in told:
                yield each

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
        self, context: grpc.aio.ServicerContext, work: Callable[[float], Awaitable[T]], *,
        wait: bool, counted: bool = True,
    ) -> T:  # fmt: skip
        """What `work` returns, within the caller's deadline; errors end the call."""
        try:
            left_s = context.time_remaining()
            return await self._front.within(left_s, work, wait=wait, counted=counted)
        except RequestError as error:
            await refuse(context, error)

    async def _read(
        self, requests: AsyncIterator[router_pb2.RouteStreamRequest], answers: _Answers,
        room: asyncio.Semaphore,
    ) -> None:  # fmt: skip
        """Answer all of a stream's requests, then say None.

        What takes no time is answered in order; a text or a long prompt lets others pass.
        """
        pending: set[asyncio.Task[None]] = set()

        async def answer(request: router_pb2.RouteStreamRequest) -> None:
            answers.put_nowait(await self._one(request))

        try:
            async for request in requests:
                await room.acquire()  # no more is read than is worked on
                if _at_once(request.request.prompt):
                    await answer(request)
                    continue
                task = asyncio.ensure_future(answer(request))
                pending.add(task)
                task.add_done_callback(pending.discard)
            await asyncio.gather(*pending)
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
            answers.put_nowait(None)

    async def _one(self, request: router_pb2.RouteStreamRequest) -> router_pb2.RouteStreamResponse:
        try:
            work = self._front.route
            response = await self._front.within(None, lambda _: work(request.request), wait=False)
        except RequestError as error:
            told = router_pb2.RouteError(
                status=error.grpc_status,
                message=str(error),
                retry_s=error.retry_s if isinstance(error, Overloaded) else 0,
            )
            return router_pb2.RouteStreamResponse(tag=request.tag, error=told)
        return router_pb2.RouteStreamResponse(tag=request.tag, response=response)


def _at_once(prompt: router_pb2.Prompt) -> bool:
    kind = prompt.WhichOneof("kind")
    return kind == "keys" or (kind == "tokens" and len(prompt.tokens.ids) < LONG)
