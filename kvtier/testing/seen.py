"""The world around one ledger, with clients that copy from where a match saw blocks, unleased."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Final

from kvtier.core.blocks import BlockKey, Slot
from kvtier.core.ledger import HOST, Lease, Ledger, Match
from kvtier.core.policy import Use
from kvtier.core.tiers import TierSpec
from kvtier.testing.credit import CreditWorld

_LOOKS: Final = 6  # that are remembered


@dataclass(frozen=True)
class _Look:
    """What a client saw of a path, and how often each slot had been taken by then."""

    path: list[BlockKey]
    found: Match
    claims: list[int]
    gone: list[int]


class SeenWorld(CreditWorld):
    """See the module."""

    def __init__(
        self, ledger: Ledger, specs: Sequence[TierSpec], rng: Random, seen: Counter[str]
    ) -> None:
        super().__init__(ledger, specs, rng, seen)
        self.looks: list[_Look] = []
        self._claims = Counter[Slot]()
        self._gone = Counter[BlockKey]()

    def claim(self, slot: Slot, key: BlockKey | None = None, by: Lease | None = None) -> None:
        """See `World.claim`."""
        self._claims[slot] += 1
        super().claim(slot, key, by)

    def gone(self, key: BlockKey, tier: int) -> None:
        """See `World.gone`."""
        self._gone[key] += tier == HOST
        super().gone(key, tier)

    def look(self, path: list[BlockKey]) -> None:
        """A client asks where blocks lie, and begins to copy them."""
        found = self.ledger.match(path)
        assert len(found.slots) <= found.by_tier[HOST]
        assert [self.arena[slot] for slot in found.slots] == path[: len(found.slots)], "not there"
        slots, turn = self.ledger.index.find(path)
        assert (slots, turn) == (found.slots[: len(slots)], found.turn), "found elsewhere"
        self.seen["found without asking"] += len(slots)
        claims = [self._claims[slot] for slot in found.slots]
        self.looks.append(_Look(path, found, claims, [self._gone[key] for key in path]))
        del self.looks[:-_LOOKS]

    def copied(self, use: Use) -> None:
        """A client ends such a copy: what it takes for right is right, and nothing else is not."""
        if not self.looks:
            return
        look = self.rng.choice(self.looks)
        left, right = self.ledger.index.left, 0
        for slot, key, claims, gone in zip(
            look.found.slots, look.path, look.claims, look.gone, strict=False
        ):
            if left[slot] > look.found.turn:
                assert self._gone[key] > gone, "a right copy is taken for a wrong one"
                self.seen["seen, and gone since"] += 1
                self.seen["seen, and written over since"] += self._claims[slot] > claims
                break
            assert self._claims[slot] == claims, "written to while it is copied"
            assert self.arena[slot] == key, "a wrong copy is taken for a right one"
            right += 1
        self.seen["copied as seen"] += right
        if right:
            self.ledger.used(look.path[:right], use)
            self.carry_out()
