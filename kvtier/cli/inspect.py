"""`kvtier inspect`: what a node daemon, or the folder of a disk tier, holds."""

import argparse
import asyncio
from pathlib import Path

from kvtier import config as configuration
from kvtier.cli.parser import ACCESS_HELP
from kvtier.config import Config
from kvtier.core.blocks import Attention, BlockLayout, LayerGroup
from kvtier.errors import ConfigError


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the parser of `kvtier inspect`."""
    text = "show what a node daemon, or the folder of a disk tier, holds"
    command = commands.add_parser("inspect", help=text, description=text)
    command.add_argument(
        "address", metavar="HOST:PORT|DIR", help="the daemon's gRPC address, or its disk.path"
    )
    command.add_argument("--config", metavar="FILE", help=ACCESS_HELP)
    command.set_defaults(run=_inspect)


def _inspect(options: argparse.Namespace) -> int:
    if "/" in options.address or Path(options.address).is_dir():
        _print_folder(Path(options.address))
        return 0
    configuration.parse_address(options.address, "address")
    asyncio.run(_print_status(options.address, configuration.load(options.config)))
    return 0


def _print_folder(path: Path) -> None:
    """By the headers alone, so that a daemon may use the folder meanwhile."""
    from kvtier.stores.disk.check import State, slots, stores_below

    for folder in stores_below(path):
        found = list(slots(folder, payloads=False))
        blocks = [each.header for each in found if each.state is State.BLOCK and each.header]
        files = {each.shape: each.shape.nbytes for each in found}
        frames = sum(header.nbytes for header in blocks) / 2**20
        free = sum(each.state is State.FREE for each in found)
        bad = sum(each.state is State.DAMAGED for each in found)
        layout = folder / "layout.json"
        print(f"{folder}")
        print(f"  {_shape(layout.read_text())[1] if layout.is_file() else 'of no known layout'}")
        strange = sum(each.before is None for each in found if each.state is State.BLOCK)
        print(f"  {len(blocks)} blocks {frames:.1f} MiB, {free} slots free, {bad} damaged headers")
        if strange:
            print(f"  {strange} blocks with a frame of another version, which the next start drops")
        print(f"  {len(files)} segments {sum(files.values()) / 2**20:.1f} MiB")


async def _print_status(address: str, config: Config) -> None:
    import grpc

    from kvtier.wire.access import Access
    from kvtier.wire.pb import feed_pb2, node_pb2, node_pb2_grpc

    access = Access(config, serving=False)
    access.preflight(address)
    async with access.channel(address) as channel:
        try:
            request = node_pb2.NodeStatusRequest()
            status = await node_pb2_grpc.NodeStub(channel).Status(request, timeout=10)
        except grpc.aio.AioRpcError as error:
            why = await access.why(address, error) or error.details()
            raise ConfigError(f"no node daemon at {address}: {why}") from None
    state = "draining" if status.draining else "serving"
    lends = f", lends blocks at {status.lends_at}" if status.lends_at else ""
    print(f"node {status.node}, {state}, {_count(status.clients, 'engine')} attached{lends}")
    for layout in status.layouts:
        name, shape = _shape(layout.layout)
        print(f"layout {name}\n  {shape}")
        print(f"  {_count(layout.leases, 'lease')}, {_count(layout.moves, 'move')} under way")
        for tier in layout.tiers:
            name = feed_pb2.Tier.Name(tier.tier).removeprefix("TIER_").lower()
            answer = "" if tier.available else "  (gives no answer)"
            codec = f"  {tier.codec}{' by auto' if tier.codec_chosen else ''}" if tier.codec else ""
            used, room = tier.used_bytes / 2**20, tier.capacity_bytes / 2**20
            print(f"  {name:7}{tier.blocks:8} blocks {used:10.1f} of {room:.1f} MiB{codec}{answer}")
            if tier.measured_by:
                write, read = tier.write_bytes_per_s / 1e9, tier.read_bytes_per_s / 1e9
                by = {"probe": "a probe at the start"}.get(tier.measured_by, tier.measured_by)
                print(f"          measured by {by}: {write:.3f} GB/s written, {read:.3f} read")


def _shape(text: str) -> tuple[str, str]:
    """A layout's name and what its blocks are, for a person; what cannot be read as it was told."""
    try:
        layout = BlockLayout.parse(text)
    except ValueError:
        return "of another release", text.strip()
    groups = " + ".join(map(_group, layout.groups))
    rank = f", rank {layout.rank} of {layout.ranks}" if layout.ranks > 1 else ""
    tokens, nbytes = _count(layout.block_tokens, "token"), f"{layout.nbytes:,} bytes"
    return layout.id, f"a block: {tokens}, {groups}, {layout.dtype}, {nbytes}{rank}"


def _group(group: LayerGroup) -> str:
    if group.attention is Attention.LATENT:  # or a row of vLLM's, whose layers nobody tells us
        return f"{group.layers} x {group.head_dim} values a token"
    window = f", the last {group.window} tokens" if group.window else ""
    heads = f"{_count(group.kv_heads, 'KV head')} x {group.head_dim}"
    return f"{_count(group.layers, 'layer')} ({heads}{window})"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
