"""Routing by stream and by block keys, and answers that another worker goes on with."""

import asyncio

import grpc
import pytest

from kvtier import metrics
from kvtier.router.service import MAX_PENDING, RouterService
from kvtier.wire.pb import router_pb2, worker_pb2
from tests.router.stub_engine import (
    BLOCK,
    SPECIAL,
    Ends,
    StubWorker,
    aborts,
    done,
    ids,
    keys,
    says,
    started,
    tokenizer,
    tokens,
)
from tests.router.support import PATIENCE_S, Status, generate_request, refused, route_request

PROMPT = "a prompt of eight and more blocks, and of a few more than that"
IDS = ids(PROMPT)
KEYS = keys(PROMPT)


def keyed(keys_, block=BLOCK, prompt_tokens=0):
    given = router_pb2.BlockKeys(
        keys=b"".join(keys_), block_tokens=block, prompt_tokens=prompt_tokens
    )
    return router_pb2.RouteRequest(prompt=router_pb2.Prompt(keys=given))


async def test_block_keys_are_routed_as_their_prompt(engines, routers):
    warm, cold = await engines(StubWorker("warm", KEYS)), await engines(StubWorker("cold"))
    router = await routers(warm, cold)
    by_keys = await router.stub.Explain(keyed(KEYS, prompt_tokens=len(IDS)))
    by_ids = await router.stub.Explain(route_request(IDS))
    assert by_keys == by_ids
    assert by_keys.choices[0].worker_id == "warm"
    routed = await router.stub.Route(keyed(KEYS))
    assert (routed.choice.worker_id, routed.prompt_tokens) == ("warm", len(KEYS) * BLOCK)


async def test_only_workers_with_blocks_of_that_size_take_keys(engines, routers):
    large = [bytes([i]) * 16 for i in range(3)]
    other = await engines(StubWorker("other", large, block=8))
    router = await routers(other, await engines(StubWorker("four")))
    answer = await router.stub.Explain(keyed(large, block=8))
    assert [c.worker_id for c in answer.choices] == ["other"]


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (keyed([b"x" * 15]), ["prompt.keys has 15 bytes", "16"]),
        (keyed(KEYS, block=0), ["prompt.block_tokens is 0"]),
        (keyed(KEYS, block=64), ["prompt.block_tokens is 64", "have 4"]),
        (keyed(KEYS, prompt_tokens=3), ["prompt.prompt_tokens is 3", "keys of 4 tokens"]),
        (keyed([]), ["no tokens"]),
    ],
)
async def test_bad_keys_get_one_clear_line(engines, routers, request_, words):
    router = await routers(await engines(StubWorker("a")))
    async with refused(Status.INVALID_ARGUMENT, *words):
        await router.stub.Route(request_)


async def test_nothing_is_generated_from_keys(engines, routers):
    router = await routers(await engines(StubWorker("a")))
    asked = router_pb2.GenerateRequest(prompt=keyed(KEYS).prompt)
    async with refused(Status.INVALID_ARGUMENT, "nothing can be generated from keys"):
        await router.stub.Generate(asked).read()


async def test_a_stream_answers_each_request_by_its_tag(engines, routers):
    warm, cold = await engines(StubWorker("warm", KEYS)), await engines(StubWorker("cold"))
    router = await routers(warm, cold)
    call = router.stub.RouteStream()
    asked = {
        1: route_request(IDS), 2: keyed(KEYS), 3: route_request(PROMPT), 4: route_request(""),
        5: route_request("x", "huge"), 6: route_request([("user", "hi")]),
    }  # fmt: skip
    for tag, request in asked.items():
        await call.write(router_pb2.RouteStreamRequest(tag=tag, request=request))
    answers = {}
    async with asyncio.timeout(PATIENCE_S):
        for _ in asked:
            answer = await call.read()
            answers[answer.tag] = answer
    assert answers.keys() == asked.keys()
    for tag in (1, 2, 3):
        assert answers[tag].response.choice.worker_id == "warm"
        assert [c.worker_id for c in answers[tag].response.fallbacks] == ["cold"]
    assert answers[4].error.status == "INVALID_ARGUMENT"
    assert (answers[5].error.status, answers[6].WhichOneof("body")) == ("NOT_FOUND", "response")
    assert "served: tiny" in answers[5].error.message
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is Status.OK


async def test_a_stream_that_nobody_reads_stops_reading():
    # Over a socket gRPC's own buffers hide it.
    class Front:
        async def within(self, limit_s, work, *, wait):
            return router_pb2.RouteResponse()

        async def route(self, request):
            raise AssertionError

    read = 0

    async def requests():
        nonlocal read
        while True:
            read += 1
            yield router_pb2.RouteStreamRequest(tag=read, request=route_request(IDS))

    answers = RouterService(Front(), None).RouteStream(requests(), None)
    assert (await anext(answers)).tag == 1
    for _ in range(1000):
        await asyncio.sleep(0)
    assert read <= MAX_PENDING + 2
    assert [(await anext(answers)).tag for _ in range(300)] == [*range(2, 302)]
    await answers.aclose()


def dies(text: str):
    return aborting(ids(text), Status.UNAVAILABLE)


def aborting(answer, code):
    async def script(request):
        yield started(request)
        for token in answer:
            yield tokens(token)
        raise Ends(code, "gone")

    return script


async def collect(call):
    async with asyncio.timeout(PATIENCE_S):
        return [message async for message in call]


async def test_a_resumed_answer_has_no_seam(engines, routers):
    warm, cold = await engines(StubWorker("warm", KEYS)), await engines(StubWorker("cold"))
    # The first dies within a character.
    whole = ids("one 😀 two")
    first, rest = whole[:6], whole[6:]

    async def script(request):
        yield started(request)
        for token in rest:
            yield tokens(token)
        yield done(len(rest))

    warm.script, cold.script = aborting(first, Status.UNAVAILABLE), script
    router = await routers(warm, cold)
    before = metrics.RESUMES._value.get()
    messages = await collect(
        router.stub.Generate(generate_request(IDS, max_tokens=50, resume=True, seed=3))
    )
    assert "".join(m.chunk.text for m in messages) == "one 😀 two"
    assert [i for m in messages for i in m.chunk.ids] == whole
    routed = [m.routed for m in messages if m.WhichOneof("body") == "routed"]
    assert [(r.choice.worker_id, r.attempt, r.resumed_tokens) for r in routed] == [
        ("warm", 1, 0), ("cold", 2, len(first)),
    ]  # fmt: skip
    assert sum(m.WhichOneof("body") == "started" for m in messages) == 1
    assert messages[-1].finished.completion_tokens == len(whole)
    (asked,) = cold.requests
    assert list(asked.token_ids) == [*IDS, *first]
    assert (asked.max_tokens, asked.seed) == (50 - len(first), 3)
    assert metrics.RESUMES._value.get() == before + 1


@pytest.mark.parametrize(
    ("answer", "eos", "reason"),
    [("full", [], "LENGTH"), ("end<|end|>", [tokenizer().token_to_id(SPECIAL[0])], "STOP")],
)
async def test_an_answer_that_was_whole_when_its_worker_died_ends(
    engines, routers, answer, eos, reason
):
    warm, cold = await engines(StubWorker("warm", KEYS)), await engines(StubWorker("cold"))
    for worker in (warm, cold):
        worker.info.eos_token_ids.extend(eos)
    warm.script = dies(answer)
    router = await routers(warm, cold)
    limit = len(ids(answer)) if reason == "LENGTH" else 100
    asked = generate_request(IDS, max_tokens=limit, resume=True)
    messages = await collect(router.stub.Generate(asked))
    finished = messages[-1].finished
    assert finished.finish_reason == getattr(worker_pb2, f"FINISH_REASON_{reason}")
    assert finished.completion_tokens == len(ids(answer))
    assert cold.requests == []


async def test_a_resumed_answer_ends_when_nobody_is_left(engines, routers):
    workers = [await engines(StubWorker(name)) for name in "ab"]
    for worker in workers:
        worker.script = dies("xyz")
    router = await routers(*workers)
    async with refused(Status.UNAVAILABLE, "could go on after 6 tokens", "lost"):
        await collect(router.stub.Generate(generate_request(IDS, max_tokens=50, resume=True)))


async def test_a_full_worker_is_passed_over_in_a_resume(engines, routers):
    workers = [
        await engines(StubWorker(name, KEYS[:blocks]))
        for name, blocks in (("a", len(KEYS)), ("b", len(KEYS) // 2), ("c", 0))
    ]
    workers[0].script = dies("xy")
    workers[1].script = aborts(Status.RESOURCE_EXHAUSTED, "full")
    workers[2].script = says("z")
    router = await routers(*workers)
    messages = await collect(
        router.stub.Generate(generate_request(IDS, max_tokens=50, resume=True))
    )
    assert "".join(m.chunk.text for m in messages) == "xyz"


async def test_only_token_ids_are_resumed(engines, routers):
    router = await routers(await engines(StubWorker("a")))
    async with refused(Status.INVALID_ARGUMENT, "resume: only with a prompt in token ids"):
        await router.stub.Generate(generate_request(PROMPT, resume=True)).read()
