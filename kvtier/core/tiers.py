"""Where a block can lie, and how much of it each place takes."""

from dataclasses import dataclass
from enum import IntEnum

from kvtier.core.admission import AdmissionFactory
from kvtier.core.policy import LRU, PolicyFactory


class Tier(IntEnum):
    """A kind of place, warmest first. The first three go with their node; SHARED outlives it."""

    VRAM = 0
    HOST = 1
    DISK = 2
    SHARED = 3

    @property
    def label(self) -> str:
        """The lower-case name that metrics and people use."""
        return self.name.lower()


@dataclass(frozen=True, slots=True, kw_only=True)
class TierSpec:
    """The limits of one tier of one node; sizes in bytes.

    `capacity` of a shared tier is how much of it this node keeps track of; what the store itself
    keeps is the store's business. `drain_at` is how much may lie in this tier without a copy
    further down; above it the coldest such blocks are copied one tier down. `queue` bounds the
    copies into this tier that are under way; the host tier is bounded by its slots instead.
    `policy` makes the order in which a full tier gives up its blocks. `admission` says what is
    copied from the host tier into the tier below it; None: everything.

    Raises:
        ValueError: A limit makes no sense; the message names it and its value.
    """

    tier: Tier
    capacity: int
    drain_at: int
    queue: int = 64
    policy: PolicyFactory = LRU
    admission: AdmissionFactory | None = None

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise ValueError(f"{self.tier.label} tier: capacity is {self.capacity}, must be >= 1")
        if self.drain_at < 0:
            raise ValueError(f"{self.tier.label} tier: drain_at is {self.drain_at}, must be >= 0")
        if self.queue < 1:
            raise ValueError(f"{self.tier.label} tier: queue is {self.queue}, must be >= 1")

    @property
    def shared(self) -> bool:
        """Whether its blocks belong to no node."""
        return self.tier is Tier.SHARED
