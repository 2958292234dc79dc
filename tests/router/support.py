"""A running router, requests for it, and waiting for what must come."""

import asyncio
import contextlib
import inspect
from collections.abc import AsyncIterator, Callable

import grpc
import pytest

from kvtier.config import Config, RouterConfig
from kvtier.router.server import serve
from kvtier.wire.pb import router_pb2, router_pb2_grpc

Status = grpc.StatusCode
PATIENCE_S = 60  # nothing here takes so long, unless it never happens
GRPC = [("grpc.max_send_message_length", -1), ("grpc.enable_http_proxy", 0)]


class RunningRouter:
    """A router that serves on a real port, and a client of it."""

    def __init__(self, settings: RouterConfig) -> None:
        self.settings = settings
        self.stopping = asyncio.Event()
        self.address = ""
        self.http = ""
        self.epp = ""
        self._started = asyncio.Event()

    def _told(self, address: str) -> None:
        self.address = address
        self._started.set()

    def _beside(self, name: str, address: str) -> None:
        setattr(self, name, address)

    async def start(self) -> "RunningRouter":
        config = Config(router=self.settings)
        self.task = asyncio.create_task(
            serve(config, started=self._told, stop=self.stopping, beside=self._beside)
        )
        waiting = asyncio.create_task(self._started.wait())
        await asyncio.wait({self.task, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if self.task.done():
            waiting.cancel()
            await self.task
        self.channel = grpc.aio.insecure_channel(self.address, options=GRPC)
        self.stub = router_pb2_grpc.RouterStub(self.channel)
        return self

    async def stop(self) -> None:
        self.stopping.set()
        await self.channel.close()
        await self.task

    async def members(
        self, wanted: Callable[[list[router_pb2.Member]], bool]
    ) -> list[router_pb2.Member]:
        """The first routing table that is as wanted."""
        call = self.stub.Watch(router_pb2.WatchMembersRequest())
        last: list[router_pb2.Member] = []
        try:
            async with asyncio.timeout(PATIENCE_S):
                async for table in call:
                    last = list(table.members)
                    if wanted(last):
                        return last
        except TimeoutError:
            pytest.fail(f"members never as wanted, last: {last}")
        finally:
            call.cancel()
        pytest.fail(f"the watch ended, last: {last}")

    async def ready(self) -> None:
        """Every member is."""
        await self.members(lambda each: bool(each) and all(m.state == "ready" for m in each))

    async def explain(self, prompt: str | list[int], model: str = "") -> list[router_pb2.Choice]:
        return list((await self.stub.Explain(route_request(prompt, model))).choices)

    async def warmth(self, prompt: str | list[int]) -> dict[str, dict[int, int]]:
        """Warm tokens by worker and tier."""
        choices = await self.explain(prompt)
        return {c.worker_id: {t.tier: t.tokens for t in c.warm} for c in choices}

    async def until_warmth(
        self, prompt: str | list[int], wanted: Callable[[dict[str, dict[int, int]]], bool]
    ) -> None:
        async def check() -> bool:
            return wanted(await self.warmth(prompt))

        await eventually(check, "the warmth is as wanted")

    async def route(self, prompt: str | list[int], model: str = "") -> router_pb2.Choice:
        return (await self.stub.Route(route_request(prompt, model))).choice


def make_prompt(prompt: str | list[int] | list[tuple[str, str]]) -> router_pb2.Prompt:
    """Text, token ids, or a chat of (role, content)."""
    if isinstance(prompt, str):
        return router_pb2.Prompt(text=prompt)
    if prompt and isinstance(prompt[0], tuple):
        turns = [router_pb2.ChatMessage(role=r, content=c) for r, c in prompt]
        return router_pb2.Prompt(chat=router_pb2.Chat(messages=turns))
    return router_pb2.Prompt(tokens=router_pb2.TokenIds(ids=prompt))


def route_request(prompt, model: str = "") -> router_pb2.RouteRequest:
    return router_pb2.RouteRequest(model=model, prompt=make_prompt(prompt))


def generate_request(prompt, **fields) -> router_pb2.GenerateRequest:
    return router_pb2.GenerateRequest(prompt=make_prompt(prompt), **fields)


async def eventually(check: Callable[[], object], what: str) -> None:
    """Wait until `check`, a function or a coroutine function, gives something true."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                found = check()
                if await found if inspect.isawaitable(found) else found:
                    return
                await asyncio.sleep(0.01)
    except TimeoutError:
        pytest.fail(f"never: {what}")


@contextlib.asynccontextmanager
async def refused(code: grpc.StatusCode, *words: str) -> AsyncIterator[None]:
    """The call inside ends with `code` and one line that has all the words."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        yield
    assert caught.value.code() is code, caught.value
    details = caught.value.details() or ""
    assert "\n" not in details
    for word in words:
        assert word in details, details
