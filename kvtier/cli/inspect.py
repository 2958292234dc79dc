"""`kvtier inspect`: what a node daemon holds."""

import argparse
import asyncio

from kvtier import config as configuration
from kvtier.errors import ConfigError


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the parser of `kvtier inspect`."""
    text = "show what a node daemon holds"
    command = commands.add_parser("inspect", help=text, description=text)
    command.add_argument("address", metavar="HOST:PORT", help="the daemon's gRPC address")
    command.set_defaults(run=_inspect)


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
