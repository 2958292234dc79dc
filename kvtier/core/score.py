"""Which worker gives the first token soonest.

    seconds = wait + (1 + behind) * (load + prefill)

`wait` is what stands in the worker's queue, at the speed at which its queue empties, `load` brings
the warm blocks to VRAM, `prefill` computes the rest. A request also holds up those that come behind
it: `behind` of them, on average, wait for its load and prefill too (kvtier.core.behind).

Computing a token takes the longer the more tokens stand before it, and the longer the more
requests the worker is decoding meanwhile. A prefix that another node could hand over is loaded
from there where that takes less time than computing it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from math import inf
from typing import NamedTuple

from kvtier.core.audience import Warmth
from kvtier.core.breakeven import as_first
from kvtier.core.tiers import Tier

_TIE_SHARE = 0.01
_TIE_S = 0.001
_LOWER = (Tier.HOST, Tier.DISK, Tier.SHARED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What a worker was measured to do; 0 where nothing was measured yet.

    `doubles_at` is the position in a prompt at which a token takes twice as long to compute as
    the first one does, as attention looks at all tokens before it. `decode_drag` is by how much
    of its own time every request in decode lengthens a prefill. `drain` is how fast its queue
    empties, in units of what its waiting tokens and its speed say: at 0.5 they take twice as long
    as that. Without a `peer_bytes_per_s` nothing is loaded from other nodes.

    Raises:
        ValueError: A rate is negative or not finite.
    """

    prefill_tokens_per_s: float = 0.0
    host_bytes_per_s: float = 0.0
    disk_bytes_per_s: float = 0.0
    shared_bytes_per_s: float = 0.0
    peer_bytes_per_s: float = 0.0
    doubles_at: float = 0.0
    decode_drag: float = 0.0
    drain: float = 0.0
    complete: bool = field(init=False, default=False, compare=False)

    def __post_init__(self) -> None:
        for name in _RATES:
            if not 0 <= getattr(self, name) < inf:
                raise ValueError(f"{name} is {getattr(self, name)}, must be 0 or more")
        known = all(getattr(self, name) for name in _NEEDED)
        object.__setattr__(self, "complete", known)

    def prefill_s(self, start: int, stop: int) -> float:
        """Seconds to compute the tokens of a prompt from `start` to before `stop`."""
        return as_first(start, stop, self.doubles_at) / self.prefill_tokens_per_s


_NEEDED = (
    "prefill_tokens_per_s",
    "host_bytes_per_s",
    "disk_bytes_per_s",
    "shared_bytes_per_s",
    "drain",
)
_RATES = tuple(each.name for each in fields(Rates) if each.init)

# Stand in for what nobody has measured: a small GPU, a PCIe copy, an NVMe disk, 10 Gbit/s Ethernet.
DEFAULT_RATES = Rates(
    prefill_tokens_per_s=4_000.0,
    host_bytes_per_s=10e9,
    disk_bytes_per_s=2e9,
    shared_bytes_per_s=1e9,
    drain=1.0,
)


class Candidate(NamedTuple):
    """A worker that could take a request."""

    name: str
    warmth: Warmth
    waiting_tokens: int = 0  # that it has still to compute for others, as at a prompt's start
    rates: Rates = DEFAULT_RATES
    last_cold: float = 0.0  # when it was last given a prompt that it had nothing of, in seconds
    draining: bool = False
    wait_s: float = 0.0  # until its queue is empty, besides the waiting tokens; before `drain`
    decoding: int = 0  # requests
    lends: int = 0  # leading blocks of the prompt that others could load from its node
    loads_all: bool = False  # also what it would compute sooner than it is loaded


class Load(NamedTuple):
    """A part of `Choice.load_s`: so many blocks from one place; no tier means another node."""

    tier: Tier | None
    blocks: int
    bytes_per_s: float
    seconds: float


class Choice(NamedTuple):
    """A candidate with what it is expected to take; `seconds` is the score, lowest first."""

    name: str
    warmth: Warmth
    seconds: float
    wait_s: float
    load_s: float
    prefill_s: float
    prompt_tokens: int
    block_tokens: int
    pull_from: str = ""  # the candidate on whose node the blocks after its own are loaded from
    pull_blocks: int = 0
    rates: Rates = DEFAULT_RATES  # that it was scored with
    waiting_tokens: int = 0
    decoding: int = 0
    used: int = 0  # leading blocks of its own that are not computed again

    @property
    def believed_s(self) -> float:
        """`wait_s` by waiting tokens, speed and decoding alone, as if `Rates.drain` were 1."""
        return self.wait_s * self.rates.drain

    @property
    def taken(self) -> Warmth:
        """What of `warmth` is used, by tier."""
        left, counts = self.used, []
        for count in self.warmth:
            counts.append(min(count, left))
            left -= counts[-1]
        return Warmth(*counts)

    def loads(self, block_nbytes: int) -> list[Load]:
        """What `load_s` is made of: each lower tier that blocks come from, then another node."""
        speeds = (
            self.rates.host_bytes_per_s, self.rates.disk_bytes_per_s, self.rates.shared_bytes_per_s
        )  # fmt: skip
        loads = [
            Load(tier, blocks, speed, block_nbytes * blocks / speed)
            for tier, blocks, speed in zip(_LOWER, self.taken[1:], speeds, strict=True)
            if blocks
        ]
        if self.pull_from:
            speed = self.rates.peer_bytes_per_s
            loads.append(
                Load(None, self.pull_blocks, speed, block_nbytes * self.pull_blocks / speed)
            )
        return loads


class _Terms(NamedTuple):
    draining: bool
    seconds: float
    number: int  # of the candidate
    wait_s: float
    load_s: float
    prefill_s: float
    pull: int  # the number of the candidate that lends, or -1
    used: int
    rates: Rates


def rank(
    candidates: Sequence[Candidate],
    *,
    prompt_tokens: int,
    block_tokens: int,
    block_nbytes: int,
    behind: float,
    tie: Callable[[], float],
    most: int | None = None,
    keep: str = "",
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
        most: How many to give; all where it is None.
        keep: The name of a candidate that is given, as the last, also where it is not among them.
    """
    prompt = _Prompt(prompt_tokens, block_tokens, block_nbytes, behind)
    most = len(candidates) if most is None else most
    scored = _terms(candidates, prompt)
    scored.sort()
    ranked: list[Choice] = []
    at = 0
    while at < len(scored) and len(ranked) < most:
        first = scored[at]
        start, at = at, at + 1
        while (
            at < len(scored)
            and scored[at].draining == first.draining
            and tied(scored[at].seconds, first.seconds)
        ):
            at += 1
        equals = scored[start:at]
        if len(equals) > 1:
            keyed = [(_order(candidates[each.number], tie()), each) for each in equals]
            keyed.sort()
            equals = [each for _, each in keyed]
        ranked += [prompt.choice(candidates, each) for each in equals[: most - len(ranked)]]
    if keep and all(each.name != keep for each in ranked):
        kept = (each for each in scored if candidates[each.number].name == keep)
        ranked += [prompt.choice(candidates, each) for each in kept]
    return ranked


def tied(seconds: float, best: float) -> bool:
    """Whether a score is as good as equal to the best: within 1% or 1 ms."""
    return seconds <= best + max(_TIE_S, _TIE_SHARE * best)


class _Prompt(NamedTuple):
    tokens: int
    block_tokens: int
    block_nbytes: int
    behind: float

    def choice(self, candidates: Sequence[Candidate], terms: _Terms) -> Choice:
        candidate = candidates[terms.number]
        pull_from, pull_blocks = "", 0
        if terms.pull >= 0:
            lender = candidates[terms.pull]
            pull_from, pull_blocks = lender.name, lender.lends - terms.used
        return Choice(
            candidate.name, candidate.warmth, terms.seconds, terms.wait_s, terms.load_s,
            terms.prefill_s, self.tokens, self.block_tokens, pull_from, pull_blocks, terms.rates,
            candidate.waiting_tokens, candidate.decoding, terms.used,
        )  # fmt: skip


def filled(rates: Sequence[Rates]) -> list[Rates]:
    """Each of these, with what it has not measured taken from the median of the others.

    Or from the default, where none of them did.
    """
    usual = {"peer_bytes_per_s": 0.0}  # who has none can't
    for name in _RATES:
        if name in usual:
            continue
        known = sorted(rate for each in rates if (rate := getattr(each, name)))
        usual[name] = known[len(known) // 2] if known else getattr(DEFAULT_RATES, name)
    return [
        Rates(**{name: getattr(each, name) or usual[name] for name in _RATES}) for each in rates
    ]


@lru_cache(maxsize=16)  # measured rates change once a heartbeat or a request, not once a ranking
def _filled(rates: tuple[Rates, ...]) -> tuple[Rates, ...]:
    return tuple(filled(rates))


def _terms(candidates: Sequence[Candidate], prompt: _Prompt) -> list[_Terms]:
    rates: Sequence[Rates] = [each.rates for each in candidates]
    if not all(each.complete for each in rates):
        rates = _filled(tuple(rates))
    lenders = sorted(
        (number for number, each in enumerate(candidates) if each.lends),
        key=lambda number: -candidates[number].lends,
    )[:2]
    tokens, block_tokens, nbytes, behind = prompt
    terms = []
    for number, (each, rate) in enumerate(zip(candidates, rates, strict=True)):
        vram, host, disk, shared = each.warmth
        blocks = held = vram + host + disk + shared
        own_s = load_s = nbytes * host / rate.host_bytes_per_s if host else 0.0
        slow = 1 + rate.decode_drag * each.decoding
        believed_s = (each.waiting_tokens / rate.prefill_tokens_per_s + each.wait_s) * slow
        wait_s = believed_s / rate.drain
        prefill_s = rate.prefill_s(min(blocks * block_tokens, tokens - 1), tokens) * slow
        if disk or shared:
            own_s += nbytes * (disk / rate.disk_bytes_per_s + shared / rate.shared_bytes_per_s)
            if each.loads_all:
                load_s = own_s
            else:
                blocks, more_s, prefill_s = worth(
                    each.warmth, rate, prompt_tokens=tokens, block_tokens=block_tokens,
                    block_nbytes=nbytes, slow=slow,
                )  # fmt: skip
                load_s += more_s
        pull = -1
        if lenders and rate.peer_bytes_per_s:
            lender = lenders[0] if lenders[0] != number else lenders[-1]
            lent = candidates[lender].lends
            # A daemon asks for what its node has in no tier: all that comes before is loaded, too.
            if lent > held and lender != number:
                pull_s = own_s + nbytes * (lent - held) / rate.peer_bytes_per_s
                rest_s = rate.prefill_s(min(lent * block_tokens, tokens - 1), tokens) * slow
                if pull_s + rest_s < load_s + prefill_s:
                    pull, blocks, load_s, prefill_s = lender, held, pull_s, rest_s
        seconds = wait_s + (1 + behind) * (load_s + prefill_s)
        terms.append(
            _Terms(each.draining, seconds, number, wait_s, load_s, prefill_s, pull, blocks, rate)
        )
    return terms


def worth(
    warmth: Warmth, rates: Rates, *, prompt_tokens: int, block_tokens: int, block_nbytes: int,
    slow: float = 1.0,
) -> tuple[int, float, float]:  # fmt: skip
    """What of disk and shared store is loaded: blocks with those before them; seconds of both.

    A worker computes again what takes longer to load (kvtier.core.breakeven): here a whole tier,
    the last first, as where in it the balance turns matters little to which worker is best. The
    seconds are those to load from disk and shared store, and to compute the rest at `slow` times
    the usual time.
    """
    blocks, load_s = warmth.vram + warmth.host, 0.0
    found = []
    for more, bytes_per_s in (
        (0, 1.0), (warmth.disk, rates.disk_bytes_per_s), (warmth.shared, rates.shared_bytes_per_s)
    ):  # fmt: skip
        blocks += more
        load_s += block_nbytes * more / bytes_per_s
        warm = min(blocks * block_tokens, prompt_tokens - 1)
        prefill_s = rates.prefill_s(warm, prompt_tokens) * slow
        found.append((load_s + prefill_s, -blocks, load_s, prefill_s))
    _, less, load_s, prefill_s = min(found)
    return -less, load_s, prefill_s


def _order(candidate: Candidate, luck: float) -> tuple[bool, float, float]:
    cold = not any(candidate.warmth)
    return cold, candidate.last_cold if cold else 0.0, luck


def why(choice: Choice, source: str = "") -> str:
    """One line for people: what is warm, and what the first token has to wait for.

    `source` is what people call `choice.pull_from`.
    """
    parts = [
        f"{name} {blocks * choice.block_tokens:,}"
        for name, blocks in zip(choice.warmth._fields, choice.warmth, strict=True)
        if blocks
    ]
    warm = choice.warmth.blocks * choice.block_tokens
    return (
        f"{warm:,} of {choice.prompt_tokens:,} tokens warm"
        + (f" ({', '.join(parts)})" if parts else "")
        + (
            f" and {choice.pull_blocks * choice.block_tokens:,} from {source or choice.pull_from}"
            if choice.pull_from
            else ""
        )
        + f": {choice.load_s:.2f} s load + {choice.prefill_s:.2f} s prefill"
        + f" + {choice.wait_s:.2f} s wait"
    )
