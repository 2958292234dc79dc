"""Policies against capacities: the table, the JSON and the picture of `kvtier simulate evict`."""

import json
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Final, NamedTuple

from kvtier.core.policies import POLICIES
from kvtier.errors import ConfigError
from kvtier.sim import tiers as tiered
from kvtier.sim.belady import optimum
from kvtier.sim.evict import Bare, MakeCache, Progress, Workload, replay

OPT: Final = "opt"
NAMES: Final = (*POLICIES, OPT)


class Row(NamedTuple):
    """One policy at one capacity; ratios are 0 to 1."""

    policy: str
    capacity_fraction: float
    capacity_blocks: int
    token_hit_ratio: float
    flop_saved: float
    us_per_block: float
    by_tier: tuple[float, ...] = ()  # of token_hit_ratio, the parts, where there are tiers
    disk_writes: int | None = None  # blocks, where there is a disk; the optimum's are not known


def sweep(
    workload: Workload,
    policies: Iterable[str],
    capacities: Sequence[float],
    progress: Progress,
    tiers: Sequence[float] = (1.0,),
    cache: MakeCache = Bare,
    *,
    second_use: bool = False,
) -> list[Row]:
    """Every policy of `NAMES` at every share of the footprint.

    With several `tiers`, whose sizes are to one another as those numbers, a share is the first
    one's; with one, `cache` keeps its books. With `second_use` disk takes only what was asked for
    twice. The optimum's part of a tier is what the tiers down
    to it can find together, less what those above it can.

    Raises:
        KeyError: There is no such policy.
    """
    return [
        _row(workload, name, fraction, progress, tiers, cache, second_use=second_use)
        for name in policies
        for fraction in capacities
    ]


def _row(
    workload: Workload,
    name: str,
    fraction: float,
    progress: Progress,
    tiers: Sequence[float],
    cache: MakeCache,
    *,
    second_use: bool,
) -> Row:
    sizes = [workload.capacity(fraction * size / tiers[0]) for size in tiers]
    by_tier: tuple[float, ...] = ()
    writes: int | None = None
    if name == OPT:
        hits, cost = optimum(workload, sum(sizes), progress)
        if len(tiers) > 1:
            down_to = [optimum(workload, sum(sizes[:n])).hits for n in range(1, len(sizes))]
            ratios = [0.0, *(each.token_ratio for each in down_to), hits.token_ratio]
            by_tier = tuple(below - above for above, below in pairwise(ratios))
    elif len(tiers) > 1:
        hits, by_tier, made, cost = tiered.replay(
            workload, POLICIES[name], sizes, progress, second_use=second_use
        )
        writes = made if len(tiers) == len(tiered.NAMES) else None
    else:
        hits, cost = replay(workload, POLICIES[name], sizes[0], progress, cache)
    return Row(name, fraction, sizes[0], hits.token_ratio, hits.flop_ratio, cost, by_tier, writes)


def write_json(path: Path, workload: Workload, rows: Sequence[Row]) -> None:
    """Write the figures.

    Raises:
        ConfigError: The file cannot be written.
    """
    figures = {
        "trace": workload.name,
        "requests": len(workload.prompts),
        "footprint_blocks": workload.footprint,
        "results": [_figures(row) for row in rows],
    }
    try:
        path.write_text(json.dumps(figures, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"--json {path}: {error.strerror}") from None


def _figures(row: Row) -> dict[str, object]:
    figures = row._asdict()
    if not row.by_tier:
        del figures["by_tier"]
    if row.disk_writes is None:
        del figures["disk_writes"]
    return figures


def plot(path: Path, workload: Workload, rows: Sequence[Row]) -> None:
    """Draw hit ratio against capacity, one line a policy, the bound on top.

    Raises:
        ConfigError: The file cannot be written, or its kind is not known.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name in dict.fromkeys(row.policy for row in rows):
        points = sorted((r.capacity_fraction, r.token_hit_ratio) for r in rows if r.policy == name)
        axes.plot(
            [100 * x for x, _ in points],
            [100 * y for _, y in points],
            marker="o",
            markersize=3,
            label=name,
            color="black" if name == OPT else None,
            linestyle="--" if name == OPT else "-",
        )
    axes.set_xscale("log")
    ticks = sorted({100 * row.capacity_fraction for row in rows})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(f"capacity, % of the {workload.footprint} blocks asked for")
    axes.set_ylabel("tokens found, %")
    axes.set_title(workload.name)
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path)
    except OSError as error:
        raise ConfigError(f"--plot {path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"--plot {path}: {str(error).splitlines()[0]}") from None
