"""A vLLM worker has its daemon load what the router's source holds, before vLLM looks.

Daemons, sockets and gRPC are real. In vLLM's place is an engine that restores what its node holds
in host memory at the time, as vLLM's look-up would.
"""

import asyncio
import dataclasses
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import grpc
import pytest

from kvtier import metrics
from kvtier.config import Config, WorkerConfig
from kvtier.core.blocks import BEGINS, BlockKey
from kvtier.core.tiers import Tier
from kvtier.core.vllm_keys import none_hash, prompt_keys, space_root
from kvtier.engine.client import TierClient
from kvtier.engine.sequence import Done, FinishReason, Request, Started, Tokens
from kvtier.engine.vllm import gateway
from kvtier.engine.vllm.announced import Announced, read_announced, write_announced
from kvtier.engine.vllm.gateway import Answer, Served
from kvtier.engine.vllm.puller import LINES, Brought, Puller
from kvtier.engine.vllm.spaces import Spaces
from kvtier.errors import ConfigError
from kvtier.wire.pb import worker_pb2, worker_pb2_grpc
from tests.launching import DEADLINE_S, Process, node_toml, wait_for
from tests.node.conftest import LAYOUT, save

SIZE = LAYOUT.block_tokens
PATIENT_S = 60.0  # as long as a daemon lets anybody wait: only a hang lasts so long
SERVED = Served(
    model="m", revision="r", block_tokens=SIZE, max_tokens=100_000, vocab_size=1000,
    kv_bytes_per_token=1, doubles_at=0.0, eos_token_ids=(), tokenizer_files={},
    none_hash=none_hash(), root=b"r" * 32, events="", replay="",
    spaces=Spaces({"red": "the salt of red"}, {"poet": "/poet"}),
)  # fmt: skip


def prompt(blocks: int, seed: int = 0) -> list[int]:
    """So many full blocks, and a token more: the last one is always computed."""
    return [(seed + 7 * at) % 1000 for at in range(blocks * SIZE + 1)]


def keys_of(tokens: list[int], adapter: str = "", tenant: str = "") -> list[BlockKey]:
    salt = SERVED.spaces.salts[tenant] if tenant else ""
    lora = (adapter, SERVED.spaces.adapters[adapter]) if adapter else None
    root = space_root(SERVED.none_hash, SERVED.root, adapter=lora, salt=salt)
    return prompt_keys(root, tokens, SIZE)


class Engine:
    """Restores what its node's host memory has when it is handed a request."""

    served = SERVED

    def __init__(self, socket: str) -> None:
        self._socket = socket

    async def answer(self, request: Request) -> Answer:
        tokens, keys = len(request.token_ids), list[BlockKey]()
        if request.source:  # the others' answers ask nobody: the daemon may be made to hang
            keys = keys_of(list(request.token_ids), request.adapter, request.tenant)
        held = len(keys) and await asyncio.to_thread(self._held, keys)
        yield Started(
            prompt_tokens=tokens, restored={Tier.HOST: held * SIZE} if held else {},
            computed_tokens=tokens - held * SIZE, queue_s=0.0, restore_s=0.5, prefill_s=0.25,
        )  # fmt: skip
        yield Tokens((1,))
        yield Done(finish_reason=FinishReason.LENGTH, completion_tokens=1, saved_tokens=0)

    def _held(self, keys: list[BlockKey]) -> int:
        if not Path(self._socket).exists():
            return 0
        client = TierClient(self._socket, LAYOUT)
        try:
            return client.match(keys).blocks
        finally:
            client.close()

    async def clear(self) -> None: ...

    async def alive(self) -> bool:
        return True

    async def close(self) -> None: ...


@dataclasses.dataclass
class Nodes:
    """Node b may load from node a; `lent` holds blocks in a's host memory."""

    a: Process
    b: Process
    sockets: dict[str, str]

    def lend(self, keys: list[BlockKey], node: str = "a") -> None:
        client = TierClient(self.sockets[node], LAYOUT)
        try:
            assert save(client, keys) == len(keys)
        finally:
            client.close()


def start(folder: Path, stack: ExitStack) -> Nodes:
    def node(name: str, more: str) -> Process:
        home = folder / name
        home.mkdir()
        toml = node_toml(home, host="32MiB", more=more).replace('"n"', f'"{name}"')
        return stack.enter_context(Process("node", toml, home))

    a = node("a", "[peers]\n")
    b = node("b", f'[peers]\nmembers = [{{ node = "a", address = "{a.lends_at()}" }}]\n')
    return Nodes(a, b, {name: f"{folder}/{name}/node.sock" for name in "ab"})


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """For tests that leave both alive; each has prompts of its own."""
    with ExitStack() as stack:
        yield start(tmp_path_factory.mktemp("nodes"), stack)


class Worker:
    """A worker of node b, as routers reach it."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = worker_pb2_grpc.WorkerStub(channel)

    async def info(self) -> worker_pb2.WorkerInfo:
        return await self._stub.Describe(worker_pb2.DescribeRequest(), timeout=DEADLINE_S)

    async def ask(self, tokens: list[int], **more: str) -> worker_pb2.Started:
        request = worker_pb2.WorkerRequest(token_ids=tokens, max_tokens=1, **more)
        parts = [each async for each in self._stub.Generate(request, timeout=DEADLINE_S)]
        assert parts[-1].HasField("done")
        return parts[0].started


@asynccontextmanager
async def worker_on(
    socket: str, wait_s: float = PATIENT_S, *, pulls: bool = True
) -> AsyncIterator[Worker]:
    stop, address = asyncio.Event(), asyncio.get_running_loop().create_future()
    config = Config(worker=WorkerConfig(listen="127.0.0.1:0", node="b"))
    puller = Puller(socket, LAYOUT, wait_s) if pulls else None
    serving = asyncio.create_task(
        gateway.serve(config, Engine(socket), puller, started=address.set_result, stop=stop)
    )
    async with grpc.aio.insecure_channel(await address) as channel:
        yield Worker(channel)
    stop.set()
    await serving
    if puller is not None:
        await puller.close()


def failures() -> float:
    return metrics.TIER_FAILURES.labels("pull")._value.get()


async def test_what_another_node_has_is_there_before_the_engine_looks(nodes: Nodes) -> None:
    tokens = prompt(300, 1)  # more than a daemon loads at once
    nodes.lend(keys_of(tokens))
    async with worker_on(nodes.sockets["b"]) as worker:
        assert (await worker.info()).pulls
        started = await worker.ask(tokens, source="a")
        assert started.pulled_tokens == 300 * SIZE
        assert started.computed_tokens == 1
        assert started.restore_s > 0.5, "the wait is part of it"
        again = await worker.ask(tokens, source="a")
        assert (again.pulled_tokens, again.computed_tokens) == (0, 1), "it was there"


async def test_a_worker_without_a_daemon_to_ask_says_so(nodes: Nodes) -> None:
    tokens = prompt(3, 2)
    nodes.lend(keys_of(tokens))
    async with worker_on(nodes.sockets["b"], pulls=False) as worker:
        assert not (await worker.info()).pulls
        started = await worker.ask(tokens, source="a")
        assert (started.pulled_tokens, started.computed_tokens) == (0, len(tokens))


async def test_the_last_token_is_computed_so_its_block_is_not_asked_for(nodes: Nodes) -> None:
    tokens = prompt(4, 3)[:-1]
    nodes.lend(keys_of(tokens))
    async with worker_on(nodes.sockets["b"]) as worker:
        assert (await worker.ask(tokens, source="a")).pulled_tokens == 3 * SIZE


@pytest.mark.parametrize("space", [{"tenant": "red"}, {"adapter": "poet"}])
async def test_whose_blocks_they_are_is_in_the_keys(nodes: Nodes, space: dict[str, str]) -> None:
    tokens = prompt(4, 4)
    nodes.lend(keys_of(tokens, **space))
    async with worker_on(nodes.sockets["b"]) as worker:
        assert (await worker.ask(tokens, source="a")).pulled_tokens == 0, "nobody else's"
        assert (await worker.ask(tokens, source="a", **space)).pulled_tokens == 4 * SIZE


async def test_only_what_is_missing_comes(nodes: Nodes) -> None:
    tokens = prompt(6, 5)
    nodes.lend(keys_of(tokens))
    nodes.lend(keys_of(tokens)[:2], "b")
    async with worker_on(nodes.sockets["b"]) as worker:
        started = await worker.ask(tokens, source="a")
        assert (started.pulled_tokens, started.computed_tokens) == (4 * SIZE, 1)


async def test_a_source_that_has_less_gives_what_it_has(nodes: Nodes) -> None:
    tokens = prompt(6, 6)
    nodes.lend(keys_of(tokens)[:4])
    async with worker_on(nodes.sockets["b"]) as worker:
        started = await worker.ask(tokens, source="a")
        assert started.pulled_tokens == 4 * SIZE
        assert started.computed_tokens == len(tokens) - 4 * SIZE


async def test_many_requests_for_one_prompt_are_served_at_once(nodes: Nodes) -> None:
    """More of them than there are connections."""
    tokens = prompt(40, 7)
    nodes.lend(keys_of(tokens))
    async with worker_on(nodes.sockets["b"]) as worker:
        asked = [worker.ask(tokens, source="a") for _ in range(12)]
        for started in await asyncio.gather(*asked):
            assert started.computed_tokens == 1


async def test_a_source_that_is_gone_or_not_known_costs_a_miss(tmp_path: Path) -> None:
    with ExitStack() as stack:
        await lose_the_source(start(tmp_path, stack))


async def lose_the_source(nodes: Nodes) -> None:
    tokens = prompt(4, 8)
    nodes.lend(keys_of(tokens))
    async with worker_on(nodes.sockets["b"]) as worker:
        for source in ("nobody", "x" * 10_000):
            started = await worker.ask(tokens, source=source)
            assert (started.pulled_tokens, started.computed_tokens) == (0, len(tokens))
        nodes.a.kill()
        started = await worker.ask(tokens, source="a")
        assert (started.pulled_tokens, started.computed_tokens) == (0, len(tokens))


async def test_a_daemon_that_is_not_there_is_counted(tmp_path: Path) -> None:
    before = failures()
    async with worker_on(f"{tmp_path}/nobody.sock") as worker:
        tokens = prompt(2, 9)
        assert (await worker.ask(tokens, source="a")).computed_tokens == len(tokens)
    assert failures() == before + 1


async def test_others_go_on_while_one_waits(nodes: Nodes) -> None:
    tokens = prompt(4, 10)
    nodes.lend(keys_of(tokens))
    async with worker_on(nodes.sockets["b"]) as worker:
        # Attached by now: what hangs is the answer.
        assert (await worker.ask(prompt(1, 1), source="a")).pulled_tokens == 0
        os.kill(nodes.b.pid, signal.SIGSTOP)
        waiting = asyncio.create_task(worker.ask(tokens, source="a"))
        try:
            for _ in range(3):
                assert (await worker.ask(prompt(2))).computed_tokens == len(prompt(2))
            assert not waiting.done()
        finally:
            os.kill(nodes.b.pid, signal.SIGCONT)
        assert (await waiting).pulled_tokens == 4 * SIZE


async def test_a_daemon_that_hangs_is_waited_for_once(nodes: Nodes) -> None:
    keys = keys_of(prompt(4, 12))
    nodes.lend(keys)
    os.kill(nodes.b.pid, signal.SIGSTOP)  # before it has taken the puller in
    try:
        before, puller = failures(), Puller(nodes.sockets["b"], LAYOUT, 0.1)
        assert await puller.pull(keys, 0, "a") == 0
        assert failures() == before + 1
        assert puller._overdue == 1
        assert await puller.pull(keys, 0, "a") == 0, "and nobody waits beside"
        assert failures() == before + 2
        assert len(puller._lines) == 1, "it was not even asked"
    finally:
        os.kill(nodes.b.pid, signal.SIGCONT)
    await asyncio.to_thread(wait_for, "its late answer", lambda: not puller._overdue)
    await puller.close()
    puller = Puller(nodes.sockets["b"], LAYOUT, PATIENT_S)
    assert await puller.pull(keys, 0, "a") == 4
    await puller.close()


async def test_a_request_that_is_given_up_leaves_its_connection_to_others(nodes: Nodes) -> None:
    keys = keys_of(prompt(4, 13))
    nodes.lend(keys)
    puller = Puller(nodes.sockets["b"], LAYOUT, PATIENT_S)
    os.kill(nodes.b.pid, signal.SIGSTOP)
    given_up = [asyncio.create_task(puller.pull(keys, 0, "a")) for _ in range(6)]
    await asyncio.sleep(0)  # each has begun
    for each in given_up:
        each.cancel()
    await asyncio.gather(*given_up, return_exceptions=True)
    os.kill(nodes.b.pid, signal.SIGCONT)
    late = keys_of(prompt(4, 500))
    nodes.lend(late)
    assert await puller.pull(late, 0, "a") == 4
    assert len(puller._lines) == LINES, "none was lost and replaced"
    await puller.close()


async def test_what_vram_holds_is_not_asked_for(nodes: Nodes) -> None:
    tokens = prompt(6, 11)
    keys = keys_of(tokens)
    nodes.lend(keys)
    puller = Puller(nodes.sockets["b"], LAYOUT, PATIENT_S)
    config = Config(worker=WorkerConfig(listen="127.0.0.1:0", node="b"))
    servicer = gateway.GatewayServicer(config, Engine(nodes.sockets["b"]), puller)
    servicer.residency.before.update({keys[0]: BEGINS, keys[1]: keys[0]})
    brought = await servicer._bring(Request(token_ids=tokens, source="a"))
    assert brought.blocks == 4
    servicer.feed.close()
    await puller.close()


def test_what_came_counts_as_far_as_it_was_restored() -> None:
    started = Started(
        prompt_tokens=100, restored={Tier.HOST: 3 * SIZE}, computed_tokens=52, queue_s=1.0,
        restore_s=2.0, prefill_s=3.0,
    )  # fmt: skip
    told = Brought(5, 8.0).told(started, SIZE)
    assert (told.pulled_tokens, told.queue_s, told.restore_s) == (3 * SIZE, 1.0, 10.0)
    told = Brought(0, 8.0).told(started, SIZE)  # a wait for nothing is no restore
    assert (told.pulled_tokens, told.queue_s, told.restore_s) == (0, 9.0, 2.0)


def test_the_layout_of_an_engine_is_announced(tmp_path: Path) -> None:
    path, said = tmp_path / "who", Announced(b"r" * 32, b"n" * 32, "revision", LAYOUT)
    write_announced(str(path), said, "sha256_cbor", SIZE)
    assert read_announced(path, SIZE) == said
    text = path.read_text()
    assert LAYOUT.describe().replace('"', '\\"') in text
    path.write_text(text.replace("float16", "float99"))
    with pytest.raises(ConfigError):
        read_announced(path, SIZE)
