"""Which node a router names for a worker's node to load blocks from, and that it is told."""

import asyncio
import math

import pytest

from kvtier.config import MemberConfig
from kvtier.core.tiers import Tier
from tests.router.stub_engine import StubSource, StubWorker, ids, started, tokens
from tests.router.stub_engine import keys as keys_of
from tests.router.support import eventually, generate_request

PROMPT = "x" * 400
KEYS = keys_of(PROMPT)
OTHER = "z" * 400


class Pair:
    """A busy worker whose node holds the prompt, and an idle one of a node that can pull."""

    def __init__(self) -> None:
        self.holder, self.idle = StubWorker("holder"), StubWorker("idle")
        self.lender, self.puller = StubSource({Tier.HOST: KEYS}), StubSource()
        self.holder.heartbeat.load.waiting_tokens = 10**6
        self.lender.heartbeat.lends = True
        self.puller.heartbeat.pulls.SetInParent()
        self.idle.info.pulls = True

    async def routed(self, engines, routers, **settings):
        for each in (self.holder, self.idle, self.lender, self.puller):
            await engines(each)
        router = await routers((self.holder, self.lender), (self.idle, self.puller), **settings)
        await router.until_warmth(PROMPT, lambda each: each["holder"] != {})
        return router


async def until_named(router):
    async def named() -> bool:
        best = (await router.explain(PROMPT))[0]
        return (best.worker_id, best.source) == ("idle", "holder")

    await eventually(named, "the idle worker is the best, with the other's blocks")


async def test_the_node_that_holds_the_blocks_is_named_and_the_worker_is_told(engines, routers):
    pair = Pair()
    router = await pair.routed(engines, routers, peer_bytes_per_s=10**12)
    await until_named(router)
    best, other = await router.explain(PROMPT)
    assert other.source == "", "it has them"
    assert best.source_tokens == len(KEYS) * 4
    assert f"{len(KEYS) * 4:,} from holder: " in best.why
    assert [each.bytes_per_s for each in best.terms.loads] == [1e12]
    call = router.stub.Generate(generate_request(PROMPT))
    async for _ in call:
        pass
    (asked,) = pair.idle.requests
    assert asked.source == "holder"
    assert asked.warm_tokens == len(KEYS) * 4, "it is loaded, and not computed"
    assert not pair.holder.requests


async def test_what_is_pulled_is_no_work_that_waits(engines, routers):
    pair = Pair()
    pair.lender.held = {Tier.HOST: KEYS[:-1]}

    async def never(request):
        await asyncio.Event().wait()
        yield started(request)

    pair.idle.script = never
    router = await pair.routed(engines, routers, peer_bytes_per_s=10**12)
    await until_named(router)
    call = router.stub.Generate(generate_request(PROMPT))

    async def sent() -> bool:
        return len(pair.idle.requests) == 1

    await eventually(sent, "the worker has it")
    waits = {each.worker_id: each.terms.waiting_tokens for each in await router.explain(OTHER)}
    assert waits["idle"] == len(PROMPT) - (len(KEYS) - 1) * 4
    call.cancel()


async def test_a_measured_speed_takes_the_place_of_the_usual_one(engines, routers):
    pair = Pair()
    router = await pair.routed(engines, routers, peer_bytes_per_s=10**12)
    await until_named(router)
    pair.puller.heartbeat.pulls.bytes_per_s = 5e11

    async def told() -> bool:
        best = (await router.explain(PROMPT))[0]
        return [each.bytes_per_s for each in best.terms.loads] == [5e11]

    await eventually(told, "the daemon's own word counts")
    pair.puller.heartbeat.pulls.bytes_per_s = 1.0  # so slow that computing is faster

    async def unnamed() -> bool:
        return all(not each.source for each in await router.explain(PROMPT))

    await eventually(unnamed, "nobody pulls at that speed")
    pair.puller.heartbeat.pulls.bytes_per_s = math.nan
    await until_named(router)


def puller_stops(pair: Pair) -> None:
    pair.puller.heartbeat.ClearField("pulls")


def lender_stops(pair: Pair) -> None:
    pair.lender.heartbeat.lends = False


@pytest.mark.parametrize("stops", [puller_stops, lender_stops])
async def test_nobody_is_named_once_a_daemon_cannot_do_its_part(engines, routers, stops):
    pair = Pair()
    router = await pair.routed(engines, routers, peer_bytes_per_s=10**12)
    await until_named(router)
    stops(pair)

    async def unnamed() -> bool:
        return all(not each.source for each in await router.explain(PROMPT))

    await eventually(unnamed, "it cannot any more")


async def test_nobody_is_named_to_an_engine_that_passes_no_source_on(engines, routers):
    pair = Pair()
    plain = await engines(StubWorker("plain"))  # of the same node
    for each in (pair.holder, pair.idle, pair.lender, pair.puller):
        await engines(each)
    router = await routers(
        (pair.holder, pair.lender), (pair.idle, pair.puller), (plain, pair.puller)
    )

    async def sources() -> bool:
        found = {each.worker_id: each.source for each in await router.explain(PROMPT)}
        return found == {"holder": "", "idle": "holder", "plain": ""}

    await eventually(sources, "one of the two can have them")


async def test_nobody_is_named_where_the_router_is_told_not_to(engines, routers):
    pair = Pair()
    router = await pair.routed(engines, routers, peer_bytes_per_s=0)
    (beside,) = [await routers((pair.holder, pair.lender), (pair.idle, pair.puller))]
    await until_named(beside)
    assert all(not each.source for each in await router.explain(PROMPT))


async def test_pulled_tokens_teach_no_speed_of_a_tier(engines, routers):
    pair = Pair()

    async def script(request):
        first = started(request)
        first.started.pulled_tokens = len(KEYS) * 4
        first.started.restored.add(tier=2, tokens=len(KEYS) * 4)
        first.started.restore_s = 1000.0  # of a tier it would be a crawl
        yield first
        yield tokens(*ids("x"))
        await asyncio.Event().wait()

    pair.idle.script = script
    pair.idle.heartbeat.load.host_bytes_per_s = 3e9
    pair.puller.held = {Tier.HOST: keys_of("y" * 40)}
    router = await pair.routed(engines, routers, peer_bytes_per_s=10**12)

    async def speeds() -> list[float]:
        choices = {each.worker_id: each for each in await router.explain("y" * 40)}
        return [each.bytes_per_s for each in choices["idle"].terms.loads if each.tier == 2]

    async def told() -> bool:
        return await speeds() == [3e9]

    await until_named(router)
    await eventually(told, "another prompt lies in its host tier, of a known speed")
    call = router.stub.Generate(generate_request(PROMPT))
    async for message in call:
        if message.WhichOneof("body") == "chunk":
            break
    call.cancel()
    assert await speeds() == [3e9]


async def test_no_node_is_named_for_what_a_worker_has_on_its_own_disk(engines, routers):
    """Its daemon would not ask for that, however slow the disk is, and least of all itself."""
    near, far = StubSource({Tier.DISK: KEYS}), StubSource({Tier.HOST: KEYS + keys_of(OTHER)})
    one, two, third = [StubWorker(name) for name in ("one", "two", "third")]
    for each in (one, two, third):
        each.info.pulls = True
        each.heartbeat.load.disk_bytes_per_s = 1.0
        await engines(each)
    for each in (near, far):
        each.heartbeat.lends = True
        each.heartbeat.pulls.bytes_per_s = 1e12
        await engines(each)
    homes = [("near", one, near), ("near", two, near), ("far", third, far)]
    members = tuple(
        MemberConfig(node=node, worker=worker.address, daemon=daemon.address)
        for node, worker, daemon in homes
    )
    router = await routers(members=members)
    await router.ready()
    await router.until_warmth(PROMPT, lambda each: each["one"] != {} and each["two"] != {})

    async def sources(prompt: str) -> dict[str, str]:
        return {each.worker_id: each.source for each in await router.explain(prompt)}

    async def named() -> bool:
        return await sources(OTHER) == {"one": "far", "two": "far", "third": ""}

    async def declined() -> bool:
        return not any(
            each.tier == 3 for c in await router.explain(PROMPT) for each in c.terms.loads
        )

    await eventually(named, "the other node is named for what the first has not")
    await eventually(declined, "it is known how slow the disk is")
    assert await sources(PROMPT) == {"one": "", "two": "", "third": ""}
