"""Which block lies in which slot, where engines see it too: in memory that they share.

An engine that looks here asks nobody, and wakes nobody (docs/decisions/0058).
"""

import mmap
import sys
from collections.abc import Callable, Sequence
from typing import Final, cast

from kvtier.core.blocks import KEY_NBYTES, BlockKey, Slot

RUN: Final = 64  # neighbouring slots that are compared at once
_STEP: Final = 4  # of neighbours one in so many has a hint
_AHEAD: Final = 2 * _STEP  # blocks, by whose hints one is looked for, and _STEP behind it
_HINTS: Final = 4  # for each slot, at least


class SlotIndex:
    """The blocks of `slots` slots: written by the ledger alone, read by anybody at any time.

    A reader may copy what it finds without a lease. Nobody writes to a slot before what was
    readable there has left it: so whoever found a block in a slot at turn t, copied it, and then
    finds that nothing has left the slot since (`unmoved`), has a right copy. That is a seqlock as
    in the optimistic reads of FaRM and Silo. Turns go up by one and begin at 1: 64 bits last for
    ever.

    The memory has, one after the other: the turn (u64), for each slot the turn in which a block
    last left it (u64), for each slot its block's key (16 bytes, 0 where it has none), and hints
    (u32): where a key hashes to, the slot of a block with such a key, plus 1. A hint is overwritten
    by the next one, so a block may be there and not be found, until the ledger is asked about it
    and hints at it again; what is found is there, since its whole key is compared.

    Args:
        slots: How many.
        memory: `nbytes(slots)` bytes, zeros at first, aligned to 8. By default its own.
        fence: What comes before a call of it in memory comes before what follows, on every
            processor. By default nothing does that: then all is done by one thread.
    """

    def __init__(
        self,
        slots: int,
        memory: memoryview | None = None,
        fence: Callable[[], None] = lambda: None,
    ) -> None:
        if memory is None:
            memory = memoryview(mmap.mmap(-1, self.nbytes(slots)))
        keys = 8 + 8 * slots
        hints = keys + KEY_NBYTES * slots
        self.slots = slots
        self.turn = 1  # the ledger's: what others read is what it has told
        self.left = memory[8:keys].cast("Q")
        self._told = memory[:8].cast("Q")
        self._keys = memory[keys:hints]
        self._halves = self._keys.cast("Q")  # two of each key
        self._hints = memory[hints : self.nbytes(slots)].cast("I")
        self._mask = len(self._hints) - 1
        self._fence = fence

    @staticmethod
    def nbytes(slots: int) -> int:
        """Bytes of memory for so many slots: some 40 to 56 for each."""
        hints = 1 << (_HINTS * slots - 1).bit_length()
        return 8 + (8 + KEY_NBYTES) * slots + 4 * hints

    # --- the ledger's -----------------------------------------------------------------

    def enter(self, keys: Sequence[BlockKey], slots: Sequence[Slot]) -> None:
        """The slots hold the bytes of these blocks now."""
        first, end = slots[0], slots[0] + len(keys)
        if [*slots] == [*range(first, end)]:
            self._keys[first * KEY_NBYTES : end * KEY_NBYTES] = b"".join(keys)
        else:
            for key, slot in zip(keys, slots, strict=True):
                self._keys[slot * KEY_NBYTES : (slot + 1) * KEY_NBYTES] = key
        self.hint(keys, slots)

    def hint(self, keys: Sequence[BlockKey], slots: Sequence[Slot]) -> None:
        """See to it that these blocks, which lie there, are found; others may be found no more."""
        hints, mask, last = self._hints, self._mask, len(slots) - 1
        for at in range(0, len(slots), _STEP):
            slot, end = slots[at], min(at + _STEP - 1, last)
            hints[_hash(keys[at]) & mask] = slot + 1
            if slots[end] - slot != end - at:  # no neighbours, most likely
                for other in range(at + 1, end):
                    hints[_hash(keys[other]) & mask] = slots[other] + 1
                hints[_hash(keys[end]) & mask] = slots[end] + 1
        if slots:
            hints[_hash(keys[last]) & mask] = slots[last] + 1

    def leave(self, slots: Sequence[Slot]) -> None:
        """What was in these slots has left them; after that somebody may write there."""
        halves, left, turn = self._halves, self.left, self.turn + 1
        for slot in slots:
            halves[2 * slot] = halves[2 * slot + 1] = 0
            left[slot] = turn
        # Who reads the new turn finds no old key.
        self._fence()
        self._told[0] = turn - 1  # so that zeros are the beginning
        self.turn = turn

    def key_at(self, slot: Slot) -> BlockKey | None:
        """What lies in a slot; for tests."""
        key = bytes(self._keys[slot * KEY_NBYTES : (slot + 1) * KEY_NBYTES])
        return BlockKey(key) if any(key) else None

    # --- everybody's ------------------------------------------------------------------

    def find(
        self, keys: Sequence[BlockKey], first: int = 0, end: int | None = None
    ) -> tuple[list[Slot], int]:
        """The slots of keys[first:end] from the first one on, as far as this finds them.

        And the turn in which they were there. The other keys of the path help to find them.
        """
        turn = self._told[0] + 1
        self._fence()
        end = len(keys) if end is None else end
        slots: list[int] = []
        at, after = first, -1
        while at < end:
            slot, same = self._run(keys, at, end, after)
            if not same:
                break
            slots += range(slot, slot + same)
            at += same
            after = slot + same
        self._fence()
        return cast("list[Slot]", slots), turn

    def _run(self, keys: Sequence[BlockKey], at: int, end: int, after: int) -> tuple[int, int]:
        """The slot of keys[at], and how many of keys[at:end] lie there one behind the other.

        Neighbours of a path mostly lie in neighbouring slots, `after` is the next of these: they
        are compared as a whole.
        """
        raw = b"".join(keys[at : min(at + RUN, end)])
        if after >= 0 and (same := self._same(raw, after)):
            return after, same
        for near in (*range(at, min(at + _AHEAD, len(keys))), *range(max(0, at - _STEP), at)):
            slot = self._hints[_hash(keys[near]) & self._mask] - 1 - near + at
            if slot >= 0 and (same := self._same(raw, slot)):
                return slot, same
        return 0, 0

    def _same(self, raw: bytes, slot: int) -> int:
        """How many keys of `raw` lie in the slots from `slot` on, in this order."""
        begin = slot * KEY_NBYTES
        found = bytes(self._keys[begin : begin + len(raw)])
        if found == raw:
            return len(raw) // KEY_NBYTES
        for at in range(0, len(raw), KEY_NBYTES):
            if found[at : at + KEY_NBYTES] != raw[at : at + KEY_NBYTES]:
                return at // KEY_NBYTES
        raise AssertionError("keys that differ are the same")

    def unmoved(self, slots: Sequence[Slot], turn: int) -> int:
        """Of blocks that were seen in `slots` at `turn`, how many leading ones never left them.

        What was copied from these before this call is what was seen: nobody has written there.
        """
        self._fence()  # what was copied is read before this is
        left = self.left
        for count, slot in enumerate(slots):
            if left[slot] > turn:
                return count
        return len(slots)

    def release(self) -> None:
        """Let go of the memory; nobody calls anything here any more."""
        for view in (self.left, self._told, self._halves, self._keys, self._hints):
            view.release()


def _hash(key: BlockKey) -> int:
    return int.from_bytes(key[-4:], sys.byteorder)  # a key is a hash
