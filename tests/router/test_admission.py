"""Limits of number and time, and what those are told who find no place."""

import asyncio

import grpc
import pytest

from kvtier import metrics
from kvtier.errors import Overloaded
from kvtier.router.admission import FORGET_S, Admission
from kvtier.router.text import MAX_JOBS, TextPool
from kvtier.wire.rpc import PUSHBACK
from tests.router.stub_engine import StubWorker, hangs, says
from tests.router.support import PATIENCE_S, Status, eventually, generate_request, refused


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


async def hold(admission, leave: asyncio.Event, deadline=1e9, order=None, name=None):
    async with admission.place(deadline, wait=True):
        if order is not None:
            order.append(name)
        await leave.wait()


async def settle():
    for _ in range(20):
        await asyncio.sleep(0)


async def test_places_then_a_queue_in_order_then_a_refusal():
    admission, leave, order = Admission(2, 3, Clock()), asyncio.Event(), []
    held = [asyncio.create_task(hold(admission, leave, order=order, name=i)) for i in range(5)]
    await settle()
    assert order == [0, 1]
    with pytest.raises(Overloaded, match=r"2 requests under way.*3 waiting, which is max_waiting"):
        await hold(admission, leave)
    with pytest.raises(Overloaded, match="max_requests"):
        async with admission.place(1e9, wait=False):
            pass
    leave.set()
    await asyncio.gather(*held)
    assert order == [0, 1, 2, 3, 4]
    assert metrics.RUNNING._value.get() == metrics.WAITING._value.get() == 0


@pytest.mark.parametrize("when", ["waiting", "called"])
async def test_one_that_gives_up_takes_nobodys_place(when):
    admission, leaves = Admission(1, 9, Clock()), [asyncio.Event() for _ in range(3)]
    held = [asyncio.create_task(hold(admission, leave)) for leave in leaves]
    await settle()
    if when == "called":
        leaves[0].set()
        await asyncio.sleep(0)  # the first has just handed its place to the second
    held[1].cancel()
    await settle()
    for leave in leaves:
        leave.set()
    ends = await asyncio.gather(*held, return_exceptions=True)
    assert [type(end) for end in (ends[0], ends[2])] == [type(None)] * 2
    async with admission.place(1e9, wait=False):
        pass


async def test_the_pace_tells_when_to_come_again_and_whose_turn_comes_too_late():
    clock = Clock()
    admission = Admission(1, 3, clock)
    leaves = [asyncio.Event() for _ in range(7)]
    held = [asyncio.create_task(hold(admission, leave)) for leave in leaves[:4]]
    await settle()
    for leave in leaves[:3]:  # a place becomes free every 5 s
        clock.now += 5
        leave.set()
        await settle()
    held += [asyncio.create_task(hold(admission, leave)) for leave in leaves[4:6]]
    await settle()
    with pytest.raises(Overloaded, match=r"2 requests wait.*about 15\.0 s, after its deadline"):
        await hold(admission, leaves[6], deadline=clock.now + 14)
    held.append(asyncio.create_task(hold(admission, leaves[6], deadline=clock.now + 16)))
    await settle()
    with pytest.raises(Overloaded) as caught:
        await hold(admission, leaves[6])
    assert caught.value.retry_s == pytest.approx(20)
    for leave in leaves:
        leave.set()
    await asyncio.gather(*held)


async def test_the_pace_of_another_hour_refuses_nobody():
    clock = Clock()
    admission = Admission(1, 3, clock)

    async def crowd(seconds: float) -> None:
        """Three come at once, and each takes so long."""
        leaves = [asyncio.Event() for _ in range(3)]
        held = [asyncio.create_task(hold(admission, leave)) for leave in leaves]
        for leave in leaves:
            await settle()
            clock.now += seconds
            leave.set()
        await asyncio.gather(*held)

    await crowd(60)
    assert admission.expected_s() == pytest.approx(60)
    clock.now += FORGET_S - 1  # free for so long, which is not long
    await crowd(60)
    assert admission.expected_s() == pytest.approx(60), "a while without a crowd is no figure"
    clock.now += 3600
    leave = asyncio.Event()
    held = [asyncio.create_task(hold(admission, leave))]
    await settle()
    held.append(asyncio.create_task(hold(admission, leave, deadline=clock.now + 1)))
    await settle()
    assert not held[1].done(), "waits, though the pace of an hour ago would have refused it"
    clock.now += 5
    leave.set()
    await asyncio.gather(*held)
    assert admission.expected_s() <= 5, "what is measured now counts"


async def test_a_queued_request_is_served_when_its_turn_comes(engines, routers):
    worker = await engines(StubWorker("a"))
    worker.script = hangs()
    router = await routers(worker, max_requests=1, max_waiting=1)
    first = router.stub.Generate(generate_request("one"))
    await eventually(lambda: worker.requests, "the first has its place")
    second = asyncio.create_task(read_all(router.stub.Generate(generate_request("two"))))
    await eventually(lambda: metrics.WAITING._value.get() == 1, "the second waits")
    call = router.stub.Generate(generate_request("three"))
    async with refused(Status.RESOURCE_EXHAUSTED, "1 waiting, which is max_waiting"):
        await call.read()
    trailers = dict(await call.trailing_metadata())
    assert int(trailers[PUSHBACK]) >= 100
    worker.script = says("ok")
    first.cancel()
    assert "".join(m.chunk.text for m in await second) == "ok"


async def test_a_deadline_ends_the_wait_in_the_queue(engines, routers):
    worker = await engines(StubWorker("a"))
    worker.script = hangs()
    router = await routers(worker, max_requests=1, max_waiting=1)
    first = router.stub.Generate(generate_request("one"))
    await eventually(lambda: worker.requests, "the first has its place")
    async with refused(Status.DEADLINE_EXCEEDED):
        await router.stub.Generate(generate_request("two"), timeout=0.5).read()
    await eventually(lambda: metrics.WAITING._value.get() == 0, "nobody waits any more")
    assert len(worker.requests) == 1
    first.cancel()


async def read_all(call):
    async with asyncio.timeout(PATIENCE_S):
        messages = []
        while (message := await call.read()) is not grpc.aio.EOF:
            messages.append(message)
        return messages


async def test_the_readers_of_text_have_a_bounded_queue():
    import threading

    pool, go = TextPool(), threading.Event()
    jobs = [asyncio.create_task(pool.run(go.wait)) for _ in range(MAX_JOBS)]
    await settle()
    with pytest.raises(Overloaded, match=f"{MAX_JOBS} prompts"):
        await pool.run(lambda: None)
    go.set()
    await asyncio.gather(*jobs)
    assert await pool.run(lambda: 7) == 7
    pool.close()
