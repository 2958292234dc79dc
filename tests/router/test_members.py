import asyncio
import contextlib
from collections.abc import AsyncIterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvtier import metrics
from kvtier.core.tiers import Tier
from kvtier.wire.pb import feed_pb2, router_pb2
from tests.router.stub_engine import StubSource, StubWorker, keys, tier_keys
from tests.router.support import eventually, refused, route_request

PROMPT = "a prompt of eight and more blocks"
KEYS = keys(PROMPT)
VRAM, HOST, DISK, SHARED = 1, 2, 3, 4  # on the wire


def gaps(node):
    return metrics.FEED_GAPS.labels(node)._value.get()


async def test_residency_follows_the_feeds(engines, routers):
    worker = await engines(StubWorker("a", KEYS[:2]))
    daemon = await engines(StubSource({Tier.HOST: KEYS[:4]}))
    router = await routers((worker, daemon))
    await router.until_warmth(PROMPT, lambda w: w["a"] == {VRAM: 8, HOST: 8})
    worker.tell(removed={Tier.VRAM: KEYS[:2]})
    daemon.tell(added={Tier.DISK: KEYS[4:5], Tier.SHARED: KEYS[5:6]})
    await router.until_warmth(PROMPT, lambda w: w["a"] == {HOST: 16, DISK: 4, SHARED: 4})


@pytest.mark.parametrize("lost_last", [False, True])
async def test_a_gap_in_a_feed_is_watched_anew(engines, routers, lost_last):
    worker = await engines(StubWorker("gap", KEYS[:1]))
    router = await routers(worker)
    before = gaps("gap")
    worker.tell(added={Tier.VRAM: KEYS[1:3]}, lost=True)
    if not lost_last:  # otherwise the heartbeat tells
        worker.tell(added={Tier.VRAM: KEYS[3:4]})
    wanted = 12 if lost_last else 16
    await router.until_warmth(PROMPT, lambda w: w.get("gap") == {VRAM: wanted})
    assert gaps("gap") == before + 1
    assert worker.watched == 2


@pytest.mark.parametrize("too_slow", [False, True])
async def test_a_gap_does_not_take_the_worker_out_of_use(engines, routers, too_slow):
    worker = await engines(StubWorker("a"))
    router = await routers(worker)
    states = []
    call = router.stub.Watch(router_pb2.WatchMembersRequest())
    follow = asyncio.create_task(collect(call, states))
    if too_slow:
        worker.held = {Tier.VRAM: KEYS}
        worker.send(None)
    else:
        worker.tell(added={Tier.VRAM: KEYS}, lost=True)
    await router.until_warmth(PROMPT, lambda w: w["a"] == {VRAM: 32})
    call.cancel()
    await asyncio.gather(follow, return_exceptions=True)
    assert set(states) == {"ready"}


async def collect(call: AsyncIterator[router_pb2.Members], states: list[str]) -> None:
    async for table in call:
        states += [member.state for member in table.members]


async def test_after_a_gap_what_was_known_counts_until_the_source_answers(engines, routers):
    worker = await engines(StubWorker("a", KEYS[:4]))
    router = await routers(worker)
    await router.until_warmth(PROMPT, lambda w: w["a"] == {VRAM: 16})
    before = gaps("a")
    worker.answering.clear()
    worker.tell(removed={Tier.VRAM: KEYS[:4]}, lost=True)
    await eventually(lambda: gaps("a") > before, "the gap was seen")
    assert (await router.warmth(PROMPT))["a"] == {VRAM: 16}
    worker.answering.set()
    await router.until_warmth(PROMPT, lambda w: w["a"] == {})


async def test_a_worker_may_come_back_as_another(engines, routers):
    worker = await engines(StubWorker("a", model="old"))
    router = await routers(worker)
    before = await router.explain([("user", "hi")])
    worker.info.model, worker.epoch = "new", 99
    worker.files |= {"chat_template.jinja": b"{{ messages[0].content }} and more"}

    async def renewed() -> bool:
        try:
            return await router.explain([("user", "hi")], "new") != before
        except grpc.aio.AioRpcError as error:
            assert error.code() is grpc.StatusCode.NOT_FOUND  # noqa: PT017
            return False

    await eventually(renewed, "the new model is served")
    response = await router.stub.Explain(route_request([("user", "hi")], "new"))
    assert response.prompt_tokens == len("hi and more")


async def test_another_epoch_is_another_life(engines, routers):
    worker = await engines(StubWorker("epoch", KEYS[:4]))
    router = await routers(worker)
    before = gaps("epoch")
    worker.epoch, worker.held = 99, {Tier.VRAM: KEYS[:1]}
    await router.until_warmth(PROMPT, lambda w: w.get("epoch") == {VRAM: 4})
    assert gaps("epoch") == before + 1
    assert worker.described == 2


@pytest.mark.parametrize(
    "message",
    [
        feed_pb2.Delta(added=[feed_pb2.TierKeys(tier=feed_pb2.TIER_VRAM, keys=b"odd")]),
        feed_pb2.Delta(added=tier_keys({Tier.HOST: KEYS})),  # which no worker has
        feed_pb2.Delta(added=[feed_pb2.TierKeys(tier=feed_pb2.TIER_VRAM, keys=KEYS[1])]),  # loose
    ],
)
async def test_a_feed_that_breaks_the_protocol_is_watched_anew(engines, routers, message):
    worker = await engines(StubWorker("a", KEYS[:1]))
    router = await routers(worker)
    worker.held = {Tier.VRAM: KEYS[:3]}
    body = feed_pb2.FeedMessage(epoch=worker.epoch, seq=worker.seq + 1, delta=message)
    worker.send(body)
    await router.until_warmth(PROMPT, lambda w: w.get("a") == {VRAM: 12})


class Loose(StubWorker):
    """Says of no block what comes before it."""

    def _snapshot(self) -> list[feed_pb2.FeedMessage]:
        part = feed_pb2.TierKeys(tier=feed_pb2.TIER_VRAM, keys=b"".join(KEYS[:3]))
        body = feed_pb2.Snapshot(held=[part], last=True)
        return [feed_pb2.FeedMessage(epoch=self.epoch, seq=self.seq, snapshot=body)]


async def test_a_feed_that_is_always_refused_is_said_once_and_holds_nobody_up(
    engines, routers, caplog
):
    good, bad = await engines(StubWorker("good", KEYS[:2])), await engines(Loose("loose"))
    router = await routers(good, bad, ready=False)
    health = health_pb2_grpc.HealthStub(router.channel)

    async def serves() -> bool:
        said = await health.Check(health_pb2.HealthCheckRequest())
        return said.status == health_pb2.HealthCheckResponse.SERVING

    async def again() -> bool:
        return gaps("loose") >= 3

    await eventually(serves, "the router to serve without it")
    await eventually(again, "it is watched anew")
    await router.until_warmth(PROMPT, lambda w: w.get("good") == {VRAM: 8})
    said = [each for each in caplog.messages if "lie in no chain" in each]
    assert len(said) == 1
    assert "3 of 3 blocks" in said[0]
    assert bad.watched >= 3
    assert (await router.stub.Route(route_request(PROMPT))).choice.node == "good"


async def test_a_daemon_that_goes_takes_its_own_and_leaves_what_is_shared(engines, routers):
    worker = await engines(StubWorker("a"))
    held = {Tier.HOST: KEYS[1:2], Tier.DISK: KEYS[2:3], Tier.SHARED: KEYS[:1]}
    daemon = await engines(StubSource(held))
    router = await routers((worker, daemon))
    await router.until_warmth(PROMPT, lambda w: w["a"] == {HOST: 4, DISK: 4, SHARED: 4})
    await daemon.stop()
    await router.until_warmth(PROMPT, lambda w: w["a"] == {SHARED: 4})
    await daemon.restart()
    await router.until_warmth(PROMPT, lambda w: w["a"] == {HOST: 4, DISK: 4, SHARED: 4})


async def test_what_is_shared_is_warm_for_every_node(engines, routers):
    one, two = await engines(StubWorker("a")), await engines(StubWorker("b"))
    daemon = await engines(StubSource({Tier.SHARED: KEYS[:3], Tier.HOST: KEYS[:1]}))
    router = await routers((one, daemon), two)
    await router.until_warmth(PROMPT, lambda w: w == {"a": {HOST: 4, SHARED: 8}, "b": {SHARED: 12}})


async def test_a_worker_that_goes_is_not_routed_to_until_it_is_back(engines, routers):
    one, two = await engines(StubWorker("a", KEYS)), await engines(StubWorker("b"))
    router = await routers(one, two)
    assert (await router.route(PROMPT)).worker_id == "a"
    await one.stop()
    await router.members(lambda each: [m.state for m in each] == ["connecting", "ready"])
    assert [c.worker_id for c in await router.explain(PROMPT)] == ["b"]
    one.held = {}  # its VRAM is empty now
    await one.restart()
    await router.ready()
    assert (await router.warmth("another " + PROMPT))["a"] == {}
    assert one.described == 2


async def test_a_worker_that_loads_its_model_is_waited_for(engines, routers):
    worker = StubWorker("slow")
    worker.loading = True
    await engines(worker)
    router = await routers(worker, ready=False)
    await router.members(lambda each: [m.state for m in each] == ["connecting"])
    async with refused(grpc.StatusCode.UNAVAILABLE, "no worker is ready"):
        await router.route(PROMPT)
    await eventually(lambda: worker.described > 1, "it was asked, and asked again")
    worker.loading = False
    await router.ready()
    assert (await router.route(PROMPT)).worker_id == "slow"


async def test_a_worker_that_starts_after_the_router_is_found(engines, routers):
    late = StubWorker("late")
    await engines(late)
    await late.stop()
    router = await routers(late, ready=False)
    await router.members(lambda each: each[0].state == "connecting")
    await late.restart()
    await router.ready()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("block_tokens", 0),
        ("max_tokens", 1),
        ("vocab_size", 0),
        ("root", b""),
        ("model", ""),
        ("doubles_at", 0.5),
    ],
)
async def test_a_worker_that_makes_no_sense_is_never_ready(engines, routers, field, value):
    worker = StubWorker("odd")
    good = getattr(worker.info, field)
    setattr(worker.info, field, value)
    await engines(worker)
    router = await routers(worker, ready=False)
    await eventually(lambda: worker.described > 1, "it was asked, refused, and asked again")
    assert (await router.members(bool))[0].state == "connecting"
    setattr(worker.info, field, good)
    await router.ready()


async def told(router, *names: str) -> bool:
    """Whether a request would go to these workers, in whatever order."""
    try:
        return sorted(each.worker_id for each in await router.explain(PROMPT)) == [*names]
    except grpc.aio.AioRpcError as error:
        assert error.code() is grpc.StatusCode.UNAVAILABLE  # noqa: PT017
        return False


async def test_silence_is_told_and_a_word_makes_good(engines, routers):
    quiet, other = await engines(StubWorker("q", KEYS)), await engines(StubWorker("o"))
    router = await routers(quiet, other, stale_s=1.0)
    quiet.beating = False
    await router.members(lambda each: [m.state for m in each] == ["stale", "ready"])
    await eventually(lambda: told(router, "o"), "the silent one is left out")
    quiet.beating = True
    await eventually(lambda: told(router, "o", "q"), "both are used")


class Interrupted(StubWorker):
    """A worker whose stream of requests is there only while `streaming` is set."""

    def __init__(self, name: str, held) -> None:
        super().__init__(name, held)
        self.streaming, self.interrupt = asyncio.Event(), asyncio.Event()
        self.streaming.set()

    async def Multiplex(self, requests, context) -> None:
        await self.streaming.wait()
        serving = asyncio.ensure_future(super().Multiplex(requests, context))
        breaking = asyncio.ensure_future(self.interrupt.wait())
        await asyncio.wait({serving, breaking}, return_when=asyncio.FIRST_COMPLETED)
        for each in (serving, breaking):
            each.cancel()
        await asyncio.gather(serving, breaking, return_exceptions=True)
        with contextlib.suppress(asyncio.CancelledError):
            await context.abort(grpc.StatusCode.INTERNAL, "interrupted")


def count(state):
    return metrics.MEMBERS.labels(state)._value.get()


async def test_a_stream_that_reopens_makes_no_silent_feed_true(engines, routers, patient):
    quiet, other = await engines(Interrupted("q", KEYS)), await engines(StubWorker("o"))
    router = await routers(quiet, other, stale_s=0.5)
    quiet.beating = False
    await router.members(lambda each: [m.state for m in each] == ["stale", "ready"])
    quiet.streaming.clear()
    quiet.interrupt.set()
    await router.members(lambda each: [m.state for m in each] == ["connecting", "ready"])
    await eventually(lambda: told(router, "o"), "it cannot be asked")
    quiet.interrupt.clear()
    quiet.streaming.set()
    table = await router.members(lambda each: each[0].state != "connecting")
    assert table[0].state == "stale", "its feed has not spoken"
    await eventually(lambda: told(router, "o"), "the other is used")
    counts = {"ready": 1, "stale": 1, "connecting": 0}
    await eventually(lambda: {s: count(s) for s in counts} == counts, "the metric says the same")
    quiet.beating = True
    await eventually(lambda: told(router, "o", "q"), "a word makes good")


async def test_a_silent_worker_that_drains_is_not_ready_for_that(engines, routers, patient):
    quiet, other = await engines(StubWorker("q", KEYS)), await engines(StubWorker("o"))
    router = await routers(quiet, other, stale_s=0.5)
    quiet.beating = False
    await router.members(lambda each: [m.state for m in each] == ["stale", "ready"])
    await other.stop()
    await eventually(lambda: told(router, "q"), "nothing else is left")
    quiet.drain_streams()

    async def draining() -> bool:
        return (await router.explain(PROMPT))[0].draining

    await eventually(draining, "the router knows")
    assert (await router.members(bool))[0].state == "stale"


async def test_a_stream_that_breaks_beside_a_gap_is_told(engines, routers, patient):
    worker = await engines(Interrupted("a", KEYS))
    router = await routers(worker)
    worker.answering.clear()
    worker.tell(removed={Tier.VRAM: KEYS[:4]}, lost=True)
    await eventually(lambda: worker.watched > 1, "the gap was seen")
    worker.streaming.clear()
    worker.interrupt.set()
    await router.members(lambda each: each[0].state == "connecting")
    worker.interrupt.clear()
    worker.streaming.set()
    await router.members(lambda each: each[0].state != "connecting")
    worker.answering.set()
    await router.ready()


async def test_stale_workers_are_used_where_no_other_is_left(engines, routers):
    quiet = await engines(StubWorker("q", KEYS))
    router = await routers(quiet, stale_s=1.0)
    quiet.beating = False
    await router.members(lambda each: each[0].state == "stale")
    await eventually(lambda: told(router, "q"), "it is used")


async def test_a_long_silence_ends_the_connection(engines, routers):
    quiet = await engines(StubWorker("q", KEYS))
    router = await routers(quiet, stale_s=0.3)
    quiet.beating = False
    await router.members(lambda each: each[0].state == "connecting")
    quiet.beating = True
    await router.ready()
    assert quiet.watched >= 2


def announced(version, *members):
    return router_pb2.Members(version=version, members=[member(*each) for each in members])


def member(node, worker=None, daemon=None, draining=False):
    return router_pb2.Member(
        node=node,
        worker_address=getattr(worker, "address", ""),
        daemon_address=getattr(daemon, "address", ""),
        draining=draining,
    )


async def test_members_are_replaced_by_newer_versions_only(engines, routers):
    one, two = await engines(StubWorker("a")), await engines(StubWorker("b"))
    router = await routers()

    async def announce(version, *members):
        return (await router.stub.SetMembers(announced(version, *members))).applied

    assert await announce(5, ("a", one))
    await router.ready()
    assert await announce(5, ("a", one))  # again: nothing changes
    assert not await announce(4, ("b", two))
    assert [c.worker_id for c in await router.explain(PROMPT)] == ["a"]
    assert await announce(6, ("a", one), ("b", two))
    await router.members(lambda each: [m.state for m in each] == ["ready", "ready"])
    assert await announce(0, ("b", two))  # unconditionally
    assert [c.worker_id for c in await router.explain(PROMPT)] == ["b"]
    assert await announce(1, ("a", one))
    await router.members(lambda each: [(m.node, m.state) for m in each] == [("a", "ready")])
    assert (one.watched, two.watched) == (2, 1)  # those that stayed kept their connections


async def test_announced_members_come_besides_the_configured(engines, routers):
    fixed, other = await engines(StubWorker("a")), await engines(StubWorker("b"))
    router = await routers(fixed)
    await router.stub.SetMembers(announced(1, ("a", fixed, None, True), ("b", other)))
    await router.members(lambda each: [m.state for m in each] == ["ready", "ready"])
    table = await router.members(bool)
    assert [(m.node, m.draining) for m in table] == [("a", True), ("b", False)]
    await router.stub.SetMembers(announced(2))
    assert [m.node for m in await router.members(bool)] == ["a"]
    assert fixed.watched == 1


async def test_workers_of_one_node_share_its_daemon(engines, routers):
    one, two = await engines(StubWorker("a")), await engines(StubWorker("b"))
    daemon = await engines(StubSource({Tier.HOST: KEYS[:2]}))
    router = await routers()
    await router.stub.SetMembers(announced(1, ("n", one, daemon), ("n", two, daemon)))
    await router.ready()
    await router.until_warmth(PROMPT, lambda w: w == {"a": {HOST: 8}, "b": {HOST: 8}})
    assert daemon.watched == 1


async def test_requests_go_to_draining_workers_last(engines, routers):
    warm, cold = await engines(StubWorker("warm", KEYS)), await engines(StubWorker("cold"))
    router = await routers(warm, cold)
    assert (await router.explain(PROMPT))[0].worker_id == "warm"
    warm.heartbeat.draining = True
    await router.members(lambda each: each[0].draining)
    assert [c.worker_id for c in await router.explain(PROMPT)] == ["cold", "warm"]


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([router_pb2.Member(node="a")], "members[0]: neither a daemon nor a worker"),
        ([router_pb2.Member(node="", worker_address="h:1")], "members[0].node has 0 characters"),
        ([router_pb2.Member(node="a" * 300, worker_address="h:1")], "300 characters"),
        ([router_pb2.Member(node="a", worker_address="h")], "members[0].worker is 'h'"),
        ([router_pb2.Member(node="a", daemon_address="h:99999")], "members[0].daemon"),
        ([router_pb2.Member(node="a", worker_address="h:1")] * 2, "members[1].worker is h:1"),
        ([router_pb2.Member(node="a", daemon_address="h:1")] * 4097, "more than 4096"),
    ],
)
async def test_members_that_make_no_sense_change_nothing(engines, routers, members, words):
    worker = await engines(StubWorker("a"))
    router = await routers(worker)
    async with refused(grpc.StatusCode.INVALID_ARGUMENT, words):
        await router.stub.SetMembers(router_pb2.Members(version=1, members=members))
    assert [m.state for m in await router.members(bool)] == ["ready"]
