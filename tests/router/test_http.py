"""The HTTP front, asked by the official OpenAI client and by raw requests."""

import asyncio
import json
import socket

import httpx2
import openai
import pytest

from kvtier.errors import ConfigError
from kvtier.router import link
from kvtier.router.http.answer import Answer
from kvtier.router.http.openai import Writer, read
from kvtier.wire.pb import router_pb2, worker_pb2
from tests.router.stub_engine import (
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
from tests.router.support import PATIENCE_S, Status, eventually

PROMPT = "a prompt of eight and more blocks"


@pytest.fixture
async def fronts(routers):
    """Starts a router with the HTTP front: its OpenAI client, and a raw one."""
    clients = []

    async def start(*members, **settings):
        router = await routers(*members, **({"http": "127.0.0.1:0"} | settings))
        base = f"http://{router.http}"
        client = openai.AsyncOpenAI(
            base_url=f"{base}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S
        )
        raw = httpx2.AsyncClient(base_url=base, timeout=PATIENCE_S, trust_env=False)
        clients.extend((client.close, raw.aclose))
        return client, raw

    yield start
    for close in clients:
        await close()


def text(words):
    return {"type": "text", "text": words}


async def test_a_chat_is_answered_with_its_usage(engines, fronts):
    worker = await engines(StubWorker("a"))
    worker.script = says("héllo 😀")
    client, _ = await fronts(worker)
    answer = await client.chat.completions.create(
        model="tiny",
        messages=[
            {"role": "system", "content": "be kind"},
            {"role": "user", "content": [text("hi "), text("you")]},
        ],
        max_completion_tokens=50, temperature=0.5, seed=7, extra_headers={"x-request-id": "r1"},
    )  # fmt: skip
    assert answer.choices[0].message.content == "héllo 😀"
    assert answer.choices[0].message.role == "assistant"
    assert (answer.object, answer.model) == ("chat.completion", "tiny")
    assert answer.choices[0].finish_reason == "length"
    assert answer._request_id == "r1"
    prompt = ids("<|system|>be kind<|end|><|user|>hi you<|end|><|assistant|>")
    (asked,) = worker.requests
    assert asked == worker_pb2.WorkerRequest(
        request_id="r1", token_ids=prompt, max_tokens=50, temperature=0.5, seed=7, model="tiny"
    )
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt), len(ids("héllo 😀")))
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


async def test_a_chat_streams(engines, fronts):
    worker = await engines(StubWorker("a"))

    async def script(request):
        yield started(request)
        yield tokens(*ids("héllo 😀"))
        stop = worker_pb2.FINISH_REASON_STOP
        yield worker_pb2.WorkerResponse(done=worker_pb2.Done(finish_reason=stop))

    worker.script = script
    client, _ = await fronts(worker)
    stream = await client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hi"}], stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = [chunk async for chunk in stream]
    deltas = [c.choices[0].delta for c in chunks if c.choices]
    assert deltas[0].role == "assistant"
    assert "".join(d.content or "" for d in deltas) == "héllo 😀"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert {c.object for c in chunks} == {"chat.completion.chunk"}
    assert len({c.id for c in chunks}) == 1
    assert not chunks[-1].choices
    assert chunks[-1].usage.completion_tokens == len(ids("héllo 😀"))
    assert all(c.usage is None for c in chunks[:-1])


async def test_a_completion_of_text_or_token_ids(engines, fronts):
    worker = await engines(StubWorker("a"))
    worker.script = says("yes")
    client, _ = await fronts(worker)
    for prompt in (PROMPT, ids(PROMPT)):
        answer = await client.completions.create(model="tiny", prompt=prompt)
        assert answer.choices[0].text == "yes"
        assert answer.object == "text_completion"
    stream = await client.completions.create(model="tiny", prompt=PROMPT, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == "yes"
    assert [list(r.token_ids) for r in worker.requests] == [ids(PROMPT)] * 3
    assert {r.max_tokens for r in worker.requests} == {16}
    assert len({r.seed for r in worker.requests}) == 3, "without a seed each is another"


async def test_a_chat_without_a_limit_may_take_all_the_room(engines, fronts):
    worker = await engines(StubWorker("a", max_tokens=100))
    client, _ = await fronts(worker)
    await client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}])
    (asked,) = worker.requests
    assert asked.max_tokens == 100 - len(asked.token_ids)


async def test_several_prompts_and_choices_are_answered_in_order(engines, fronts):
    worker = await engines(StubWorker("a"))

    async def echo(request):
        yield started(request)
        yield tokens(*request.token_ids)
        yield done(len(request.token_ids))

    worker.script = echo
    client, _ = await fronts(worker)
    answer = await client.completions.create(model="tiny", prompt=["one", "three"], n=2, seed=5)
    assert [c.text for c in answer.choices] == ["one", "one", "three", "three"]
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    assert sorted(r.seed for r in worker.requests) == [5, 5, 6, 6]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (8, 16)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_ends_the_answer_and_the_worker(engines, fronts, stream):
    worker = await engines(StubWorker("a"))

    async def script(request):
        yield started(request)
        for token in ids("one, two END"):
            yield tokens(token)
        await asyncio.Event().wait()

    worker.script = script
    client, _ = await fronts(worker)
    answer = await client.completions.create(
        model="tiny", prompt=PROMPT, stop=["wo E", "nope"], stream=stream
    )
    choices = [chunk.choices[0] async for chunk in answer] if stream else answer.choices
    assert "".join(c.text for c in choices) == "one, t"
    assert choices[-1].finish_reason == "stop"
    async with asyncio.timeout(PATIENCE_S):
        await worker.cancelled.wait()


async def test_tokens_behind_a_stop_are_not_counted_though_they_came_with_it(engines, fronts):
    worker = await engines(StubWorker("a"))

    async def script(request):
        yield started(request)
        yield tokens(*ids("one END and much that nobody wants"))
        await asyncio.Event().wait()

    worker.script = script
    client, _ = await fronts(worker)
    answer = await client.completions.create(model="tiny", prompt=PROMPT, stop="END")
    assert answer.choices[0].text == "one "
    assert answer.usage.completion_tokens == len(ids("one END"))


async def test_what_was_held_back_for_a_stop_comes_at_the_end(engines, fronts):
    worker = await engines(StubWorker("a"))
    worker.script = says("one STO")
    client, _ = await fronts(worker)
    answer = await client.completions.create(model="tiny", prompt=PROMPT, stop="STOP")
    assert answer.choices[0].text == "one STO"


async def test_models_health_and_metrics(engines, fronts):
    worker = await engines(StubWorker("a"))
    client, raw = await fronts(worker)
    assert [m.id for m in (await client.models.list()).data] == ["tiny"]
    assert (await client.models.retrieve("tiny")).id == "tiny"
    with pytest.raises(openai.NotFoundError, match="is not served; served: tiny"):
        await client.models.retrieve("huge")
    assert (await raw.get("/health")).status_code == 200
    assert 'kvtier_members{state="ready"}' in (await raw.get("/metrics")).text
    await worker.stop()

    async def unhealthy() -> bool:
        return (await raw.get("/health")).status_code == 503

    await eventually(unhealthy, "no worker, no health")


async def test_a_model_whose_worker_is_away_is_listed_a_moment_only(engines, fronts, monkeypatch):
    x, y = await engines(StubWorker("a", model="x")), await engines(StubWorker("b", model="y"))
    client, _ = await fronts(x, y)

    async def listed() -> list[str]:
        return [m.id for m in (await client.models.list()).data]

    async def ask(model: str) -> str:
        return (await client.completions.create(model=model, prompt=PROMPT)).choices[0].text

    async def away() -> bool:
        try:
            await ask("y")
        except openai.InternalServerError as error:
            return error.status_code == 503 and "no worker of 'y' is ready" in error.message
        return False

    monkeypatch.setattr(link, "EXPECTED_S", 3600.0)
    assert await listed() == ["x", "y"]
    await y.stop()
    await eventually(away, "its worker is away")
    assert await listed() == ["x", "y"], "it may be restarting"
    assert (await client.models.retrieve("y")).id == "y"

    monkeypatch.setattr(link, "EXPECTED_S", 0.0)
    assert await listed() == ["x"]
    assert await away(), "who asks for it may come again"
    with pytest.raises(openai.InternalServerError, match="no worker of 'y' is ready"):
        await client.models.retrieve("y")
    with pytest.raises(openai.NotFoundError, match="'z' is not served; served: x"):
        await ask("z")
    assert await ask("") == "hello", "one is left"

    await y.restart()

    async def back() -> bool:
        return await listed() == ["x", "y"]

    await eventually(back, "it is listed again")
    assert await ask("y") == "hello"


CHAT = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize(
    ("path", "body", "status", "words", "param"),
    [
        ("completions", {"prompt": PROMPT, "model": "huge"}, 404, "served: tiny", None),
        ("completions", {}, 400, "prompt: must be", "prompt"),
        ("completions", {"prompt": [1, "x"]}, 400, "prompt: must be", "prompt"),
        ("completions", {"prompt": [[1], [-1]]}, 400, "prompt: must be", "prompt"),
        ("completions", {"prompt": [10**6]}, 400, "token id 1000000", None),
        ("completions", {"prompt": ["x"] * 9, "n": 2}, 400, "limit 16", "n"),
        ("completions", {"prompt": "x", "max_tokens": 0}, 400, "max_tokens is 0", "max_tokens"),
        ("completions", {"prompt": "x", "temperature": 3}, 400, "temperature is 3", "temperature"),
        ("completions", {"prompt": "x", "stop": [""]}, 400, "stop: must be", "stop"),
        ("completions", {"prompt": "x", "stream": 1}, 400, "stream: must be", "stream"),
        ("completions", {"prompt": "x", "stream_options": {}, "top_p": 0.5}, 400, "top_p", "top_p"),
        ("completions", {"prompt": "x", "logprobs": 0}, 400, "logprobs: not", "logprobs"),
        ("completions", {"prompt": "x", "top_k": 20}, 400, "top_k: not supported", "top_k"),
        ("chat/completions", {**CHAT, "guided_json": {}}, 400, "guided_json", "guided_json"),
        ("chat/completions", {"messages": []}, 400, "messages: must be", "messages"),
        ("chat/completions", {**CHAT, "tools": [{"type": "function"}]}, 400, "tools", "tools"),
        ("chat/completions", {**CHAT, "n": 17}, 400, "n is 17", "n"),
        (
            "chat/completions", {"messages": [{"role": "nobody", "content": "x"}]},
            400, "the model's template refuses it: who?", None,
        ),
        (
            "chat/completions", {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            400, "only parts of type text", "messages",
        ),
        ("nothing", {}, 404, "Not Found", None),
        ("no%E2%80%A8such%1B[31m", {}, 404, "POST /v1/no such [31m: Not Found", None),
    ],
)  # fmt: skip
async def test_a_bad_request_is_told_in_openais_shape(
    engines, fronts, path, body, status, words, param
):
    worker = await engines(StubWorker("a"))
    _, raw = await fronts(worker)
    answer = await raw.post(f"/v1/{path}", json=body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert words in error["message"]
    assert error["message"].isprintable()
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert worker.requests == []


@pytest.mark.parametrize("chat", [True, False])
async def test_what_changes_nothing_is_taken(engines, fronts, chat):
    """As frameworks send it: every field that they know, at its default."""
    client, _ = await fronts(await engines(StubWorker("a")))
    usual = {
        "model": "tiny", "top_p": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0,
        "logit_bias": {}, "n": 1, "stop": None, "user": "me",
        "extra_body": {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "min_tokens": 0,
                       "skip_special_tokens": True, "stop_token_ids": []},
    }  # fmt: skip
    if chat:
        answer = await client.chat.completions.create(
            **CHAT, **usual, logprobs=False, tool_choice="auto", parallel_tool_calls=True
        )
        assert answer.choices[0].message.content == "hello"
    else:
        answer = await client.completions.create(prompt="x", **usual, echo=False, best_of=1)
        assert answer.choices[0].text == "hello"


async def test_a_prompt_that_is_too_long_has_the_code_that_clients_look_for(engines, fronts):
    client, _ = await fronts(await engines(StubWorker("a", max_tokens=20)))
    with pytest.raises(openai.BadRequestError) as caught:
        await client.completions.create(model="tiny", prompt="x" * 20)
    assert caught.value.code == "context_length_exceeded"
    assert "20 tokens" in caught.value.message
    with pytest.raises(openai.BadRequestError) as caught:
        await client.completions.create(model="tiny", prompt=[10**6])
    assert caught.value.code is None


async def test_an_idle_connection_outlives_those_of_clients_and_proxies(engines, fronts):
    """Else the end that closes first meets a request under way; nginx and AWS keep 60 s."""
    _, raw = await fronts(await engines(StubWorker("a")))
    loop = asyncio.get_running_loop()
    before = loop.time()
    assert (await raw.get("/health")).status_code == 200

    def closing() -> list[float]:
        return [
            timer.when() - before
            for timer in loop._scheduled
            if "keep_alive" in repr(timer) and not timer.cancelled()
        ]

    await eventually(closing, "the server has set when it will close the connection")
    assert min(closing()) > 60


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b'{"prompt": "\\uD800"}', 400),
        (b'{"prompt": "\xed\xa0\x80"}', 400),
        (b'{"prompt": 1' + b"0" * 5000 + b"}", 400),
        (b"[]", 400),
        (b"\xff", 400),
        (b"[" * 100_000, 400),
        (b" " * (17 << 20), 413),
    ],
)
async def test_a_body_that_is_no_request_is_refused(engines, fronts, body, status):
    _, raw = await fronts(await engines(StubWorker("a")))
    for content in (body, _pieces(body)):
        answer = await raw.post("/v1/completions", content=content)
        assert answer.status_code == status
        assert answer.json()["error"]["message"].startswith("body")


@pytest.mark.parametrize("told", ["9" * 5000, "9" * 30, "0", "x", "60000"])
async def test_a_proxys_time_limit_is_read_with_care(engines, fronts, told):
    _, raw = await fronts(await engines(StubWorker("a")))
    headers = {"x-envoy-expected-rq-timeout-ms": told}
    answer = await raw.post("/v1/completions", json={"prompt": "x"}, headers=headers)
    assert answer.status_code == 200


async def test_a_tenant_that_is_told_twice_is_refused(engines, fronts):
    _, raw = await fronts(await engines(StubWorker("a")))
    headers = [("x-kvtier-tenant", "red"), ("x-kvtier-tenant", "blue")]
    answer = await raw.post("/v1/completions", json={"prompt": "x"}, headers=headers)
    assert answer.status_code == 400
    assert "a proxy must overwrite it" in answer.json()["error"]["message"]


async def test_a_body_that_does_not_come_ends_at_the_deadline(engines, fronts):
    _, raw = await fronts(await engines(StubWorker("a")))
    reader, writer = await asyncio.open_connection(raw.base_url.host, raw.base_url.port)
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n"
        b"x-envoy-expected-rq-timeout-ms: 300\r\n\r\n{"
    )
    async with asyncio.timeout(PATIENCE_S):
        answer = await reader.readuntil(b"within 0.3 s")
    assert answer.startswith(b"HTTP/1.1 504")
    writer.close()
    await writer.wait_closed()


async def _pieces(body: bytes):
    yield body[: len(body) // 2]
    yield body[len(body) // 2 :]


@pytest.mark.parametrize("stream", [False, True])
async def test_each_end_has_its_status(engines, fronts, stream):
    worker = await engines(StubWorker("a"))
    client, _ = await fronts(worker, max_requests=1, max_waiting=0)

    async def ask(**headers):
        return await client.completions.create(
            model="tiny", prompt=PROMPT, stream=stream, extra_headers=headers
        )

    worker.script = aborts(Status.RESOURCE_EXHAUSTED, "64 requests wait")
    with pytest.raises(openai.RateLimitError, match="every worker of 'tiny' is full") as caught:
        await ask()
    assert int(caught.value.response.headers["retry-after"]) >= 1
    worker.script = aborts(Status.UNAVAILABLE, "gone")
    with pytest.raises(openai.InternalServerError, match="no worker of 'tiny' could begin") as no:
        await ask()
    assert no.value.status_code == 503
    assert no.value.response.headers["retry-after"] == "1"
    worker.script = hangs()
    with pytest.raises(openai.InternalServerError, match=r"not finished within 0\.5 s") as late:
        await ask(**{"x-envoy-expected-rq-timeout-ms": "500"})
    assert late.value.status_code == 504
    worker.cancelled.clear()
    before = len(worker.requests)
    first = asyncio.create_task(ask())
    await eventually(lambda: len(worker.requests) > before, "it takes the one place")
    with pytest.raises(openai.RateLimitError, match="max_requests"):
        await ask()
    first.cancel()  # the client hangs up
    async with asyncio.timeout(PATIENCE_S):
        await worker.cancelled.wait()


async def test_a_client_that_hangs_up_in_mid_answer_cancels_the_worker(engines, fronts):
    worker = await engines(StubWorker("a"))
    worker.script = hangs(2)
    client, _ = await fronts(worker)
    stream = await client.completions.create(model="tiny", prompt=PROMPT, stream=True)
    await anext(aiter(stream))
    await stream.close()
    async with asyncio.timeout(PATIENCE_S):
        await worker.cancelled.wait()


async def test_a_client_that_hangs_up_with_another_request_behind_the_first_cancels_it(
    engines, routers
):
    worker, ended = await engines(StubWorker("a")), asyncio.Event()

    async def script(request):
        yield started(request)
        try:
            while True:
                yield tokens(*ids("x"))
        finally:
            ended.set()

    worker.script = script
    router = await routers(worker, http="127.0.0.1:0")
    host, _, port = router.http.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = json.dumps({"model": "tiny", "prompt": PROMPT, "stream": True})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(2 * (head + body).encode())
    await reader.readuntil(b"data: ")
    writer.transport.abort()
    async with asyncio.timeout(PATIENCE_S):
        await ended.wait()
    assert len(worker.requests) == 1, "nobody waits for the second one"


async def test_a_worker_lost_in_mid_answer_is_told_in_the_stream(engines, fronts):
    worker = await engines(StubWorker("a"))
    worker.script = aborts(Status.UNAVAILABLE, "shutting down", after=3)
    client, raw = await fronts(worker)
    stream = await client.completions.create(model="tiny", prompt=PROMPT, stream=True)
    with pytest.raises(openai.APIError, match="worker a was lost after 3 tokens"):
        _ = [chunk async for chunk in stream]
    body = {"model": "tiny", "prompt": PROMPT, "stream": True}
    lines = (await raw.post("/v1/completions", json=body)).text.split("\n\n")
    assert "error" in json.loads(lines[-2].removeprefix("data: "))
    assert "[DONE]" not in "".join(lines)
    with pytest.raises(openai.InternalServerError, match="was lost after 3 tokens"):
        await client.completions.create(model="tiny", prompt=PROMPT)


@pytest.mark.parametrize("stream", [False, True])
async def test_one_choice_that_fails_ends_them_all(engines, fronts, stream):
    worker = await engines(StubWorker("a"))
    client, _ = await fronts(worker)
    asked = 0

    async def script(request):
        nonlocal asked
        asked += 1
        how = hangs() if asked == 1 else aborts(Status.RESOURCE_EXHAUSTED, "64 requests wait")
        async for message in how(request):
            yield message

    worker.script = script
    with pytest.raises(openai.RateLimitError, match="every worker of 'tiny' is full"):
        await client.completions.create(model="tiny", prompt=PROMPT, n=2, stream=stream)
    async with asyncio.timeout(PATIENCE_S):
        await worker.cancelled.wait()


async def test_a_worker_lost_before_its_first_token_is_not_seen(engines, fronts):
    warm, cold = await engines(StubWorker("warm", keys(PROMPT))), await engines(StubWorker("cold"))
    warm.script, cold.script = aborts(Status.UNAVAILABLE, "gone"), says("ok")
    client, _ = await fronts(warm, cold)
    answer = await client.completions.create(model="tiny", prompt=PROMPT)
    assert answer.choices[0].text == "ok"
    assert warm.requests


async def test_a_slow_client_holds_up_its_own_worker_only():
    # Over a socket the kernel's buffers hide it.
    written = 0

    class Front:
        async def within(self, limit_s, work, *, wait):
            return await work(1e9)

        async def generate(self, request, deadline, write, **_):
            nonlocal written
            while True:
                written += 1
                chunk = router_pb2.Chunk(ids=[1], text="x")
                await write([router_pb2.GenerateResponse(chunk=chunk)])

    asked = read({"prompt": "x", "stream": True}, chat=False, request_id="", luck=lambda: 1)
    room, taken = asyncio.Semaphore(1), 0

    async def emit(pieces) -> None:
        nonlocal taken
        await room.acquire()
        taken += 1

    answer = Answer(Front(), asked, Writer(asked, "id", "tiny", 0), None)
    streaming = asyncio.create_task(answer.stream(emit))
    await eventually(lambda: written, "the worker has begun")
    for allowed in (1, 300):
        for _ in range(allowed - 1):
            room.release()
        for _ in range(1000):
            await asyncio.sleep(0)
        assert (taken, written) == (allowed, allowed + 1), "no more is read than is taken"
    streaming.cancel()
    await asyncio.gather(streaming, return_exceptions=True)
    assert written == 301


async def test_a_taken_http_port_is_named(engines, routers):
    first = await routers(http="127.0.0.1:0")
    with pytest.raises(ConfigError, match=rf"router\.http.*{first.http}"):
        await routers(http=first.http)


async def test_stopping_lets_running_requests_end(engines, routers):
    worker, go = await engines(StubWorker("a")), asyncio.Event()

    async def script(request):
        yield started(request)
        yield tokens(*ids("x"))
        await go.wait()
        yield tokens(*ids("y"))
        yield done(2)

    worker.script = script
    router = await routers(worker, http="127.0.0.1:0")
    async with openai.AsyncOpenAI(
        base_url=f"http://{router.http}/v1", api_key="none", max_retries=0
    ) as client:
        stream = aiter(await client.completions.create(model="", prompt=PROMPT, stream=True))
        assert (await anext(stream)).choices[0].text == "x"
        router.stopping.set()
        go.set()
        assert "".join([c.choices[0].text async for c in stream]) == "y"
    async with asyncio.timeout(PATIENCE_S):
        await router.task


async def test_an_answer_does_not_wait_for_the_clients_acknowledgement(routers):
    router = await routers(http="127.0.0.1:0")
    reader, writer = await asyncio.open_connection(*router.http.split(":"))
    writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
    assert b"503" in await reader.readline()
    here = writer.get_extra_info("sockname")[1]
    writer_side = [
        transport.get_extra_info("socket")
        for transport in asyncio.get_running_loop()._transports.values()
        if transport.get_extra_info("peername") == ("127.0.0.1", here)
    ]
    assert [each.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for each in writer_side] == [1]
    writer.close()
    await writer.wait_closed()
