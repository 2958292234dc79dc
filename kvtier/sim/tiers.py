"""What tiers one below the other find of a trace's prompts, by the rules of production.

A block enters VRAM. What VRAM gives up is written to host memory, and what that gives up to disk,
unless it lies further down already; the last tier drops. What is found in a lower tier comes up to
all above it, and its copy stays and is warm again, so that giving it up a second time costs no
write. VRAM and host memory have the policy that is tried, disk has LRU. With `second_use` disk
takes only what was asked for twice, by the class that a node has for it.
"""

import time
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Final, NamedTuple

from kvtier.core.admission import SecondUse
from kvtier.core.blocks import BlockKey
from kvtier.core.policy import LRU, EvictionPolicy, Keep, PolicyFactory, Use
from kvtier.sim.evict import Hits, Progress, Workload

NAMES: Final = ("VRAM", "host", "disk")
_TRIED: Final = 2  # tiers that have the policy which is tried
_STEP: Final = 256  # requests between two words about progress


class TieredResult(NamedTuple):
    """What one policy did. `by_tier`: tokens found there, of all; they sum up to the ratio."""

    hits: Hits
    by_tier: tuple[float, ...]
    disk_writes: int  # blocks
    us_per_block: float  # of all tiers' policies, for each full block of each prompt


class Cascade:
    """Tiers of so many blocks each, warmest first."""

    def __init__(
        self, policy: PolicyFactory, capacities: Sequence[int], *, second_use: bool = False
    ) -> None:
        self.disk_writes = 0
        self._capacities = capacities
        self._disk = NAMES.index("disk")
        self._once: SecondUse | None = None
        if second_use and len(capacities) > self._disk:
            self._once = SecondUse(capacities[self._disk])
        self._tiers: list[EvictionPolicy] = [
            policy() if n < _TRIED else LRU() for n in range(len(capacities))
        ]
        self._above: dict[BlockKey, BlockKey] = {}  # of every block that was ever asked for

    def find(self, path: Iterable[BlockKey]) -> list[int]:
        """For each leading block that some tier has, the warmest of those."""
        found = []
        for key in path:
            tier = next((n for n, tier in enumerate(self._tiers) if key in tier), None)
            if tier is None:
                break
            found.append(tier)
        return found

    def use(self, path: Sequence[BlockKey], found: Sequence[int], use: Use) -> None:
        """A request used `path`, of which `find` had said `found`."""
        for at in range(len(found), len(path)):
            if at:
                self._above[path[at]] = path[at - 1]
        if self._once is not None:
            self._once.used(path, use.request)
            new = [key for key in path[len(found) :] if not any(key in t for t in self._tiers)]
            self._once.entered(new, use.request)
        self._tiers[0].touch(path, use)
        for n in range(1, max(found, default=0) + 1):
            tier = self._tiers[n]
            here = [key for key, at in zip(path, found, strict=False) if at > n or key in tier]
            tier.touch(here, use)
        for n in range(len(self._tiers)):
            self._spill(n, use.now)

    def _spill(self, n: int, now: float) -> None:
        """Tier `n` gives up what is too much."""
        tier, lower = self._tiers[n], self._tiers[n + 1 :]
        over = len(tier) - self._capacities[n]
        going = [*islice(tier.coldest(), over)] if over > 0 else []
        tier.remove(*going)
        if not lower:
            return
        sinking = {key: None for key in going if not any(key in each for each in lower)}
        if n + 1 == self._disk:
            if self._once is not None:
                sinking = {key: None for key in sinking if not self._once.left(key)}
            self.disk_writes += len(sinking)
        while sinking:
            deepest = next(iter(sinking))
            lower[0].touch(self._path(deepest, sinking, lower[0].__contains__), Use(now))

    def _path(self, key: BlockKey, sinking: dict[BlockKey, None], here: Keep) -> list[BlockKey]:
        """`key` and what lies or comes there of the blocks before it, root first."""
        path: list[BlockKey] = []
        above: BlockKey | None = key
        while above is not None:
            if above in sinking or here(above):
                path.append(above)
            sinking.pop(above, None)
            above = self._above.get(above)
        return path[::-1]


def replay(
    workload: Workload,
    policy: PolicyFactory,
    capacities: Sequence[int],
    progress: Progress | None = None,
    *,
    second_use: bool = False,
) -> TieredResult:
    """Play all prompts to tiers of `capacities` blocks; `progress` is told of prompts."""
    cascade = Cascade(policy, capacities, second_use=second_use)
    hits, spent = Hits(), 0.0
    tokens = [0] * len(capacities)
    for request, prompt in enumerate(workload.prompts):
        found = cascade.find(prompt.keys)
        hits.count(prompt, len(found))
        for tier in found:
            tokens[tier] += prompt.block_tokens
        start = time.process_time()
        if prompt.keys:
            cascade.use(prompt.keys, found, Use(prompt.at_s, request, prompt.output_tokens))
        spent += time.process_time() - start
        if progress is not None and request % _STEP == _STEP - 1:
            progress(_STEP)
    if progress is not None:
        progress(len(workload.prompts) % _STEP)
    by_tier = tuple(count / max(1, hits.tokens) for count in tokens)
    us_per_block = spent / max(1, hits.blocks) * 1e6
    return TieredResult(hits, by_tier, cascade.disk_writes, us_per_block)
