"""What a policy keeps of a trace's prompts in a cache of some size.

A request is one step: it finds the longest run of present blocks from its first one on, then its
full blocks enter. What that means in detail is the cache's business (`Bare`; `sim/live.py`).
Hits are counted in tokens and in the floating point operations of prefill that they save.
"""

import time
from collections.abc import Callable, Iterable
from itertools import islice
from typing import NamedTuple, Protocol

from kvtier.core.blocks import BlockKey
from kvtier.core.policy import PolicyFactory, Use
from kvtier.errors import ConfigError
from kvtier.sim.trace import Request

# Llama-3-8B: of each token, and besides of each token for each one before it.
_FLOP_TOKEN = 2 * 7.5e9
_FLOP_PAIR = 4 * 32 * 4096
_STEP = 256  # requests between two words about progress

Progress = Callable[[int], None]


class Prompt(NamedTuple):
    """A request as a cache sees it. `keys` are those of its full blocks."""

    at_s: float
    input_tokens: int
    output_tokens: int
    block_tokens: int
    keys: list[BlockKey]


class Workload:
    """All prompts of a trace. `footprint` counts its blocks, the partly filled ones included.

    Two blocks are one where their ids and all ids before them are equal.

    Raises:
        ConfigError: There is no request, or none has a full block.
    """

    def __init__(self, requests: Iterable[Request], name: str = "trace") -> None:
        self.name = name
        self.prompts: list[Prompt] = []
        known: dict[tuple[int, int], int] = {}
        keys: list[BlockKey] = []
        for request in requests:
            above, path = -1, []
            for block in request.blocks:
                above = known.setdefault((above, block), len(keys))
                if above == len(keys):
                    keys.append(BlockKey(above.to_bytes(16, "big")))
                path.append(keys[above])
            del path[len(request.full_blocks) :]
            at_s, tokens, output, _, size = request
            self.prompts.append(Prompt(at_s, tokens, output, size, path))
        self.footprint = len(keys)
        if not any(prompt.keys for prompt in self.prompts):
            raise ConfigError(f"{name}: no request has a full block, so there is nothing to keep")

    def capacity(self, fraction: float) -> int:
        """Blocks that a fraction of the footprint is; at least 1."""
        return max(1, int(self.footprint * fraction))


class Hits:
    """Counts what was found."""

    def __init__(self) -> None:
        self.hit_tokens = self.tokens = self.hit_blocks = self.blocks = 0
        self._saved = self._flop = 0.0

    def count(self, prompt: Prompt, hits: int) -> None:
        """The leading `hits` blocks of a prompt were there."""
        found = min(hits * prompt.block_tokens, prompt.input_tokens)
        self.hit_tokens += found
        self.tokens += prompt.input_tokens
        self.hit_blocks += hits
        self.blocks += len(prompt.keys)
        self._saved += _prefill_flop(found)
        self._flop += _prefill_flop(prompt.input_tokens)

    @property
    def token_ratio(self) -> float:
        """Tokens found, of all."""
        return self.hit_tokens / max(1, self.tokens)

    @property
    def flop_ratio(self) -> float:
        """Prefill that was saved, of all."""
        return self._saved / max(1.0, self._flop)


class Result(NamedTuple):
    """What one policy did at one capacity."""

    hits: Hits
    us_per_block: float  # the policy's process time for each full block of each prompt


class Cache(Protocol):
    """Some number of blocks, and a policy that says which of them go."""

    def find(self, prompt: Prompt) -> int:
        """How many leading blocks of the prompt are here; changes nothing."""
        ...

    def use(self, prompt: Prompt, request: int) -> None:
        """A request asks for the prompt, which has at least one full block."""
        ...


MakeCache = Callable[[PolicyFactory, int], Cache]


class Bare:
    """A policy alone: all blocks enter, then the coldest go until `capacity` are left.

    Blocks of the request itself may be among them.
    """

    def __init__(self, policy: PolicyFactory, capacity: int) -> None:
        self._kept = policy()
        self._capacity = capacity

    def find(self, prompt: Prompt) -> int:
        """See `Cache.find`."""
        absent = (i for i, key in enumerate(prompt.keys) if key not in self._kept)
        return next(absent, len(prompt.keys))

    def use(self, prompt: Prompt, request: int) -> None:
        """See `Cache.use`."""
        kept = self._kept
        kept.touch(prompt.keys, Use(prompt.at_s, request, prompt.output_tokens))
        over = len(kept) - self._capacity
        if over > 0:
            kept.remove(*islice(kept.coldest(), over))


def replay(
    workload: Workload,
    policy: PolicyFactory,
    capacity: int,
    progress: Progress | None = None,
    cache: MakeCache = Bare,
) -> Result:
    """Play all prompts to one policy over `capacity` blocks; `progress` is told of prompts."""
    kept, hits, spent = cache(policy, capacity), Hits(), 0.0
    for request, prompt in enumerate(workload.prompts, 1):
        hits.count(prompt, kept.find(prompt))
        start = time.process_time()
        if prompt.keys:
            kept.use(prompt, request)
        spent += time.process_time() - start
        if progress is not None and request % _STEP == 0:
            progress(_STEP)
    if progress is not None:
        progress(len(workload.prompts) % _STEP)
    return Result(hits, spent / max(1, hits.blocks) * 1e6)


def _prefill_flop(tokens: int) -> float:
    return _FLOP_TOKEN * tokens + _FLOP_PAIR * tokens * (tokens - 1) / 2
