"""`kvtier drain`: takes a node out of service, what only it holds copied down first."""

import argparse
import asyncio

from kvtier import config as configuration
from kvtier.cli.parser import ACCESS_HELP
from kvtier.config import Config
from kvtier.errors import ConfigError

_MOST_S = 3600.0
_ANSWER_S = 5.0  # for the daemon to answer, once its time is over


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the parser of `kvtier drain`."""
    text = "have a node daemon copy down what only its host memory holds, before it is stopped"
    command = commands.add_parser("drain", help=text, description=text)
    command.add_argument("address", metavar="HOST:PORT", help="the daemon's gRPC address")
    command.add_argument(
        "--seconds", type=float, default=30.0, metavar="S", help="at most so long, up to 3600"
    )
    command.add_argument(
        "--stay", action="store_true", help="only copy; routers go on sending requests there"
    )
    command.add_argument("--config", metavar="FILE", help=ACCESS_HELP)
    command.set_defaults(run=_drain)


def _drain(options: argparse.Namespace) -> int:
    configuration.parse_address(options.address, "address")
    if not 0 < options.seconds <= _MOST_S:
        raise ConfigError(
            f"--seconds is {options.seconds:g}, must be above 0 and up to {_MOST_S:g}"
        )
    config = configuration.load(options.config)
    left = asyncio.run(_ask(options.address, options.seconds, config, stay=options.stay))
    print(f"node at {options.address}: drained, {left} blocks not copied down")
    return 1 if left else 0


async def _ask(address: str, seconds: float, config: Config, *, stay: bool) -> int:
    import grpc

    from kvtier.wire.access import Access
    from kvtier.wire.pb import node_pb2, node_pb2_grpc

    access = Access(config, serving=False)
    access.preflight(address)
    async with access.channel(address) as channel:
        stub = node_pb2_grpc.NodeStub(channel)
        try:
            request = node_pb2.NodeDrainRequest(deadline_s=seconds, stay=stay)
            answer = await stub.Drain(request, timeout=seconds + _ANSWER_S)
        except grpc.aio.AioRpcError as error:
            why = await access.why(address, error) or error.details()
            raise ConfigError(f"no drain of the node daemon at {address}: {why}") from None
    return int(answer.undrained_blocks)
