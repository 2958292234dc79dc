"""A session is a hint: its worker comes first among as good as equals, and is never waited for."""

import contextlib

import grpc
import httpx2
import openai
import pytest

from kvtier.core.sessions import MAX_SESSION
from kvtier.router.epp.server import DESTINATION, SERVICE
from kvtier.router.http.openai import SESSION_HEADER
from kvtier.wire.pb import ext_proc_pb2 as ext_proc
from kvtier.wire.pb import router_pb2
from tests.router.stub_engine import StubWorker, aborts, hangs
from tests.router.support import (
    PATIENCE_S,
    Status,
    eventually,
    generate_request,
    make_prompt,
    refused,
)

WORKERS = "abcdef"


def request(session: str = "", **more) -> router_pb2.RouteRequest:
    """One token, less than a block: no worker is warm, and it's no load to speak of."""
    return router_pb2.RouteRequest(prompt=make_prompt([1]), session=session, **more)


@pytest.fixture
async def many(engines, routers):
    """Workers that are as good as equal, by name, and their router."""
    workers = [await engines(StubWorker(name)) for name in WORKERS]
    return {worker.name: worker for worker in workers}, await routers(*workers)


async def test_a_session_comes_back_to_its_worker_and_others_spread(many):
    _, router = many
    homes = {}
    for session in "stuvwx":
        first = (await router.stub.Route(request(session))).choice
        assert not first.hinted, "nobody knew it"
        homes[session] = first.worker_id
    assert set(homes.values()) == set(WORKERS), "new ones go where cold prompts are due"
    for session in "stuvwxxwvuts":
        choice = (await router.stub.Route(request(session))).choice
        assert (choice.worker_id, choice.hinted) == (homes[session], True)
        assert choice.why.endswith(", and its session went there last")
    choice = (await router.stub.Route(request())).choice
    assert not choice.hinted
    assert "session" not in choice.why


async def test_explain_tells_of_the_hint_and_changes_nothing(many):
    _, router = many
    for _ in range(3):
        choices = (await router.stub.Explain(request("s"))).choices
        assert not any(each.hinted for each in choices), "only asked"
    there = (await router.stub.Route(request("s"))).choice.worker_id
    best, *others = (await router.stub.Explain(request("s"))).choices
    assert (best.worker_id, best.hinted) == (there, True)
    assert sorted(each.worker_id for each in (best, *others)) == list(WORKERS)
    assert not any(each.hinted for each in others)
    assert not (await router.stub.Explain(request())).choices[0].hinted


async def test_a_session_is_left_for_a_worker_that_is_clearly_better(many):
    workers, router = many
    there = (await router.stub.Route(request("s"))).choice.worker_id
    workers[there].heartbeat.load.waiting_tokens = 1_000_000

    async def left() -> bool:
        (told,) = [
            each
            for each in (await router.stub.Explain(request("s"))).choices
            if each.worker_id == there
        ]
        return told.wait_s > 1

    await eventually(left, "its queue is known")
    choice = (await router.stub.Route(request("s"))).choice
    assert choice.worker_id != there
    assert not choice.hinted
    again = (await router.stub.Route(request("s"))).choice
    assert (again.worker_id, again.hinted) == (choice.worker_id, True), "it has moved"


async def test_a_crowd_of_one_session_spreads_by_its_own_load(many):
    workers, router = many
    seen = set()
    async with contextlib.AsyncExitStack() as stack:
        for worker in workers.values():
            worker.script = hangs()
        for n in range(len(WORKERS)):
            asked = generate_request([n] * 4000, session="s")
            call = router.stub.Generate(asked, timeout=PATIENCE_S)
            stack.callback(call.cancel)
            seen.add((await call.read()).routed.choice.worker_id)
    assert seen == set(WORKERS)


async def test_a_session_leaves_a_worker_that_drains(many):
    workers, router = many
    there = (await router.stub.Route(request("s"))).choice.worker_id
    members = [
        router_pb2.Member(node=each.name, worker_address=each.address, draining=each.name == there)
        for each in workers.values()
    ]
    await router.stub.SetMembers(router_pb2.Members(members=members))
    response = await router.stub.Route(request("s"))
    assert response.choice.worker_id != there
    assert response.fallbacks[-1].worker_id == there


async def test_a_session_leaves_a_worker_that_is_gone(many):
    workers, router = many
    there = (await router.stub.Route(request("s"))).choice.worker_id
    await workers[there].stop()
    await router.members(lambda each: any(m.node == there and m.state != "ready" for m in each))
    assert (await router.stub.Route(request("s"))).choice.worker_id != there


async def test_a_session_leaves_a_worker_that_is_full(many):
    workers, router = many
    there = (await router.stub.Route(request("s"))).choice.worker_id
    workers[there].script = aborts(Status.RESOURCE_EXHAUSTED, "full")
    call = router.stub.Generate(generate_request([1, 1], session="s"), timeout=PATIENCE_S)
    routed = [each.routed.choice async for each in call if each.WhichOneof("body") == "routed"]
    assert routed[0].worker_id == there
    assert routed[0].hinted
    taken = routed[-1].worker_id
    assert taken != there
    choice = (await router.stub.Route(request("s"))).choice
    assert (choice.worker_id, choice.hinted) == (taken, True)


async def test_an_answer_that_is_resumed_takes_its_session_along(many):
    workers, router = many
    for worker in workers.values():
        worker.script = hangs(2)
    asked = generate_request([1] * 9, session="s", resume=True, max_tokens=9)
    call = router.stub.Generate(asked, timeout=PATIENCE_S)
    there = (await call.read()).routed.choice.worker_id
    while (await call.read()).WhichOneof("body") != "chunk":
        pass
    await workers[there].stop()
    while (message := await call.read()).WhichOneof("body") != "routed":
        pass
    best = (await router.stub.Explain(request("s"))).choices[0]
    assert (best.worker_id, best.hinted) == (message.routed.choice.worker_id, True)
    assert best.worker_id != there
    call.cancel()


async def test_workers_with_other_blocks_are_hinted_alike(engines, routers):
    workers = [await engines(StubWorker(f"{n}", block=4 << n)) for n in range(4)]
    router = await routers(*workers)
    there = (await router.stub.Route(request("s"))).choice.worker_id
    for _ in range(8):
        response = await router.stub.Route(request("s"))
        assert (response.choice.worker_id, response.choice.hinted) == (there, True)
        assert len(response.fallbacks) == 3


async def test_one_name_of_two_tenants_is_two_sessions(engines, routers):
    workers = [StubWorker(name) for name in WORKERS]
    for worker in workers:
        worker.info.spaces.add(tenant="red", root=b"r" * 31 + b"t")
        await engines(worker)
    router = await routers(*workers)
    await router.stub.Route(request("s", tenant="red"))
    assert not (await router.stub.Explain(request("s"))).choices[0].hinted
    assert (await router.stub.Explain(request("s", tenant="red"))).choices[0].hinted


async def test_a_name_that_is_too_long_is_refused_in_one_line(many):
    workers, router = many
    assert (await router.stub.Route(request("x" * MAX_SESSION))).choice.worker_id
    long, words = "\u00e9" * 129, ("session has 258 bytes", "limit 256")
    for call in (router.stub.Route, router.stub.Explain):
        async with refused(Status.INVALID_ARGUMENT, *words):
            await call(request(long))
    async with refused(Status.INVALID_ARGUMENT, *words):
        await router.stub.Generate(generate_request([1], session=long)).read()
    one = router_pb2.RouteStreamRequest(tag=7, request=request(long))
    answers = [each async for each in router.stub.RouteStream(iter([one]))]
    assert [(each.tag, each.error.status) for each in answers] == [(7, "INVALID_ARGUMENT")]
    assert not any(worker.requests for worker in workers.values())


async def test_http_clients_name_the_session_in_a_header(engines, routers):
    workers = [await engines(StubWorker(name)) for name in WORKERS]
    router = await routers(*workers, http="127.0.0.1:0")
    base = f"http://{router.http}/v1"
    async with (
        openai.AsyncOpenAI(
            base_url=base, api_key="none", max_retries=0,
            default_headers={"X-Kvtier-Session": "s"},
        ) as client,
        httpx2.AsyncClient(trust_env=False, base_url=base) as raw,
    ):  # fmt: skip
        for n in range(12):
            await client.completions.create(model="tiny", prompt=chr(ord("a") + n) * 3)
        assert sorted(len(worker.requests) for worker in workers) == [0] * 5 + [12]
        messages = [{"role": "user", "content": "hi"}]
        for named, words in (
            (["x" * 257], "x-kvtier-session has 257 bytes, limit 256"),
            (["s", "t"], "x-kvtier-session: 2 of them"),
        ):
            headers = [("x-kvtier-session", each) for each in named]
            body = {"messages": messages}
            answer = await raw.post("/chat/completions", json=body, headers=headers)
            assert answer.status_code == 400
            assert words in answer.json()["error"]["message"]


async def test_the_endpoint_picker_reads_the_header(engines, routers):
    workers = [await engines(StubWorker(name)) for name in WORKERS]
    for n, worker in enumerate(workers):
        worker.info.http_address = f"127.0.0.1:{1000 + n}"
    router = await routers(*workers, epp="127.0.0.1:0")
    async with grpc.aio.insecure_channel(router.epp) as channel:
        process = channel.stream_stream(
            f"/{SERVICE}/Process",
            ext_proc.ProcessingRequest.SerializeToString,
            ext_proc.ProcessingResponse.FromString,
        )

        async def picked(session: str, body: bytes) -> ext_proc.ProcessingResponse:
            path, named = b"/v1/completions", session.encode()
            values = [
                ext_proc.HeaderValue(key=":path", raw_value=path),
                ext_proc.HeaderValue(key=SESSION_HEADER, raw_value=named),
            ]
            headers = ext_proc.HttpHeaders(
                headers=ext_proc.HeaderMap(headers=values), end_of_stream=not body
            )
            asked = [ext_proc.ProcessingRequest(request_headers=headers)]
            if body:
                piece = ext_proc.HttpBody(body=body, end_of_stream=True)
                asked.append(ext_proc.ProcessingRequest(request_body=piece))
            first, *_ = [each async for each in process(asked)]
            return first

        def endpoint(answer: ext_proc.ProcessingResponse) -> str:
            return answer.dynamic_metadata["envoy.lb"][DESTINATION]

        first = endpoint(await picked("s", b'{"prompt": "x"}'))
        for body in [b'{"prompt": "y"}', b"", b'{"prompt": [{"image": 1}]}'] * 4:
            assert endpoint(await picked("s", body)) == first, "also where it cannot be read"
        refusal = (await picked("x" * 257, b"")).immediate_response
        assert refusal.status.code == 400
        assert b"x-kvtier-session has 257 bytes, limit 256" in refusal.body
