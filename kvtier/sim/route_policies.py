"""Whom a router sends a request to: kvtier's own ranking, and what it is compared with."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from random import Random
from typing import Final, TypeVar
from zlib import crc32

from kvtier.config import RouterConfig
from kvtier.core import score
from kvtier.core.behind import Behind
from kvtier.core.learned import Learned
from kvtier.errors import ConfigError
from kvtier.sim.route_cluster import Node, Setup
from kvtier.sim.trace import Request

MOST_BEHIND: Final = RouterConfig().behind
_POINTS: Final = 100  # of a node on the hash ring

Cost = TypeVar("Cost", float, tuple[int, float])


Policy = Callable[[Sequence[Node], Request, float], Node]  # the request's node, at a time


def policy(name: str, setup: Setup, rng: Random) -> Policy:
    """The policy of this name.

    `kvtier` (or `kvtier:L` with a lambda of at most L), `kvtier-untaught` (it learns nothing from
    requests that got their first token), `dynamo` (or `dynamo:W`: the cost of NVIDIA
    Dynamo's KV router as published, with weight W of the prefill term), `least-loaded`,
    `round-robin`, `random`, `prefix` (longest match), `consistent-hash` (of the second block, as
    the first is often the same for all).

    Raises:
        ConfigError: There is none.
    """
    kind, _, argument = name.partition(":")
    make = _POLICIES.get(kind)
    try:
        number = float(argument) if argument else None
    except ValueError:
        number = -1.0
    if make is None or (number is not None and (kind not in _WEIGHTED or not 0 <= number < 1e6)):
        known = ", ".join(_POLICIES)
        raise ConfigError(f"policy {name!r} is unknown; known: {known}, kvtier:L, dynamo:W")
    return make(setup, rng, number)


def _ranked(setup: Setup, rng: Random, number: float | None) -> Policy:
    return _learning(setup, rng, MOST_BEHIND if number is None else number, learns=True)


def _untaught(setup: Setup, rng: Random, number: float | None) -> Policy:
    """As `kvtier`, with the nodes' own word of their speeds, and queues as they are believed."""
    return _learning(setup, rng, MOST_BEHIND if number is None else number, learns=False)


def _learning(setup: Setup, rng: Random, most_behind: float, *, learns: bool) -> Policy:
    behind, learned = Behind(most_behind), Learned()

    def choose(nodes: Sequence[Node], request: Request, now: float) -> Node:
        for node in nodes if learns else ():
            while node.begun:
                sent = node.begun.popleft()
                learned.observe(node.name, sent.told, sent.first_token_s)
        blocks = request.full_blocks
        candidates = [
            score.Candidate(
                name=node.name,
                warmth=node.warmth(blocks, now),
                rates=learned.rates(node.name, node.rates, now),
                last_cold=node.last_cold,
                wait_s=node.wait_s(now),
            )
            for node in nodes
        ]
        behind.see(sum(each.wait_s > 0 for each in candidates), len(candidates))
        (best,) = score.rank(
            candidates,
            prompt_tokens=max(1, request.input_tokens),
            block_tokens=request.block_tokens,
            block_nbytes=setup.kv_bytes_per_token * request.block_tokens,
            behind=behind.value,
            tie=rng.random,
            most=1,
        )
        return next(node for node in nodes if node.name == best.name)

    return choose


def _dynamo(_setup: Setup, rng: Random, number: float | None) -> Policy:
    """Cost = w * (blocks to prefill, its own included) + blocks in decode; lowest wins."""
    weight = 1.0 if number is None else number

    def choose(nodes: Sequence[Node], request: Request, now: float) -> Node:
        blocks, own = request.full_blocks, request.input_tokens / request.block_tokens

        def cost(node: Node) -> float:
            warmth = node.warmth(blocks, now)
            prefill = node.prefill_blocks + own - warmth.vram - warmth.host
            return weight * prefill + node.decode_blocks

        return _lowest(nodes, cost, rng)

    return choose


def _least_loaded(_setup: Setup, rng: Random, _number: float | None) -> Policy:
    return lambda nodes, _request, now: _lowest(nodes, lambda node: node.wait_s(now), rng)


def _round_robin(_setup: Setup, _rng: Random, _number: float | None) -> Policy:
    turn = -1

    def choose(nodes: Sequence[Node], _request: Request, _now: float) -> Node:
        nonlocal turn
        turn += 1
        return nodes[turn % len(nodes)]

    return choose


def _random(_setup: Setup, rng: Random, _number: float | None) -> Policy:
    return lambda nodes, _request, _now: rng.choice(nodes)


def _prefix(_setup: Setup, rng: Random, _number: float | None) -> Policy:
    def choose(nodes: Sequence[Node], request: Request, now: float) -> Node:
        def cost(node: Node) -> tuple[int, float]:
            warmth = node.warmth(request.full_blocks, now)
            return -warmth.vram - warmth.host, node.wait_s(now)

        return _lowest(nodes, cost, rng)

    return choose


def _consistent_hash(_setup: Setup, _rng: Random, _number: float | None) -> Policy:
    ring: list[tuple[int, Node]] = []

    def choose(nodes: Sequence[Node], request: Request, _now: float) -> Node:
        nonlocal ring
        if {id(node) for _, node in ring} != {id(node) for node in nodes}:
            points = [(crc32(f"{n.name}/{i}".encode()), n) for n in nodes for i in range(_POINTS)]
            ring = sorted(points, key=lambda point: point[0])
        block = request.blocks[min(1, len(request.blocks) - 1)] if request.blocks else 0
        at = bisect_left(ring, crc32(str(block).encode()), key=lambda point: point[0])
        return ring[at % len(ring)][1]

    return choose


def _lowest(nodes: Sequence[Node], cost: Callable[[Node], Cost], rng: Random) -> Node:
    costs = [cost(node) for node in nodes]
    best = min(costs)
    equals = [node for node, each in zip(nodes, costs, strict=True) if each == best]
    return equals[0] if len(equals) == 1 else rng.choice(equals)


_WEIGHTED: Final = ("kvtier", "kvtier-untaught", "dynamo")
_POLICIES: Final[dict[str, Callable[[Setup, Random, float | None], Policy]]] = {
    "kvtier": _ranked,
    "dynamo": _dynamo,
    "least-loaded": _least_loaded,
    "round-robin": _round_robin,
    "random": _random,
    "prefix": _prefix,
    "consistent-hash": _consistent_hash,
    "kvtier-untaught": _untaught,
}
