"""Does the router decide well? Replay of a trace, beside a Dynamo-like cost and least-loaded.

`KVTIER_TRACE` (or ../shared/traces/conversation_trace.jsonl) is Mooncake's conversation trace; the
bars are for that one. Without it a made trace is replayed, with bars that only ask to be no worse.
"""

import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from random import Random

from benchmarks.common import Bar, summary
from kvtier.sim.route import Result, compare
from kvtier.sim.route_cluster import Setup
from kvtier.sim.trace import Request, read_trace

TRACE = Path(__file__).parent.parent.parent / "shared/traces/conversation_trace.jsonl"
VRAM = Setup()
TIERS = Setup(host_blocks=3200, pool_blocks=32_000)
LIMITS = {8: (0.65, 0.80, 0.65), 16: (0.45, 0.62, 0.45)}  # of w=1, of w=4, of w=1 with tiers
SLOW_QUEUES = "half the queues empty half as fast as believed"
DISTURBED = {
    "a node lost": replace(VRAM, lose_at=0.5),
    "a node added": replace(VRAM, join_at=0.5),
    "news 1 s late": replace(VRAM, stale_s=1.0),
    "half the nodes at half speed": replace(VRAM, slow_nodes=0.5),
    SLOW_QUEUES: replace(VRAM, slow_queues=0.5),
}


def run(*, tiny: bool) -> dict[str, object]:
    trace = Path(os.environ.get("KVTIER_TRACE", TRACE))
    real = not tiny and trace.exists()
    requests = list(read_trace(trace)) if real else made_trace(60 if tiny else 2000)
    seeds = (1,) if tiny else (1, 2, 3)
    nodes = (2,) if tiny else (8, 16)
    begun = time.perf_counter()
    policies = ("kvtier", "dynamo", "dynamo:4", "least-loaded")
    runs = {
        "VRAM": compare(requests, policies, nodes, (0.95,), VRAM, seeds),
        "tiers": compare(requests, policies, nodes, (0.95,), TIERS, seeds),
    }
    for name, setup in DISTURBED.items():
        both = ("kvtier", "least-loaded", *(("kvtier-untaught",) if name == SLOW_QUEUES else ()))
        runs[name] = compare(requests, both, nodes[:1], (0.7,), setup, seeds)
    took = time.perf_counter() - begun
    bars = []
    for count in nodes:
        bars += _bars(runs, count, LIMITS[count] if real else (1.0, 1.0, 1.0))
    for name in DISTURBED:
        ours, theirs = _means(runs[name], nodes[0])["kvtier"], _means(runs[name], nodes[0])
        bars.append(Bar(f"{name}: of least-loaded", ours / theirs["least-loaded"], at_most=1.0))
        if "kvtier-untaught" in theirs:
            ratio = ours / theirs["kvtier-untaught"]
            bars.append(Bar(f"{name}: of the same without learning", ratio, at_most=1.0))
    return {
        "trace": str(trace) if real else "made",
        "requests": len(requests),
        "bytes": 0,
        "times": {"all replays": summary([took])},
        "results": {name: [asdict(each) for each in found] for name, found in runs.items()},
        "bars": [bar.as_dict() for bar in bars],
    }


def _bars(
    runs: dict[str, list[Result]], nodes: int, limits: tuple[float, float, float]
) -> list[Bar]:
    of_1, of_4, of_1_tiers = limits
    vram, tiers = _means(runs["VRAM"], nodes), _means(runs["tiers"], nodes)
    ours, dynamo = (
        next(each for each in runs["VRAM"] if (each.policy, each.nodes) == (name, nodes))
        for name in ("kvtier", "dynamo")
    )
    what = f"{nodes} nodes at 0.95, mean TTFT"
    return [
        Bar(f"{what} of dynamo w=1", vram["kvtier"] / vram["dynamo"], at_most=of_1),
        Bar(f"{what} of dynamo w=4", vram["kvtier"] / vram["dynamo:4"], at_most=of_4),
        Bar(f"{what} of w=1, tiers", tiers["kvtier"] / tiers["dynamo"], at_most=of_1_tiers),
        Bar(f"{nodes} nodes, imbalance", ours.imbalance, at_most=1.08 if limits[0] < 1 else 1.2),
        Bar(
            f"{nodes} nodes, token hits of w=1's",
            ours.token_hit_ratio / (dynamo.token_hit_ratio or 1e-9),
            at_least=1.3,
        ),
    ]


def _means(results: list[Result], nodes: int) -> dict[str, float]:
    return {each.policy: each.ttft_mean_s for each in results if each.nodes == nodes}


def made_trace(count: int) -> list[Request]:
    """Conversations over one system prompt, in bursts; each turn repeats all before it."""
    rng = Random(1)
    requests, fresh = [], 1
    talks: list[tuple[int, ...]] = []
    for number in range(count):
        start = talks.pop(rng.randrange(len(talks))) if talks and rng.random() < 0.5 else (0,)
        more = rng.randint(1, 20)
        blocks = start + tuple(range(fresh, fresh + more))
        fresh += more
        talks.append(blocks)
        tokens = 512 * len(blocks) - rng.randrange(512)
        requests.append(Request(3.0 * (number // 10), tokens, rng.randint(1, 600), blocks))
    return requests
