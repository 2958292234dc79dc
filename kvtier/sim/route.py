"""Replay of a trace through a router: how long first tokens take under each policy.

`utilization` says how hard the cluster is driven: the trace's clock is divided by the factor at
which the Dynamo-like policy with weight 1, on the trace as it is, would keep the nodes busy for
that share of the time. Every policy of one setup is driven by the same factor.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Final, NamedTuple

from kvtier.errors import ConfigError
from kvtier.sim.route_cluster import Node, Pool, Sent, Setup
from kvtier.sim.route_policies import policy
from kvtier.sim.trace import Request

REFERENCE: Final = "dynamo"  # its utilization is the one that is set


class Outcome(NamedTuple):
    """What one policy made of a trace; seconds to first token in the order of the requests."""

    ttfts: list[float]
    token_hit_ratio: float
    imbalance: float  # the busiest node's time, in units of the mean
    busy_s: float  # of all nodes together


@dataclass(frozen=True, slots=True)
class Result:
    """One line of the answer, the mean of all seeds."""

    policy: str
    nodes: int
    utilization: float
    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    token_hit_ratio: float
    imbalance: float


def simulate(
    requests: Sequence[Request], name: str, nodes: int, setup: Setup, *, factor: float, seed: int
) -> Outcome:
    """Send every request, `factor` times as fast as it was recorded."""
    if not requests:
        raise ConfigError("trace: no requests")
    cluster = _Cluster(nodes, setup)
    choose = policy(name, setup, Random(seed))
    start, end = requests[0].at_s, requests[-1].at_s
    lose = start + setup.lose_at * (end - start) if setup.lose_at < 1 else float("inf")
    join = start + setup.join_at * (end - start) if setup.join_at < 1 else float("inf")
    ttfts = [0.0] * len(requests)
    matched = total = 0
    for number, request in enumerate(requests):
        now = (request.at_s - start) / factor
        if request.at_s >= join:
            join = float("inf")
            cluster.join()
        if request.at_s >= lose:
            lose = float("inf")
            for lost in cluster.lose(now):
                node = choose(cluster.nodes, lost.request, now)
                sent = node.send(lost.number, lost.request, lost.asked_s, now)
                ttfts[lost.number] = sent.first_token_s - lost.asked_s
        cluster.advance(now)
        node = choose(cluster.nodes, request, now)
        sent = node.send(number, request, now, now)
        ttfts[number] = sent.first_token_s - now
        matched += min(sent.matched * request.block_tokens, request.input_tokens)
        total += request.input_tokens
    busy = [node.busy_s for node in cluster.all_nodes]
    mean = sum(busy) / len(busy)
    return Outcome(ttfts, matched / max(1, total), max(busy) / mean if mean else 1.0, sum(busy))


def time_factor(requests: Sequence[Request], nodes: int, utilization: float, setup: Setup) -> float:
    """By what the trace's clock has to be divided, see the module."""
    if not requests:
        raise ConfigError("trace: no requests")
    plain = _undisturbed(setup)
    busy_s = simulate(requests, REFERENCE, nodes, plain, factor=1.0, seed=1).busy_s
    span_s = requests[-1].at_s - requests[0].at_s
    if not span_s or not busy_s:  # all come at one moment: no factor changes that
        return 1.0
    return nodes * span_s * utilization / busy_s


def compare(
    requests: Sequence[Request],
    policies: Iterable[str],
    nodes: Iterable[int],
    utilizations: Iterable[float],
    setup: Setup,
    seeds: Sequence[int],
) -> list[Result]:
    """Every policy at every size and load; the mean of the seeds."""
    policies, utilizations = list(policies), list(utilizations)
    results = []
    for count in nodes:
        unit = time_factor(requests, count, 1.0, setup)
        for utilization in utilizations:
            for name in policies:
                runs = [
                    simulate(requests, name, count, setup, factor=unit * utilization, seed=seed)
                    for seed in seeds
                ]
                results.append(_result(name, count, utilization, runs))
    return results


def _result(name: str, nodes: int, utilization: float, runs: Sequence[Outcome]) -> Result:
    ordered = [sorted(run.ttfts) for run in runs]

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    return Result(
        policy=name,
        nodes=nodes,
        utilization=utilization,
        ttft_mean_s=mean([mean(ttfts) for ttfts in ordered]),
        ttft_p50_s=mean([ttfts[len(ttfts) // 2] for ttfts in ordered]),
        ttft_p99_s=mean([ttfts[min(len(ttfts) - 1, len(ttfts) * 99 // 100)] for ttfts in ordered]),
        token_hit_ratio=mean([run.token_hit_ratio for run in runs]),
        imbalance=mean([run.imbalance for run in runs]),
    )


def _undisturbed(setup: Setup) -> Setup:
    return replace(setup, stale_s=0.0, slow_nodes=0.0, slow_queues=0.0, lose_at=1.0, join_at=1.0)


class _Cluster:
    def __init__(self, nodes: int, setup: Setup) -> None:
        self._setup = setup
        self._pool = Pool(setup.pool_blocks)
        slow, slow_queues = round(nodes * setup.slow_nodes), round(nodes * setup.slow_queues)
        self.nodes = [
            Node(f"node {i}", setup, self._pool, slow=i < slow, slow_queue=i < slow_queues)
            for i in range(nodes)
        ]
        self.all_nodes = list(self.nodes)

    def join(self) -> None:
        node = Node(f"node {len(self.all_nodes)}", self._setup, self._pool)
        self.nodes.append(node)
        self.all_nodes.append(node)

    def lose(self, now: float) -> list[Sent]:
        self.advance(now)
        return self.nodes.pop(0).lose(now)

    def advance(self, now: float) -> None:
        for node in self.nodes:
            node.advance(now)
