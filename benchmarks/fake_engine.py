"""Fake workers for `route`: they sleep by a model of their speed, then answer as fast as they can.

`python -m benchmarks.fake_engine COUNT PORT RATE` serves COUNT workers in this process, each over
gRPC (kvtier.v1.Worker and its feed, from PORT on; 0: any) and over HTTP (OpenAI's completions), and
prints their addresses as JSON. RATE: prompt tokens a second.
"""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import grpc
from tokenizers import Tokenizer, models, pre_tokenizers

from kvtier.core.blocks import BEGINS, BlockKey, block_keys
from kvtier.core.tiers import Tier
from kvtier.wire.chains import tell
from kvtier.wire.muxed import MuxedServicer
from kvtier.wire.pb import (
    feed_pb2,
    feed_pb2_grpc,
    router_pb2,
    router_pb2_grpc,
    worker_pb2,
    worker_pb2_grpc,
)

ROOT = b"bench" * 4
BLOCK = 16
WORDS = 4096
MODEL = "fake"
RATE = 1_000_000.0
WARM = list(range(512))  # a prompt that every worker holds


def tokenizer() -> str:
    """A word is a token; about five characters each with its space."""
    vocab = {f"w{i}": i for i in range(WORDS)}
    made = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made.to_str()


def keys(ids: list[int]) -> list[BlockKey]:
    return block_keys(ROOT, ids, BLOCK)


class Worker(MuxedServicer, feed_pb2_grpc.FeedServicer):
    def __init__(self, name: str, rate: float) -> None:
        super().__init__()
        self._rate = rate
        self.info = worker_pb2.WorkerInfo(
            worker_id=name, node=name, model=MODEL, revision="1", block_tokens=BLOCK,
            max_tokens=1 << 20, root=ROOT, vocab_size=WORDS, kv_bytes_per_token=1 << 16,
        )  # fmt: skip

    async def Describe(self, request: object, context: object) -> worker_pb2.WorkerInfo:
        return self.info

    async def Tokenizer(self, request: object, context: object) -> worker_pb2.TokenizerFiles:
        return worker_pb2.TokenizerFiles(files={"tokenizer.json": tokenizer().encode()})

    async def answer(
        self, request: worker_pb2.WorkerRequest
    ) -> AsyncGenerator[worker_pb2.WorkerResponse, None]:
        await asyncio.sleep(len(request.token_ids) / self._rate)
        started = worker_pb2.Started(prompt_tokens=len(request.token_ids))
        yield worker_pb2.WorkerResponse(started=started)
        count = max(1, request.max_tokens)
        for _ in range(count):
            yield worker_pb2.WorkerResponse(tokens=worker_pb2.Tokens(ids=[1]))
        yield worker_pb2.WorkerResponse(done=worker_pb2.Done(completion_tokens=count))

    async def Watch(self, request: object, context: object) -> AsyncIterator[feed_pb2.FeedMessage]:
        path = keys(WARM)
        held = [tell(Tier.VRAM, path, dict(zip(path, [BEGINS, *path], strict=False)).get)]
        snapshot = feed_pb2.Snapshot(held=held, last=True)
        yield feed_pb2.FeedMessage(epoch=1, seq=1, snapshot=snapshot)
        load = feed_pb2.WorkerLoad(prefill_tokens_per_s=self._rate)
        while True:
            yield feed_pb2.FeedMessage(epoch=1, seq=1, heartbeat=feed_pb2.Heartbeat(load=load))
            await asyncio.sleep(0.5)


class Http(asyncio.Protocol):
    """As little HTTP/1.1 as a proxy needs, so that what is measured is the proxy."""

    def __init__(self, name: str, rate: float) -> None:
        text = {"index": 0, "text": "w1", "finish_reason": "length", "logprobs": None}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        body = json.dumps({
            "id": name, "object": "text_completion", "created": 0, "model": MODEL,
            "choices": [text], "usage": usage,
        }).encode()  # fmt: skip
        head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
        self._answer = f"{head}\r\n\r\n".encode() + body
        self._rate = rate
        self._got = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._got += data
        head, end, body = self._got.partition(b"\r\n\r\n")
        if not end:
            return
        fields = head.lower().split(b"\r\n")
        chunked = any(f.startswith(b"transfer-encoding:") for f in fields)
        length = next(
            (int(f.partition(b":")[2]) for f in fields if f.startswith(b"content-length:")), 0
        )
        if body.endswith(b"0\r\n\r\n") if chunked else len(body) >= length:
            self._got = b""
            wait_s = len(body) / 5 / self._rate
            asyncio.get_running_loop().call_later(wait_s, self._transport.write, self._answer)


@contextmanager
def workers(count: int, port: int = 0) -> Iterator[list[dict[str, str]]]:
    """`count` fake workers in a process of their own; their addresses."""
    command = [sys.executable, "-m", "benchmarks.fake_engine", str(count), str(port), str(RATE)]
    root = Path(__file__).parent.parent
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root)
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())
    finally:
        process.kill()
        process.communicate()


async def ready(address: str, workers: int) -> None:
    """All workers are candidates, and what they hold is known."""
    prompt = router_pb2.Prompt(tokens=router_pb2.TokenIds(ids=WARM))
    request = router_pb2.RouteRequest(prompt=prompt)
    async with asyncio.timeout(120), grpc.aio.insecure_channel(address) as channel:
        stub = router_pb2_grpc.RouterStub(channel)
        while True:
            with suppress(grpc.aio.AioRpcError):
                choices = (await stub.Explain(request)).choices
                warm = [sum(t.tokens for t in c.warm) for c in choices]
                if warm == [len(keys(WARM)) * BLOCK] * workers:
                    return
            await asyncio.sleep(0.01)


async def main(count: int, port: int, rate: float) -> None:
    loop = asyncio.get_running_loop()
    ends, servers = [], []
    for i in range(count):
        name = f"w{i}"
        http = await loop.create_server(lambda name=name: Http(name, rate), "127.0.0.1", 0)
        worker = Worker(name, rate)
        worker.info.http_address = f"127.0.0.1:{http.sockets[0].getsockname()[1]}"
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        worker_pb2_grpc.add_WorkerServicer_to_server(worker, server)
        feed_pb2_grpc.add_FeedServicer_to_server(worker, server)
        bound = server.add_insecure_port(f"127.0.0.1:{port + i if port else 0}")
        await server.start()
        servers.append((server, http))
        ends.append({"grpc": f"127.0.0.1:{bound}", "http": worker.info.http_address})
    print(json.dumps(ends), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
