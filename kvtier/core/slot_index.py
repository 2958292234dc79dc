"""Which block lies in which slot, where engines see it too: in memory that they share.

An engine that looks here asks nobody, and wakes nobody (docs/decisions/0058).
"""

from collections.abc import Callable, Sequence
from typing import Final, cast

from kvtier.core.blocks import KEY_NBYTES, BlockKey, Slot

RUN: Final = 64  # neighbouring slots that are compared at once
_STEP: Final = 4  # of neighbours that come together one in so many has a hint
_AHEAD: Final = 2 * _STEP  # blocks, by whose hints one is looked for: a hint may be lost
_HINTS: Final = 4  # for each slot, at least
_WORDS: Final = KEY_NBYTES // 4  # of a key; the last one serves as its hash, as it is one


class SlotIndex:
    """The blocks of `slots` slots: written by the ledger alone, read by anybody at any time.

    A reader may copy what it finds without a lease. Nobody writes to a slot before what was
    readable there has left it: so whoever found a block in a slot at turn t, copied it, and then
    finds that nothing has left the slot since (`unmoved`), has a right copy. That is a seqlock as
    in the optimistic reads of FaRM and Silo. Turns go up by one and begin at 1: 64 bits last for
    ever.

    The memory has, one after the other: the turn (u64), for each slot the turn in which a block
    last left it (u64), for each slot its block's key (16 bytes; the first 8 are 0 where it has
    none), and hints (u32): where a key hashes to, the slot of a block with such a key, plus 1.
    A hint is overwritten by the next one, so a block may be there and not be found; what is found
    is there, since its whole key is compared.

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
            memory = memoryview(bytearray(self.nbytes(slots)))
        keys = 8 + 8 * slots
        hints = keys + KEY_NBYTES * slots
        self.slots = slots
        self.left = memory[8:keys].cast("Q")
        self._turn = memory[:8].cast("Q")
        self._keys = memory[keys:hints]
        self._begins = self._keys.cast("Q")  # two of each key
        self._hints = memory[hints : self.nbytes(slots)].cast("I")
        self._mask = len(self._hints) - 1
        self._fence = fence

    @staticmethod
    def nbytes(slots: int) -> int:
        """Bytes of memory for so many slots: some 40 to 56 for each."""
        hints = 1 << (_HINTS * slots - 1).bit_length()
        return 8 + (8 + KEY_NBYTES) * slots + 4 * hints

    # --- the ledger's -----------------------------------------------------------------

    @property
    def turn(self) -> int:
        """Now."""
        return self._turn[0] + 1

    def enter(self, keys: Sequence[BlockKey], slots: Sequence[Slot]) -> None:
        """The slots hold the bytes of these blocks now."""
        raw, hints, mask = b"".join(keys), self._hints, self._mask
        words = memoryview(raw).cast("I")[_WORDS - 1 :: _WORDS]
        first, end = slots[0], slots[0] + len(keys)
        if [*slots] == [*range(first, end)]:
            self._keys[first * KEY_NBYTES : end * KEY_NBYTES] = raw
            for word, slot in zip(words[::_STEP], range(first, end, _STEP), strict=True):
                hints[word & mask] = slot + 1
            hints[words[-1] & mask] = end
            return
        for key, word, slot in zip(keys, words, slots, strict=True):
            self._keys[slot * KEY_NBYTES : (slot + 1) * KEY_NBYTES] = key
            hints[word & mask] = slot + 1

    def leave(self, slots: Sequence[Slot]) -> None:
        """What was in these slots has left them; after that somebody may write there."""
        begins, left, turn = self._begins, self.left, self.turn + 1
        for slot in slots:
            begins[2 * slot] = 0
            left[slot] = turn
        # Who reads the new turn finds no old key.
        self._fence()
        self._turn[0] = turn - 1

    def key_at(self, slot: Slot) -> BlockKey | None:
        """What lies in a slot; for tests."""
        if not self._begins[2 * slot]:
            return None
        return BlockKey(bytes(self._keys[slot * KEY_NBYTES : (slot + 1) * KEY_NBYTES]))

    # --- everybody's ------------------------------------------------------------------

    def find(self, keys: Sequence[BlockKey]) -> tuple[list[Slot], int]:
        """The slots of `keys` from the first one on, as far as this finds them, and the turn.

        Neighbours of a path mostly lie in neighbouring slots: these are compared as a whole.
        """
        turn = self.turn
        self._fence()
        raw = b"".join(keys)
        slots: list[int] = []
        done = 0
        while done < len(keys):
            slot, same = self._run(raw, done)
            if not same:
                break
            slots += range(slot, slot + same)
            done += same
        self._fence()
        return cast("list[Slot]", slots), turn

    def _run(self, raw: bytes, done: int) -> tuple[int, int]:
        """The slot of the key of `raw` behind `done` others, and how many follow it there."""
        rest = len(raw) // KEY_NBYTES - done
        words = memoryview(raw).cast("I")
        for ahead in range(min(rest, _AHEAD)):
            word = words[_WORDS * (done + ahead + 1) - 1]
            slot = self._hints[word & self._mask] - 1 - ahead
            if slot < 0:
                continue
            begin = done * KEY_NBYTES
            if same := self._same(raw[begin : begin + RUN * KEY_NBYTES], slot):
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
        for view in (self.left, self._turn, self._begins, self._keys, self._hints):
            view.release()
