"""`kvtier simulate evict`: what eviction policies would make of recorded traffic."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from kvtier.cli.parser import JSON_HELP, PLOT_HELP, check_outputs
from kvtier.errors import ConfigError

if TYPE_CHECKING:
    from rich.progress import Progress

    from kvtier.sim.evict import Workload
    from kvtier.sim.sweep import Row

_MOST_TIMES = 10**6
_CAPACITIES = "0.005,0.01,0.02,0.05,0.1,0.2,0.5"


def add(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the parser of `kvtier simulate evict`."""
    text = "how much of a trace's prompts each eviction policy finds again, by capacity"
    evict = actions.add_parser("evict", help=text, description=text)
    evict.add_argument(
        "--trace",
        required=True,
        type=Path,
        metavar="FILE",
        help="requests to replay, in Mooncake's format",
    )
    evict.add_argument(
        "--block-tokens",
        type=int,
        metavar="N",
        help="tokens a block of the trace (default: as the trace says, else 512)",
    )
    evict.add_argument(
        "--capacity", default=_CAPACITIES, metavar="SHARES",
        help="of the blocks that the trace asks for, with commas between",
    )  # fmt: skip
    evict.add_argument(
        "--policy",
        default="phd,lru,opt",
        metavar="NAMES",
        help="with commas between, or all",
    )
    evict.add_argument(
        "--tiers", default="1", metavar="A:B:C",
        help="sizes of VRAM, host memory and disk to one another, as 1:4:40: --capacity is then "
        "VRAM's, and the tiers below it have 4 and 40 times as much (default: 1, one tier)",
    )  # fmt: skip
    evict.add_argument(
        "--admission", choices=("all", "second-use"), default="all",
        help="what disk takes, as disk.admission says it for a node; with --tiers A:B:C",
    )  # fmt: skip
    evict.add_argument(
        "--cache", choices=("bare", "host", "vram"), default="bare",
        help="what the policy orders: blocks alone, or a node's host tier or a worker's pool, "
        "to the block as they do; without --tiers",
    )  # fmt: skip
    evict.add_argument("--json", type=Path, metavar="FILE", help=JSON_HELP)
    evict.add_argument("--plot", type=Path, metavar="FILE.png", help=PLOT_HELP)
    evict.set_defaults(run=_evict)


def _evict(options: argparse.Namespace) -> int:
    from kvtier.sim import sweep
    from kvtier.sim.evict import Workload
    from kvtier.sim.live import CACHES
    from kvtier.sim.trace import load_trace

    capacities, tiers = _shares(options.capacity), _tiers(options.tiers)
    if len(tiers) > 1 and options.cache != "bare":
        raise ConfigError(f"--cache {options.cache} is one tier alone, and --tiers names several")
    if options.admission != "all" and len(tiers) < 3:
        raise ConfigError(f"--admission {options.admission}: --tiers {options.tiers} has no disk")
    names = sweep.NAMES if options.policy == "all" else tuple(options.policy.split(","))
    for name in names:
        if name not in sweep.NAMES:
            known = ", ".join(sweep.NAMES)
            raise ConfigError(f"--policy {name!r}: must be of {known}, or all")
    size = options.block_tokens
    if size is not None and not 1 <= size <= 2**20:
        raise ConfigError(f"--block-tokens {size}: must be 1 to {2**20}")
    check_outputs(options)
    workload = Workload(load_trace(options.trace, size), options.trace.name)
    total = len(names) * len(capacities) * len(workload.prompts)
    with _progress() as bar:
        task = bar.add_task("replaying", total=total)
        rows = sweep.sweep(
            workload, names, capacities, lambda done: bar.advance(task, done), tiers,
            CACHES[options.cache], second_use=options.admission == "second-use",
        )  # fmt: skip
    _print(workload, rows)
    if options.json is not None:
        sweep.write_json(options.json, workload, rows)
    if options.plot is not None:
        sweep.plot(options.plot, workload, rows)
    return 0


def _shares(text: str) -> list[float]:
    shares = []
    for part in text.split(","):
        try:
            share = float(part)
        except ValueError:
            share = 0.0
        if not 0 < share <= 1:
            raise ConfigError(f"--capacity {part!r}: must be a share above 0 and up to 1")
        shares.append(share)
    return shares


def _tiers(text: str) -> list[float]:
    try:
        sizes = [float(part) for part in text.split(":")]
    except ValueError:
        sizes = []
    if not 1 <= len(sizes) <= 3 or not all(0 < size <= _MOST_TIMES for size in sizes):
        raise ConfigError(
            f"--tiers {text!r}: must be 1 to 3 numbers above 0 and up to {_MOST_TIMES}, as 1:4:40"
        )
    return sizes


def _progress() -> "Progress":
    from rich.console import Console
    from rich.progress import Progress

    return Progress(console=Console(stderr=True), transient=True)


def _print(workload: "Workload", rows: "list[Row]") -> None:
    from rich.console import Console
    from rich.table import Table

    from kvtier.sim.tiers import NAMES

    tiers = NAMES[: max(len(row.by_tier) for row in rows)]
    table = Table(title=f"{workload.name}: {len(workload.prompts)} requests")
    disk = len(tiers) == len(NAMES)
    more = (*tiers, *(("disk writes",) if disk else ())) or ("prefill saved", "us a block")
    for heading in ("policy", "capacity", "blocks", "tokens found", *more):
        table.add_column(heading, justify="left" if heading == "policy" else "right")
    for row in rows:
        parts = [f"{100 * part:.2f}%" for part in row.by_tier]
        if disk:
            parts.append("-" if row.disk_writes is None else str(row.disk_writes))
        table.add_row(
            row.policy, f"{100 * row.capacity_fraction:g}%", str(row.capacity_blocks),
            f"{100 * row.token_hit_ratio:.2f}%",
            *(parts or (f"{100 * row.flop_saved:.2f}%", f"{row.us_per_block:.2f}")),
        )  # fmt: skip
    Console().print(table)
