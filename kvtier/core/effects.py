"""What the ledger asks of the world, and what it tells it."""

from collections.abc import Sequence
from typing import NamedTuple

from kvtier.core.blocks import BEGINS, BlockKey, Slot

HOST = 0  # index of the host tier in a ledger's list of tiers; further down means a higher index


class Move(NamedTuple):
    """Copy one block from tier `source` to tier `target`, then report it by `Ledger.moved`.

    `slot` is the block's place in the arena when `source` or `target` is the host tier; it stays
    the move's own until the report. `before` is, of a copy down, the block before it.
    """

    key: BlockKey
    source: int
    target: int
    slot: Slot | None
    before: BlockKey = BEGINS


class Forget(NamedTuple):
    """Delete the copy of `key` in `tier`, before any later move of that key into that tier.

    Nothing depends on its success.
    """

    key: BlockKey
    tier: int


class Settled(NamedTuple):
    """Every block of the read lease `lease` is in its slot; comes once a lease."""

    lease: int


class Held(NamedTuple):
    """`keys` can be read from `tier` from now on."""

    keys: Sequence[BlockKey]
    tier: int


class Gone(NamedTuple):
    """`keys` can no longer be read from `tier`."""

    keys: Sequence[BlockKey]
    tier: int


Effect = Move | Forget | Settled | Held | Gone


class TierUsage(NamedTuple):
    """What one tier takes: in the host tier slots in use, further down copies and frame bytes."""

    blocks: int
    nbytes: int
