"""Where an engine may copy blocks from without a lease: where the node's last answer saw them."""

from collections.abc import Sequence
from typing import Final, cast

from kvtier.core.blocks import BlockKey, Slot
from kvtier.wire import local


class Seen:
    """The slots in which a MATCH saw the leading blocks of a path.

    Nobody keeps them there: others may have these slots, and write to them, at any time. What is
    copied from them is right only if `SlotIndex.unmoved` says so of `slots` and `turn` afterwards.

    Args:
        keys: The path.
        slots: Those of its leading blocks, packed; not more than `keys`.
        turn: As in the answer to MATCH.
        epoch: That of the arena: this is good for every connection to the same one.
    """

    __slots__ = ("_keys", "_slots", "epoch", "turn")

    def __init__(self, keys: Sequence[BlockKey], slots: bytes, turn: int, epoch: int) -> None:
        # And the first that has none: by it a path is known again of which nothing was there.
        self._keys = [*keys[: len(slots) // local.NUMBER_NBYTES + 1]]
        self._slots = slots
        self.turn = turn
        self.epoch = epoch

    def tells_of(self, keys: Sequence[BlockKey], first: int) -> bool:
        """Whether the match has looked for keys[first:], or ended before; `keys`: a path."""
        last = min(first, len(self._slots) // local.NUMBER_NBYTES)
        return self._keys[last : last + 1] == [*keys[last : last + 1]] != []

    def slots(self, keys: Sequence[BlockKey], first: int, end: int) -> list[Slot]:
        """Those of keys[first:end], from the first on, as far as this knows; `keys`: a path."""
        known = self._keys[first : min(end, len(self._slots) // local.NUMBER_NBYTES)]
        if known != [*keys[first : first + len(known)]]:  # of another path
            return []
        width = local.NUMBER_NBYTES
        raw = self._slots[first * width : (first + len(known)) * width]
        return cast("list[Slot]", local.unpack_numbers(raw))


NOTHING: Final = Seen((), b"", 0, 0)
