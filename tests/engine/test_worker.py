"""A worker over real gRPC: what it says it is, what it streams, what it refuses, how it ends."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from kvtier.config import Config, WorkerConfig
from kvtier.core.blocks import BlockLayout, Namespace, block_keys
from kvtier.engine.model import LoadedModel
from kvtier.engine.reference import Reference
from kvtier.engine.worker import serve
from kvtier.errors import ConfigError
from kvtier.wire.pb import feed_pb2, feed_pb2_grpc, worker_pb2, worker_pb2_grpc
from tests.engine.support import BLOCK, STEP, Tiers, prompt_of

AsyncCall = grpc.aio.UnaryStreamCall[worker_pb2.WorkerRequest, worker_pb2.WorkerResponse]

WAIT_S = 60.0
VOCAB = 300


@dataclass
class Worker:
    """A running worker and stubs for it."""

    address: str
    channel: grpc.aio.Channel
    stop: asyncio.Event
    task: "asyncio.Task[None]"
    tiers: Tiers
    stub: worker_pb2_grpc.WorkerStub = field(init=False)
    feed: feed_pb2_grpc.FeedStub = field(init=False)

    def __post_init__(self) -> None:
        self.stub = worker_pb2_grpc.WorkerStub(self.channel)
        self.feed = feed_pb2_grpc.FeedStub(self.channel)


def settings(folder: Path | str, blocks: int = 64, **changes: object) -> Config:
    values: dict[str, object] = {
        "model": str(folder),
        "node": "here",
        "listen": "127.0.0.1:0",
        "device": "cpu",
        "block_tokens": BLOCK,
        "prefill_tokens": STEP,
        "vram_bytes": blocks * BLOCK * 512,
    }
    return Config(worker=WorkerConfig(**{**values, **changes}))  # type: ignore[arg-type]


@asynccontextmanager
async def worker(config: Config, drain_s: float = WAIT_S) -> AsyncIterator[Worker]:
    address: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    stop, tiers = asyncio.Event(), Tiers()
    task = asyncio.create_task(
        serve(config, started=address.set_result, stop=stop, make_tier=tiers, drain_s=drain_s)
    )
    await asyncio.wait((task, address), return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        task.result()
    options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    try:
        async with grpc.aio.insecure_channel(address.result(), options=options) as channel:
            yield Worker(address.result(), channel, stop, task, tiers)
    finally:
        stop.set()
        await asyncio.wait_for(task, WAIT_S)


@pytest.fixture
async def tiny_worker(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Worker]:
    monkeypatch.setenv("KVTIER_CACHE", str(tmp_path))
    async with worker(settings(tiny_folder)) as each:
        yield each


def ask(prompt: list[int], max_tokens: int = 8, **fields: object) -> worker_pb2.WorkerRequest:
    values: dict[str, object] = {"ignore_eos": True, "return_first_logits": True, **fields}
    return worker_pb2.WorkerRequest(token_ids=prompt, max_tokens=max_tokens, **values)  # type: ignore[arg-type]


async def answer(
    each: Worker, request: worker_pb2.WorkerRequest
) -> tuple[worker_pb2.Started, list[int], worker_pb2.Done]:
    parts = [part async for part in each.stub.Generate(request, timeout=WAIT_S)]
    kinds = [part.WhichOneof("body") for part in parts]
    assert kinds == ["started", *["tokens"] * (len(parts) - 2), "done"]
    return parts[0].started, [i for part in parts for i in part.tokens.ids], parts[-1].done


async def refused(call: Awaitable[object]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details() or ""


async def rest_of(call: AsyncCall) -> list[worker_pb2.WorkerResponse]:
    """What a stream that was begun with `read` still brings."""
    parts = []
    async with asyncio.timeout(WAIT_S):
        while (part := await call.read()) is not grpc.aio.EOF:
            parts.append(part)
    return parts


@contextmanager
def held_up(each: Worker) -> Iterator[None]:
    """No answer whose blocks are saved ends before the end."""
    go = threading.Event()

    def wait() -> None:
        assert go.wait(WAIT_S)

    each.tiers.only.on_save = wait
    try:
        yield
    finally:
        go.set()


class Watcher:
    """A feed as a router follows it: every message is checked for its place in the stream."""

    def __init__(self, each: Worker) -> None:
        self.call = each.feed.Watch(feed_pb2.WatchRequest())
        self.held: set[bytes] = set()
        self.beats: list[feed_pb2.Heartbeat] = []
        self.deltas = 0
        self.epoch = 0
        self.seq = 0

    async def follow(self, done: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not done():
                self.take(await self.call.read())

    async def snapshot(self) -> None:
        async with asyncio.timeout(WAIT_S):
            while True:
                message = await self.call.read()
                self.epoch, self.seq = message.epoch, message.seq
                self.held |= keys(message.snapshot.held)
                if message.snapshot.last:
                    return

    def take(self, message: feed_pb2.FeedMessage) -> None:
        assert message.epoch == self.epoch
        if message.HasField("heartbeat"):
            assert message.seq == self.seq
            self.beats.append(message.heartbeat)
            return
        assert message.HasField("delta")
        assert message.seq == self.seq + 1
        self.seq += 1
        self.deltas += 1
        self.held |= keys(message.delta.added)
        self.held -= keys(message.delta.removed)


def keys(parts: object) -> set[bytes]:
    found: set[bytes] = set()
    for part in parts:  # type: ignore[attr-defined]
        assert part.tier == feed_pb2.TIER_VRAM
        found |= {part.keys[i : i + 16] for i in range(0, len(part.keys), 16)}
    return found


class TestDescribe:
    async def test_says_all_that_a_router_needs(
        self, tiny_worker: Worker, tiny: LoadedModel
    ) -> None:
        info = await tiny_worker.stub.Describe(worker_pb2.DescribeRequest())
        assert (info.node, info.model, info.revision) == ("here", tiny.name, tiny.revision)
        assert BlockLayout.parse(info.layout) == tiny.layout
        assert info.root == Namespace(tiny.name, tiny.revision, tiny.layout).root()
        assert (info.block_tokens, info.max_tokens, info.vocab_size) == (BLOCK, 512, VOCAB)
        assert list(info.eos_token_ids) == [2]
        assert info.kv_bytes_per_token == 512
        assert info.worker_id.startswith("here-")

    async def test_gives_the_tokenizer_files(self, tiny_worker: Worker, tiny: LoadedModel) -> None:
        files = await tiny_worker.stub.Tokenizer(worker_pb2.TokenizerRequest())
        assert dict(files.files) == tiny.tokenizer_files

    async def test_is_healthy_and_reflects_its_services(self, tiny_worker: Worker) -> None:
        health = health_pb2_grpc.HealthStub(tiny_worker.channel)
        for service in ("", "kvtier.v1.Worker", "kvtier.v1.Feed"):
            reply = await health.Check(health_pb2.HealthCheckRequest(service=service))
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        stub = reflection_pb2_grpc.ServerReflectionStub(tiny_worker.channel)
        call = stub.ServerReflectionInfo()
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        listed = {each.name for each in (await call.read()).list_services_response.service}
        assert {"kvtier.v1.Worker", "kvtier.v1.Feed", "grpc.health.v1.Health"} <= listed
        await call.done_writing()


class TestGenerate:
    async def test_streams_what_transformers_computes(
        self, tiny_worker: Worker, tiny: LoadedModel
    ) -> None:
        reference = Reference(tiny.model, STEP)
        prompt = prompt_of(100, 1, VOCAB)
        for hit in (0, 96):
            started, ids, done = await answer(tiny_worker, ask(prompt, 12))
            assert [(each.tier, each.tokens) for each in started.restored] == (
                [(feed_pb2.TIER_VRAM, 96)] if hit else []
            )
            assert (started.prompt_tokens, started.computed_tokens) == (100, 100 - hit)
            logits, expected = reference.next_token_logits_and_greedy(prompt, hit, 12)
            assert started.first_logits == logits.numpy().tobytes()
            assert ids == expected
            assert done.finish_reason == worker_pb2.FINISH_REASON_LENGTH
            assert done.completion_tokens == 12
            assert min(started.queue_s, started.restore_s, started.prefill_s) >= 0

    async def test_a_cleared_pool_is_filled_from_the_tier(self, tiny_worker: Worker) -> None:
        prompt = prompt_of(100, 2, VOCAB)
        _, cold, done = await answer(tiny_worker, ask(prompt))
        assert done.saved_tokens == 96
        assert (await tiny_worker.stub.Clear(worker_pb2.ClearRequest())).blocks == 6
        started, warm, _ = await answer(tiny_worker, ask(prompt))
        assert [(each.tier, each.tokens) for each in started.restored] == [(feed_pb2.TIER_HOST, 96)]
        assert warm == cold

    async def test_without_max_tokens_there_are_128(self, tiny_worker: Worker) -> None:
        asked = ask([5, 6])
        asked.ClearField("max_tokens")
        _, ids, _ = await answer(tiny_worker, asked)
        assert len(ids) == 128

    async def test_logits_come_only_where_they_were_asked_for(self, tiny_worker: Worker) -> None:
        started, _, _ = await answer(tiny_worker, ask([5], return_first_logits=False))
        assert started.first_logits == b""

    async def test_many_at_once_get_each_their_own(
        self, tiny_worker: Worker, tiny: LoadedModel
    ) -> None:
        prompts = [prompt_of(40 + i, 3 + i, VOCAB) for i in range(12)]
        answers = await asyncio.gather(*(answer(tiny_worker, ask(p, 10)) for p in prompts))
        for prompt, (_, ids, _) in zip(prompts, answers, strict=True):
            reference = Reference(tiny.model, STEP)
            assert ids == reference.next_token_logits_and_greedy(prompt, 0, 10)[1]

    async def test_a_client_that_leaves_frees_everything(self, tiny_worker: Worker) -> None:
        with held_up(tiny_worker):
            call = tiny_worker.stub.Generate(ask(prompt_of(100, 4, VOCAB), 400))
            assert (await call.read()).HasField("started")
            call.cancel()
            for _ in range(3):  # behind the cancellation on the same connection
                await tiny_worker.stub.Describe(worker_pb2.DescribeRequest())
        watcher = Watcher(tiny_worker)
        await watcher.snapshot()
        await watcher.follow(lambda: bool(watcher.beats) and not watcher.beats[-1].load.running)
        cleared = 0
        while cleared < 6:  # what is still being saved is cleared a moment later
            cleared += (await tiny_worker.stub.Clear(worker_pb2.ClearRequest())).blocks
        assert cleared < 499 // BLOCK, "it was not computed to its end"
        await watcher.follow(lambda: not watcher.held)
        watcher.call.cancel()

    @pytest.mark.parametrize(
        ("request_", "code", "message"),
        [
            (ask([]), grpc.StatusCode.INVALID_ARGUMENT, "token_ids is empty"),
            (ask([VOCAB]), grpc.StatusCode.INVALID_ARGUMENT, "is 300, must be 0 to 299"),
            (ask([5] * 512), grpc.StatusCode.INVALID_ARGUMENT, "has 512, must be at most 511"),
            (ask([5], 0), grpc.StatusCode.INVALID_ARGUMENT, "max_tokens is 0, must be at least 1"),
            (ask([5], temperature=-1.0), grpc.StatusCode.INVALID_ARGUMENT, "temperature is -1"),
            (ask([5], request_id="x" * 129), grpc.StatusCode.INVALID_ARGUMENT, "129 characters"),
            (ask([5], model="gpt-9"), grpc.StatusCode.NOT_FOUND, "'gpt-9'"),
        ],
        ids=["empty", "token", "long", "zero", "temperature", "id", "model"],
    )
    async def test_a_bad_request_is_refused_with_its_reason(
        self,
        tiny_worker: Worker,
        request_: worker_pb2.WorkerRequest,
        code: grpc.StatusCode,
        message: str,
    ) -> None:
        got, details = await refused(answer(tiny_worker, request_))
        assert got is code
        assert message in details

    async def test_a_message_of_100_mb_is_refused_and_nothing_else_suffers(
        self, tiny_worker: Worker
    ) -> None:
        huge = worker_pb2.WorkerRequest(request_id="x" * 100_000_000)
        code, _ = await refused(answer(tiny_worker, huge))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await answer(tiny_worker, ask([5])))[1]

    async def test_a_full_queue_says_try_again_later(
        self, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("KVTIER_CACHE", str(tmp_path))
        async with worker(settings(tiny_folder, max_running=1, max_waiting=0)) as each:
            with held_up(each):
                first = each.stub.Generate(ask([5], 500))
                await first.read()
                code, details = await refused(answer(each, ask([6])))
                assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert "worker.max_waiting 0" in details
                first.cancel()

    @pytest.mark.model
    async def test_smollm2_over_the_wire(self, smollm2: LoadedModel) -> None:
        prompt = prompt_of(60, 9, smollm2.vocab_size)
        reference = Reference(smollm2.model, STEP, smollm2.eos_token_ids)
        async with worker(settings("smollm2", vram_bytes=2**26)) as each:
            for hit in (0, 48):
                started, ids, _ = await answer(each, ask(prompt, 6, ignore_eos=False))
                logits, expected = reference.next_token_logits_and_greedy(prompt, hit, 6)
                got = torch.from_numpy(np.frombuffer(started.first_logits, np.float32).copy())
                assert ids == expected
                torch.testing.assert_close(got, logits, rtol=0, atol=1e-3)


class TestStream:
    """Multiplex, as routers ask."""

    async def test_many_over_one_stream_answer_as_calls_of_their_own_do(
        self, tiny_worker: Worker
    ) -> None:
        prompts = [prompt_of(30 + i, 50 + i, VOCAB) for i in range(8)]
        expected = [(await answer(tiny_worker, ask(p, 10)))[1] for p in prompts]
        call = tiny_worker.stub.Multiplex()
        opens = [
            worker_pb2.MuxOpen(id=i, request=ask(p, 10), timeout_s=WAIT_S, credit=1000)
            for i, p in enumerate([*prompts, [VOCAB]], 1)  # the last is none of the model's
        ]
        answers: dict[int, list[int]] = {each.id: [] for each in opens}
        ends: dict[int, worker_pb2.MuxPart] = {}
        async with asyncio.timeout(WAIT_S):
            assert (await call.read()).HasField("hello")
            await call.write(worker_pb2.MuxRequest(opens=opens))
            while len(ends) < len(opens):
                for part in (await call.read()).parts:
                    answers[part.id] += part.token_ids
                    if part.WhichOneof("end"):
                        ends[part.id] = part
            await call.done_writing()
            assert await call.read() is grpc.aio.EOF
        for i, ids in enumerate(expected, 1):
            assert answers[i] == ids
            assert ends[i].done.completion_tokens == 10
        assert ends[9].error.status == "INVALID_ARGUMENT"

    async def test_one_that_is_cancelled_is_not_computed_and_one_at_the_end_is_finished(
        self, tiny_worker: Worker
    ) -> None:
        call = tiny_worker.stub.Multiplex()
        opens = [
            worker_pb2.MuxOpen(id=i, request=ask([5, i], 480), timeout_s=WAIT_S, credit=1000)
            for i in (1, 2)
        ]
        async with asyncio.timeout(WAIT_S):
            with held_up(tiny_worker):
                await call.write(worker_pb2.MuxRequest(opens=opens))
                while not (await call.read()).parts:
                    pass
                # What is refused tells that the cancel before it was read.
                bad = worker_pb2.MuxOpen(id=3, request=ask([VOCAB]), timeout_s=WAIT_S)
                await call.write(worker_pb2.MuxRequest(cancels=[1], opens=[bad]))
                while all(part.id != 3 for part in (await call.read()).parts):
                    pass
                tiny_worker.stop.set()
                while not (await call.read()).draining:
                    pass
            parts = []
            while (message := await call.read()) is not grpc.aio.EOF:
                parts += message.parts
        assert {part.id for part in parts} <= {2}
        assert parts[-1].done.completion_tokens == 480
        await asyncio.wait_for(asyncio.shield(tiny_worker.task), WAIT_S)


class TestFeed:
    async def test_a_snapshot_and_its_deltas_are_what_the_pool_holds(
        self, tiny_worker: Worker, tiny: LoadedModel
    ) -> None:
        prompt = prompt_of(100, 20, VOCAB)
        _, first, _ = await answer(tiny_worker, ask(prompt, 40))
        watcher = Watcher(tiny_worker)
        await watcher.snapshot()
        other = prompt_of(100, 21, VOCAB)
        _, second, _ = await answer(tiny_worker, ask(other, 40))
        root = tiny.namespace().root()
        expected = {
            key
            for tokens in (prompt + first, other + second)
            for key in block_keys(root, tokens[:139], BLOCK)
        }
        await watcher.follow(lambda: watcher.held == expected)
        await tiny_worker.stub.Clear(worker_pb2.ClearRequest())
        await watcher.follow(lambda: not watcher.held)
        assert watcher.deltas >= 2
        watcher.call.cancel()

    async def test_evicted_blocks_are_told_as_gone(
        self, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("KVTIER_CACHE", str(tmp_path))
        async with worker(settings(tiny_folder, 12)) as each:
            watcher = Watcher(each)
            await watcher.snapshot()
            assert not watcher.held
            for seed in range(5):
                await answer(each, ask(prompt_of(100, seed, VOCAB), 20))
            fresh = Watcher(each)
            await fresh.snapshot()
            await fresh.follow(lambda: bool(fresh.beats))  # whatever was under way is told now
            assert len(fresh.held) == 12
            await watcher.follow(lambda: watcher.held == fresh.held)
            watcher.call.cancel()
            fresh.call.cancel()

    async def test_heartbeats_tell_the_load(self, tiny_worker: Worker) -> None:
        watcher = Watcher(tiny_worker)
        await watcher.snapshot()
        await watcher.follow(lambda: len(watcher.beats) >= 1)
        idle = watcher.beats[0]
        assert (idle.draining, idle.load.running, idle.load.waiting) == (False, 0, 0)
        assert idle.load.host_bytes_per_s == 1e9
        with held_up(tiny_worker):  # an answer that waits for its save is under way, too
            calls = [tiny_worker.stub.Generate(ask([5, i], 500)) for i in range(10)]
            for call in calls[:4]:
                await call.read()
            await watcher.follow(
                lambda: (watcher.beats[-1].load.running, watcher.beats[-1].load.waiting) == (4, 6)
            )
            assert watcher.beats[-1].load.waiting_tokens == 12
            assert watcher.beats[-1].load.waiting_as_first > 12
            for call in calls:
                call.cancel()
        await watcher.follow(lambda: not watcher.beats[-1].load.running)
        watcher.call.cancel()

    async def test_another_start_is_another_epoch(
        self, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("KVTIER_CACHE", str(tmp_path))
        epochs = []
        for _ in range(2):
            async with worker(settings(tiny_folder)) as each:
                watcher = Watcher(each)
                await watcher.snapshot()
                epochs.append(watcher.epoch)
                watcher.call.cancel()
        assert epochs[0] != epochs[1]


class TestEnd:
    async def test_stopping_lets_answers_end_and_refuses_new_ones(
        self, tiny_worker: Worker
    ) -> None:
        health = health_pb2_grpc.HealthStub(tiny_worker.channel)
        with held_up(tiny_worker):
            call = tiny_worker.stub.Generate(ask(prompt_of(20, 31, VOCAB), 480))
            assert (await call.read()).HasField("started")
            tiny_worker.stop.set()
            async for reply in health.Watch(health_pb2.HealthCheckRequest(), timeout=WAIT_S / 2):
                if reply.status == health_pb2.HealthCheckResponse.NOT_SERVING:
                    break
            code, _ = await refused(answer(tiny_worker, ask([6])))
            assert code is grpc.StatusCode.UNAVAILABLE
        rest = await rest_of(call)
        assert sum(len(part.tokens.ids) for part in rest) == 480
        assert rest[-1].done.completion_tokens == 480
        await asyncio.wait_for(asyncio.shield(tiny_worker.task), WAIT_S)
        assert tiny_worker.tiers.only.closed

    async def test_what_does_not_end_in_time_is_told_so(
        self, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("KVTIER_CACHE", str(tmp_path))
        async with worker(settings(tiny_folder), drain_s=0.0) as each:
            call = each.stub.Generate(ask([5], 500))
            await call.read()
            each.stop.set()
            code, details = await refused(rest_of(call))
            assert code is grpc.StatusCode.UNAVAILABLE
            assert "stopping" in details

    async def test_a_bug_in_the_engine_ends_the_worker(
        self, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("KVTIER_CACHE", str(tmp_path))

        async def use_it() -> None:
            async with worker(settings(tiny_folder)) as each:
                each.tiers.only.on_save = lambda: 1 // 0  # type: ignore[assignment, return-value]
                code, _ = await refused(answer(each, ask(prompt_of(100, 30, VOCAB))))
                assert code is grpc.StatusCode.UNAVAILABLE
                await asyncio.wait((each.task,), timeout=WAIT_S)

        with pytest.raises(ZeroDivisionError):
            await use_it()

    async def test_a_taken_port_is_named(self, tiny_worker: Worker, tiny_folder: Path) -> None:
        config = settings(tiny_folder, listen=tiny_worker.address)
        with pytest.raises(ConfigError, match=f"worker.listen.*{tiny_worker.address}"):
            async with worker(config):
                pass

    async def test_a_model_that_cannot_be_loaded_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="no such folder"):
            async with worker(settings(tmp_path / "none")):
                pass
