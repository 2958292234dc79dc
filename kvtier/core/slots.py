"""Which block of the host tier lies in which slot, and who touches it."""

from array import array
from collections.abc import Sequence
from operator import eq
from typing import Protocol, cast

from kvtier.core.blocks import BlockKey, Slot
from kvtier.core.shards import KeyMap

RUN = 64  # neighbouring slots that are compared at once


class Turns(Protocol):
    """A number of 64 bits for each slot; an `array("Q")`, or memory that clients see as well."""

    def __getitem__(self, index: int, /) -> int: ...
    def __setitem__(self, index: int, value: int, /) -> None: ...


class SlotTable:
    """The readable blocks of the host tier by key and by slot, and the leases on each slot.

    `left` says in which turn a block last left each slot. Nobody writes to a slot before what was
    readable there has left it: so whoever saw a block in a slot at turn t, copied it, and then
    finds `left` of that slot to be at most t, has a right copy, lease or not (a seqlock, with the
    ledger as its writer). Turns go up by one and begin at 1: 64 bits last for ever.

    Kept apart from all else that is known of a block: a read of what lies in host memory, on
    every engine's path, looks at few places, since the processor's caches do not hold a large
    ledger.
    """

    def __init__(self, slots: int, left: Turns | None = None) -> None:
        self.of = KeyMap[int](slots)  # `Slot`s
        self.pins = array("i", bytes(4 * slots))
        self.turn = 1
        self.left = array("Q", bytes(8 * slots)) if left is None else left
        self._key_at: list[BlockKey | None] = [None] * slots

    def enter(self, key: BlockKey, slot: Slot) -> None:
        """`slot` holds the bytes of `key` now."""
        self.of[key] = slot
        self._key_at[slot] = key

    def enter_all(self, keys: Sequence[BlockKey], slots: Sequence[Slot]) -> None:
        """`enter` for each of `keys` and its slot."""
        shards = self.of.shards
        for key, slot in zip(keys, slots, strict=True):
            shards[key[-1]][key] = slot
            self._key_at[slot] = key

    def leave(self, key: BlockKey) -> None:
        """`key` is given up."""
        self.leave_all([key])

    def leave_all(self, keys: Sequence[BlockKey]) -> list[Slot]:
        """`leave` for each of `keys`; the slots that they were in."""
        shards, key_at, left = self.of.shards, self._key_at, self.left
        slots = [shards[key[-1]].pop(key) for key in keys]
        self.turn = turn = self.turn + 1
        for slot in slots:
            key_at[slot] = None
            left[slot] = turn
        return cast("list[Slot]", slots)

    def leading(self, keys: Sequence[BlockKey]) -> list[Slot]:
        """The slots of `keys` from the first one on, up to the first that is not there.

        Neighbours of a path mostly lie in neighbouring slots: these are compared as a whole
        instead of looked up one by one, which is what costs in a large ledger.
        """
        shards = self.of.shards
        slots: list[int] = []
        at, count, after = 0, len(keys), -1
        while at < count:
            key = keys[at]
            slot = shards[key[-1]].get(key)
            if slot is None:
                break
            end = slot + 1
            if at == 0 or slot == after:
                wanted = keys[at + 1 : at + 1 + RUN]
                found = self._key_at[end : end + len(wanted)]
                if wanted == found:
                    end += len(wanted)
                else:
                    same = [*map(eq, wanted, found)]
                    end += same.index(False) if False in same else len(same)
            slots += range(slot, end)
            at += end - slot
            after = end
        return cast("list[Slot]", slots)

    def check(self) -> None:
        """Assert that both ways lead to the same; for tests."""
        at = {key: slot for slot, key in enumerate(self._key_at) if key is not None}
        assert dict(self.of.items()) == at, "a slot is not where its block is"
