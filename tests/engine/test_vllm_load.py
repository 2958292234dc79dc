"""What a vLLM worker says of its load, over real gRPC; in vLLM's place an engine that waits."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest

from kvtier.config import Config, WorkerConfig
from kvtier.core.vllm_keys import none_hash
from kvtier.engine.sequence import Done, FinishReason, Request, Started, Tokens
from kvtier.engine.vllm import gateway
from kvtier.engine.vllm.gateway import Answer, Served
from kvtier.engine.vllm.spaces import Spaces
from kvtier.wire.pb import feed_pb2, feed_pb2_grpc, worker_pb2, worker_pb2_grpc
from tests.launching import DEADLINE_S

SERVED = Served(
    model="m", revision="r", block_tokens=16, max_tokens=100_000, vocab_size=1000,
    kv_bytes_per_token=1, doubles_at=1000.0, eos_token_ids=(), tokenizer_files={},
    none_hash=none_hash(), root=b"r" * 32, events="", replay="", spaces=Spaces({}, {}),
)  # fmt: skip


class Engine:
    """Gives first tokens when it is let, and ends when it is told to."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self.let, self.end = asyncio.Event(), asyncio.Event()
        self.asked: list[int] = []  # for so many tokens

    async def answer(self, request: Request) -> Answer:
        self.asked.append(request.max_tokens)
        await self.let.wait()
        tokens = len(request.token_ids)
        yield Started(
            prompt_tokens=tokens, restored={}, computed_tokens=tokens, queue_s=0.0,
            restore_s=0.0, prefill_s=1.0,
        )  # fmt: skip
        yield Tokens((1,))
        await self.end.wait()
        yield Done(finish_reason=FinishReason.LENGTH, completion_tokens=1, saved_tokens=0)

    async def clear(self) -> None: ...

    async def alive(self) -> bool:
        return True

    async def close(self) -> None: ...


@asynccontextmanager
async def served(engine: Engine) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to a worker over `engine`."""
    stop, address = asyncio.Event(), asyncio.get_running_loop().create_future()
    config = Config(worker=WorkerConfig(listen="127.0.0.1:0", node="b"))
    serving = asyncio.create_task(
        gateway.serve(config, engine, None, started=address.set_result, stop=stop)
    )
    async with asyncio.timeout(DEADLINE_S), grpc.aio.insecure_channel(await address) as channel:
        yield channel
    stop.set()
    await serving


async def test_an_answer_has_128_tokens_where_nobody_says_and_0_is_refused() -> None:
    engine = Engine(SERVED)
    engine.let.set()
    engine.end.set()
    async with served(engine) as channel:
        stub = worker_pb2_grpc.WorkerStub(channel)
        async for _ in stub.Generate(worker_pb2.WorkerRequest(token_ids=[1])):
            pass
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in stub.Generate(worker_pb2.WorkerRequest(token_ids=[1], max_tokens=0)):
                pass
    assert engine.asked == [128]
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "max_tokens is 0" in caught.value.details()


async def heard(engine: Engine, prompts: list[int], warm: int = 0) -> list[tuple[int, float]]:
    """Waiting tokens, plain and as first ones: while these wait, and from first tokens on."""
    found = []
    async with served(engine) as channel:
        stub = worker_pb2_grpc.WorkerStub(channel)

        async def ask(count: int) -> None:
            request = worker_pb2.WorkerRequest(
                token_ids=[1] * count, max_tokens=1, warm_tokens=warm
            )
            async for _ in stub.Generate(request):
                pass

        asking = [asyncio.create_task(ask(count)) for count in prompts]
        watch = feed_pb2_grpc.FeedStub(channel).Watch(feed_pb2.WatchRequest())
        async for message in watch:
            load = message.heartbeat.load
            told = sum(max(1, count - warm) for count in prompts)
            if message.HasField("heartbeat") and load.waiting_tokens == told:
                found.append((load.waiting_tokens, load.waiting_as_first))
                break
        engine.let.set()
        async for message in watch:
            load = message.heartbeat.load
            if message.HasField("heartbeat") and not load.waiting_tokens:
                assert load.running == len(prompts)
                found.append((load.waiting_tokens, load.waiting_as_first))
                break
        engine.end.set()
        await asyncio.gather(*asking)
        watch.cancel()
    return found


async def test_waiting_tokens_count_the_more_the_later_they_come() -> None:
    # 3,000 tokens take as long as 7,500 first ones where a token at 1,000 takes twice as long.
    waiting, done = await heard(Engine(SERVED), [3000, 10])
    assert waiting[0] == 3010
    assert abs(waiting[1] - (7500 + 10.05)) < 1e-6
    assert done == (0, 0.0)


async def test_what_a_router_thinks_is_warm_does_not_wait_to_be_computed() -> None:
    waiting, _ = await heard(Engine(SERVED), [3000, 10], warm=2000)
    assert waiting[0] == 1001
    assert abs(waiting[1] - (1000 + (3000**2 - 2000**2) / 2000 + 1 + 19 / 2000)) < 1e-6


async def test_where_the_model_says_nothing_each_counts_as_one() -> None:
    waiting, _ = await heard(Engine(dataclasses.replace(SERVED, doubles_at=0.0)), [3000, 10])
    assert waiting == (3010, 3010.0)
