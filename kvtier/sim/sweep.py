"""Policies against capacities: the table, the JSON and the picture of `kvtier simulate evict`."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from kvtier.core.policies import POLICIES
from kvtier.errors import ConfigError
from kvtier.sim.belady import optimum
from kvtier.sim.evict import Progress, Workload, replay

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


def sweep(
    workload: Workload, policies: Iterable[str], capacities: Sequence[float], progress: Progress
) -> list[Row]:
    """Every policy of `NAMES` at every share of the footprint.

    Raises:
        KeyError: There is no such policy.
    """
    rows = []
    for name in policies:
        for fraction in capacities:
            blocks = workload.capacity(fraction)
            if name == OPT:
                result = optimum(workload, blocks, progress)
            else:
                result = replay(workload, POLICIES[name], blocks, progress)
            hits = result.hits
            rows.append(
                Row(name, fraction, blocks, hits.token_ratio, hits.flop_ratio, result.us_per_block)
            )
    return rows


def write_json(path: Path, workload: Workload, rows: Sequence[Row]) -> None:
    """Write the figures.

    Raises:
        ConfigError: The file cannot be written.
    """
    figures = {
        "trace": workload.name,
        "requests": len(workload.prompts),
        "footprint_blocks": workload.footprint,
        "results": [row._asdict() for row in rows],
    }
    try:
        path.write_text(json.dumps(figures, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"--json {path}: {error.strerror}") from None


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
