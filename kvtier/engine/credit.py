"""The slots that an engine may fill before it says with what: its side of the books."""

from collections.abc import Sequence
from typing import Final

from kvtier.core.blocks import BlockKey, Slot

MET: Final = 4096  # keys that are remembered, at least; at most twice as many
PATIENCE: Final = 64  # calls of `wanted` after a refusal, before it asks again


class Credit:
    """Slots that the daemon has told of and that hold nothing yet, and when to use them. No I/O."""

    def __init__(self) -> None:
        self._met: dict[BlockKey, None] = {}
        self._met_before: dict[BlockKey, None] = {}
        self._used = False  # whether any was ever wanted
        self._slots: list[Slot] = []  # in order: neighbours are copied as one
        self._filling = 0
        self._awaited = 0  # words of the daemon that are still to come
        self._rest = 0  # calls of `wanted` that ask for nothing

    def wanted(self, slots: int) -> int:
        """How many to ask for, to have `slots`; the caller does so, if any."""
        self._used = self._used or slots > 0
        missing = slots - len(self._slots) - self._filling
        if missing <= 0 or self._awaited:
            return 0
        if self._rest:
            self._rest -= 1
            return 0
        self._awaited += 1
        return missing

    def told(self, slots: Sequence[Slot]) -> None:
        """The daemon's word on what was asked or put: slots that this engine has more."""
        self._awaited -= 1
        if slots:
            self._slots = sorted([*self._slots, *slots])
        else:
            self._rest = PATIENCE

    def met(self, keys: Sequence[BlockKey]) -> None:
        """This engine has saved or restored these blocks: the node is likely to have them."""
        if self._used:
            if len(self._met) >= MET:
                self._met, self._met_before = {}, self._met
            self._met.update(dict.fromkeys(keys))

    def first(self, keys: Sequence[BlockKey]) -> list[Slot]:
        """A slot for each of `keys`, or none at all; they stay here until `fill`.

        None where the first was met: then it costs less to ask than to copy for nothing.
        """
        count = len(keys)
        if count > len(self._slots) or keys[0] in self._met or keys[0] in self._met_before:
            return []
        return self._slots[:count]

    def fill(self, slots: Sequence[Slot]) -> None:
        """They are being filled."""
        taken = {*slots}
        self._slots = [slot for slot in self._slots if slot not in taken]
        self._filling += len(slots)

    def put(self, slots: Sequence[Slot], filled: int) -> None:
        """The filling of `slots` has ended, and the first `filled` are told to the daemon."""
        self._filling -= len(slots)
        self._awaited += filled > 0
        if filled < len(slots):
            self._slots = sorted([*self._slots, *slots[filled:]])
