"""What a live router learns from the first tokens of its workers' answers."""

import asyncio
import math
from collections.abc import AsyncIterator

import pytest

from kvtier.core.drag import WINDOW
from kvtier.core.learned import ENOUGH, MOST_DRAIN
from kvtier.wire.pb import router_pb2, worker_pb2
from tests.router.stub_engine import Script, StubWorker, done, hangs, tokens
from tests.router.support import eventually, generate_request

PROMPT = "abcd"


def begins(after_s: float = 0.0, prefill_s: float = 0.001) -> Script:
    """Says after so long that its prefill took `prefill_s`."""

    async def script(request: worker_pb2.WorkerRequest) -> AsyncIterator[worker_pb2.WorkerResponse]:
        await asyncio.sleep(after_s)
        count = len(request.token_ids)
        begun = worker_pb2.Started(prompt_tokens=count, computed_tokens=count, prefill_s=prefill_s)
        yield worker_pb2.WorkerResponse(started=begun)
        yield tokens(33)
        yield done(1)

    return script


def worker(name: str, waiting: int) -> StubWorker:
    """At 1,000 tokens a second it would be busy with these for `waiting` milliseconds."""
    stub = StubWorker(name)
    stub.heartbeat.load.prefill_tokens_per_s = 1000.0
    stub.heartbeat.load.waiting_tokens = waiting
    stub.script = begins()
    return stub


async def terms(router, name: str) -> tuple[router_pb2.Choice, router_pb2.Terms]:
    choices = {c.worker_id: c for c in await router.explain(PROMPT)}
    return choices[name], choices[name].terms


async def until_waiting(router, name: str, count: int) -> None:
    async def heard() -> bool:
        return (await terms(router, name))[1].waiting_tokens == count

    await eventually(heard, "the load was told")


async def ask(router, times: int = ENOUGH, prompt: str = PROMPT) -> None:
    async def once() -> None:
        async for _ in router.stub.Generate(generate_request(prompt, max_tokens=1)):
            pass

    await asyncio.gather(*(once() for _ in range(times)))


@pytest.mark.parametrize(
    ("waiting", "after_s", "drain"),
    [(1_000_000, 0.0, MOST_DRAIN), (60, 0.06 * MOST_DRAIN + 0.1, 1 / MOST_DRAIN)],
    ids=["faster", "slower"],
)
async def test_how_fast_a_queue_empties_is_learned_and_explained(
    engines, routers, waiting, after_s, drain
):
    stub = worker("w", waiting)
    stub.script = begins(after_s)
    address = await engines(stub)
    router, other = await routers(address), await routers(address)
    for each in (router, other):
        await until_waiting(each, "w", waiting)
        choice, told = await terms(each, "w")
        assert told.drain == 1.0
        assert choice.wait_s == pytest.approx(waiting / 1000)
    await ask(router)
    await until_waiting(router, "w", waiting)  # said again since the first tokens came
    choice, told = await terms(router, "w")
    assert told.drain == pytest.approx(drain)
    assert choice.wait_s == pytest.approx(waiting / 1000 / drain)
    assert (await terms(other, "w"))[1].drain == 1.0, "a replica learns from what it sent"
    await ask(router, 40)  # what it has learned is no part of what it learns from
    assert (await terms(router, "w"))[1].drain == pytest.approx(drain)


async def test_a_worker_that_does_not_say_what_it_did_teaches_nothing(engines, routers):
    stub = worker("w", 1_000_000)
    stub.script = begins(prefill_s=0.0)
    router = await routers(await engines(stub))
    await until_waiting(router, "w", 1_000_000)
    await ask(router)
    assert (await terms(router, "w"))[1].drain == 1.0


@pytest.mark.parametrize(
    ("said", "counts"),
    [(800.4, 800), (0.0, 500), (-1.0, 500), (math.nan, 500), (math.inf, 500), (1e30, 500)],
)
async def test_tokens_that_wait_count_by_where_they_stand_in_their_prompts(
    engines, routers, said, counts
):
    stub = worker("w", 500)
    stub.heartbeat.load.waiting_as_first = said
    router = await routers(await engines(stub))
    await until_waiting(router, "w", counts)
    choice, _ = await terms(router, "w")
    assert choice.wait_s == pytest.approx(counts / 1000)


async def test_the_ends_of_long_prompts_are_a_longer_wait_than_as_many_short_ones(engines, routers):
    """Both have as many tokens to compute; whose are late in their prompts takes longer."""
    late, early = worker("late", 5000), worker("early", 5000)
    late.heartbeat.load.waiting_as_first = 9000.0
    early.heartbeat.load.waiting_as_first = 5100.0
    router = await routers(await engines(late), await engines(early))
    await until_waiting(router, "late", 9000)
    await until_waiting(router, "early", 5100)
    assert [c.worker_id for c in await router.explain(PROMPT)] == ["early", "late"]


@pytest.mark.parametrize(
    ("computed", "counts"),
    [(30.4, 970), (0.0, 1000), (-1.0, 1000), (math.nan, 1000), (math.inf, 1000), (5000.0, 20)],
)
async def test_what_is_computed_of_the_first_prompt_is_no_wait(engines, routers, computed, counts):
    stub = worker("w", 20)
    stub.script = hangs()
    stub.heartbeat.load.computed_as_first = computed
    router = await routers(await engines(stub))
    call = router.stub.Generate(generate_request([1] * 1000, max_tokens=1))
    await call.read()
    await until_waiting(router, "w", counts)
    call.cancel()


async def test_what_decoding_costs_is_learned_and_explained(engines, routers):
    stub = worker("w", 0)
    router = await routers(await engines(stub))
    long = "x" * 200
    for running, prefill_s in ((0, 0.5), (20, 1.5)):
        stub.heartbeat.load.running = running
        stub.script = begins(prefill_s=prefill_s)

        async def heard(count: int = running) -> bool:
            return (await terms(router, "w"))[1].decoding == count

        await eventually(heard, "the load was told")
        assert (await terms(router, "w"))[1].drag == 0.02
        await ask(router, WINDOW // 2, long)
    _, told = await terms(router, "w")
    assert told.drag == pytest.approx(0.1, rel=0.2), "1 s of 0.5 over 20 of them"
    slow = 1 + 20 * told.drag
    assert told.prefill_tokens_per_s / slow == pytest.approx(200 / 1.5, rel=0.01)
