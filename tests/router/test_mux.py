"""All requests of a router to a worker share one stream: none of them pays for another."""

import asyncio
import contextlib
import random
import signal
import sys
from pathlib import Path

import grpc
import pytest

from kvtier.config import Config
from kvtier.core.mux import MAX_HELD, WINDOW
from kvtier.router.asking import Asks
from kvtier.router.link import OPTIONS
from kvtier.wire.access import Access
from kvtier.wire.muxed import MAX_STREAMS
from kvtier.wire.pb import router_pb2, router_pb2_grpc, worker_pb2, worker_pb2_grpc
from tests.launching import Process
from tests.router.chaos_worker import TOKENS, expected
from tests.router.stub_engine import (
    StubWorker,
    done,
    hangs,
    ids,
    keys,
    says,
    started,
    tokens,
)
from tests.router.support import (
    GRPC,
    PATIENCE_S,
    Status,
    eventually,
    generate_request,
    refused,
)

PROMPT = "a prompt of eight and more blocks"
MANY = 40
FOLDER = Path(__file__).parents[2]


async def read_all(call) -> tuple[list[int], grpc.StatusCode, str]:
    """The tokens of an answer, and how it ended."""
    answer: list[int] = []
    try:
        async with asyncio.timeout(PATIENCE_S):
            while (message := await call.read()) is not grpc.aio.EOF:
                answer += message.chunk.ids
    except grpc.aio.AioRpcError as error:
        return answer, error.code(), error.details() or ""
    return answer, Status.OK, ""


@contextlib.asynccontextmanager
async def asks_of(worker: StubWorker):
    """What a router asks a worker through, without the router."""
    channel = Access(Config()).channel(worker.address, OPTIONS)
    asks = Asks("worker", channel, random.Random(1), lambda: None)
    await asks.begin()
    yield asks
    await asks.close()
    await channel.close()


@contextlib.asynccontextmanager
async def raw(worker: StubWorker):
    """A stream to a worker whose every message the test decides."""
    async with grpc.aio.insecure_channel(worker.address, options=GRPC) as channel:
        call = worker_pb2_grpc.WorkerStub(channel).Multiplex()
        async with asyncio.timeout(PATIENCE_S):
            assert (await call.read()).hello.max_open > 0
            yield call
        call.cancel()


def opening(number: int, **fields) -> worker_pb2.MuxRequest:
    request = worker_pb2.WorkerRequest(token_ids=[1])
    fields = {"timeout_s": 60, "credit": 100, "request": request} | fields
    return worker_pb2.MuxRequest(opens=[worker_pb2.MuxOpen(id=number, **fields)])


async def echo(request):
    """The prompt, token by token, letting others pass."""
    yield started(request)
    for token in request.token_ids:
        yield tokens(token)
        await asyncio.sleep(0)
    yield done(len(request.token_ids))


class Killable:
    """A chaos worker in a process of its own."""

    def __init__(self, name: str) -> None:
        self.name = name

    async def __aenter__(self) -> "Killable":
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.router.chaos_worker", self.name, "0", cwd=FOLDER,
            stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        async with asyncio.timeout(PATIENCE_S):
            self.address = (await self._process.stdout.readline()).decode().strip()
        return self

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)

    async def __aexit__(self, *_) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.communicate()


@pytest.mark.parametrize("resume", [True, False])
async def test_kill_9_under_many_answers_ends_each_as_if_it_had_a_call_of_its_own(routers, resume):
    prompts = [[60 + i, 50, 40, 30] for i in range(MANY)]
    async with Killable("a") as one, Killable("b") as other:
        router = await routers(one.address, other.address)
        first = [asyncio.Event() for _ in prompts]

        async def ask(i: int) -> tuple[list[int], grpc.StatusCode, str]:
            asked = generate_request(prompts[i], max_tokens=TOKENS, resume=resume)
            answer: list[int] = []
            try:
                async for message in router.stub.Generate(asked, timeout=PATIENCE_S):
                    answer += message.chunk.ids
                    if answer:
                        first[i].set()
            except grpc.aio.AioRpcError as error:
                first[i].set()
                return answer, error.code(), error.details() or ""
            return answer, Status.OK, ""

        asks = [asyncio.create_task(ask(i)) for i in range(MANY)]
        await asyncio.wait_for(first[0].wait(), PATIENCE_S)
        one.kill()
        for prompt, end in zip(prompts, await asyncio.gather(*asks), strict=True):
            answer, code, line = end
            assert answer == expected(prompt)[: len(answer)], "nothing twice, nothing left out"
            if resume or code is Status.OK:
                assert (code, len(answer)) == (Status.OK, TOKENS), line
            else:
                assert code is Status.UNAVAILABLE
                assert f"worker a was lost after {len(answer)} tokens: " in line
                assert "tokens: UNAVAILABLE" not in line, "the status says so"
        await router.members(lambda each: each[0].state == "connecting")
        again = await read_all(router.stub.Generate(generate_request([7, 7], max_tokens=TOKENS)))
        assert again[:2] == (expected([7, 7]), Status.OK)


async def test_each_of_many_gets_its_own_answer_and_stays_who_it_is(engines, routers):
    worker = await engines(StubWorker("a"))
    worker.script = echo
    names = ["red", "green", "blue"]
    for name in names:
        worker.info.spaces.add(tenant=name, root=name.encode())
    router = await routers(worker)
    asked = {name: [[i + 1] * (i + 1) + [at] for i in range(MANY)] for at, name in enumerate(names)}
    calls = {
        (name, tuple(prompt)): router.stub.Generate(generate_request(prompt, tenant=name))
        for i in range(MANY)
        for name in names
        for prompt in [asked[name][i]]
    }
    answers = await asyncio.gather(*(read_all(call) for call in calls.values()))
    for (_, prompt), (answer, code, line) in zip(calls, answers, strict=True):
        assert (answer, code) == (list(prompt), Status.OK), line
    assert len(worker.requests) == len(calls)
    for request in worker.requests:
        assert request.tenant == names[request.token_ids[-1]]


@pytest.mark.parametrize("after", [0, 2])
async def test_one_that_is_cancelled_leaves_the_others_alone(engines, routers, after):
    worker, go = await engines(StubWorker("a")), asyncio.Event()
    ended: list[tuple[int, ...]] = []

    async def script(request):
        if after:
            yield started(request)
            yield tokens(*ids("x") * after)
        try:
            await go.wait()
        except (asyncio.CancelledError, GeneratorExit):
            ended.append(tuple(request.token_ids))
            raise
        if not after:
            yield started(request)
        yield tokens(*ids("yz"))
        yield done(after + 2)

    worker.script = script
    router = await routers(worker)
    calls = [router.stub.Generate(generate_request([i, i])) for i in range(1, MANY)]
    await eventually(lambda: len(worker.requests) == len(calls), "all reach the worker")
    calls[7].cancel()
    await eventually(lambda: ended == [(8, 8)], "that one is cancelled there")
    go.set()
    for i, call in enumerate(calls):
        if i != 7:
            answer, code, line = await read_all(call)
            assert (answer, code) == (ids("x") * after + ids("yz"), Status.OK), line
    assert ended == [(8, 8)]


async def test_who_reads_nothing_holds_up_nobody_and_only_so_much_is_kept_for_it(engines):
    worker = await engines(StubWorker("a"))
    made = {1: 0, 2: 0}
    total, batch = 200_000, 50

    async def script(request):
        yield started(request)
        for _ in range(0, total, batch):
            made[request.token_ids[0]] += batch
            yield tokens(*[5] * batch)
        yield done(total)

    worker.script = script
    async with asks_of(worker) as asks, asyncio.timeout(PATIENCE_S):
        slow = asks.ask(worker_pb2.WorkerRequest(token_ids=[1]), PATIENCE_S)
        quick = asks.ask(worker_pb2.WorkerRequest(token_ids=[2]), PATIENCE_S)
        count, end = 0, None
        while end is None:
            part = await quick.read()
            assert len(part.token_ids) <= WINDOW
            count, end = count + len(part.token_ids), part.end
        assert (count, end.completion_tokens) == (total, total)
        assert 0 < made[1] <= WINDOW + MAX_HELD + batch
        # Once it reads, it has all of it.
        count, end = 0, None
        while end is None:
            part = await slow.read()
            count, end = count + len(part.token_ids), part.end
        assert count == total


async def test_a_client_that_reads_slowly_has_its_whole_answer_and_others_theirs(engines, routers):
    worker = await engines(StubWorker("a"))
    total, batch = 20_000, 100

    async def script(request):
        yield started(request)
        for _ in range(0, total, batch):
            yield tokens(*ids("x") * batch)
        yield done(total)

    worker.script = script
    router = await routers(worker)
    slow = router.stub.Generate(generate_request([1]))
    await slow.read()
    others = [router.stub.Generate(generate_request([2])) for _ in range(3)]
    for answer, code, line in await asyncio.gather(*(read_all(call) for call in others)):
        assert (len(answer), code) == (total, Status.OK), line
    answer, code, line = await read_all(slow)
    assert (len(answer), code) == (total, Status.OK), line


async def test_a_stream_that_breaks_is_opened_anew_and_the_worker_stays_known(engines, routers):
    class Breaking(StubWorker):
        def __init__(self, name: str, held) -> None:
            super().__init__(name, held)
            self.breaking = asyncio.Event()

        async def Multiplex(self, requests, context) -> None:
            serving = asyncio.ensure_future(super().Multiplex(requests, context))
            breaking = asyncio.ensure_future(self.breaking.wait())
            await asyncio.wait({serving, breaking}, return_when=asyncio.FIRST_COMPLETED)
            for each in (serving, breaking):
                each.cancel()
            await asyncio.gather(serving, breaking, return_exceptions=True)
            await context.abort(Status.INTERNAL, "a bug")

    warm = await engines(Breaking("warm", keys(PROMPT)))
    cold = await engines(StubWorker("cold"))
    cold.script = says("ok")

    async def script(request):
        if request.request_id == "begun":
            yield started(request)
            yield tokens(*ids("xx"))
        await asyncio.Event().wait()

    warm.script = script
    router = await routers(warm, cold)
    begun = router.stub.Generate(generate_request(PROMPT, request_id="begun"))
    waiting = asyncio.create_task(read_all(router.stub.Generate(generate_request(PROMPT))))
    seen = 0
    async with asyncio.timeout(PATIENCE_S):
        while seen < 2:
            seen += len((await begun.read()).chunk.ids)
    await eventually(lambda: len(warm.requests) == 2, "both reach the worker")
    described = warm.described
    warm.breaking.set()
    assert await waiting == (ids("ok"), Status.OK, "")
    answer, code, line = await read_all(begun)
    assert (answer, code) == ([], Status.UNAVAILABLE)
    assert "worker warm was lost after 2 tokens: INTERNAL: a bug" in line
    warm.breaking.clear()
    warm.script = says("back")
    await cold.stop()

    async def back() -> bool:
        return (await read_all(router.stub.Generate(generate_request(PROMPT))))[0] == ids("back")

    await eventually(back, "the stream is there again")
    assert warm.described == described, "it was the stream alone that broke"


async def test_why_a_stream_cannot_be_opened_anew_is_said_once(engines, routers, caplog):
    class Refusing(StubWorker):
        refused = 0
        refusing = asyncio.Event()

        async def Multiplex(self, requests, context) -> None:
            if not self.refusing.is_set():
                serving = asyncio.ensure_future(super().Multiplex(requests, context))
                await self.refusing.wait()
                serving.cancel()
                await asyncio.gather(serving, return_exceptions=True)
            self.refused += 1
            await context.abort(Status.UNAUTHENTICATED, "no such token")

    worker = await engines(Refusing("a"))
    router = await routers(worker)
    worker.refusing.set()
    await router.members(lambda each: each[0].state == "connecting")
    await eventually(lambda: worker.refused > 4, "it is tried again")
    said = [r.getMessage() for r in caplog.records if "cannot be opened" in r.getMessage()]
    assert len(said) == 1
    assert worker.address in said[0]
    assert "UNAUTHENTICATED: no such token" in said[0]


async def test_a_worker_that_drains_says_so_and_ends_what_it_has(engines, routers):
    going, other = await engines(StubWorker("going", keys(PROMPT))), await engines(StubWorker("b"))
    go = asyncio.Event()

    async def script(request):
        yield started(request)
        yield tokens(*ids("x"))
        await go.wait()
        yield tokens(*ids("y"))
        yield done(2)

    going.script, other.script = script, says("ok")
    router = await routers(going, other)
    call = router.stub.Generate(generate_request(PROMPT))
    assert (await call.read()).routed.choice.worker_id == "going"
    await eventually(lambda: going.requests, "the request reaches the worker")
    going.drain_streams()

    async def drains() -> bool:
        return {c.worker_id: c.draining for c in await router.explain(PROMPT)}["going"]

    await eventually(drains, "the router knows")
    assert (await read_all(router.stub.Generate(generate_request(PROMPT))))[0] == ids("ok")
    assert len(going.requests) == 1
    going.close_streams()
    go.set()
    assert await read_all(call) == (ids("xy"), Status.OK, "")


async def test_a_worker_that_always_has_more_to_write_still_says_that_it_drains(engines):
    worker, enough = await engines(StubWorker("a")), asyncio.Event()

    async def script(request):
        yield started(request)
        while not enough.is_set():
            yield tokens(5)
            await asyncio.sleep(0)
        yield done(1)

    async def read(ask) -> None:
        while (await ask.read()).end is None:
            pass

    worker.script = script
    async with asks_of(worker) as asks, asyncio.timeout(2 * PATIENCE_S):
        each = [asks.ask(worker_pb2.WorkerRequest(), PATIENCE_S) for _ in range(MANY)]
        reading = asyncio.gather(*map(read, each))
        await eventually(lambda: len(worker.requests) == MANY, "all reach the worker")
        worker.drain_streams()
        try:
            await eventually(lambda: asks.draining, "the router knows")
        finally:
            enough.set()
            await reading


async def test_who_had_its_answer_from_a_worker_that_fell_silent_is_told_so(engines, routers):
    worker = await engines(StubWorker("a"))
    worker.script = hangs(after=1)
    router = await routers(worker, stale_s=1.0)
    call = router.stub.Generate(generate_request([1, 2]))
    async with asyncio.timeout(PATIENCE_S):
        while not (await call.read()).chunk.ids:
            pass
    worker.beating = False
    _, code, line = await read_all(call)
    assert code is Status.UNAVAILABLE
    assert "worker a was lost after 1 tokens: silent for 5 s" in line


async def test_a_request_that_meets_a_drain_on_its_way_is_refused(engines):
    worker = await engines(StubWorker("a"))
    async with raw(worker) as call:
        worker.drain_streams()
        await call.write(opening(1))
        parts, draining = [], False
        while not parts:
            message = await call.read()
            draining = draining or message.draining
            parts += message.parts
        assert parts[0].error.status == "UNAVAILABLE"
        assert "stopping" in parts[0].error.message
        assert draining or (await call.read()).draining
    assert worker.requests == []


async def test_a_worker_holds_the_deadline_itself(engines):
    worker = await engines(StubWorker("a"))
    worker.script = hangs(after=1)
    async with raw(worker) as call:
        await call.write(opening(3, timeout_s=0.01))
        parts: list[worker_pb2.MuxPart] = []
        while not parts or not parts[-1].HasField("error"):
            parts += (await call.read()).parts
        assert {part.id for part in parts} == {3}
        assert parts[-1].error.status == "DEADLINE_EXCEEDED"
        await worker.cancelled.wait()
        worker.script = says("y")
        await call.write(opening(4))
        said: list[int] = []
        while not parts[-1].HasField("done"):
            parts += (await call.read()).parts
            said += [token for token in parts[-1].token_ids if parts[-1].id == 4]
        assert said == ids("y")


@pytest.mark.parametrize("message", [
    opening(0),
    worker_pb2.MuxRequest(cancels=[1]),
    worker_pb2.MuxRequest(credits=[worker_pb2.MuxCredit(id=9, tokens=1)]),
])  # fmt: skip
async def test_who_breaks_the_protocol_loses_its_stream_and_nobody_elses(engines, message):
    worker = await engines(StubWorker("a"))
    worker.script = says("hi")
    async with asks_of(worker) as asks, raw(worker) as call:
        await call.write(message)
        async with refused(Status.INVALID_ARGUMENT, "request"):
            await call.read()
        ask = asks.ask(worker_pb2.WorkerRequest(token_ids=[1]), PATIENCE_S)
        part, said = await ask.read(), []
        while part.end is None:
            said, part = said + part.token_ids, await ask.read()
        assert said + part.token_ids == ids("hi")


async def test_a_timeout_that_is_none_ends_its_request_only(engines):
    worker = await engines(StubWorker("a"))
    async with raw(worker) as call:
        await call.write(opening(1, timeout_s=float("nan")))
        assert (await call.read()).parts[0].error.status == "INVALID_ARGUMENT"
        worker.script = says("y")
        await call.write(opening(2))
        assert {part.id for part in (await call.read()).parts} == {2}


async def test_a_bug_in_one_answer_is_the_end_of_that_one(engines, caplog):
    worker = await engines(StubWorker("a"))

    async def script(request):
        yield started(request)
        if request.token_ids[0] == 1:
            raise ZeroDivisionError("oops")
        yield tokens(*ids("y"))
        yield done(1)

    worker.script = script
    async with asks_of(worker) as asks, asyncio.timeout(PATIENCE_S):
        bad = asks.ask(worker_pb2.WorkerRequest(token_ids=[1]), PATIENCE_S)
        good = asks.ask(worker_pb2.WorkerRequest(token_ids=[2]), PATIENCE_S)
        ends = []
        for ask in (bad, good):
            part = await ask.read()
            while part.end is None:
                part = await ask.read()
            ends.append(part.end)
    assert (ends[0].status, ends[0].message) == ("UNKNOWN", "ZeroDivisionError: oops")
    assert ends[1].completion_tokens == 1
    assert "a bug of ours" in caplog.text


async def test_long_answers_that_are_ready_together_come_in_messages_of_bounded_length(engines):
    worker, go, count, nbytes = await engines(StubWorker("a")), asyncio.Event(), 80, 1 << 20

    async def script(request):
        await go.wait()
        yield worker_pb2.WorkerResponse(started=worker_pb2.Started(first_logits=bytes(nbytes)))
        yield done(0)

    worker.script = script
    async with asks_of(worker) as asks, asyncio.timeout(PATIENCE_S):
        all_ = [asks.ask(worker_pb2.WorkerRequest(), PATIENCE_S) for _ in range(count)]
        await eventually(lambda: len(worker.requests) == count, "all reach the worker")
        go.set()  # more than a router takes in one message
        for ask in all_:
            part = await ask.read()
            while part.end is None:
                part = await ask.read()
            assert isinstance(part.end, worker_pb2.Done), part.end


async def test_the_number_of_streams_is_limited(engines):
    worker = await engines(StubWorker("a"))
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(MAX_STREAMS):
            await stack.enter_async_context(raw(worker))
        async with refused(Status.RESOURCE_EXHAUSTED, f"{MAX_STREAMS} routers"):
            await stack.enter_async_context(raw(worker))


async def test_a_worker_of_an_earlier_release_gets_no_requests_and_is_named(
    engines, routers, caplog
):
    class Old(StubWorker):
        Multiplex = worker_pb2_grpc.WorkerServicer.Multiplex

    caplog.set_level("INFO")
    old, new = await engines(Old("old", keys(PROMPT))), await engines(StubWorker("new"))
    new.script = says("ok")
    router = await routers(old, new, ready=False)
    await router.members(lambda each: [m.state for m in each] == ["connecting", "ready"])
    assert (await read_all(router.stub.Generate(generate_request(PROMPT))))[0] == ids("ok")
    await eventually(lambda: "upgrade the worker" in caplog.text, "a person is told what to do")
    assert any(old.address in r.getMessage() for r in caplog.records if r.levelname == "WARNING")
    assert old.requests == []


async def test_a_router_that_is_killed_frees_what_it_asked_and_comes_back(engines, tmp_path):
    worker = await engines(StubWorker("a"))
    worker.script = hangs(after=1)
    toml = f"""
        [router]
        listen = "127.0.0.1:0"
        members = [{{ node = "n", worker = "{worker.address}" }}]
    """
    router = await asyncio.to_thread(Process, "router", toml, tmp_path)
    try:
        for _ in range(2):
            async with grpc.aio.insecure_channel(router.address, options=GRPC) as channel:
                stub = router_pb2_grpc.RouterStub(channel)

                async def ready(stub=stub) -> bool:
                    table = await stub.Watch(router_pb2.WatchMembersRequest()).read()
                    return [each.state for each in table.members] == ["ready"]

                await eventually(ready, "the worker is ready")
                call = stub.Generate(generate_request([1, 2]))
                async with asyncio.timeout(PATIENCE_S):
                    while not (await call.read()).chunk.ids:
                        pass
                worker.cancelled.clear()
                await asyncio.to_thread(router.kill)
                async with asyncio.timeout(PATIENCE_S):
                    await worker.cancelled.wait()
            await asyncio.to_thread(router.restart)
    finally:
        await asyncio.to_thread(router.kill)
