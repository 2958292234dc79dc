"""A worker whose bytes are no messages is out of use, and nobody else is."""

import asyncio

import grpc
import pytest

from kvtier.wire.pb import router_pb2, worker_pb2
from tests.router.stub_engine import StubWorker, ids, says
from tests.router.support import PATIENCE_S, Status, eventually, generate_request

NO_MESSAGE = b"\xff\xff\xff"
HELLO = worker_pb2.MuxResponse(hello=worker_pb2.MuxHello(max_open=9)).SerializeToString()


class _Bent:
    """A server one of whose methods is `instead`, whatever its kind is."""

    def __init__(self, server: grpc.aio.Server, method: str, instead) -> None:
        self._server = server
        self._method = method
        self._instead = grpc.stream_stream_rpc_method_handler(instead)

    def add_registered_method_handlers(self, *_) -> None:
        """All come by `add_generic_rpc_handlers` as well."""

    def add_generic_rpc_handlers(self, handlers) -> None:
        self._server.add_generic_rpc_handlers(tuple(self._bent(each) for each in handlers))

    def _bent(self, handler: grpc.GenericRpcHandler) -> grpc.GenericRpcHandler:
        method, instead = self._method, self._instead

        class Handler(grpc.GenericRpcHandler):
            def service(self, details):
                return instead if details.method == method else handler.service(details)

        return Handler()


class Garbled(StubWorker):
    """Answers one method with the bytes `first` and then with some that are no message."""

    def __init__(self, name: str, method: str, first: tuple[bytes, ...] = ()) -> None:
        super().__init__(name)
        self.method = method
        self.first = first
        self.asked = 0

    def register(self, server: grpc.aio.Server) -> None:
        super().register(_Bent(server, f"/{self.method}", self._garble))

    async def _garble(self, requests, context) -> None:
        self.asked += 1
        for each in (*self.first, NO_MESSAGE):
            await context.write(each)
        if not self.method.endswith(("Describe", "Tokenizer")):
            await asyncio.Event().wait()


@pytest.mark.parametrize(("method", "first"), [
    ("kvtier.v1.Worker/Describe", ()),
    ("kvtier.v1.Worker/Tokenizer", ()),
    ("kvtier.v1.Worker/Multiplex", ()),
    ("kvtier.v1.Worker/Multiplex", (HELLO,)),
    ("kvtier.v1.Feed/Watch", ()),
])  # fmt: skip
async def test_a_router_outlives_a_worker_that_sends_no_messages(engines, routers, method, first):
    bad, good = await engines(Garbled("bad", method, first)), await engines(StubWorker("good"))
    good.script = says("ok")
    router = await routers(bad, good, ready=False)
    await eventually(lambda: bad.asked > 1 or router.task.done(), "it is asked again")
    assert not router.task.done(), router.task.exception()
    await router.members(lambda each: each[1].state == "ready")
    answer: list[int] = []
    async with asyncio.timeout(PATIENCE_S):
        call = router.stub.Generate(generate_request([1, 2]))
        async for message in call:
            answer += message.chunk.ids
    assert (answer, await call.code()) == (ids("ok"), Status.OK)
    table = await router.stub.Watch(router_pb2.WatchMembersRequest()).read()
    assert [each.state for each in table.members] == ["connecting", "ready"]
