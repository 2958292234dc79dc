"""The slots that an engine may fill before it says with what: its side of the books."""

import threading
from collections.abc import Sequence
from typing import Final

from kvtier.core.blocks import BlockKey, Slot

MET: Final = 4096  # keys that are remembered once so many were met; at most twice as many
PATIENCE: Final = 64  # calls of `wanted` after a refusal, before it asks again


class Met:
    """Blocks that an engine has saved or restored: its node is likely to have them.

    Connections of one engine share it, as one may save what another has restored. Any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._newer: dict[BlockKey, None] = {}
        self._older: dict[BlockKey, None] = {}
        self.wanted = False  # whether anybody ever asks

    def add(self, keys: Sequence[BlockKey]) -> None:
        """These were met."""
        if not self.wanted:
            return
        with self._lock:
            at = 0
            while at < len(keys):
                if len(self._newer) >= MET:
                    self._newer, self._older = {}, self._newer
                end = at + MET - len(self._newer)
                self._newer.update(dict.fromkeys(keys[at:end]))
                at = end

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._newer or key in self._older

    def __len__(self) -> int:
        """Keys that are remembered; some of them may count twice."""
        return len(self._newer) + len(self._older)


class Credit:
    """Slots that the daemon has told of and that hold nothing yet, and when to use them. No I/O.

    `met` is that of the engine, where it has more connections than this one.
    """

    def __init__(self, met: Met | None = None) -> None:
        self._met = Met() if met is None else met  # an empty one is falsy
        self._slots: list[Slot] = []  # in order: neighbours are copied as one
        self._filling = 0
        self._awaited = 0  # words of the daemon that are still to come
        self._rest = 0  # calls of `wanted` that ask for nothing

    def wanted(self, slots: int) -> int:
        """How many to ask for, to have `slots`; the caller does so, if any."""
        self._met.wanted = self._met.wanted or slots > 0
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
        self._met.add(keys)

    def first(self, keys: Sequence[BlockKey]) -> list[Slot]:
        """A slot for each of `keys`, or none at all; they stay here until `fill`.

        None where the first was met: then it costs less to ask than to copy for nothing.
        """
        count = len(keys)
        if count > len(self._slots) or keys[0] in self._met:
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
