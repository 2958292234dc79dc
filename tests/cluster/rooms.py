"""Rooms small enough to watch, run by agents under test instead of a whole daemon or worker."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import grpc
import ray

from kvtier.cluster.agent import Started
from kvtier.config import Config
from kvtier.wire.pb import node_pb2, node_pb2_grpc, router_pb2, router_pb2_grpc


def disk_folder(config: Config) -> Path:
    assert config.disk is not None
    folder = Path(config.disk.path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


async def serve(config: Config, *, started: Started, stop: asyncio.Event) -> None:
    """A node's gRPC side that leaves a file for what was done to it, in its disk folder."""
    folder = disk_folder(config)

    class Node(node_pb2_grpc.NodeServicer):
        async def Drain(self, request, context):
            (folder / "drained").write_text(f"{request.deadline_s} {request.stay}")
            return node_pb2.NodeDrainResponse(undrained_blocks=3)

    server = grpc.aio.server()
    node_pb2_grpc.add_NodeServicer_to_server(Node(), server)
    host, _, _ = config.node.listen.rpartition(":")
    port = server.add_insecure_port(config.node.listen)
    await server.start()
    where = ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
    (folder / "placed").write_text(f"{os.getpid()} {where}")
    started(f"{host}:{port}", lends=f"{config.node.name}.invalid:{port}")
    await stop.wait()
    await server.stop(1)
    (folder / "stopped").write_text(config.node.name)


async def worker(config: Config, *, started: Callable[[str], None], stop: asyncio.Event) -> None:
    """Serves nothing, at a made-up address that carries the node's name."""
    started(f"{config.worker.node}.invalid:{config.worker.threads}")
    await stop.wait()


async def router(config: Config, *, started: Callable[[str], None], stop: asyncio.Event) -> None:
    """Leaves a file with the members that it was told, beside the disk folder."""
    assert config.disk is not None
    told = Path(config.disk.path).parent / "members"

    class Router(router_pb2_grpc.RouterServicer):
        async def SetMembers(self, request, context):
            told.write_text(" ".join(sorted(m.node for m in request.members)))
            return router_pb2.SetMembersResponse(applied=True)

    server = grpc.aio.server()
    router_pb2_grpc.add_RouterServicer_to_server(Router(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    started(f"127.0.0.1:{port}")
    await stop.wait()
    await server.stop(1)


async def fails(config: Config, *, started: Callable[[str], None], stop: asyncio.Event) -> None:
    raise ValueError("no such weights")


async def ends(config: Config, *, started: Callable[[str], None], stop: asyncio.Event) -> None:
    started("127.0.0.1:1")


async def deaf(config: Config, *, started: Callable[[str], None], stop: asyncio.Event) -> None:
    started("127.0.0.1:1")
    await asyncio.Event().wait()


async def stuck(config: Config, *, started: Callable[[str], None], stop: asyncio.Event) -> None:
    started("127.0.0.1:1")
    import time

    time.sleep(60)  # noqa: ASYNC251 (the very fault that is tested)
