"""Does the router's memory grow over a million prompts that never come again?

Eight fake workers, real sockets to the end; see route.py.
"""

import asyncio
import itertools
import time
from contextlib import suppress
from pathlib import Path

import grpc

from benchmarks.common import Bar, scratch, server, summary
from benchmarks.fake_engine import BLOCK, ready, workers
from kvtier.wire.pb import router_pb2, router_pb2_grpc

WORKERS = 8
REQUESTS, STREAMS, AHEAD = 1_000_000, 4, 64


def run(*, tiny: bool) -> dict[str, object]:
    with scratch() as folder, workers(WORKERS) as ends:
        members = ", ".join(
            f'{{ node = "n{i}", worker = "{end["grpc"]}" }}' for i, end in enumerate(ends)
        )
        toml = f'[router]\nlisten = "127.0.0.1:0"\nmembers = [{members}]\n'
        with server("router", toml, folder) as address:
            asyncio.run(ready(address, WORKERS))
            grown = asyncio.run(_growth(address, _pid_of(folder), 500 if tiny else REQUESTS))
    bar = Bar("growth over prompts that never come again, MiB", grown["mib"], at_most=16)
    took = grown["requests"] / grown["requests_per_s"]
    times = {"all requests": summary([took])}
    return {"workers": WORKERS, **grown, "times": times, "bars": [bar.as_dict()]}


async def _growth(address: str, pid: int, limit: int) -> dict[str, float]:
    """How much its memory grows from the first quarter of the requests to the last."""
    fresh, answers = iter(range(limit)), itertools.count(1)
    start, settled = time.monotonic(), (0, 0)

    async def ask(stub) -> None:
        nonlocal settled
        stream, room = stub.RouteStream(), asyncio.Semaphore(AHEAD)

        async def write() -> None:
            for number in fresh:
                await room.acquire()
                given = b"".join((number * 8 + i).to_bytes(16, "big") for i in range(8))
                prompt = router_pb2.BlockKeys(keys=given, block_tokens=BLOCK)
                request = router_pb2.RouteRequest(prompt=router_pb2.Prompt(keys=prompt))
                await stream.write(router_pb2.RouteStreamRequest(request=request))
            await stream.done_writing()

        writing = asyncio.ensure_future(write())
        while (answer := await stream.read()) is not grpc.aio.EOF:
            assert answer.response.choice.worker_id
            room.release()
            if (count := next(answers)) == limit // 4:
                settled = (count, _rss(pid))
        await writing

    async with grpc.aio.insecure_channel(address) as channel:
        stub = router_pb2_grpc.RouterStub(channel)
        await asyncio.gather(*(ask(stub) for _ in range(STREAMS)))
    count, rss, took = next(answers) - 1, _rss(pid), time.monotonic() - start
    assert count == limit
    grown = (rss - settled[1]) / 2**20
    return {
        "requests": count, "from": settled[0], "mib": grown, "rss_mib": rss / 2**20,
        "requests_per_s": count / took,
    }  # fmt: skip


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
