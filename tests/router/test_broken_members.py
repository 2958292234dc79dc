"""Members that break the protocol in ways that no release of ours does: what they cost others."""

import asyncio
import logging
from types import ModuleType

import grpc
import httpx2
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvtier import metrics
from kvtier.errors import MAX_LINE
from kvtier.router import asking, link
from kvtier.wire.pb import feed_pb2, worker_pb2
from tests.router.stub_engine import StubWorker, aborts, keys
from tests.router.support import PATIENCE_S, Status, eventually, generate_request, refused

PROMPT = "a prompt of eight and more blocks"
KEYS = keys(PROMPT)


async def serves(router) -> bool:
    health = health_pb2_grpc.HealthStub(router.channel)
    said = await health.Check(health_pb2.HealthCheckRequest())
    return said.status == health_pb2.HealthCheckResponse.SERVING


def slept(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long `module` sleeps each time from now on; none of it takes long."""
    pauses: list[float] = []
    rest = asyncio.sleep

    async def sleep(pause_s: float) -> None:
        pauses.append(pause_s)
        await rest(min(pause_s, 0.01))

    class Sleeping:
        def __getattr__(self, name: str) -> object:
            return sleep if name == "sleep" else getattr(asyncio, name)

    monkeypatch.setattr(module, "asyncio", Sleeping())
    return pauses


class Jumps(StubWorker):
    """The pieces of its snapshot do not follow each other."""

    def _snapshot(self) -> list[feed_pb2.FeedMessage]:
        pieces = super()._snapshot()
        pieces[-1].seq += 1
        return pieces


async def test_a_snapshot_that_is_never_whole_holds_nobody_up(engines, routers):
    good, bad = await engines(StubWorker("good")), await engines(Jumps("bad", KEYS))
    router = await routers(good, bad, ready=False)
    await eventually(lambda: bad.watched >= 3, "it was watched anew")
    await eventually(lambda: serves(router), "the router serves without it")


class Endless(StubWorker):
    """Its snapshot goes on and on."""

    async def Watch(self, request, context) -> None:
        self.watched += 1
        piece = feed_pb2.FeedMessage(epoch=1, seq=1, snapshot=feed_pb2.Snapshot())
        while True:
            yield piece
            await asyncio.sleep(0.01)


async def test_a_snapshot_that_never_ends_is_not_waited_for_for_ever(
    engines, routers, caplog, monkeypatch
):
    monkeypatch.setattr(link, "SETTLE_S", 0.5)
    good, bad = await engines(StubWorker("good")), await engines(Endless("endless"))
    router = await routers(good, bad, ready=False)
    await eventually(lambda: serves(router), "the router serves without it")
    name = f"worker at {bad.address}: "
    told = f"{name}has not told all that it holds within 0.5 s; not waited for"
    assert [each for each in caplog.messages if each.startswith(name)] == [told]
    assert metrics.MEMBERS_LATE.labels("endless")._value.get() == 1
    assert (await router.route(PROMPT)).worker_id == "good"


async def test_a_snapshot_that_takes_its_time_is_waited_for(engines, routers, monkeypatch):
    monkeypatch.setattr(link, "SETTLE_S", 3600.0)
    good, slow = await engines(StubWorker("good")), await engines(Endless("slow", KEYS))
    router = await routers(good, slow, ready=False)
    await router.members(lambda each: each[0].state == "ready")
    await eventually(lambda: slow.watched, "it tells what it holds")
    assert not await serves(router)


class Refused(StubWorker):
    """Its feed is good until `bad` is set, and never again."""

    bad = False

    def _snapshot(self) -> list[feed_pb2.FeedMessage]:
        if not self.bad:
            return super()._snapshot()
        body = feed_pb2.Heartbeat()
        return [feed_pb2.FeedMessage(epoch=self.epoch, seq=self.seq, heartbeat=body)]


async def test_who_is_refused_is_not_believed_busy_for_ever(engines, routers):
    worker = Refused("a")
    worker.heartbeat.load.waiting_tokens = 1_000_000
    worker.heartbeat.load.running = 100
    await engines(worker)
    router = await routers(worker)

    async def told(waiting: int, decoding: int) -> bool:
        terms = (await router.explain(PROMPT))[0].terms
        return (terms.waiting_tokens, terms.decoding) == (waiting, decoding)

    await eventually(lambda: told(1_000_000, 100), "its load was told")
    worker.bad = True
    worker.send(feed_pb2.FeedMessage(epoch=worker.epoch, seq=worker.seq))
    await eventually(lambda: worker.watched >= 4, "its feed was refused, and refused again")
    await eventually(lambda: told(0, 0), "what it said once no longer counts")


async def test_an_error_that_says_ok_is_no_answer(engines, routers):
    worker = await engines(StubWorker("a"))
    worker.script = aborts(Status.OK, "what?")
    router = await routers(worker)
    async with asyncio.timeout(PATIENCE_S), refused(Status.UNAVAILABLE, "no worker"):
        async for _ in router.stub.Generate(generate_request(PROMPT)):
            pass


async def test_who_was_refused_and_is_mended_is_new_to_the_router(
    engines, routers, caplog, monkeypatch
):
    monkeypatch.setattr(link, "LASTING_S", 0.0)
    caplog.set_level(logging.INFO, "kvtier.router")
    worker = Refused("a", KEYS)
    await engines(worker)
    router = await routers(worker, ready=False)

    def said(words: str) -> int:
        return len([each for each in caplog.messages if worker.address in each and words in each])

    for life in range(1, 4):
        worker.bad = True
        await worker.restart()
        await eventually(lambda life=life: said("before the snapshot") == life, "it was refused")
        worker.bad = False
        await worker.restart()
        await router.ready()
        await router.until_warmth(PROMPT, lambda w: w["a"] == {feed_pb2.TIER_VRAM: 32})
        assert (await router.route(PROMPT)).worker_id == "a"
        await eventually(lambda life=life: said("in order again") == life, "it was told")
    assert said("before the snapshot") == 3


class Old(StubWorker):
    """Has no stream of requests, as a worker of an earlier release, until it is upgraded."""

    upgraded = False

    async def Multiplex(self, requests, context) -> None:
        if not self.upgraded:
            await context.abort(Status.UNIMPLEMENTED, "Method not found!")
        await super().Multiplex(requests, context)


async def test_a_worker_of_another_release_is_there_once_it_was_upgraded(
    engines, routers, caplog, monkeypatch
):
    monkeypatch.setattr(link, "LASTING_S", 0.0)
    worker = await engines(Old("a", KEYS))
    router = await routers(worker, ready=False)

    def said() -> int:
        return len([each for each in caplog.messages if "of an earlier release" in each])

    for life in range(1, 4):
        await eventually(lambda life=life: said() == life, "it was named")
        worker.upgraded = True
        await worker.restart()
        await router.ready()
        await router.until_warmth(PROMPT, lambda w: w["a"] == {feed_pb2.TIER_VRAM: 32})
        assert [each async for each in router.stub.Generate(generate_request(PROMPT))]
        worker.heartbeat.load.running = life

        async def beat(life=life) -> bool:
            return (await router.explain(PROMPT))[0].terms.decoding == life

        await eventually(beat, "its feed went on")
        worker.upgraded = False
        await worker.restart()


class Ending(StubWorker):
    """Ends its feed right after a heartbeat."""

    async def Watch(self, request, context) -> None:
        self.watched += 1
        for message in self._snapshot():
            yield message
        body = feed_pb2.Heartbeat()
        yield feed_pb2.FeedMessage(epoch=self.epoch, seq=self.seq, heartbeat=body)


async def test_a_feed_that_ends_after_its_heartbeat_is_watched_ever_more_rarely(
    engines, routers, monkeypatch
):
    pauses = slept(link, monkeypatch)
    worker = await engines(Ending("a"))
    await routers(worker, ready=False)
    await eventually(lambda: worker.watched >= 12, "it was watched anew")
    longest = link.PAUSE_S[1]
    assert max(pauses[:2]) < longest / 2, "at first soon"
    assert min(pauses[6:12]) >= longest / 2, "and then not"
    assert len(set(pauses[6:12])) > 1, "never all at once"


class Brief(StubWorker):
    """Ends every stream of requests as soon as it was opened."""

    opened = 0

    async def Multiplex(self, requests, context) -> None:
        self.opened += 1
        hello = worker_pb2.MuxHello(max_open=1)
        await context.write(worker_pb2.MuxResponse(hello=hello))


async def test_streams_that_never_last_are_opened_ever_more_rarely(engines, routers, monkeypatch):
    pauses = slept(asking, monkeypatch)
    worker = await engines(Brief("a"))
    await routers(worker, ready=False)
    await eventually(lambda: worker.opened >= 10, "it was opened anew")
    await eventually(lambda: max(pauses) >= asking.PAUSE_S[1] / 2, "the pauses grow")


class Talks(StubWorker):
    """Ends each request with words of its own choice, as no worker of ours would."""

    words = ""

    async def Multiplex(self, requests, context) -> None:
        hello = worker_pb2.MuxHello(max_open=8)
        await context.write(worker_pb2.MuxResponse(hello=hello))
        async for message in requests:
            end = worker_pb2.MuxError(status="INVALID_ARGUMENT", message=self.words)
            parts = [worker_pb2.MuxPart(id=each.id, error=end) for each in message.opens]
            await context.write(worker_pb2.MuxResponse(parts=parts))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("CUDA error:\n  out of\tmemory\x1b[31m\r\n", "CUDA error: out of memory [31m"),
        ("a\u2028b\u202ec\x00d\x85e", "a b c d e"),
        ("no\n" * 10_000, "no no no "),
        ("長" * 10_000, "長長"),  # three bytes a character, nine where gRPC carries it
    ],
)
async def test_whatever_a_worker_says_callers_get_one_line(engines, routers, words, told):
    worker = Talks("a")
    worker.words = words
    await engines(worker)
    router = await routers(worker, http="127.0.0.1:0")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in router.stub.Generate(generate_request(PROMPT)):
            pass
    assert caught.value.code() is Status.INVALID_ARGUMENT
    url = f"http://{router.http}/v1/completions"
    async with httpx2.AsyncClient(timeout=PATIENCE_S, trust_env=False) as client:
        answer = await client.post(url, json={"prompt": PROMPT})
    assert answer.status_code == 400
    for line in (caught.value.details(), answer.json()["error"]["message"]):
        assert line.startswith(told)
        assert line.isprintable(), "it is one line"
        assert len(line.encode()) <= MAX_LINE
        assert line.endswith("...") or line == told


class Shy(StubWorker):
    """Tells nobody who it is, in words of its own choice."""

    status = Status.UNAVAILABLE

    async def Describe(self, request, context) -> None:
        self.described += 1
        await context.abort(self.status, "no\nWARNING all is lost\x1b[2J" + "!" * 3000)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (Status.UNAVAILABLE, "is away: no WARNING"),
        (Status.UNAUTHENTICATED, "refuses us (no [auth]"),
    ],
)
async def test_whatever_a_worker_says_the_log_gets_one_line(
    engines, routers, caplog, status, words
):
    caplog.set_level(logging.INFO, "kvtier.router")
    worker = Shy("a")
    worker.status = status
    await engines(worker)
    await routers(worker, ready=False)
    await eventually(lambda: words in caplog.text, "the log tells")
    for line in (each for each in caplog.messages if worker.address in each):
        assert line.isprintable()
        assert len(line.encode()) < MAX_LINE + 200


class Growing(StubWorker):
    """Holds one block more at every look, and says of none what comes before it."""

    def _snapshot(self) -> list[feed_pb2.FeedMessage]:
        part = feed_pb2.TierKeys(tier=feed_pb2.TIER_VRAM, keys=b"".join(KEYS[: self.watched]))
        body = feed_pb2.Snapshot(held=[part], last=True)
        return [feed_pb2.FeedMessage(epoch=self.epoch, seq=self.seq, snapshot=body)]


async def test_a_refusal_is_said_once_whatever_its_numbers(engines, routers, caplog):
    worker = await engines(Growing("a"))
    await routers(worker, ready=False)
    await eventually(lambda: worker.watched >= 4, "it was refused several times")
    said = [each for each in caplog.messages if "lie in no chain" in each]
    assert len(said) == 1, said
