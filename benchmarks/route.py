"""What does the router cost, and what does it hold up to?

Eight fake workers that sleep by a model of their speed, real sockets, all on this machine: client,
router and workers share its cores. Each way through is measured in turn with the way straight to
a worker. `--peers PYTHON` names the Python of an environment with sglang-router (cache_aware).
"""

import asyncio
import itertools
import json
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

import grpc

from benchmarks.common import Bar, scratch, server, summary
from benchmarks.fake_engine import MODEL, WARM, WORDS, ready, workers
from benchmarks.proxies import envoy, free_port, sglang
from kvtier.wire.pb import router_pb2, router_pb2_grpc, worker_pb2, worker_pb2_grpc

WORKERS = 8
AT_ONCE = 32
ANSWER = 64  # tokens of an answer that is streamed
PROMPT_BYTES = 2000
LONG_BYTES = 500_000
RECOVERY_S = 3.0

Ask = Callable[[], Awaitable[object]]


def run(*, tiny: bool, peers: str = "") -> dict[str, object]:
    with scratch() as folder, workers(WORKERS, 0) as ends:
        ways, bars, other = {}, [], {}
        members = ", ".join(
            f'{{ node = "n{i}", worker = "{end["grpc"]}" }}' for i, end in enumerate(ends)
        )
        http, epp = free_port(), free_port()
        toml = f"""
            [router]
            listen = "127.0.0.1:0"
            http = "127.0.0.1:{http}"
            epp = "127.0.0.1:{epp}"
            members = [{members}]
        """
        with server("router", toml, folder) as address:
            asyncio.run(ready(address, WORKERS))
            sizes = (30, 60) if tiny else (500, 2000)
            asyncio.run(_grpc(address, ends, ways, bars, other, sizes))
            asyncio.run(_http(http, epp, ends, ways, bars, other, sizes, folder, peers))
            asyncio.run(_held_up(address, ways, bars, tiny))
        _recovery(folder, ways, bars, tiny)
    return {"workers": WORKERS, **other, "times": ways, "bars": [bar.as_dict() for bar in bars]}


async def _grpc(address, ends, ways, bars, other, sizes) -> None:
    async with AsyncExitStack() as stack:
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(address))
        direct = await stack.enter_async_context(grpc.aio.insecure_channel(ends[0]["grpc"]))
        stub = router_pb2_grpc.RouterStub(channel)
        worker = worker_pb2_grpc.WorkerStub(direct)
        asked = router_pb2.Prompt(tokens=router_pb2.TokenIds(ids=WARM))
        route = router_pb2.RouteRequest(prompt=asked)
        generate = router_pb2.GenerateRequest(prompt=asked, max_tokens=1)
        together = router_pb2.GenerateRequest(prompt=asked, max_tokens=1, together=True)
        bare = worker_pb2.WorkerRequest(token_ids=WARM, max_tokens=1)
        stream = stub.RouteStream()

        async def by_stream() -> None:
            await stream.write(router_pb2.RouteStreamRequest(request=route))
            assert (await stream.read()).response.choice.worker_id

        asks: dict[str, Ask] = {
            "route": lambda: stub.Route(route),
            "route by stream": by_stream,
            "generate": lambda: _drain(stub.Generate(generate)),
            "generate together": lambda: _drain(stub.Generate(together)),
            "straight to a worker": lambda: _drain(worker.Generate(bare)),
        }
        ways["gRPC, one at a time"] = found = await _in_turn(asks, sizes[0])
        rates = {
            name: await _rate(asks[name], sizes[1])
            for name in ("route", "generate", "generate together", "straight to a worker")
        }
        rates["route by stream"] = await _stream_rate(stub, route, sizes[1])
        stream.cancel()
        longer = router_pb2.GenerateRequest(prompt=asked, max_tokens=ANSWER)
        straight = worker_pb2.WorkerRequest(token_ids=WARM, max_tokens=ANSWER)
        other["tokens_per_s"] = {
            "generate": await _tokens_rate(lambda: _drain(stub.Generate(longer)), sizes[1]),
            "straight to a worker": await _tokens_rate(
                lambda: _drain(worker.Generate(straight)), sizes[1]
            ),
        }
        # The fake worker has all tokens at once: what waits together is passed on together.
        other["messages_an_answer"] = {
            "generate": await _drain(stub.Generate(longer)),
            "straight to a worker": await _drain(worker.Generate(straight)),
        }
    other["requests_per_s"] = rates
    other["generate_added_ms"] = 1e3 * (
        found["generate"]["median_s"] - found["straight to a worker"]["median_s"]
    )
    median = {name: each["median_s"] * 1e3 for name, each in found.items()}
    bars += [
        Bar("Route, 512 tokens, 8 workers, p50 in ms", median["route"], at_most=2.0),
        Bar("Route by stream in units of a call", median["route by stream"] / median["route"],
            at_most=0.8),
        Bar("Generate adds, p50 in ms", other["generate_added_ms"], at_most=2.5),
        Bar("requests a second, Route by stream", rates["route by stream"], at_least=1000),
    ]  # fmt: skip


async def _http(http, epp, ends, ways, bars, other, sizes, folder, peers) -> None:
    rng = random.Random(1)
    async with AsyncExitStack() as stack:
        at = {"straight to a worker": ends[0]["http"], "kvtier": f"127.0.0.1:{http}"}
        notes: dict[str, str] = {}
        for name, start in (
            ("Envoy with kvtier as endpoint picker", envoy(f"127.0.0.1:{epp}", folder)),
            ("sglang-router cache_aware", sglang(peers, [end["http"] for end in ends], folder)),
        ):
            found = await stack.enter_async_context(start)
            if ":" in found and " " not in found:
                at[name] = found
            else:
                notes[name] = found
        asks: dict[str, Ask] = {}
        for name, address in at.items():
            pool = Pool(address, rng)
            stack.push_async_callback(pool.close)
            asks[name] = pool.ask
        ways["HTTP, one at a time, 2 KB"] = found = await _in_turn(asks, sizes[0])
        rates = {name: await _rate(ask, sizes[1]) for name, ask in asks.items()}
        streams = Pool(at["kvtier"], rng, ANSWER)
        stack.push_async_callback(streams.close)
        other["tokens_per_s"]["HTTP, streamed"] = await _tokens_rate(streams.ask, sizes[1])
    straight = found["straight to a worker"]["median_s"]
    other["http_requests_per_s"] = rates
    other["http_added_ms"] = {n: 1e3 * (t["median_s"] - straight) for n, t in found.items()}
    other["not_measured"] = notes
    bars.append(Bar("HTTP adds, p50 in ms", other["http_added_ms"]["kvtier"], at_most=4.0))
    if "sglang-router cache_aware" in at:
        theirs = other["http_added_ms"]["sglang-router cache_aware"]
        ratio = other["http_added_ms"]["kvtier"] / theirs
        bars.append(Bar("HTTP adds, in units of sglang-router", ratio, at_most=10))


async def _held_up(address, ways, bars, tiny) -> None:
    """Route beside prompts of 500 KB that are read at the same time."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = router_pb2_grpc.RouterStub(channel)
        short = router_pb2.RouteRequest(
            prompt=router_pb2.Prompt(tokens=router_pb2.TokenIds(ids=WARM[:64]))
        )
        long = router_pb2.RouteRequest(prompt=router_pb2.Prompt(text=_text(LONG_BYTES)))
        count = 20 if tiny else 400
        quiet = await _times(lambda: stub.Route(short), count)
        stop = False

        async def keep_reading() -> int:
            done = 0
            while not stop:
                await stub.Route(long)
                done += 1
            return done

        reading = [asyncio.ensure_future(keep_reading()) for _ in range(2)]
        await asyncio.sleep(0.1)
        beside = await _times(lambda: stub.Route(short), count)
        stop = True
        assert sum(await asyncio.gather(*reading)) > 0
    ways["Route of 64 tokens"] = {"alone": summary(quiet), "beside 500 KB": summary(beside)}
    p99 = summary(beside)["p99_s"] * 1e3
    bars.append(Bar("Route beside two prompts of 500 KB, p99 in ms", p99, at_most=100))


def _recovery(folder, ways, bars, tiny) -> None:
    """A worker is killed and comes back: how long until the index is what it holds."""
    port = free_port()
    taken: list[float] = []
    toml = f"""
        [router]
        listen = "127.0.0.1:0"
        members = [{{ node = "a", worker = "127.0.0.1:{port}" }}]
    """
    with server("router", toml, folder) as address:
        for _ in range(2 if tiny else 10):
            with workers(1, port):
                start = time.perf_counter()
                asyncio.run(ready(address, 1))
                taken.append(time.perf_counter() - start)
    ways["a worker's return is known"] = summary(taken)
    bars.append(
        Bar("index true after a worker's return, worst in s", max(taken), at_most=RECOVERY_S)
    )


class Pool:
    """Keep-alive HTTP/1.1 connections to one address; prompts of 2 KB of which half is shared.

    Answers of more than one token are streamed.
    """

    def __init__(self, address: str, rng: random.Random, tokens: int = 1) -> None:
        self._fields = {"model": MODEL, "max_tokens": tokens, "stream": tokens > 1}
        self._host, _, self._port = address.partition(":")
        self._rng = rng
        self._head = _text(PROMPT_BYTES // 2)
        self._free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(self) -> None:
        reader, writer = (
            self._free.pop()
            if self._free
            else await asyncio.open_connection(self._host, int(self._port))
        )
        tail = " ".join(f"w{self._rng.randrange(WORDS)}" for _ in range(PROMPT_BYTES // 12))
        body = json.dumps({**self._fields, "prompt": f"{self._head} {tail}"}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        answer = (await reader.readuntil(b"\r\n\r\n")).lower()
        assert answer.startswith(b"http/1.1 200"), answer
        if b"transfer-encoding: chunked" in answer:
            while (size := int((await reader.readline()).split(b";")[0], 16)) > 0:
                await reader.readexactly(size + 2)
            await reader.readline()
        else:
            length = answer.partition(b"content-length:")[2].split(b"\r\n")[0]
            await reader.readexactly(int(length))
        self._free.append((reader, writer))

    async def close(self) -> None:
        for _, writer in self._free:
            writer.close()


async def _drain(call) -> int:
    """How many messages came."""
    return sum([1 async for _ in call])


async def _times(ask: Ask, count: int) -> list[float]:
    times = []
    for _ in range(count):
        start = time.perf_counter()
        await ask()
        times.append(time.perf_counter() - start)
    return times


async def _in_turn(asks: dict[str, Ask], count: int) -> dict[str, dict[str, float]]:
    """One of each, again and again; the first are not counted."""
    times: dict[str, list[float]] = {name: [] for name in asks}
    for _ in range(count + 10):
        for name, ask in asks.items():
            times[name] += await _times(ask, 1)
    return {name: summary(each[10:]) for name, each in times.items()}


async def _rate(ask: Ask, count: int) -> float:
    """Requests a second, AT_ONCE under way."""
    left = iter(range(count))

    async def client() -> None:
        for _ in left:
            await ask()

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(AT_ONCE)))
    return count / (time.perf_counter() - start)


async def _tokens_rate(ask: Ask, count: int) -> float:
    """Tokens a second of answers of ANSWER tokens, AT_ONCE under way."""
    return ANSWER * await _rate(ask, max(AT_ONCE, count // 10))


async def _stream_rate(stub, route, count: int) -> float:
    stream = stub.RouteStream()
    room = asyncio.Semaphore(AT_ONCE)

    async def write() -> None:
        for i in range(count):
            await room.acquire()
            await stream.write(router_pb2.RouteStreamRequest(tag=i, request=route))

    start = time.perf_counter()
    writing = asyncio.ensure_future(write())
    for _ in range(count):
        await stream.read()
        room.release()
    await writing
    took = time.perf_counter() - start
    stream.cancel()
    return count / took


def _text(nbytes: int) -> str:
    words = (f"w{i % WORDS}" for i in itertools.count())
    parts, size = [], 0
    while size < nbytes:
        parts.append(next(words))
        size += len(parts[-1]) + 1
    return " ".join(parts)
