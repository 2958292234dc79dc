"""`kvtier simulate route`: what a routing policy would make of recorded traffic."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, cast

from kvtier.cli.parser import JSON_HELP, PLOT_HELP, check_outputs
from kvtier.errors import ConfigError

if TYPE_CHECKING:
    from kvtier.sim.route import Result

_POLICIES = "kvtier,dynamo,dynamo:4,least-loaded,round-robin,random,prefix,consistent-hash"
_OPTIONS = {
    "vram_blocks": (0, 10**9, "blocks of a node's VRAM cache"),
    "host_blocks": (0, 10**9, "blocks of a node's host tier"),
    "pool_blocks": (0, 10**9, "blocks of the store that all nodes share"),
    "kv_bytes_per_token": (1, 10**9, "bytes of KV of one token"),
    "prefill_tokens_per_s": (1e-3, 1e12, "prefill speed at the start of a prompt"),
    "doubles_at": (1.0, 1e12, "position at which a token takes twice as long"),
    "host_bytes_per_s": (1.0, 1e15, "speed of loads from host memory"),
    "pool_bytes_per_s": (1.0, 1e15, "speed of loads from the shared store"),
    "decode_s": (0.0, 1e3, "seconds that a generated token takes"),
    "stale_s": (0.0, 3600.0, "so late the router learns what a cache holds"),
    "slow_nodes": (0.0, 1.0, "share of the nodes that work at half speed"),
    "slow_queues": (0.0, 1.0, "share of the nodes whose queues empty half as fast as is believed"),
    "lose_at": (0.0, 1.0, "share of the trace after which a node is lost"),
    "join_at": (0.0, 1.0, "share of the trace after which a node is added"),
}


def add(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the parser of `kvtier simulate route`."""
    from kvtier.sim.route_cluster import Setup

    text = "replay a trace through a router: seconds to the first token, by policy"
    command = actions.add_parser("route", help=text, description=text)
    command.add_argument(
        "--trace", required=True, metavar="FILE",
        help="requests to replay, in Mooncake's format",
    )  # fmt: skip
    command.add_argument(
        "--block-tokens",
        type=int,
        metavar="N",
        help="tokens a block of the trace (default: as the trace says, else 512)",
    )
    command.add_argument(
        "--nodes", default="8", metavar="N,N", help="sizes of the cluster, with commas between"
    )
    command.add_argument(
        "--utilization", default="0.7", metavar="U,U",
        help="how busy the Dynamo-like policy with weight 1 would keep "
        "the nodes, with commas between",
    )  # fmt: skip
    command.add_argument("--policy", default=_POLICIES, metavar="P,P", help="with commas between")
    command.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each")
    for each in fields(Setup):
        _, _, about = _OPTIONS[each.name]
        kind = type(each.default)
        command.add_argument(
            f"--{each.name.replace('_', '-')}", type=kind, default=each.default,
            metavar="N", help=f"{about} (default: {each.default:g})",
        )  # fmt: skip
    command.add_argument("--json", type=Path, metavar="FILE", help=JSON_HELP)
    command.add_argument("--plot", type=Path, metavar="FILE.png", help=PLOT_HELP)
    command.set_defaults(run=_route)


def _route(options: argparse.Namespace) -> int:
    from kvtier.sim.route import compare
    from kvtier.sim.route_cluster import Setup
    from kvtier.sim.trace import load_trace

    values = {name: _limited(options, name) for name in _OPTIONS}
    setup = Setup(**values)  # type: ignore[arg-type]  # each has the type of its default
    if not 1 <= options.seeds <= 1000:
        raise ConfigError(f"--seeds is {options.seeds}, must be 1 to 1000")
    if options.block_tokens is not None and not 1 <= options.block_tokens <= 2**20:
        raise ConfigError(f"--block-tokens is {options.block_tokens}, must be 1 to {2**20}")
    nodes = [int(n) for n in _numbers("--nodes", options.nodes, 1, 4096, whole=True)]
    if setup.lose_at < 1 and min(nodes) < 2:
        raise ConfigError("--lose-at: one node can't be lost of one")
    utilizations = _numbers("--utilization", options.utilization, 0.001, 10)
    names = [name.strip() for name in options.policy.split(",")]
    check_outputs(options)
    results = compare(
        load_trace(options.trace, options.block_tokens), names, nodes, utilizations, setup,
        range(1, options.seeds + 1),
    )  # fmt: skip
    _table(results)
    if options.json:
        found = {
            "trace": str(options.trace),
            "seeds": options.seeds,
            "setup": asdict(setup),
            "results": [asdict(each) for each in results],
        }
        _write(options.json, (json.dumps(found, indent=1) + "\n").encode())
    if options.plot:
        _plot(results, options.plot)
    return 0


def _table(results: Sequence["Result"]) -> None:
    print(f"{'policy':16}{'nodes':>6}{'load':>6}{'mean s':>10}{'p50 s':>10}{'p99 s':>10}"
          f"{'hits %':>8}{'imbalance':>11}")  # fmt: skip
    for each in results:
        print(
            f"{each.policy:16}{each.nodes:6}{each.utilization:6.2f}{each.ttft_mean_s:10.3f}"
            f"{each.ttft_p50_s:10.3f}{each.ttft_p99_s:10.3f}{100 * each.token_hit_ratio:8.2f}"
            f"{each.imbalance:11.3f}"
        )


def _limited(options: argparse.Namespace, name: str) -> float:
    low, high, _ = _OPTIONS[name]
    value = cast("float", getattr(options, name))
    if not low <= value <= high:
        raise ConfigError(f"--{name.replace('_', '-')} is {value:g}, must be {low:g} to {high:g}")
    return value


def _numbers(name: str, text: str, low: float, high: float, *, whole: bool = False) -> list[float]:
    found = []
    for part in text.split(","):
        try:
            number = float(int(part) if whole else float(part))
        except ValueError:
            number = float("nan")
        if not low <= number <= high:
            raise ConfigError(f"{name} has {part!r}, must be {low:g} to {high:g}")
        found.append(number)
    return found


def _write(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None


def _plot(results: Sequence["Result"], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    groups = dict.fromkeys((each.nodes, each.utilization) for each in results)
    figure, axes = plt.subplots(
        1, len(groups), figsize=(5 * len(groups), 4), squeeze=False, layout="constrained"
    )
    for axis, (nodes, load) in zip(axes[0], groups, strict=True):
        bars = [r for r in results if (r.nodes, r.utilization) == (nodes, load)]
        drawn = axis.barh([r.policy for r in bars], [r.ttft_mean_s for r in bars])
        axis.bar_label(drawn, fmt="%.3g", padding=3)
        axis.margins(x=0.2)
        axis.set(title=f"{nodes} nodes, load {load:g}", xlabel="mean seconds to first token",
                 xscale="log")  # fmt: skip
        axis.invert_yaxis()
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from None
    finally:
        plt.close(figure)
