"""Everything that the demo starts: a shared store, Ray with two nodes, agents, a router."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final

import grpc

from kvtier.cluster import launch
from kvtier.cluster.coordinator import Status
from kvtier.cluster.local import LocalCluster
from kvtier.config import (
    Config,
    DiskConfig,
    HostConfig,
    NodeConfig,
    RedisConfig,
    RouterConfig,
    WorkerConfig,
)  # fmt: skip
from kvtier.engine import child
from kvtier.errors import KVTierError
from kvtier.testing.valkey import ValkeyServer
from kvtier.wire.pb import (
    feed_pb2,
    node_pb2,
    node_pb2_grpc,
    router_pb2,
    router_pb2_grpc,
    worker_pb2,
    worker_pb2_grpc,
)  # fmt: skip
from kvtier.wire.rpc import MAX_MESSAGE

NODES: Final = ("a", "b")
DEADLINE_S: Final = 300.0  # for any one thing to start, come back or be answered
Say = Callable[[str], None]


def config(folder: Path, engine: str, model: str, conversation: int, redis_url: str) -> Config:
    """Budgets so small that conversations push each other out of VRAM and host memory.

    VRAM holds one and a half of them, host memory too, the disk all; `conversation` is the bytes of
    the longest.
    """
    return Config(
        node=NodeConfig(socket=str(folder / "{node}.sock"), listen="127.0.0.1:0"),
        # Everything is copied down as soon as it is there: a kill may come at any moment.
        host=HostConfig(bytes=conversation * 3 // 2, drain_at=0.0),
        disk=DiskConfig(path=str(folder / "disk-{node}"), bytes=conversation * 12, drain_at=0.0),
        redis=RedisConfig(url=redis_url, prefix=f"kvtier-demo-{os.getpid()}", ttl_s=3600),
        worker=WorkerConfig(
            engine=engine,
            model=model,
            socket=str(folder / "{node}.sock"),
            listen="127.0.0.1:0",
            vram_bytes=conversation * 3 // 2,
            # Each tier is to be seen, on a slow machine with a slow disk, too.
            loads="always",
            wait_s=30.0,
        ),
        router=RouterConfig(listen="127.0.0.1:0"),
    )


@contextmanager
def shared_store(redis_url: str, room: int) -> Iterator[str]:
    """The URL of the store that all nodes share: the one given, or a Valkey server of our own."""
    if redis_url:
        yield redis_url
        return
    with ValkeyServer(maxmemory=room) as server:
        yield server.url


@contextmanager
def router_process(folder: Path) -> Iterator[str]:
    """`kvtier router` in a process of its own; gives its address."""
    path = folder / "router.toml"
    path.write_text('[router]\nlisten = "127.0.0.1:0"\n')
    with (folder / "router.log").open("w") as log:
        process = subprocess.Popen(  # noqa: S603 - this very program
            [sys.executable, "-m", "kvtier.cli", "router", "--until-eof", "--config", str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    try:
        assert process.stdout is not None
        watchdog = threading.Timer(DEADLINE_S, process.kill)
        watchdog.start()
        line = process.stdout.readline()
        watchdog.cancel()
        if "ready at" not in line:
            said = (folder / "router.log").read_text().strip() or f"silent for {DEADLINE_S:g} s"
            raise KVTierError(f"the router did not start: {said}")
        yield line.rsplit(" ", 1)[1].strip()
    finally:
        child.end(process)


class Stage:
    """The running parts, as the acts of the demo use them."""

    def __init__(self, router: grpc.aio.Channel) -> None:
        self.router = router_pb2_grpc.RouterStub(router)

    async def agents(self) -> dict[tuple[str, str], tuple[int, str]]:
        """Process id and gRPC address of each (node, kind) that runs."""
        seen = await asyncio.to_thread(launch.read_status)
        return _running(seen)

    async def kill(self, node: str, kind: str) -> int:
        """SIGKILL the process of a node's worker or daemon; its process id."""
        pid, _ = (await self.agents())[node, kind]
        self.kill_process(pid)
        return pid

    @staticmethod
    def kill_process(pid: int) -> None:
        """SIGKILL a process that `agents` named."""
        os.kill(pid, signal.SIGKILL)

    async def back(self, node: str, kind: str, old_pid: int) -> int:
        """Wait until Ray has put a new process in the place of `old_pid`; its process id."""

        async def replaced() -> int:
            pid, _ = (await self.agents()).get((node, kind), (0, ""))
            return pid if pid != old_pid else 0

        pid = await self.until(f"{kind} of node {node} to come back", replaced)
        await self.ready()
        return pid

    async def ready(self) -> None:
        """Wait until the router follows every worker and daemon."""

        async def all_ready() -> bool:
            stream = self.router.Watch(router_pb2.WatchMembersRequest(), timeout=10)
            async for members in stream:
                states = [each.state for each in members.members]
                return len(states) == len(NODES) and all(each == "ready" for each in states)
            return False

        await self.until("the router to follow every node", all_ready)

    async def until(self, what: str, condition: Callable[[], Awaitable[int | bool]]) -> int:
        """Ask again and again until `condition` holds, at most DEADLINE_S; what it gave."""
        end = time.monotonic() + DEADLINE_S
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):  # not up yet: asked again
                if result := await condition():
                    return int(result)
            if time.monotonic() > end:
                raise KVTierError(f"waited {DEADLINE_S:g} s for {what}")
            await asyncio.sleep(0.2)

    async def clear(self, node: str, *tiers: feed_pb2.Tier) -> None:
        """Empty tiers of a node, VRAM included where it is named."""
        agents = await self.agents()
        if feed_pb2.TIER_VRAM in tiers:
            async with self._channel(agents[node, "worker"][1]) as channel:
                stub = worker_pb2_grpc.WorkerStub(channel)
                with _naming(f"emptying VRAM of node {node}"):
                    await stub.Clear(worker_pb2.ClearRequest(), timeout=DEADLINE_S)
        owned = [tier for tier in tiers if tier != feed_pb2.TIER_VRAM]
        if owned:
            async with self._channel(agents[node, "node"][1]) as channel:
                request = node_pb2.NodeClearRequest(tiers=owned)
                with _naming(f"emptying tiers of node {node}"):
                    await node_pb2_grpc.NodeStub(channel).Clear(request, timeout=DEADLINE_S)

    async def settled(self) -> None:
        """Wait until no copy is under way on any node."""

        async def quiet() -> bool:
            return all([await self._quiet(node) for node in NODES])

        await self.until("copies to end", quiet)

    async def _quiet(self, node: str) -> bool:
        status = await self.node_status(node)
        return all(each.moves == 0 and each.leases == 0 for each in status.layouts)

    async def node_status(self, node: str) -> node_pb2.NodeStatus:
        """What a node's daemon says of itself."""
        _, address = (await self.agents())[node, "node"]
        async with self._channel(address) as channel:
            stub = node_pb2_grpc.NodeStub(channel)
            status: node_pb2.NodeStatus = await stub.Status(
                node_pb2.NodeStatusRequest(), timeout=10
            )
            return status

    async def drain(self, node: str) -> None:
        """Take a node out of service: its daemon saves what is left, routers avoid it."""
        _, address = (await self.agents())[node, "node"]
        async with self._channel(address) as channel:
            stub = node_pb2_grpc.NodeStub(channel)
            with _naming(f"draining node {node}"):
                request = node_pb2.NodeDrainRequest(deadline_s=DEADLINE_S / 2)
                await stub.Drain(request, timeout=DEADLINE_S)

    async def explain(self, prompt: router_pb2.Prompt) -> router_pb2.ExplainResponse:
        """What the router thinks of every node for this prompt."""
        request = router_pb2.RouteRequest(prompt=prompt)
        answer: router_pb2.ExplainResponse = await self.router.Explain(request, timeout=30)
        return answer

    @staticmethod
    def _channel(address: str) -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(address)


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """A failed call says what it was for."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise KVTierError(f"{what}: {error.code().name}: {error.details()}") from None


def _running(seen: Status | None) -> dict[tuple[str, str], tuple[int, str]]:
    agents = seen["agents"] if seen else []
    return {
        (each["node"], each["kind"]): (each["pid"], each["address"])
        for each in agents
        if each["pid"] and each["address"]
    }


@asynccontextmanager
async def staged(settings: Config, router: str, say: Say) -> AsyncIterator[Stage]:
    """Place daemons and workers by Ray on two nodes of this machine, and follow them."""
    code = await asyncio.to_thread(
        launch.up, settings, say=say, routers=[router], deadline_s=DEADLINE_S
    )
    if code != 0:
        raise KVTierError("the cluster did not come up; the lines above say what is missing")
    options = [("grpc.max_receive_message_length", MAX_MESSAGE)]
    async with grpc.aio.insecure_channel(router, options=options) as channel:
        stage = Stage(channel)
        await stage.ready()
        yield stage


@contextmanager
def local_ray() -> Iterator[LocalCluster]:
    """A Ray cluster of NODES on this machine, and this process connected to it."""
    with LocalCluster(NODES) as cluster, launch.connected(cluster.address):
        yield cluster


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for sockets, disks and logs; its path is short, as sockets want it."""
    with tempfile.TemporaryDirectory(prefix="kvtier-demo-") as folder:
        yield Path(folder)
