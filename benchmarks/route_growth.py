"""Does the router's memory grow over a million prompts that never come again?

Eight fake workers, real sockets to the end; see route.py. A million by their block keys, and as
many as a minute takes each way: as text through Route, through Generate, and through HTTP. Growth
is from the first quarter of a way's requests (of its time, where it has a minute) to its last.
"""

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import grpc

from benchmarks.common import Bar, scratch, server, summary
from benchmarks.fake_engine import BLOCK, WORDS, ready, workers
from benchmarks.proxies import free_port
from benchmarks.route import Pool
from kvtier.wire.pb import router_pb2, router_pb2_grpc

WORKERS = 8
REQUESTS, STREAMS, AHEAD = 1_000_000, 4, 64
MINUTE_S, AT_ONCE = 60.0, 32
GROWTH_MIB = 16
GROWTH_NBYTES = 64  # a request: one object that stays of each would be more


class Growth:
    """Counts answers, and how the router's memory stands when a quarter is through."""

    def __init__(self, pid: int, requests: int, seconds: float = 0.0) -> None:
        self._pid = pid
        self._requests = requests
        self._end = time.monotonic() + seconds if seconds else float("inf")
        self._quarter = self._end - 0.75 * seconds if seconds else float("inf")
        self._start = time.monotonic()
        self.count = 0
        self._settled: tuple[int, int] | None = None

    def fresh(self) -> Iterator[int]:
        """Numbers of prompts that nobody has had, until it is enough."""
        for number in range(self._requests):
            if number and time.monotonic() >= self._end:
                return
            yield number

    def answered(self) -> None:
        """One request has its answer."""
        self.count += 1
        if self._settled is None and (
            self.count >= self._requests // 4 or time.monotonic() >= self._quarter
        ):
            self._settled = self.count, _rss(self._pid)

    def found(self) -> dict[str, float]:
        """What became of it."""
        assert self._settled is not None
        took, rss = time.monotonic() - self._start, _rss(self._pid)
        since, before = self._settled
        return {
            "requests": self.count, "from": since, "mib": (rss - before) / 2**20,
            "nbytes_a_request": (rss - before) / max(1, self.count - since),
            "rss_mib": rss / 2**20, "requests_per_s": self.count / took, "took_s": took,
        }  # fmt: skip


def run(*, tiny: bool) -> dict[str, object]:
    with scratch() as folder, workers(WORKERS) as ends:
        members = ", ".join(
            f'{{ node = "n{i}", worker = "{end["grpc"]}" }}' for i, end in enumerate(ends)
        )
        http = f"127.0.0.1:{free_port()}"
        listen = f'listen = "127.0.0.1:0"\nhttp = "{http}"'
        with server("router", f"[router]\n{listen}\nmembers = [{members}]\n", folder) as address:
            asyncio.run(ready(address, WORKERS))
            pid = _pid_of(folder)
            ways = {
                "block keys": (partial(_by_stream, _keys), 500 if tiny else REQUESTS, 0.0),
                "text": (partial(_by_stream, _text), 500 if tiny else REQUESTS, MINUTE_S),
                "Generate": (_generate, 200 if tiny else REQUESTS, MINUTE_S),
                "HTTP": (partial(_http, http), 200 if tiny else REQUESTS, MINUTE_S),
            }
            found = {}
            for name, (ask, requests, seconds) in ways.items():
                growth = Growth(pid, requests, seconds)
                asyncio.run(ask(address, growth))
                found[name] = growth.found()
    bars = [
        Bar(
            f"growth over prompts that never come again, {name}, MiB",
            each["mib"],
            at_most=GROWTH_MIB,
        )
        for name, each in found.items()
    ]
    if not tiny:  # a page or two weigh much among a few requests
        bars += [
            Bar(
                f"growth by {name}, bytes a request",
                each["nbytes_a_request"],
                at_most=GROWTH_NBYTES,
            )
            for name, each in found.items()
        ]
    times = {f"all by {name}": summary([each["took_s"]]) for name, each in found.items()}
    return {
        "workers": WORKERS, "ways": found, "times": times, "bars": [bar.as_dict() for bar in bars]
    }  # fmt: skip


def _keys(number: int) -> router_pb2.Prompt:
    given = b"".join((number * 8 + i).to_bytes(16, "big") for i in range(8))
    return router_pb2.Prompt(keys=router_pb2.BlockKeys(keys=given, block_tokens=BLOCK))


def _text(number: int) -> router_pb2.Prompt:
    """128 words, which begin with the number."""
    digits = [number // WORDS**i % WORDS for i in range(3)]
    return router_pb2.Prompt(text=" ".join(f"w{each}" for each in (*digits, *range(125))))


async def _by_stream(
    prompt: Callable[[int], router_pb2.Prompt], address: str, growth: Growth
) -> None:
    fresh = growth.fresh()

    async def ask(stub: router_pb2_grpc.RouterStub) -> None:
        stream, room = stub.RouteStream(), asyncio.Semaphore(AHEAD)

        async def write() -> None:
            for number in fresh:
                await room.acquire()
                request = router_pb2.RouteRequest(prompt=prompt(number))
                await stream.write(router_pb2.RouteStreamRequest(request=request))
            await stream.done_writing()

        writing = asyncio.ensure_future(write())
        while (answer := await stream.read()) is not grpc.aio.EOF:
            assert answer.response.choice.worker_id
            room.release()
            growth.answered()
        await writing

    async with grpc.aio.insecure_channel(address) as channel:
        stub = router_pb2_grpc.RouterStub(channel)
        await asyncio.gather(*(ask(stub) for _ in range(STREAMS)))


async def _generate(address: str, growth: Growth) -> None:
    fresh = growth.fresh()

    async def ask(stub: router_pb2_grpc.RouterStub) -> None:
        for number in fresh:
            request = router_pb2.GenerateRequest(prompt=_text(number), max_tokens=1)
            parts = [part async for part in stub.Generate(request)]
            assert parts[-1].HasField("finished")
            growth.answered()

    async with grpc.aio.insecure_channel(address) as channel:
        stub = router_pb2_grpc.RouterStub(channel)
        await asyncio.gather(*(ask(stub) for _ in range(AT_ONCE)))


async def _http(http: str, _address: str, growth: Growth) -> None:
    fresh, pool = growth.fresh(), Pool(http, random.Random(1))

    async def ask() -> None:
        for _ in fresh:
            await pool.ask()
            growth.answered()

    await asyncio.gather(*(ask() for _ in range(AT_ONCE)))
    await pool.close()


def _pid_of(folder: Path) -> int:
    """The router's process, by the settings that it was given."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if b"router" in words and any(w.startswith(str(folder).encode()) for w in words):
                return int(path.parent.name)
    raise RuntimeError("no router")


def _rss(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
