"""What does PHD find, and what does it cost, against LRU? A replay of a trace, policies in turn.

The trace is the conversation trace of Mooncake's FAST'25 release where it lies beside the
repository (../shared/traces), and made-up chat where it does not; its bars hold for the former.
And does a call of it, or of the books around it, ever take long over a million blocks?
"""

import tracemalloc
from pathlib import Path
from statistics import median

from benchmarks.common import Bar, summary
from benchmarks.pause import longest
from kvtier.core.phd import PHD
from kvtier.core.policy import LRU
from kvtier.sim.belady import optimum
from kvtier.sim.evict import Workload, replay
from kvtier.sim.trace import read_trace
from kvtier.sim.workloads import KINDS, generate

TRACE = Path(__file__).parents[2] / "shared" / "traces" / "conversation_trace.jsonl"
# Token hit ratios in %, by share of the footprint.
BARS = {0.005: 6.8, 0.01: 9.3, 0.02: 13.8, 0.05: 22.0, 0.1: 29.6, 0.2: 35.1, 0.5: 37.1}
BEHIND = 0.5  # points that PHD may lie under LRU


def run(*, tiny: bool) -> dict[str, object]:
    real = TRACE.exists() and not tiny
    requests = 600 if tiny else 6000
    workload = Workload(
        read_trace(TRACE) if real else generate("chat", 1, requests), "conversation"
    )
    shares = (0.02, 0.2) if tiny else tuple(BARS)
    costs: dict[str, list[float]] = {"phd": [], "lru": []}
    bars, results, least = [], [], 100.0
    for share in shares:
        capacity = workload.capacity(share)
        row = {"capacity_fraction": share}
        for name, policy in (("phd", PHD), ("lru", LRU)):
            result = replay(workload, policy, capacity)
            row[name] = 100 * result.hits.token_ratio
            costs[name].append(result.us_per_block / 1e6)
        row["opt"] = 100 * optimum(workload, capacity).hits.token_ratio
        results.append(row)
        least = min(least, row["phd"] - row["lru"])
        if real:
            bars.append(Bar(f"PHD finds, % at {100 * share:g}%", row["phd"], at_least=BARS[share]))
    bars.append(Bar("PHD over LRU, points, trace", least, at_least=-BEHIND if not tiny else -100))
    over = [phd - lru for phd, lru in zip(costs["phd"], costs["lru"], strict=True)]
    made_up = {}
    for kind in KINDS:
        least = _least_lead(Workload(generate(kind, 7, requests)), shares)
        limit = -BEHIND if not tiny else -100
        bars.append(Bar(f"PHD over LRU, points, {kind}", least, at_least=limit))
        made_up[kind] = _costs(Workload(generate(kind, 1, requests // 2)), rounds=2 if tiny else 9)
    bars.append(Bar("PHD over LRU, us a block", 1e6 * max(over), at_most=5.0))
    # Short prompts cost most: much of the cost is by request.
    worst = 1e6 * max(each["over"] for each in made_up.values())
    limit = 1000.0 if tiny else 5.0
    bars.append(Bar("PHD over LRU, us a block, worst of made-up traffic", worst, at_most=limit))
    bars.append(Bar("bytes a block tracked", _bytes_a_block(workload), at_most=300))
    for name, ms in longest(3000 if tiny else 1_000_000).items():
        limit = 1000.0 if tiny else 1.0
        bars.append(Bar(f"longest pause, ms at 1M blocks, {name}", ms, at_most=limit))
    return {
        "trace": TRACE.name if real else "made-up chat",
        "footprint_blocks": workload.footprint,
        "results": results,
        "times": {f"{name}, a block": summary(each) for name, each in costs.items()},
        "made_up_us_a_block": {
            kind: {name: 1e6 * each for name, each in row.items()} for kind, row in made_up.items()
        },
        "bars": [bar.as_dict() for bar in bars],
    }


def _least_lead(workload: Workload, shares: tuple[float, ...]) -> float:
    leads = []
    for share in shares:
        capacity = workload.capacity(share)
        phd, lru = (replay(workload, each, capacity).hits.token_ratio for each in (PHD, LRU))
        leads.append(100 * (phd - lru))
    return min(leads)


def _costs(workload: Workload, rounds: int) -> dict[str, float]:
    """Seconds a block at a twentieth of the footprint, policies in turn: medians."""
    capacity, costs = workload.capacity(0.05), dict[str, list[float]]()
    for _ in range(rounds):
        lru, phd = (replay(workload, each, capacity).us_per_block / 1e6 for each in (LRU, PHD))
        for name, cost in (("lru", lru), ("phd", phd), ("over", phd - lru)):
            costs.setdefault(name, []).append(cost)
    return {name: median(each) for name, each in costs.items()}


def _bytes_a_block(workload: Workload) -> float:
    """Memory of PHD at a tenth of the footprint, its ghosts counted as tracked."""
    made: list[PHD] = []

    def make() -> PHD:
        made.append(PHD())
        return made[0]

    tracemalloc.start()
    replay(workload, make, workload.capacity(0.1))
    nbytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return nbytes / max(1, made[0].tracked)
