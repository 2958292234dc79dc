"""The way to a vLLM server over HTTP, against a server that speaks as vLLM 0.32 does."""

import asyncio
import dataclasses
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing

import grpc
import pytest
from aiohttp import web

from kvtier.config import Config, WorkerConfig
from kvtier.core.tiers import Tier
from kvtier.engine.sequence import Done, FinishReason, Request, Started, Tokens
from kvtier.engine.vllm import gateway
from kvtier.engine.vllm.announced import Announced, read_announced, write_announced
from kvtier.engine.vllm.gateway import Served
from kvtier.engine.vllm.http import Http
from kvtier.engine.vllm.spaces import Spaces
from kvtier.errors import ConfigError, InvalidRequest, Overloaded, WorkerLost
from kvtier.wire.pb import feed_pb2, feed_pb2_grpc

SERVED = Served(
    model="m", revision="r", block_tokens=16, max_tokens=100, vocab_size=1000,
    kv_bytes_per_token=1, doubles_at=0.0, eos_token_ids=(), tokenizer_files={}, none_hash=bytes(32),
    root=bytes(32), events="", replay="", spaces=Spaces({"red": "salt"}, {"poet": "/poet"}),
)  # fmt: skip


def chunk(ids: list[int], finish: str | None = None, **more: object) -> dict[str, object]:
    return {"choices": [{"text": "x", "token_ids": ids, "finish_reason": finish}], **more}


class Server:
    """Answers every completion with `lines`, or with `status`."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.status = 200
        self.asked: dict[str, object] = {}
        self.gone = asyncio.Event()
        self.hold = False

    def say(self, *messages: object) -> None:
        self.lines = [b"data: " + json.dumps(each).encode() + b"\n\n" for each in messages]
        self.lines.append(b"data: [DONE]\n\n")

    async def health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def completions(self, request: web.Request) -> web.StreamResponse:
        self.asked = await request.json()
        if self.status != 200:
            return web.Response(status=self.status, text='{"error": {"message": "no\\nroom"}}')
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        try:
            for line in self.lines:
                await response.write(line)
            if self.hold:
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.gone.set()
            raise
        return response


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    it = Server()
    app = web.Application()
    app.router.add_post("/v1/completions", it.completions)
    app.router.add_get("/health", it.health)
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    it.url = runner.addresses[0]  # type: ignore[attr-defined]
    it.stop = runner.cleanup  # type: ignore[attr-defined]
    yield it
    await runner.cleanup()


@pytest.fixture
async def http(server: Server) -> AsyncIterator[Http]:
    host, port = server.url  # type: ignore[attr-defined]
    it = Http(f"http://{host}:{port}", SERVED)
    yield it
    await it.close()


async def ask(http: Http, **more: object) -> list[Started | Tokens | Done]:
    request = Request(token_ids=[1, 2, 3], max_tokens=5, **more)  # type: ignore[arg-type]
    async with aclosing(http.answer(request)) as answer:
        return [event async for event in answer]


async def test_a_stream_becomes_events(server, http):
    usage = {"prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}}
    server.say(chunk([7], usage=usage), chunk([8, 9]), chunk([], "stop"), {"choices": []})
    started, *tokens, done = await ask(http, temperature=0.5, seed=2**63 + 4, ignore_eos=True)
    assert (started.restored, started.computed_tokens) == ({Tier.VRAM: 2}, 1)
    assert tokens == [Tokens((7,)), Tokens((8, 9))]
    assert (done.finish_reason, done.completion_tokens) == (FinishReason.STOP, 3)
    assert server.asked["prompt"] == [1, 2, 3]
    assert (server.asked["seed"], server.asked["ignore_eos"]) == (4, True)


async def test_a_tenant_is_a_salt_and_an_adapter_a_model(server, http):
    server.say(chunk([1], "length"))
    await ask(http)
    assert server.asked["model"] == "m"
    assert "cache_salt" not in server.asked
    await ask(http, tenant="red", adapter="poet")
    assert server.asked["model"] == "poet"
    assert server.asked["cache_salt"] == "salt"


async def test_a_server_that_does_not_say_what_was_cached(server, http):
    server.say(chunk([7], "length"))
    started, _, done = await ask(http)
    assert (started.restored, started.computed_tokens) == ({}, 3)
    assert done.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("status", "error"),
    [(400, InvalidRequest), (404, InvalidRequest), (429, Overloaded), (503, Overloaded),
     (500, WorkerLost)],
)  # fmt: skip
async def test_a_refusal_keeps_its_meaning_on_one_line(server, http, status, error):
    server.status = status
    with pytest.raises(error, match="no\\\\nroom"):
        await ask(http)


@pytest.mark.parametrize(
    "line", [b"data: {\n\n", b"data: 3\n\n", b'data: {"error": "out of memory"}\n\n']
)
async def test_an_answer_that_makes_no_sense_is_a_lost_worker(server, http, line):
    server.say(chunk([7]))
    server.lines.insert(1, line)
    with pytest.raises(WorkerLost):
        await ask(http)


@pytest.mark.parametrize(
    "messages",
    [
        [chunk([7])],  # cut off
        [chunk([7]), chunk([], "abort")],
        [{"choices": [{"text": "hi", "finish_reason": "stop"}]}],  # tells no token ids
    ],
)
async def test_an_answer_without_its_end_is_never_passed_on_as_whole(server, http, messages):
    server.say(*messages)
    with pytest.raises(WorkerLost, match="no end"):
        await ask(http)


async def test_many_answers_under_way_do_not_make_the_engine_look_dead(server, http):
    server.say(chunk([7]))
    server.hold = True
    answers = [http.answer(Request(token_ids=[1], max_tokens=5)) for _ in range(120)]
    for answer in answers:
        await anext(answer)
    assert await http.alive()
    for answer in answers:
        await answer.aclose()


async def test_a_gateway_whose_engine_is_dead_wants_no_requests():
    class Dead:
        served = dataclasses.replace(SERVED, model="tiny")

        async def alive(self) -> bool:
            return False

        async def close(self) -> None: ...

    stop, address = asyncio.Event(), asyncio.get_running_loop().create_future()
    config = Config(worker=WorkerConfig(listen="127.0.0.1:0", node="dead"))
    serving = asyncio.create_task(
        gateway.serve(config, Dead(), started=address.set_result, stop=stop)
    )
    async with grpc.aio.insecure_channel(await address) as channel, asyncio.timeout(60):
        async for message in feed_pb2_grpc.FeedStub(channel).Watch(feed_pb2.WatchRequest()):
            if message.HasField("heartbeat") and message.heartbeat.draining:
                break
    stop.set()
    await serving


async def test_a_dead_server_is_a_lost_worker(server, http):
    assert await http.alive()
    await server.stop()
    assert not await http.alive()
    with pytest.raises(WorkerLost):
        await ask(http)


async def test_a_caller_that_gives_up_ends_the_request(server, http):
    server.say(chunk([7]))
    server.hold = True
    request = Request(token_ids=[1, 2, 3], max_tokens=5)
    async with aclosing(http.answer(request)) as answer:
        async for event in answer:
            if isinstance(event, Tokens):
                break
    async with asyncio.timeout(60):
        await server.gone.wait()


def test_who_an_engine_is_goes_through_a_file(tmp_path):
    path = tmp_path / "who"
    said = Announced(b"r" * 32, b"n" * 32, "revision")
    write_announced(str(path), said, "sha256_cbor", 16)
    assert read_announced(path, 16) == said
    with pytest.raises(ConfigError, match=r"block_tokens is 32, but .* blocks of 16"):
        read_announced(path, 32)
    write_announced(str(path), said, "sha256", 16)
    with pytest.raises(ConfigError, match="must be sha256_cbor"):
        read_announced(path, 16)
    path.write_text("{")
    with pytest.raises(ConfigError, match=r"worker\.announced"):
        read_announced(path, 16)


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ('engine = "vllm-http"', "worker.url must say where vLLM's HTTP API is"),
        ('engine = "vllm-http"\nurl = "http://127.0.0.1:9"', "worker.url: no vLLM answers there"),
        ('engine = "sglang2"', "worker.engine"),
    ],
)
def test_a_wrong_setting_ends_in_one_line(tmp_path, more, line):
    config = tmp_path / "kvtier.toml"
    config.write_text(f'[worker]\nmodel = "{tmp_path}"\nlisten = "127.0.0.1:0"\n{more}\n')
    command = [sys.executable, "-m", "kvtier.cli", "worker", "--config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert line in done.stderr
    assert "Traceback" not in done.stderr
