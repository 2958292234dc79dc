"""What a router does to find out why a member can't be reached holds up nothing else."""

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest

from kvtier.config import Config
from kvtier.wire import handshake
from kvtier.wire.access import Access
from kvtier.wire.pb import worker_pb2, worker_pb2_grpc
from tests.router.support import PATIENCE_S, eventually

HELLO = b"\x16"  # begins a TLS handshake


class Mute:
    """Hangs up on whoever speaks no TLS, and answers none who does, as a host that is lost."""

    def __init__(self) -> None:
        self.looks = 0
        self.over = asyncio.Event()
        self.address = ""

    async def met(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if await reader.read(1) == HELLO:
            self.looks += 1
            await self.over.wait()
        writer.close()


@pytest.fixture
async def mute(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Mute]:
    monkeypatch.setattr(handshake, "DIAGNOSE_S", 10 * PATIENCE_S)
    mute = Mute()
    server = await asyncio.start_server(mute.met, "127.0.0.1", 0)
    mute.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    yield mute
    mute.over.set()
    server.close()
    await server.wait_closed()


async def test_a_router_can_be_stopped_meanwhile(mute, routers):
    router = await routers(mute.address, ready=False)
    await eventually(lambda: mute.looks, "it looks what is wrong")
    async with asyncio.timeout(PATIENCE_S):
        await router.stop()
    assert not mute.over.is_set()


async def test_a_crowd_of_lost_members_leaves_threads_to_others(mute):
    access = Access(Config(), serving=False)
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        async with access.channel(mute.address, []) as channel:
            await worker_pb2_grpc.WorkerStub(channel).Describe(worker_pb2.DescribeRequest())
    looks = [asyncio.create_task(access.why(mute.address, failed.value)) for _ in range(100)]
    await eventually(lambda: mute.looks, "the first one is under way")
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.to_thread(int)  # as a long body is read
    assert not any(each.done() for each in looks)
    mute.over.set()
    assert await asyncio.gather(*looks) == [""] * 100
