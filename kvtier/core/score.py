"""Which worker gives the first token soonest.

    seconds = wait + (1 + behind) * (load + prefill)

`wait` is what stands in the worker's queue, `load` brings the warm blocks to VRAM, `prefill`
computes the rest. A request also holds up those that come behind it: `behind` of them, on
average, wait for its load and prefill too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from math import inf

from kvtier.core.audience import Warmth

_TIE_SHARE = 0.01
_TIE_S = 0.001


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What a worker was measured to do; 0 where nothing was measured yet.

    Raises:
        ValueError: A rate is negative or not finite.
    """

    prefill_tokens_per_s: float = 0.0
    host_bytes_per_s: float = 0.0
    disk_bytes_per_s: float = 0.0
    shared_bytes_per_s: float = 0.0

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if not 0 <= getattr(self, name) < inf:
                raise ValueError(f"{name} is {getattr(self, name)}, must be 0 or more")


# Stand in for what nobody has measured: a small GPU, a PCIe copy, an NVMe disk, 10 Gbit/s Ethernet.
DEFAULT_RATES = Rates(
    prefill_tokens_per_s=4_000.0,
    host_bytes_per_s=10e9,
    disk_bytes_per_s=2e9,
    shared_bytes_per_s=1e9,
)


_RATES = tuple(each.name for each in fields(Rates))


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A worker that could take a request."""

    name: str
    warmth: Warmth
    waiting_tokens: int = 0  # prompt tokens that it has still to compute for others
    rates: Rates = DEFAULT_RATES
    last_cold: float = 0.0  # when it was last given a prompt that it had nothing of, in seconds
    draining: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A candidate with what it is expected to take; `seconds` is the score, lowest first."""

    name: str
    warmth: Warmth
    seconds: float
    wait_s: float
    load_s: float
    prefill_s: float
    prompt_tokens: int
    block_tokens: int


def rank(
    candidates: Sequence[Candidate],
    *,
    prompt_tokens: int,
    block_tokens: int,
    block_nbytes: int,
    behind: float,
    tie: Callable[[], float],
) -> list[Choice]:
    """The candidates, best first; those that are draining after all others.

    A rate that a candidate has not measured is taken to be the median of the others': a worker
    that has just started is neither better nor worse than its like.

    Scores within 1% or 1 ms of the best of their group are as good as equal. Among equals the warm
    come first, in random order; then the cold, the one that was given a cold prompt longest ago
    first, so that new prompts spread.

    Args:
        candidates: Whom to rank.
        prompt_tokens: Length of the prompt; at least one token is always computed.
        block_tokens: Tokens of one block.
        block_nbytes: Bytes of one block, all ranks of the worker together.
        behind: How many requests, on average, wait for this one; lambda of the score.
        tie: Random numbers that put equals in order.
    """
    usual = _usual(candidates)
    scored = [
        (each, _choice(each, usual, prompt_tokens, block_tokens, block_nbytes, behind))
        for each in candidates
    ]
    scored.sort(key=lambda pair: (pair[0].draining, pair[1].seconds))
    ranked: list[Choice] = []
    while scored:
        equals = _equals_of_first(scored)
        del scored[: len(equals)]
        keyed = [(_order_among_equals(candidate, tie()), choice) for candidate, choice in equals]
        keyed.sort(key=lambda pair: pair[0])
        ranked += [choice for _, choice in keyed]
    return ranked


def why(choice: Choice) -> str:
    """One line for people: what is warm, and what the first token has to wait for."""
    parts = [
        f"{name} {blocks * choice.block_tokens:,}"
        for name, blocks in zip(choice.warmth._fields, choice.warmth, strict=True)
        if blocks
    ]
    warm = choice.warmth.blocks * choice.block_tokens
    return (
        f"{warm:,} of {choice.prompt_tokens:,} tokens warm"
        + (f" ({', '.join(parts)})" if parts else "")
        + f": {choice.load_s:.2f} s load + {choice.prefill_s:.2f} s prefill"
        + f" + {choice.wait_s:.2f} s wait"
    )


def _choice(
    candidate: Candidate,
    usual: Rates,
    prompt_tokens: int,
    block_tokens: int,
    block_nbytes: int,
    behind: float,
) -> Choice:
    rates, warmth = candidate.rates, candidate.warmth
    prefill_rate = rates.prefill_tokens_per_s or usual.prefill_tokens_per_s
    load_s = block_nbytes * (
        warmth.host / (rates.host_bytes_per_s or usual.host_bytes_per_s)
        + warmth.disk / (rates.disk_bytes_per_s or usual.disk_bytes_per_s)
        + warmth.shared / (rates.shared_bytes_per_s or usual.shared_bytes_per_s)
    )
    wait_s = candidate.waiting_tokens / prefill_rate
    prefill_s = max(1, prompt_tokens - warmth.blocks * block_tokens) / prefill_rate
    return Choice(
        name=candidate.name,
        warmth=warmth,
        seconds=wait_s + (1 + behind) * (load_s + prefill_s),
        wait_s=wait_s,
        load_s=load_s,
        prefill_s=prefill_s,
        prompt_tokens=prompt_tokens,
        block_tokens=block_tokens,
    )


def _usual(candidates: Sequence[Candidate]) -> Rates:
    """Of each rate the median of what the candidates measured, or the default if none did."""
    usual: dict[str, float] = {}
    for name in _RATES:
        known = sorted(rate for each in candidates if (rate := getattr(each.rates, name)))
        usual[name] = known[len(known) // 2] if known else getattr(DEFAULT_RATES, name)
    return Rates(**usual)


def _equals_of_first(scored: list[tuple[Candidate, Choice]]) -> list[tuple[Candidate, Choice]]:
    """The leading pairs whose scores are as good as the first one's."""
    draining, best = scored[0][0].draining, scored[0][1].seconds
    limit = best + max(_TIE_S, _TIE_SHARE * best)
    return [pair for pair in scored if pair[0].draining == draining and pair[1].seconds <= limit]


def _order_among_equals(candidate: Candidate, luck: float) -> tuple[bool, float, float]:
    cold = candidate.warmth.blocks == 0
    return cold, candidate.last_cold if cold else 0.0, luck
