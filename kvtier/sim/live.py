"""Caches for the simulator that keep the books as production does.

A bare policy lets a prompt in whole and then gives up what is too much. A node's host tier and a
worker's VRAM pool make room first, give up nothing that the prompt at hand uses, and let in as
much of it as there is room for. These are the very classes that they run, told of a prompt in the
same steps.
"""

from typing import Final

from kvtier.core.ledger import Ledger
from kvtier.core.policy import PolicyFactory, Use
from kvtier.core.tiers import Tier, TierSpec
from kvtier.engine.pool import BlockPool
from kvtier.sim.evict import Bare, MakeCache, Prompt

_CLIENT = 1


class HostTier:
    """The host tier of a node without tiers below: a prompt is read, then the rest is written."""

    def __init__(self, policy: PolicyFactory, capacity: int) -> None:
        spec = TierSpec(tier=Tier.HOST, capacity=capacity, drain_at=capacity, policy=policy)
        self._ledger = Ledger(1, [spec])

    def find(self, prompt: Prompt) -> int:
        """See `Cache.find`."""
        return self._ledger.match(prompt.keys).blocks

    def use(self, prompt: Prompt, request: int) -> None:
        """See `Cache.use`."""
        ledger, use = self._ledger, Use(prompt.at_s, request)
        ledger.release(ledger.read(_CLIENT, prompt.keys, use=use).id)
        use = use._replace(output_tokens=prompt.output_tokens)
        ledger.commit(ledger.write(_CLIENT, prompt.keys, use=use).id)
        ledger.take_effects()


class VramPool:
    """The pool of a worker that computes one prompt at a time, in one step."""

    def __init__(self, policy: PolicyFactory, capacity: int) -> None:
        self._pool = BlockPool(capacity, policy)

    def find(self, prompt: Prompt) -> int:
        """See `Cache.find`."""
        return len(self._pool.match(prompt.keys))

    def use(self, prompt: Prompt, request: int) -> None:
        """See `Cache.use`."""
        pool, keys, use = self._pool, prompt.keys, Use(prompt.at_s, request)
        found = self.find(prompt)
        if found:
            pool.pin(keys[:found], 0, use)
        ids, _ = pool.allocate(len(keys) - found)
        path = keys[: found + len(ids)]
        if ids:
            pool.insert(path, ids, use)
            pool.pin(path, found, use)
        pool.used(path, use._replace(output_tokens=prompt.output_tokens))
        pool.unpin(path)
        pool.take_changes()


CACHES: Final[dict[str, MakeCache]] = {"bare": Bare, "host": HostTier, "vram": VramPool}
