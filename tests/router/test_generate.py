import asyncio
import signal
import sys
from pathlib import Path

import grpc
import pytest

from kvtier import metrics
from kvtier.wire.pb import router_pb2, worker_pb2
from tests.router.stub_engine import (
    Ends,
    StubWorker,
    aborts,
    done,
    hangs,
    ids,
    keys,
    says,
    started,
    tokens,
)
from tests.router.support import PATIENCE_S, eventually, generate_request, refused

PROMPT = "a prompt of eight and more blocks"
KEYS = keys(PROMPT)
Status = grpc.StatusCode
ROOT = Path(__file__).parents[2]


async def collect(call) -> list[router_pb2.GenerateResponse]:
    async with asyncio.timeout(PATIENCE_S):
        return [message async for message in call]


def bodies(messages) -> list[str]:
    return [message.WhichOneof("body") for message in messages]


def routed(messages) -> list[str]:
    return [m.routed.choice.worker_id for m in messages if m.WhichOneof("body") == "routed"]


def text(messages) -> str:
    return "".join(m.chunk.text for m in messages)


def retries() -> float:
    return metrics.RETRIES._value.get()


class Process:
    """A stub worker in a process of its own, that can be killed."""

    def __init__(self, name: str, after: int, prompt: str) -> None:
        self._command = ["-m", "tests.router.stub_engine", name, str(after), prompt]

    async def __aenter__(self) -> "Process":
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, *self._command, cwd=ROOT, stdout=asyncio.subprocess.PIPE
        )
        async with asyncio.timeout(PATIENCE_S):
            self.address = (await self._process.stdout.readline()).decode().strip()
        return self

    def send(self, what: signal.Signals) -> None:
        self._process.send_signal(what)

    async def __aexit__(self, *_) -> None:
        if self._process.returncode is None:
            self._process.kill()
        await self._process.communicate()


async def test_an_answer_is_streamed_with_its_text(engines, routers):
    worker, answer, read = await engines(StubWorker("a")), ids("héllo 😀"), asyncio.Semaphore(0)

    async def script(request):
        yield started(request)
        for token in answer:
            yield tokens(token)
            await read.acquire()  # or it may come with the next
        yield done(len(answer))

    worker.script = script
    router = await routers(worker)
    asked = generate_request(
        [("user", "hi")], request_id="r1", max_tokens=9, temperature=0.5, seed=7,
        ignore_eos=True, return_first_logits=True,
    )  # fmt: skip
    messages = []
    async with asyncio.timeout(PATIENCE_S):
        async for message in router.stub.Generate(asked):
            messages.append(message)
            if message.WhichOneof("body") == "chunk":
                read.release()
    assert bodies(messages) == ["routed", "started", *["chunk"] * len(answer), "finished"]
    assert messages[0].routed.choice.worker_id == "a"
    assert (messages[0].routed.attempt, list(messages[0].routed.others)) == (1, [])
    assert [i for m in messages for i in m.chunk.ids] == answer
    assert [m.chunk.text for m in messages[2:-1]] == [
        *["h", "", "é", "l", "l", "o", " "], *["", "", "", "😀"],
    ]  # fmt: skip
    assert messages[-1].finished.completion_tokens == len(answer)
    expected = worker_pb2.WorkerRequest(
        request_id="r1", token_ids=ids("<|user|>hi<|end|><|assistant|>"), max_tokens=9,
        temperature=0.5, seed=7, ignore_eos=True, return_first_logits=True, model="tiny",
    )  # fmt: skip
    assert worker.requests == [expected]
    assert messages[1].started.prompt_tokens == len(expected.token_ids)


async def test_what_is_ready_together_comes_in_one_message_where_that_is_asked_for(
    engines, routers
):
    worker = await engines(StubWorker("a"))
    worker.script = says("héllo 😀")
    router = await routers(worker)
    for together in (False, True):
        messages = await collect(router.stub.Generate(generate_request("hi", together=together)))
        flat = [each for message in messages for each in (message, *message.then)]
        assert together or len(flat) == len(messages)
        assert all(not each.then for each in flat if each not in messages)
        order = [*dict.fromkeys(bodies(flat))]
        assert order == ["routed", "started", "chunk", "finished"]
        assert text(flat) == "héllo 😀"
        assert [i for each in flat for i in each.chunk.ids] == ids("héllo 😀")


@pytest.mark.parametrize("script", [
    aborts(Status.UNAVAILABLE, "shutting down"),
    aborts(Status.ABORTED, "no more"),
    aborts(Status.CANCELLED, "stopping"),
])  # fmt: skip
async def test_a_worker_lost_before_its_first_token_is_replaced(engines, routers, script):
    warm, cold = await engines(StubWorker("warm", KEYS)), await engines(StubWorker("cold"))
    warm.script, cold.script = script, says("ok")
    router = await routers(warm, cold)
    before = retries()
    messages = await collect(router.stub.Generate(generate_request(PROMPT)))
    assert routed(messages) == ["warm", "cold"]
    assert [c.worker_id for c in messages[0].routed.others] == ["cold"]
    assert messages[1].routed.attempt == 2
    assert text(messages) == "ok"
    assert bodies(messages).count("started") == 1
    assert retries() == before + 1


async def test_started_without_a_token_is_not_a_beginning(engines, routers):
    warm, cold = await engines(StubWorker("warm", KEYS)), await engines(StubWorker("cold"))

    async def script(request):
        yield started(request)
        raise Ends(Status.UNAVAILABLE, "gone")

    warm.script = script
    router = await routers(warm, cold)
    messages = await collect(router.stub.Generate(generate_request(PROMPT)))
    assert bodies(messages)[:3] == ["routed", "routed", "started"]


async def test_a_worker_lost_in_mid_answer_ends_the_request(engines, routers):
    worker, other = await engines(StubWorker("warm", KEYS)), await engines(StubWorker("cold"))
    worker.script = aborts(Status.UNAVAILABLE, "shutting down", after=3)
    router = await routers(worker, other)
    call = router.stub.Generate(generate_request(PROMPT))
    async with refused(Status.UNAVAILABLE, "worker warm was lost after 3 tokens"):
        await collect(call)
    assert other.requests == []


async def test_an_answer_without_an_end_is_a_lost_worker(engines, routers):
    worker = await engines(StubWorker("a"))

    async def script(request):
        yield started(request)
        yield tokens(1, 2)

    worker.script = script
    router = await routers(worker)
    async with refused(Status.UNAVAILABLE, "worker a was lost after 2 tokens"):
        await collect(router.stub.Generate(generate_request(PROMPT)))


async def test_a_stopped_server_is_a_lost_worker(engines, routers):
    warm, cold = await engines(StubWorker("warm", KEYS)), await engines(StubWorker("cold"))
    warm.script, cold.script = hangs(), says("ok")
    router = await routers(warm, cold)
    answer = asyncio.create_task(collect(router.stub.Generate(generate_request(PROMPT))))
    await eventually(lambda: warm.requests, "the request reaches the worker")
    await warm.stop()
    assert routed(await answer) == ["warm", "cold"]


async def test_kill_9_before_the_first_token_is_not_seen_by_the_caller(engines, routers):
    cold = await engines(StubWorker("cold"))
    cold.script = says("ok")
    async with Process("warm", 0, PROMPT) as warm:
        router = await routers(warm.address, cold)
        call = router.stub.Generate(generate_request(PROMPT))
        assert (await call.read()).routed.choice.worker_id == "warm"
        warm.send(signal.SIGKILL)
        messages = await collect_rest(call)
        assert routed(messages) == ["cold"]
        assert text(messages) == "ok"


async def collect_rest(call) -> list[router_pb2.GenerateResponse]:
    messages = []
    async with asyncio.timeout(PATIENCE_S):
        while (message := await call.read()) is not grpc.aio.EOF:
            messages.append(message)
    return messages


async def test_kill_9_after_the_first_token_ends_in_one_clear_line(routers):
    async with Process("w", 2, PROMPT) as worker:
        router = await routers(worker.address)
        call = router.stub.Generate(generate_request(PROMPT))
        seen = 0
        while seen < 2:  # tokens, in one chunk or in two
            seen += len((await call.read()).chunk.ids)
        worker.send(signal.SIGKILL)
        async with refused(Status.UNAVAILABLE, "worker w was lost after 2 tokens"):
            await collect_rest(call)
        await router.members(lambda each: each[0].state == "connecting")


async def test_a_frozen_worker_is_a_lost_worker(engines, routers):
    cold = await engines(StubWorker("cold"))
    async with Process("warm", 0, PROMPT) as warm:
        router = await routers(warm.address, cold, stale_s=1.0)
        call = router.stub.Generate(generate_request(PROMPT))
        assert (await call.read()).routed.choice.worker_id == "warm"
        warm.send(signal.SIGSTOP)
        assert routed(await collect_rest(call)) == ["cold"]


async def test_attempts_end(engines, routers):
    workers = [await engines(StubWorker(name)) for name in "abcd"]
    for worker in workers:
        worker.script = aborts(Status.UNAVAILABLE, "gone")
    router = await routers(*workers, max_attempts=2)
    async with refused(Status.UNAVAILABLE, "no worker of 'tiny' could begin", "lost"):
        await collect(router.stub.Generate(generate_request(PROMPT)))
    assert sum(len(worker.requests) for worker in workers) == 2


async def test_one_worker_is_asked_once(engines, routers):
    worker = await engines(StubWorker("a"))
    worker.script = aborts(Status.UNAVAILABLE, "gone")
    router = await routers(worker)
    async with refused(Status.UNAVAILABLE, f"{worker.address} lost"):
        await collect(router.stub.Generate(generate_request(PROMPT)))
    assert len(worker.requests) == 1


async def test_full_workers_are_passed_over(engines, routers):
    workers = [await engines(StubWorker(name, KEYS)) for name in "abcd"]
    for worker in workers[:3]:
        worker.script = aborts(Status.RESOURCE_EXHAUSTED, "64 requests wait")
    workers[3].script = says("ok")
    router = await routers(*workers, max_attempts=1)
    for _ in range(4):
        messages = await collect(router.stub.Generate(generate_request(PROMPT)))
        assert routed(messages)[-1] == "d"
        assert text(messages) == "ok"


async def test_where_all_workers_are_full_the_caller_may_come_again(engines, routers):
    workers = [await engines(StubWorker(name)) for name in "ab"]
    for worker in workers:
        worker.script = aborts(Status.RESOURCE_EXHAUSTED, "64 requests wait")
    router = await routers(*workers)
    async with refused(Status.RESOURCE_EXHAUSTED, "every worker of 'tiny' is full"):
        await collect(router.stub.Generate(generate_request(PROMPT)))


@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize(
    "code", [Status.INVALID_ARGUMENT, Status.FAILED_PRECONDITION, Status.DATA_LOSS]
)
async def test_what_a_worker_answers_is_handed_on(engines, routers, code, after):
    worker, other = await engines(StubWorker("a", KEYS)), await engines(StubWorker("b"))
    worker.script = aborts(code, "max_tokens is 9, limit 8", after)
    router = await routers(worker, other)
    async with refused(code, "max_tokens is 9, limit 8"):
        await collect(router.stub.Generate(generate_request(PROMPT)))
    assert other.requests == []


@pytest.mark.parametrize("after", [0, 2])
async def test_a_caller_that_cancels_cancels_the_worker(engines, routers, after):
    worker = await engines(StubWorker("a"))
    worker.script = hangs(after)
    router = await routers(worker)
    call = router.stub.Generate(generate_request(PROMPT))
    await call.read()
    await eventually(lambda: worker.requests, "the request reaches the worker")
    call.cancel()
    async with asyncio.timeout(PATIENCE_S):
        await worker.cancelled.wait()


async def test_the_callers_deadline_holds(engines, routers):
    worker = await engines(StubWorker("a"))
    worker.script = hangs()
    router = await routers(worker)
    while not worker.requests:  # it may be over before the request got so far
        async with refused(Status.DEADLINE_EXCEEDED):
            await collect(router.stub.Generate(generate_request(PROMPT), timeout=0.5))
    async with asyncio.timeout(PATIENCE_S):
        await worker.cancelled.wait()


@pytest.mark.parametrize("after", [0, 2])
async def test_without_a_deadline_the_routers_own_holds(engines, routers, after):
    worker = await engines(StubWorker("a"))
    worker.script = hangs(after)
    router = await routers(worker, timeout_s=0.5)
    while not worker.requests:
        async with refused(Status.DEADLINE_EXCEEDED, "0.5 s"):
            await collect(router.stub.Generate(generate_request(PROMPT)))
    async with asyncio.timeout(PATIENCE_S):
        await worker.cancelled.wait()


async def test_a_member_that_is_taken_out_finishes_what_it_began(engines, routers):
    worker, go = await engines(StubWorker("a")), asyncio.Event()

    async def script(request):
        yield started(request)
        yield tokens(*ids("x"))
        await go.wait()
        yield tokens(*ids("y"))
        yield done(2)

    worker.script = script
    router = await routers()
    entry = router_pb2.Member(node="a", worker_address=worker.address)
    await router.stub.SetMembers(router_pb2.Members(version=1, members=[entry]))
    await router.ready()
    call = router.stub.Generate(generate_request(PROMPT))
    for _ in range(3):
        await call.read()
    await router.stub.SetMembers(router_pb2.Members(version=2))
    async with refused(Status.UNAVAILABLE):
        await router.route(PROMPT)
    go.set()
    assert bodies(await collect_rest(call)) == ["chunk", "finished"]


async def test_a_prompt_follows_the_one_before_it(engines, routers, expecting):
    # No feed says so yet, but the first request's worker will hold these blocks.
    workers = [await engines(StubWorker(name)) for name in "abcd"]
    router = await routers(*workers)
    first = (await collect(router.stub.Generate(generate_request(PROMPT * 50))))[0].routed.choice
    second = (await collect(router.stub.Generate(generate_request(PROMPT * 50))))[0].routed.choice
    assert second.worker_id == first.worker_id
    assert [t.tier for t in second.warm] == [1]


async def test_what_was_sent_counts_as_load_until_its_first_token(engines, routers):
    worker, go = await engines(StubWorker("a")), asyncio.Event()

    async def script(request):
        await go.wait()
        yield started(request)
        yield tokens(*ids("x"))
        await asyncio.Event().wait()

    worker.script = script
    router = await routers(worker)
    call = router.stub.Generate(generate_request(PROMPT * 100))
    await call.read()
    waiting = len(ids(PROMPT * 100))
    assert (await router.explain("else"))[0].wait_s == pytest.approx(waiting / 4000)
    # A worker that knows of it too is not charged twice.
    worker.heartbeat.load.waiting_tokens = waiting
    worker.heartbeat.load.prefill_tokens_per_s = 1000
    told = [waiting / 4000]

    async def heard() -> bool:
        told.append((await router.explain("else"))[0].wait_s)
        return told[-1] == pytest.approx(waiting / 1000)

    await eventually(heard, "the worker's own word is heard")
    assert told[:-1] == pytest.approx([waiting / 4000] * (len(told) - 1))
    worker.heartbeat.load.waiting_tokens = 0
    go.set()
    for _ in range(2):
        await call.read()

    async def nothing_waits() -> bool:
        return (await router.explain("else"))[0].wait_s == 0

    await eventually(nothing_waits, "its first token came")
    call.cancel()


async def test_errors_stay_short_however_many_workers_there_are(engines, routers):
    workers = [await engines(StubWorker(f"w{i}")) for i in range(12)]
    for worker in workers:
        worker.script = aborts(Status.RESOURCE_EXHAUSTED, "full")
    router = await routers(*workers)
    async with refused(Status.RESOURCE_EXHAUSTED, "and 4 more"):
        await collect(router.stub.Generate(generate_request(PROMPT)))
