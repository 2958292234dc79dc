"""Which block of the host tier lies in which slot, and who touches it."""

from array import array
from collections.abc import Sequence
from operator import eq

from kvtier.core.blocks import BlockKey, Slot
from kvtier.core.shards import KeyMap

RUN = 64  # neighbouring slots that are compared at once


class SlotTable:
    """The readable blocks of the host tier by key and by slot, and the leases on each slot.

    Kept apart from all else that is known of a block: a read of what lies in host memory, on
    every engine's path, looks at few places, since the processor's caches do not hold a large
    ledger.
    """

    def __init__(self, slots: int) -> None:
        self.of = KeyMap[Slot](slots)
        self.pins = array("i", bytes(4 * slots))
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
        self._key_at[self.of.pop(key)] = None

    def leave_all(self, keys: Sequence[BlockKey]) -> list[Slot]:
        """`leave` for each of `keys`; the slots that they were in."""
        slots = [*map(self.of.pop, keys)]
        for slot in slots:
            self._key_at[slot] = None
        return slots

    def leading(self, keys: Sequence[BlockKey]) -> list[Slot]:
        """The slots of `keys` from the first one on, up to the first that is not there.

        Neighbours of a path mostly lie in neighbouring slots: these are compared as a whole
        instead of looked up one by one, which is what costs in a large ledger.
        """
        shards = self.of.shards
        slots: list[Slot] = []
        previous = -1
        while len(slots) < len(keys):
            key = keys[len(slots)]
            slot = shards[key[-1]].get(key)
            if slot is None:
                break
            slots.append(slot)
            if len(slots) == 1 or slot == previous + 1:
                wanted = keys[len(slots) : len(slots) + RUN]
                found = self._key_at[slot + 1 : slot + 1 + len(wanted)]
                same = [*map(eq, wanted, found)]
                run = same.index(False) if False in same else len(same)
                slots += map(Slot, range(slot + 1, slot + 1 + run))
            previous = slots[-1]
        return slots

    def check(self) -> None:
        """Assert that both ways lead to the same; for tests."""
        at = {key: slot for slot, key in enumerate(self._key_at) if key is not None}
        assert dict(self.of.items()) == at, "a slot is not where its block is"
