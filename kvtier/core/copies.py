"""What is known of one block, and of all the copies in one tier."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from kvtier.core.blocks import BEGINS, BlockKey, Slot
from kvtier.core.effects import Move
from kvtier.core.policy import Use
from kvtier.core.shards import KeyMap, Line
from kvtier.core.tiers import Tier, TierSpec


class Phase(IntEnum):
    """What the slot of a block is doing; a block without a slot is STABLE."""

    FILLING = 0  # an engine writes it
    LOADING = 1  # a lower tier's copy is on its way into it
    STABLE = 2


@dataclass(slots=True)
class Block:
    """One known block; which tiers have it is kept by the tiers."""

    phase: Phase = Phase.STABLE
    slot: Slot | None = None
    move: Move | None = None  # a copy down, at most one under way
    undrained_in: int | None = None  # the tier in whose `undrained` order it stands
    before: BlockKey = BEGINS  # the block before it on the path that brought it


class Aside(NamedTuple):
    """A block that a client has put while another one fills it: held if that is never committed."""

    path: Sequence[BlockKey]  # up to it
    slot: Slot
    use: Use


class Copies:
    """The copies in one tier: their sizes, who is coldest, and which have no copy further down."""

    def __init__(self, spec: TierSpec, block_nbytes: int, slot_of: KeyMap[int]) -> None:
        self.spec = spec
        self.policy = spec.policy()
        # Of each the bytes, as frames may be much smaller than blocks; in the host tier the slot.
        self.held: KeyMap[int] = slot_of if spec.tier is Tier.HOST else KeyMap()
        self.each = block_nbytes if spec.tier is Tier.HOST else 0  # bytes, where all are alike
        self.nbytes = 0  # of a lower tier
        self.coming = 0  # copies into this tier under way; loads into the host tier do not count
        self.frame_nbytes = block_nbytes  # reserved for each of them: the largest seen so far
        self.paused = False
        self.refusing = False  # the newest copy into this tier failed
        # Copies that a load found bad while one further down was made of them: to be given up as
        # soon as that has ended, and read by nobody else.
        self.leaving = set[BlockKey]()
        self.undrained = Line()  # with the bytes of each, oldest first
        self.undrained_nbytes = 0

    def __contains__(self, key: BlockKey) -> bool:
        return key in self.held

    def add(self, key: BlockKey, nbytes: int) -> None:
        """A copy of `nbytes` is here now. Nobody gives it up before it is touched.

        This and `remove` are for lower tiers: in the host tier a copy comes with its slot.
        """
        self.held.shards[key[-1]][key] = nbytes
        self.nbytes += nbytes

    def remove(self, key: BlockKey) -> None:
        """The copy is gone; its place in the undrained order is the caller's to give back."""
        self.nbytes -= self.held.shards[key[-1]].pop(key)
        self.policy.remove(key)

    def add_undrained(self, key: BlockKey) -> None:
        """Nothing further down has `key`: it is the last in line to be copied there."""
        nbytes = self.each or self.held.shards[key[-1]][key]
        self.undrained.put(key, nbytes)
        self.undrained_nbytes += nbytes

    def remove_undrained(self, key: BlockKey) -> None:
        """`key` needs no copy further down, or one is under way."""
        self.undrained_nbytes -= self.undrained.remove(key) or 0

    def fits(self, nbytes: int) -> bool:
        """Whether `nbytes` more stay within the capacity, with all that is coming."""
        return self.nbytes + self.coming * self.frame_nbytes + nbytes <= self.spec.capacity

    @property
    def takes_copies(self) -> bool:
        """Whether another copy into this tier may start, if there is room for it."""
        return not self.paused and self.coming < self.spec.queue
