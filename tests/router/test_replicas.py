"""Many requests at once, and many routers: nobody tells a router what another one decided."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator

import grpc
import pytest

from kvtier.core.tiers import Tier
from kvtier.wire.pb import worker_pb2
from tests.router.stub_engine import StubSource, StubWorker, hangs, keys, says
from tests.router.support import PATIENCE_S, eventually, generate_request

BATCH = 16
PROMPT = "a prompt that many ask at the same moment, which is long enough to be worth much " * 20
OTHER = "something else that has nothing in common with it, of about the same length, too " * 20


class Remembering(StubWorker):
    """A worker that holds a prompt once it has answered it, as its feed tells."""

    def register(self, server: grpc.aio.Server) -> None:
        answer = says("hi")

        async def script(
            request: worker_pb2.WorkerRequest,
        ) -> AsyncIterator[worker_pb2.WorkerResponse]:
            self.tell({Tier.VRAM: list(keys(list(request.token_ids)))})
            async for message in answer(request):
                yield message

        self.script = script
        super().register(server)


async def batch(router, *prompts: str) -> Counter[str]:
    """Routes of all at once: how many went to each worker."""
    choices = await asyncio.gather(*(router.route(prompt) for prompt in prompts))
    return Counter(choice.worker_id for choice in choices)


async def until_waiting(router, worker: str, tokens: int) -> None:
    async def heard() -> bool:
        told = {c.worker_id: c.terms.waiting_tokens for c in await router.explain("x")}
        return told[worker] == tokens

    await eventually(heard, "the load was told")


async def test_a_batch_of_one_new_prompt_is_computed_once(engines, routers):
    workers = [await engines(StubWorker(name)) for name in "abcd"]
    router = await routers(*workers)
    placed = await batch(router, *[PROMPT] * BATCH)
    assert list(placed.values()) == [BATCH]


async def test_a_batch_of_different_prompts_spreads(engines, routers):
    workers = [await engines(StubWorker(name)) for name in "abcd"]
    router = await routers(*workers)
    placed = await batch(router, *(f"{n} {PROMPT}" for n in range(BATCH)))
    assert sorted(placed) == list("abcd")
    assert max(placed.values()) == BATCH // 4


async def test_two_batches_are_each_kept_together_on_a_worker_of_its_own(engines, routers):
    workers = [await engines(StubWorker(name)) for name in "ab"]
    router = await routers(*workers)
    one, other = await asyncio.gather(
        batch(router, *[PROMPT] * BATCH), batch(router, *[OTHER] * BATCH)
    )
    assert list(one.values()) == list(other.values()) == [BATCH]
    assert one.keys() != other.keys()


async def test_a_batch_leaves_who_holds_its_prompt_but_has_a_long_queue(engines, routers):
    warm, idle = await engines(StubWorker("warm", keys(PROMPT))), await engines(StubWorker("idle"))
    warm.heartbeat.load.waiting_tokens = 10 * len(PROMPT)
    router = await routers(warm, idle)
    await until_waiting(router, "warm", 10 * len(PROMPT))
    assert await batch(router, *[PROMPT] * BATCH) == {"idle": BATCH}


async def test_a_batch_of_generates_goes_together_before_its_first_token(engines, routers):
    workers = [await engines(StubWorker(name)) for name in "abc"]
    for worker in workers:
        worker.script = hangs()
    router = await routers(*workers)
    calls = [router.stub.Generate(generate_request(PROMPT)) for _ in range(BATCH)]
    await eventually(
        lambda: sum(len(worker.requests) for worker in workers) == BATCH, "all were sent"
    )
    assert sorted(len(worker.requests) for worker in workers) == [0, 0, BATCH]
    for call in calls:
        call.cancel()


@pytest.fixture
async def replicas(engines, routers):
    """Two routers of the same members, named in another order, and the workers."""
    workers = [await engines(Remembering(name)) for name in "abc"]
    daemons = [await engines(StubSource()) for _ in workers]
    members = list(zip(workers, daemons, strict=True))
    return [await routers(*members), await routers(*reversed(members))], workers, daemons


async def both(routers_, prompt: str):
    return [await router.explain(prompt) for router in routers_]


async def test_what_one_replica_placed_the_other_learns_from_the_worker(replicas):
    (one, two), _, _ = replicas
    async with asyncio.timeout(PATIENCE_S):
        parts = [part async for part in one.stub.Generate(generate_request(PROMPT))]
    at = parts[0].routed.choice.worker_id
    full = len(keys(PROMPT)) * 4
    await two.until_warmth(PROMPT, lambda warmth: warmth[at] == {1: full})
    assert (await two.route(PROMPT)).worker_id == at
    assert list(await two.warmth(OTHER)) == list(await one.warmth(OTHER))


async def test_replicas_answer_alike_after_any_history(replicas):
    routers_, workers, daemons = replicas
    prompts = [f"{n} {PROMPT[: 40 * (n + 1)]}" for n in range(8)]
    for n, prompt in enumerate(prompts):
        async with asyncio.timeout(PATIENCE_S):
            async for _ in routers_[n % 2].stub.Generate(generate_request(prompt)):
                pass
    daemons[0].tell({Tier.HOST: list(keys(prompts[0])), Tier.SHARED: list(keys(prompts[1]))})
    daemons[1].tell({Tier.DISK: list(keys(prompts[2]))})
    held = workers[2].held.get(Tier.VRAM, [])
    workers[2].tell(removed={Tier.VRAM: held[::2]})
    await workers[1].restart()
    workers[1].tell({Tier.VRAM: list(keys(prompts[3]))})

    async def alike() -> bool:
        pairs = [await both(routers_, prompt) for prompt in [*prompts, PROMPT, OTHER]]
        return all(len(one) == 3 and one == other for one, other in pairs)

    await eventually(alike, "both say the same of every prompt")
    truth = {w.name: set(w.held.get(Tier.VRAM, [])) for w in workers}
    for prompt in prompts:
        mine = keys(prompt)
        for choice in await routers_[0].explain(prompt):
            own = truth[choice.worker_id]
            blocks = next((i for i, key in enumerate(mine) if key not in own), len(mine))
            vram = sum(each.tokens for each in choice.warm if each.tier == 1)
            assert vram >= 4 * blocks


async def test_a_replica_that_starts_later_answers_as_the_others_do(replicas, routers):
    (one, _), workers, daemons = replicas
    async with asyncio.timeout(PATIENCE_S):
        async for _ in one.stub.Generate(generate_request(PROMPT)):
            pass
    late = await routers(*zip(workers, daemons, strict=True))

    async def alike() -> bool:
        told = await both((one, late), PROMPT)
        return told[0] == told[1] and bool(told[0][0].warm)

    await eventually(alike, "the late one knows as much")
