"""Which block of the host tier lies in which slot, and who touches it."""

from array import array
from collections.abc import Sequence
from operator import eq
from typing import cast

from kvtier.core.blocks import BlockKey, Slot
from kvtier.core.shards import KeyMap
from kvtier.core.slot_index import RUN, SlotIndex


class SlotTable:
    """The readable blocks of the host tier by key and by slot, and the leases on each slot.

    `index` is where clients read which blocks are there.

    Kept apart from all else that is known of a block: a read of what lies in host memory, on
    every engine's path, looks at few places, since the processor's caches do not hold a large
    ledger.
    """

    def __init__(self, slots: int, index: SlotIndex | None = None) -> None:
        self.of = KeyMap[int](slots)  # `Slot`s
        self.pins = array("i", bytes(4 * slots))
        self.index = SlotIndex(slots) if index is None else index
        self._key_at: list[BlockKey | None] = [None] * slots

    def enter(self, key: BlockKey, slot: Slot) -> None:
        """`slot` holds the bytes of `key` now."""
        self.enter_all([key], [slot])

    def enter_all(self, keys: Sequence[BlockKey], slots: Sequence[Slot]) -> None:
        """`enter` for each of `keys` and its slot."""
        shards = self.of.shards
        for key, slot in zip(keys, slots, strict=True):
            shards[key[-1]][key] = slot
            self._key_at[slot] = key
        self.index.enter(keys, slots)

    def leave(self, key: BlockKey) -> None:
        """`key` is given up."""
        self.leave_all([key])

    def leave_all(self, keys: Sequence[BlockKey]) -> list[Slot]:
        """`leave` for each of `keys`; the slots that they were in."""
        shards, key_at = self.of.shards, self._key_at
        slots = cast("list[Slot]", [shards[key[-1]].pop(key) for key in keys])
        for slot in slots:
            key_at[slot] = None
        self.index.leave(slots)
        return slots

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
        told = [self.index.key_at(Slot(slot)) for slot in range(len(self._key_at))]
        assert told == self._key_at, "clients are told of other blocks"
