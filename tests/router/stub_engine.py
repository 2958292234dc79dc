"""Stand-ins for the model and for what a node holds: real gRPC servers with scripted answers.

Run as a program it is one worker in a process of its own, which prints its address.
"""

import asyncio
import json
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping

import grpc
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from kvtier.core.blocks import BEGINS, BlockKey, block_keys
from kvtier.core.tiers import Tier
from kvtier.errors import RequestError
from kvtier.wire.chains import TO_WIRE
from kvtier.wire.muxed import MuxedServicer
from kvtier.wire.pb import feed_pb2, feed_pb2_grpc, worker_pb2, worker_pb2_grpc

BLOCK = 4  # tokens
ROOT = b"r" * 32
MAX_TOKENS = 2_000_000
SPECIAL = ["<|end|>", "<|user|>", "<|system|>", "<|assistant|>"]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'nobody' %}{{ raise_exception('who?') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

Script = Callable[[worker_pb2.WorkerRequest], AsyncIterator[worker_pb2.WorkerResponse]]


def tokenizer() -> Tokenizer:
    """One token a byte, so that characters come in pieces."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(SPECIAL)
    return made


VOCAB = tokenizer().get_vocab_size()


def files() -> dict[str, bytes]:
    return {
        "tokenizer.json": tokenizer().to_str().encode(),
        "tokenizer_config.json": json.dumps({"eos_token": "<|end|>"}).encode(),
        "chat_template.jinja": TEMPLATE.encode(),
    }


def ids(text: str) -> list[int]:
    return tokenizer().encode(text).ids


def keys(prompt: str | list[int], root: bytes = ROOT, block: int = BLOCK) -> list[BlockKey]:
    return block_keys(root, ids(prompt) if isinstance(prompt, str) else prompt, block)


def tier_keys(held: Mapping[Tier, Iterable[bytes]]) -> list[feed_pb2.TierKeys]:
    """Those of a tier as one prompt: a false word on what comes before changes no answer."""
    return [
        feed_pb2.TierKeys(
            tier=TO_WIRE[tier], keys=packed, starts=[0] if packed else [],
            parents=BEGINS if packed else b"",
        )
        for tier, packed in ((tier, b"".join(each)) for tier, each in held.items())
    ]  # fmt: skip


class StubSource(feed_pb2_grpc.FeedServicer):
    """A feed whose every message, gap and silence the test decides."""

    def __init__(self, held: Mapping[Tier, Iterable[bytes]] | None = None) -> None:
        self.epoch = 1
        self.seq = 10
        self.held: dict[Tier, list[bytes]] = {t: list(each) for t, each in (held or {}).items()}
        self.heartbeat = feed_pb2.Heartbeat()
        self.beating = True
        self.watched = 0  # streams begun
        self.answering = asyncio.Event()  # a new stream waits for it
        self.answering.set()
        self._watchers: list[asyncio.Queue[feed_pb2.FeedMessage | None]] = []
        self._server: grpc.aio.Server | None = None
        self.address = ""

    async def start(self, address: str = "127.0.0.1:0") -> "StubSource":
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        self.register(self._server)
        port = self._server.add_insecure_port(address)
        self.address = f"127.0.0.1:{port}"
        await self._server.start()
        return self

    def register(self, server: grpc.aio.Server) -> None:
        feed_pb2_grpc.add_FeedServicer_to_server(self, server)

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(0)
            self._server = None

    async def restart(self) -> None:
        """The same address, another life."""
        await self.stop()
        self.epoch += 1
        await self.start(self.address)

    def tell(
        self,
        added: Mapping[Tier, list[bytes]] | None = None,
        removed: Mapping[Tier, list[bytes]] | None = None,
        *,
        lost: bool = False,
    ) -> None:
        """Change what is held and send the delta, unless it gets `lost` on the way."""
        for tier, each in (removed or {}).items():
            self.held[tier] = [key for key in self.held.get(tier, []) if key not in each]
        for tier, each in (added or {}).items():
            self.held.setdefault(tier, []).extend(each)
        self.seq += 1
        delta = feed_pb2.Delta(added=tier_keys(added or {}), removed=tier_keys(removed or {}))
        if not lost:
            self.send(feed_pb2.FeedMessage(epoch=self.epoch, seq=self.seq, delta=delta))

    def send(self, message: feed_pb2.FeedMessage | None) -> None:
        """To every stream; None ends them as those of a watcher that is too slow."""
        for queue in self._watchers:
            queue.put_nowait(message)

    def beat(self) -> None:
        message = feed_pb2.FeedMessage(epoch=self.epoch, seq=self.seq, heartbeat=self.heartbeat)
        self.send(message)

    async def Watch(
        self, request: feed_pb2.WatchRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[feed_pb2.FeedMessage]:
        self.watched += 1
        await self.answering.wait()
        queue: asyncio.Queue[feed_pb2.FeedMessage | None] = asyncio.Queue()
        self._watchers.append(queue)
        try:
            for message in self._snapshot():
                yield message
            while True:
                try:
                    message = await asyncio.wait_for(queue.get(), 0.1)
                except TimeoutError:
                    if self.beating:
                        self.beat()
                    continue
                if message is None:
                    await context.abort(grpc.StatusCode.ABORTED, "too far behind")
                yield message
        finally:
            self._watchers.remove(queue)

    def _snapshot(self) -> list[feed_pb2.FeedMessage]:
        messages = [feed_pb2.Snapshot(held=tier_keys({t: k})) for t, k in self.held.items()]
        messages.append(feed_pb2.Snapshot(last=True))
        return [
            feed_pb2.FeedMessage(epoch=self.epoch, seq=self.seq, snapshot=each) for each in messages
        ]


class Ends(RequestError):
    """A script's own end."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self.grpc_status = code.name


class StubWorker(StubSource, MuxedServicer):
    """A worker with scripted answers; its feed is a `StubSource`."""

    def __init__(
        self,
        name: str,
        held: Iterable[bytes] = (),
        *,
        model: str = "tiny",
        root: bytes = ROOT,
        block: int = BLOCK,
        max_tokens: int = MAX_TOKENS,
        vocab: int = VOCAB,
    ) -> None:
        StubSource.__init__(self, {Tier.VRAM: held})
        MuxedServicer.__init__(self)
        self.name = name
        self.info = worker_pb2.WorkerInfo(
            worker_id=name, node=name, model=model, revision="1", block_tokens=block,
            max_tokens=max_tokens, root=root, vocab_size=vocab, kv_bytes_per_token=1024,
        )  # fmt: skip
        self.files = files()
        self.loading = False
        self.described = 0
        self.requests: list[worker_pb2.WorkerRequest] = []
        self.cancelled = asyncio.Event()
        self.script: Script = says("hello")

    def register(self, server: grpc.aio.Server) -> None:
        super().register(server)
        worker_pb2_grpc.add_WorkerServicer_to_server(self, server)

    async def Describe(
        self, request: worker_pb2.DescribeRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.WorkerInfo:
        self.described += 1
        if self.loading:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "loading the model")
        return self.info

    async def Tokenizer(
        self, request: worker_pb2.TokenizerRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.TokenizerFiles:
        return worker_pb2.TokenizerFiles(files=self.files)

    async def answer(
        self, request: worker_pb2.WorkerRequest
    ) -> AsyncGenerator[worker_pb2.WorkerResponse, None]:
        self.requests.append(request)
        try:
            async for message in self.script(request):
                yield message
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.set()
            raise


def started(request: worker_pb2.WorkerRequest) -> worker_pb2.WorkerResponse:
    return worker_pb2.WorkerResponse(
        started=worker_pb2.Started(prompt_tokens=len(request.token_ids))
    )


def tokens(*each: int) -> worker_pb2.WorkerResponse:
    return worker_pb2.WorkerResponse(tokens=worker_pb2.Tokens(ids=each))


def done(count: int) -> worker_pb2.WorkerResponse:
    reason = worker_pb2.FINISH_REASON_LENGTH
    return worker_pb2.WorkerResponse(
        done=worker_pb2.Done(finish_reason=reason, completion_tokens=count)
    )


def says(text: str) -> Script:
    """Answers with this text, one token a message."""

    async def script(request: worker_pb2.WorkerRequest) -> AsyncIterator[worker_pb2.WorkerResponse]:
        yield started(request)
        answer = ids(text)
        for token in answer:
            yield tokens(token)
        yield done(len(answer))

    return script


def hangs(after: int = 0) -> Script:
    """Says so many tokens and then nothing any more."""

    async def script(request: worker_pb2.WorkerRequest) -> AsyncIterator[worker_pb2.WorkerResponse]:
        if after:
            yield started(request)
        for _ in range(after):
            yield tokens(*ids("x"))
        await asyncio.Event().wait()

    return script


def aborts(code: grpc.StatusCode, details: str, after: int = 0) -> Script:
    """Ends with this status after so many tokens."""

    async def script(request: worker_pb2.WorkerRequest) -> AsyncIterator[worker_pb2.WorkerResponse]:
        if after:
            yield started(request)
        for _ in range(after):
            yield tokens(*ids("x"))
        raise Ends(code, details)

    return script


async def _main(name: str, after: int, prompt: str) -> None:
    worker = StubWorker(name, keys(prompt))
    worker.script = hangs(after)
    await worker.start()
    print(worker.address, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
