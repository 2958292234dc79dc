"""What tiers of given sizes would do for given traffic: a replay and a cost model, in one answer.

Assumed, and printed with every answer: the router finds the node that has a prefix, so that the
nodes' memories count as one; each tier keeps copies of what is warmer (as kvtier's cascade does);
a load and the prefill after it do not overlap, and a load that takes longer than computing is not
made; no request waits for another.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from kvtier.core.blocks import BlockKey
from kvtier.core.policy import LRU, EvictionPolicy, PolicyFactory, Use
from kvtier.sim.evict import Prompt
from kvtier.sim.shapes import Shape


class Resident:
    """What one tier of `capacity` blocks holds under a policy that production runs."""

    def __init__(self, policy: EvictionPolicy, capacity: int) -> None:
        self._policy = policy
        self._capacity = capacity

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._policy

    def touch(self, path: Sequence[BlockKey], use: Use) -> None:
        """A request used `path`, root first."""
        self._policy.touch(path, use)
        over = len(self._policy) - self._capacity
        if over > 0:
            self._policy.remove(*islice(self._policy.coldest(), over))


@dataclass(frozen=True, slots=True)
class TierSize:
    """One tier: its bytes, and how fast it fills VRAM (0: it is VRAM)."""

    name: str
    nbytes: int
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Machine:
    """What computes: floating point operations a second that a prefill reaches."""

    flops: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a replay gave. Ratios are of all prompt tokens; times are seconds."""

    requests: int
    tokens: int
    hits: tuple[float, ...]  # of each tier, as the warmest that had the token
    cold_mean_s: float
    cold_p50_s: float
    cold_p99_s: float
    mean_s: float
    p50_s: float
    p99_s: float

    @property
    def hit_ratio(self) -> float:
        """Tokens that no one had to compute, of all."""
        return sum(self.hits)


def replay(
    prompts: Sequence[Prompt],
    tiers: Sequence[TierSize],
    shape: Shape,
    token_nbytes: float,
    machine: Machine,
    policy: PolicyFactory = LRU,
) -> Outcome:
    """Play `prompts` in order against `tiers`, warmest first.

    The first two tiers, VRAM and host memory, have `policy`; what lies below has LRU.

    Raises:
        ValueError: There are no prompts.
    """
    if not prompts:
        raise ValueError("the trace has no requests")
    block_nbytes = token_nbytes * prompts[0].block_tokens
    caches = [
        Resident(policy() if n < 2 else LRU(), int(tier.nbytes / block_nbytes))
        for n, tier in enumerate(tiers)
    ]
    hits = [0] * len(tiers)
    cold: list[float] = []
    warm: list[float] = []
    tokens = 0
    for number, prompt in enumerate(prompts):
        by_tier = _leading(prompt.keys, caches)
        for cache in caches:
            if prompt.keys:
                cache.touch(prompt.keys, Use(prompt.at_s, number, prompt.output_tokens))
        tokens += prompt.input_tokens
        restored = [blocks * prompt.block_tokens for blocks in by_tier]
        for tier, count in enumerate(restored):
            hits[tier] += count
        # The last token is always computed: its logits are what the request asks for.
        start = max(0, min(sum(restored), prompt.input_tokens - 1))
        load = sum(
            count * token_nbytes / tier.bytes_per_s
            for count, tier in zip(restored, tiers, strict=True)
            if tier.bytes_per_s
        )
        cold.append(shape.prefill_flops(0, prompt.input_tokens) / machine.flops)
        restored_s = load + shape.prefill_flops(start, prompt.input_tokens) / machine.flops
        warm.append(min(cold[-1], restored_s))  # a load slower than computing is not made
    return Outcome(
        len(cold),
        tokens,
        tuple(count / max(tokens, 1) for count in hits),
        statistics.fmean(cold),
        *_quantiles(cold),
        statistics.fmean(warm),
        *_quantiles(warm),
    )


def _leading(path: Sequence[BlockKey], caches: Sequence[Resident]) -> list[int]:
    """Leading blocks of `path` that some tier has, each counted in its warmest."""
    by_tier = [0] * len(caches)
    for block in path:
        tier = next((n for n, cache in enumerate(caches) if block in cache), None)
        if tier is None:
            break
        by_tier[tier] += 1
    return by_tier


def _quantiles(values: list[float]) -> tuple[float, float]:
    ordered = sorted(values)
    return ordered[len(ordered) // 2], ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)]


def vram_nbytes(
    shape: Shape, gpu_nbytes: int, gpus: int, weight_bits: int, utilization: float
) -> int:
    """Bytes that are left for KV on one engine's GPUs after the weights.

    Raises:
        ValueError: The weights do not fit; says how many GPUs would do.
    """
    room = int(gpu_nbytes * utilization)
    weights = shape.weights * weight_bits // 8
    if weights >= room * gpus:
        needed = weights // room + 1
        raise ValueError(
            f"{shape.name} has {weights / 1e9:.0f} GB of weights at {weight_bits} bits, and "
            f"{gpus} x {gpu_nbytes / 1e9:.0f} GB at {utilization:.0%} is less; needs {needed} GPUs"
        )
    return room * gpus - weights


def replication(shape: Shape, ranks: int) -> float:
    """How often the ranks of a tensor-parallel engine keep the same KV between them.

    Heads are split while there are enough of them; a latent vector is kept by every rank.
    """
    values = sum(group.values_per_token for group in shape.groups)
    kept = sum(group.values_per_token * max(1.0, ranks / group.kv_heads) for group in shape.groups)
    return kept / values
