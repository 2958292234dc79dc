"""The command line: `kvtier node | worker | router | cluster | demo | inspect`."""

import argparse
import asyncio
import importlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from typing import Protocol, cast

import kvtier
from kvtier import config as configuration
from kvtier.config import Config
from kvtier.errors import ConfigError, KVTierError

# What runs under each name: loaded only when asked for, so that a node daemon never loads torch.
_SERVERS = {
    "node": "kvtier.node.daemon",
    "worker": "kvtier.engine.run",
    "router": "kvtier.router.server",
}


_EXTRAS = {"torch": "worker", "transformers": "worker", "ray": "cluster"}


class _Serve(Protocol):
    def __call__(
        self, config: Config, *, started: Callable[[str], None], stop: asyncio.Event
    ) -> Coroutine[None, None, None]: ...


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 if it did what it was asked, 2 for a mistake of the caller."""
    parser = _parser()
    options = parser.parse_args(arguments)
    logging.basicConfig(
        level=logging.DEBUG if options.verbose else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    try:
        return cast("int", options.run(options))
    except KVTierError as error:
        print(f"kvtier: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get(error.name or "")
        if extra is None:
            raise
        print(f"kvtier: {error.name} is missing: pip install 'kvtier[{extra}]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kvtier", description=kvtier.__doc__)
    parser.add_argument("--version", action="version", version=f"kvtier {kvtier.__version__}")
    parser.add_argument("--verbose", action="store_true", help="log more, to stderr")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    texts = {
        "node": "run the node daemon of this host",
        "worker": "run an engine with a model, attached to this host's daemon",
        "router": "run the gRPC router",
    }
    for name, text in texts.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--config", metavar="FILE", help="a TOML file; see docs/config.md")
        command.add_argument(
            "--until-eof", action="store_true", help="also stop when standard input ends"
        )
        command.set_defaults(run=_serve, server=name)
    _add_cluster(commands)
    _add_demo(commands)
    text = "show what a node daemon holds"
    command = commands.add_parser("inspect", help=text, description=text)
    command.add_argument("address", metavar="HOST:PORT", help="the daemon's gRPC address")
    command.set_defaults(run=_inspect)
    return parser


def _serve(options: argparse.Namespace) -> int:
    config = configuration.load(options.config)
    module = importlib.import_module(_SERVERS[options.server])
    serve = cast("_Serve", module.serve)
    asyncio.run(_until_told(serve, config, options.server, until_eof=options.until_eof))
    return 0


async def _until_told(serve: _Serve, config: Config, name: str, *, until_eof: bool) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if until_eof:
        # A parent that dies, in whatever way, closes its end: nothing of it stays behind.
        loop.add_reader(0, lambda: None if os.read(0, 4096) else _ended(stop))

    def started(address: str) -> None:
        print(f"kvtier {name}: ready at {address}", flush=True)

    await serve(config, started=started, stop=stop)
    print(f"kvtier {name}: stopped", flush=True)


def _ended(stop: asyncio.Event) -> None:
    asyncio.get_running_loop().remove_reader(0)
    stop.set()


def _add_cluster(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    text = "place daemons and workers on the nodes of a Ray cluster"
    cluster = commands.add_parser("cluster", help=text, description=text)
    actions = cluster.add_subparsers(required=True, metavar="ACTION", dest="action")
    up = actions.add_parser("up", help="start and keep up a daemon and a worker on each node")
    up.add_argument("--config", metavar="FILE", help="a TOML file for all nodes")
    up.add_argument(
        "--router", action="append", default=[], metavar="HOST:PORT", help="tell this router"
    )
    up.add_argument(
        "--local", type=int, default=0, metavar="N", help="on a new Ray cluster of N nodes here"
    )
    up.add_argument("--everywhere", action="store_true", help="also where no `kvtier` resource is")
    up.add_argument("--no-workers", action="store_true", help="daemons only")
    up.add_argument("--worker-gpus", type=float, default=0.0, metavar="N", help="of each worker")
    for action in (
        up,
        actions.add_parser("status", help="show nodes, agents and routers"),
        actions.add_parser("down", help="stop all that `up` started"),
    ):
        action.add_argument("--ray", default="auto", metavar="ADDRESS", help="default: this host's")
    cluster.set_defaults(run=_cluster)


def _cluster(options: argparse.Namespace) -> int:
    from kvtier.cluster.settings import ClusterSettings

    if options.action == "up" and options.local:
        from kvtier.cluster import local

        local.prepare_environment()  # before anything imports ray
    from kvtier.cluster import launch

    if options.action != "up":
        action = launch.status if options.action == "status" else launch.down
        return action(say=print, ray_address=options.ray)
    settings = ClusterSettings(
        everywhere=options.everywhere,
        workers=not options.no_workers,
        worker_gpus=options.worker_gpus,
    )
    config = configuration.load(options.config)
    if options.local:
        print("up until interrupted (Ctrl-C)", flush=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # the same as Ctrl-C
        return local.up(
            config,
            nodes=options.local,
            say=print,
            wait=signal.pause,
            routers=options.router,
            settings=settings,
        )
    return launch.up(
        config,
        say=print,
        routers=options.router,
        settings=settings,
        ray_address=options.ray,
    )


def _add_demo(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    text = "run the main job on this machine: two Ray nodes, a real model, every tier"
    demo = commands.add_parser("demo", help=text, description=text)
    demo.add_argument("--model", default="smollm2", metavar="DIR", help="a Transformers causal LM")
    demo.add_argument("--redis", default="", metavar="URL", help="use this server as shared tier")
    demo.add_argument("--json", default="", metavar="FILE", help="write every figure there")
    demo.set_defaults(run=_demo)


def _demo(options: argparse.Namespace) -> int:
    from kvtier.cluster.local import prepare_environment

    prepare_environment()  # before anything imports ray
    from kvtier.demo import run

    logging.getLogger().setLevel(logging.WARNING)
    return run.main(run.Options(options.model, options.redis, options.json))


def _inspect(options: argparse.Namespace) -> int:
    configuration.parse_address(options.address, "address")
    asyncio.run(_print_status(options.address))
    return 0


async def _print_status(address: str) -> None:
    import grpc

    from kvtier.wire.pb import feed_pb2, node_pb2, node_pb2_grpc

    async with grpc.aio.insecure_channel(address) as channel:
        try:
            request = node_pb2.NodeStatusRequest()
            status = await node_pb2_grpc.NodeStub(channel).Status(request, timeout=10)
        except grpc.aio.AioRpcError as error:
            raise ConfigError(f"no node daemon at {address}: {error.details()}") from None
    state = "draining" if status.draining else "serving"
    print(f"node {status.node}, {state}, {status.clients} engines attached")
    for layout in status.layouts:
        print(f"layout {layout.layout}: {layout.leases} leases, {layout.moves} moves under way")
        for tier in layout.tiers:
            name = feed_pb2.Tier.Name(tier.tier).removeprefix("TIER_").lower()
            answer = "" if tier.available else "  (gives no answer)"
            used, room = tier.used_bytes / 2**20, tier.capacity_bytes / 2**20
            print(f"  {name:7}{tier.blocks:8} blocks {used:10.1f} of {room:.1f} MiB{answer}")


if __name__ == "__main__":
    raise SystemExit(main())
