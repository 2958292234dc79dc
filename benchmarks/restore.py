"""What does a prompt cost that was read before? The demo's model, a prompt of 2,000 tokens.

Two nodes on this machine (daemon, disk, worker each) and one shared store. Each prompt in turn:
cold on node a; again with an empty VRAM (host); again after the daemon of node a was killed and
started anew, and has seen what of its disk the shared store has (disk); then on node b, which
never saw it (Redis). Times are a client's, over gRPC, to the first token.
"""

import time
from contextlib import ExitStack
from pathlib import Path

import grpc

from benchmarks.common import Bar, scratch, server, summary
from kvtier.core.tiers import Tier
from kvtier.demo.workload import conversations
from kvtier.router.text import Text
from kvtier.testing.valkey import ValkeyServer
from kvtier.wire.pb import (
    feed_pb2,
    node_pb2,
    node_pb2_grpc,
    worker_pb2,
    worker_pb2_grpc,
)

PROMPT_TOKENS = 2000
BARS = {"host": 15, "disk": 10, "shared": 8}
DEADLINE_S = 120.0


def run(*, tiny: bool) -> dict[str, object]:
    rounds, tokens = (1, 200) if tiny else (6, PROMPT_TOKENS)
    with ExitStack() as stack:
        folder = stack.enter_context(scratch())
        valkey = stack.enter_context(ValkeyServer())
        nodes = [_Node(stack, folder, name, valkey.url) for name in ("a", "b")]
        return _measure(nodes, rounds, tokens)


class _Node:
    """A daemon and a worker; the daemon can be killed and started again."""

    def __init__(self, stack: ExitStack, folder: Path, name: str, redis: str) -> None:
        self._folder = folder
        self._toml = f"""
            [node]
            name = "{name}"
            socket = "{folder}/{name}.sock"
            listen = "127.0.0.1:0"
            [host]
            bytes = "512MiB"
            drain_at = 0.0
            [disk]
            path = "{folder}/disk-{name}"
            bytes = "4GiB"
            drain_at = 0.0
            [redis]
            url = "{redis}"
            [worker]
            socket = "{folder}/{name}.sock"
            listen = "127.0.0.1:0"
            vram_bytes = "256MiB"
        """
        self._stack = stack
        self._daemon = ExitStack()
        stack.callback(lambda: self._daemon.close())
        self.start_daemon()
        address = stack.enter_context(server("worker", self._toml, folder))
        options = [("grpc.max_receive_message_length", 64 << 20)]
        channel = stack.enter_context(grpc.insecure_channel(address, options=options))
        self.worker = worker_pb2_grpc.WorkerStub(channel)

    def start_daemon(self) -> None:
        address = self._daemon.enter_context(server("node", self._toml, self._folder))
        channel = self._daemon.enter_context(grpc.insecure_channel(address))
        self.daemon = node_pb2_grpc.NodeStub(channel)

    def restart_daemon(self) -> None:
        self._daemon.close()
        self._daemon = ExitStack()
        self.start_daemon()

    def wait_for_blocks(self, tier: Tier, blocks: int) -> None:
        end = time.monotonic() + DEADLINE_S
        while time.monotonic() < end:
            layouts = self.daemon.Status(node_pb2.NodeStatusRequest(), timeout=10).layouts
            if layouts and layouts[0].moves == 0:
                held = {each.tier: each.blocks for each in layouts[0].tiers}
                if held[tier.value + 1] >= blocks:
                    return
            time.sleep(0.02)
        raise RuntimeError(f"{blocks} blocks did not reach {tier.label}")

    def first_token_s(self, prompt: list[int]) -> tuple[float, dict[int, int]]:
        request = worker_pb2.WorkerRequest(token_ids=prompt, max_tokens=1)
        start = time.perf_counter()
        stream = self.worker.Generate(request, timeout=DEADLINE_S)
        restored: dict[int, int] = {}
        first = 0.0
        for response in stream:
            first = first or time.perf_counter() - start
            if response.WhichOneof("body") == "started":
                restored = {each.tier: each.tokens for each in response.started.restored}
        return first, restored

    def clear_vram(self) -> None:
        self.worker.Clear(worker_pb2.ClearRequest(), timeout=30)


def _prompts(node: _Node, rounds: int, tokens: int) -> list[list[int]]:
    """Real text, and no two prompts with a common beginning."""
    files = node.worker.Tokenizer(worker_pb2.TokenizerRequest(), timeout=30).files
    text = Text(dict(files))
    documents = [talk.document for talk in conversations(text, 1 << 20)]
    return [
        text.encode(f"Copy {number}.\n{documents[number % len(documents)]}")[:tokens]
        for number in range(rounds)
    ]


def _measure(nodes: list[_Node], rounds: int, tokens: int) -> dict[str, object]:
    a, b = nodes
    info = a.worker.Describe(worker_pb2.DescribeRequest(), timeout=30)
    prompts = _prompts(a, rounds + 1, tokens)
    times: dict[str, list[float]] = {"cold": [], "host": [], "disk": [], "shared": []}
    blocks = 0
    for number, prompt in enumerate(prompts):
        blocks += len(prompt) // info.block_tokens
        steps = {}
        steps["cold"] = a.first_token_s(prompt)
        a.wait_for_blocks(Tier.SHARED, blocks)
        a.clear_vram()
        steps["host"] = a.first_token_s(prompt)
        a.clear_vram()
        a.restart_daemon()
        a.wait_for_blocks(Tier.DISK, blocks)
        steps["disk"] = a.first_token_s(prompt)
        b.clear_vram()
        steps["shared"] = b.first_token_s(prompt)
        _check(steps, len(prompt), info.block_tokens)
        if number:  # the first round also pays for what is loaded lazily
            for name, (seconds, _) in steps.items():
                times[name].append(seconds)
    cold = sorted(times["cold"])[len(times["cold"]) // 2]
    medians = {name: sorted(each)[len(each) // 2] for name, each in times.items()}
    return {
        "prompt_tokens": tokens,
        "bytes": tokens // info.block_tokens * info.block_tokens * info.kv_bytes_per_token,
        "times": {name: summary(each) for name, each in times.items()},
        "cold_over": {name: cold / medians[name] for name in BARS},
        "bars": [
            Bar(f"restore from {name}, share of cold", medians[name] / cold, at_most=1 / ratio)
            .as_dict()
            for name, ratio in BARS.items()
        ],
    }  # fmt: skip


def _check(steps: dict[str, tuple[float, dict[int, int]]], tokens: int, block_tokens: int) -> None:
    """The hit must be whole and from the tier that is measured, or the time says nothing."""
    whole = (tokens - 1) // block_tokens * block_tokens
    expected = {
        "cold": {},
        "host": {feed_pb2.TIER_HOST: whole},
        "disk": {feed_pb2.TIER_DISK: whole},
        "shared": {feed_pb2.TIER_SHARED: whole},
    }
    for name, (_, restored) in steps.items():
        if restored != expected[name]:
            raise RuntimeError(f"{name}: restored {restored}, expected {expected[name]}")
