"""Nodes with a worker on vLLM each, and a router in front."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc

from kvtier.wire.pb import (
    feed_pb2,
    node_pb2,
    node_pb2_grpc,
    router_pb2,
    router_pb2_grpc,
    worker_pb2,
    worker_pb2_grpc,
)
from tests.launching import Process, disk_toml, node_toml, wait_for
from tests.vllm.driver import BLOCK, READY_S

TOKENS = 8  # of an answer


class Service:
    """A node daemon and a worker for each of `workers`, by node, and one router.

    What a worker's settings are is asked with the folder of its node, which holds `node.sock`.
    With `lends` each node lends, and may load from those before it.
    """

    def __init__(
        self, folder: Path, workers: dict[str, Callable[[Path], str]], *, lends: bool = False
    ) -> None:
        self.nodes: dict[str, Process] = {}
        self.workers: dict[str, Process] = {}
        self._channels: list[grpc.Channel] = []
        try:
            self._start(folder, workers, lends=lends)
        except BaseException:
            self.close()
            raise

    def _start(
        self, folder: Path, workers: dict[str, Callable[[Path], str]], *, lends: bool
    ) -> None:
        members, lenders = [], []
        for name in workers:
            at = folder / name
            at.mkdir()
            peers = f"[peers]\nmembers = [{', '.join(lenders)}]\n" if lends else ""
            toml = node_toml(at, host="64MiB", more=disk_toml(at) + peers)
            toml = toml.replace('name = "n"', f'name = "{name}"')
            self.nodes[name] = Process("node", toml, at)
            if lends:
                lenders.append(f'{{node = "{name}", address = "{self.nodes[name].lends_at()}"}}')
        self._start_workers(folder, workers)
        for name, node in self.nodes.items():
            daemon, worker = node.address, self.workers[name].address
            members.append(f'{{node = "{name}", daemon = "{daemon}", worker = "{worker}"}}')
        toml = f'[router]\nlisten = "127.0.0.1:0"\nmembers = [{", ".join(members)}]\n'
        # So that a source is named whatever this machine computes in a second.
        toml += 'peer_bytes_per_s = "1000TB"\n' if lends else ""
        self.router = Process("router", toml, folder)
        self.stub = router_pb2_grpc.RouterStub(self._channel(self.router.address))
        self.direct = {
            name: worker_pb2_grpc.WorkerStub(self._channel(each.address))
            for name, each in self.workers.items()
        }
        wait_for("the router to have every worker", lambda: self.ready(len(workers)))

    def _start_workers(self, folder: Path, workers: dict[str, Callable[[Path], str]]) -> None:
        """All at the same time, which takes each longer: most of a start runs on one core."""

        def start(name: str) -> None:
            toml = workers[name](folder / name) + f'node = "{name}"\n'
            self.workers[name] = Process("worker", toml, folder / name, ready_s=READY_S)

        with ThreadPoolExecutor(len(workers)) as pool:
            starting = [pool.submit(start, name) for name in workers]
        for each in starting:
            each.result()

    def _channel(self, address: str) -> grpc.Channel:
        channel = grpc.insecure_channel(address)
        self._channels.append(channel)
        return channel

    def ready(self, count: int) -> bool:
        request = router_pb2.RouteRequest(prompt=prompt([1, 2, 3]))
        try:
            return len(self.stub.Explain(request, timeout=60).choices) == count
        except grpc.RpcError:
            return False

    def warm(self, ids: list[int], node: str = "", **space: str) -> dict[int, int]:
        """Tokens of a prompt that the router knows a node to hold, by tier."""
        request = router_pb2.RouteRequest(prompt=prompt(ids), **space)
        choices = self.stub.Explain(request, timeout=60).choices
        return {
            each.tier: each.tokens
            for choice in choices
            if node in ("", choice.node)
            for each in choice.warm
        }

    def source(self, ids: list[int], node: str, **space: str) -> tuple[str, int]:
        """Where the router would have `node` load a prompt's blocks from, and how many tokens."""
        request = router_pb2.RouteRequest(prompt=prompt(ids), **space)
        for choice in self.stub.Explain(request, timeout=60).choices:
            if choice.node == node:
                return choice.source, choice.source_tokens
        return "", 0

    def ask(self, ids: list[int], **space: str) -> tuple[list[int], worker_pb2.Started]:
        """The answer, and what the worker said of it."""
        answer, started, _ = self.routed(ids, **space)
        return answer, started

    def routed(self, ids: list[int], **space: str) -> tuple[list[int], worker_pb2.Started, str]:
        """As `ask`, and the node that it went to."""
        request = router_pb2.GenerateRequest(
            prompt=prompt(ids), max_tokens=TOKENS, ignore_eos=True, **space
        )
        answer: list[int] = []
        started, node = worker_pb2.Started(), ""
        for message in self.stub.Generate(request, timeout=200):
            match message.WhichOneof("body"):
                case "routed":
                    node = message.routed.choice.node
                case "started":
                    started = message.started
                case "chunk":
                    answer += message.chunk.ids
        assert len(answer) == TOKENS
        return answer, started, node

    def told(self, node: str, ids: list[int], **space: str) -> tuple[list[int], worker_pb2.Started]:
        """As `ask`, of the worker of `node` itself: a router would weigh what each has measured."""
        request = worker_pb2.WorkerRequest(
            token_ids=ids, max_tokens=TOKENS, ignore_eos=True, **space
        )
        answer: list[int] = []
        started = worker_pb2.Started()
        for message in self.direct[node].Generate(request, timeout=200):
            if message.HasField("started"):
                started = message.started
            answer += message.tokens.ids
        assert len(answer) == TOKENS
        return answer, started

    def in_host(self, blocks: int) -> bool:
        """Whether the nodes hold so many blocks in host memory, all in all."""
        held = 0
        for node in self.nodes.values():
            with grpc.insecure_channel(node.address) as channel:
                stub = node_pb2_grpc.NodeStub(channel)
                layouts = stub.Status(node_pb2.NodeStatusRequest(), timeout=20).layouts
            tiers = [tier for layout in layouts for tier in layout.tiers]
            held += sum(tier.blocks for tier in tiers if tier.tier == feed_pb2.TIER_HOST)
        return held >= blocks

    def clear(self) -> None:
        """Empty VRAM of every worker."""
        for each in self.direct.values():
            each.Clear(worker_pb2.ClearRequest(), timeout=60)

    def close(self) -> None:
        for channel in self._channels:
            channel.close()
        router = [self.router] if hasattr(self, "router") else []
        for together in (router, list(self.workers.values()), list(self.nodes.values())):
            running = [each for each in together if each.process.poll() is None]
            with ThreadPoolExecutor() as pool:  # an engine takes seconds to end
                list(pool.map(Process.terminate, running))


def prompt(ids: list[int]) -> router_pb2.Prompt:
    return router_pb2.Prompt(tokens=router_pb2.TokenIds(ids=ids))


def worker_toml(engine: str, model: Path, more: str) -> str:
    return f"""
[worker]
engine = "{engine}"
model = "{model}"
name = "smollm2"
listen = "127.0.0.1:0"
block_tokens = {BLOCK}
dtype = "bfloat16"
{more}
"""
