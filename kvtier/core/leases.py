"""Who may touch which slot: the leases on the blocks of one layout on one node.

`Cascade` says what is copied and dropped, `Ledger` what clients may ask for.
"""

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from itertools import count

from kvtier.core.blocks import BlockKey, Slot
from kvtier.core.cascade import Cascade
from kvtier.core.copies import Aside, Phase
from kvtier.core.effects import HOST, Move, Settled
from kvtier.core.lease import Lease
from kvtier.core.policy import Use
from kvtier.core.slot_index import SlotIndex
from kvtier.core.tiers import TierSpec


class Leases(Cascade):
    """The leases, the pins that they are, and what they wait for."""

    def __init__(
        self, block_nbytes: int, tiers: Sequence[TierSpec], index: SlotIndex | None = None
    ) -> None:
        super().__init__(block_nbytes, tiers, index)
        self._leases: dict[int, Lease] = {}
        self._of_client: dict[int, set[int]] = {}
        self._waiting: dict[BlockKey, set[int]] = {}  # read leases, by the block that loads
        self._ids = count(1)

    @property
    def leases(self) -> int:
        """Leases that have not ended."""
        return len(self._leases)

    def lease(self, lease_id: int) -> Lease:
        """The lease as it is now."""
        return self._leases[lease_id]

    def check(self) -> None:
        """Assert every invariant; for tests and `kvtier check`: O(blocks and leases)."""
        super().check()
        pins, writers = Counter[BlockKey](), Counter[BlockKey]()
        for lease in self._leases.values():
            assert lease.id in self._of_client[lease.client]
            (writers if lease.writing else pins).update(lease.keys)
            assert lease.slots == [self._blocks[key].slot for key in lease.keys]
            assert len(lease.keys) == len(lease.indexes if lease.writing else lease.sources)
            assert lease.loading <= set(lease.keys)
            for key in lease.loading:
                assert lease.id in self._waiting[key]
        assert sum(map(len, self._of_client.values())) == len(self._leases)
        assert all([*self._of_client.values(), *self._waiting.values()]), "an empty set was kept"
        host = self._tiers[HOST]  # a read lease that has not ended pins what it loaded
        assert all(key in host.policy or pins[key] for key in host.held), "a block stays for ever"
        for key, ids in self._waiting.items():
            assert self._blocks[key].phase is Phase.LOADING
            assert all(key in self._leases[lease_id].loading for lease_id in ids)
        for key, block in self._blocks.items():
            pinned = 0 if block.slot is None else self._pins[block.slot]
            assert pinned == pins[key] + writers[key]
            assert writers[key] == (block.phase is Phase.FILLING)

    # --- of a tier that hangs -------------------------------------------------------------

    def abandon(self, tier: int) -> None:
        """Give up the loads under way from a lower `tier` that was paused, and may never end.

        Leases are cut before them, and their blocks can be loaded from elsewhere or written again.
        Their slots stay out of use until `late` is told of each. Copies into the tier go on: what
        they are made of is kept, and read, meanwhile.
        """
        assert self._tiers[tier].paused, "it would be loaded from there again"
        for move in [each for each in self._loads.values() if each.source == tier]:
            block = self._blocks[move.key]
            assert block.slot is not None
            for lease in [self._leases[each] for each in self._waiting.get(move.key, ())]:
                at = lease.keys.index(move.key)
                self._cut(lease, at)
                self._touch(lease)
                if not lease.loading:
                    self._settled(lease)
            del self._loads[move.key]
            self._moves -= 1
            self._abandoned.add(move)
            self._pins[block.slot] = 1
            block.slot, block.phase = None, Phase.STABLE

    def late(self, move: Move) -> bool:
        """Whether `move`, which has ended, was abandoned; its slot is free then, and it is done."""
        if move not in self._abandoned:
            return False
        self._abandoned.remove(move)
        assert move.slot is not None
        self._pins[move.slot] = 0
        self._free.append(move.slot)
        return True

    # --- for the ledger ------------------------------------------------------------------

    def _open(self, client: int, path: Sequence[BlockKey], use: Use, *, writing: bool) -> Lease:
        lease = Lease(next(self._ids), client, writing, path, use)
        self._leases[lease.id] = lease
        self._of_client.setdefault(client, set()).add(lease.id)
        return lease

    def _close(self, lease: Lease) -> None:
        del self._leases[lease.id]
        ids = self._of_client[lease.client]
        ids.remove(lease.id)
        if not ids:
            del self._of_client[lease.client]

    def _add(self, lease: Lease, key: BlockKey) -> None:
        """Add a block to a read lease that has already pinned it."""
        block = self._blocks[key]
        assert block.slot is not None
        lease.keys.append(key)
        lease.slots.append(block.slot)
        if block.phase is Phase.LOADING:
            lease.sources.append(self._loads[key].source)
            lease.loading.add(key)
            self._waiting.setdefault(key, set()).add(lease.id)
        else:
            lease.sources.append(HOST)

    def _pin(self, keys: Sequence[BlockKey]) -> deque[BlockKey]:
        """Keep those of `keys` that have a slot from being dropped; which these are."""
        pinned = deque[BlockKey]()
        for key in keys:
            block = self._blocks.get(key)
            if block is not None and block.slot is not None:
                self._pins[block.slot] += 1
                pinned.append(key)
        return pinned

    def _unpin(self, keys: Iterable[BlockKey]) -> None:
        for key in keys:
            slot = self._blocks[key].slot
            assert slot is not None
            self._pins[slot] -= 1

    def _on_credit(self, credit: set[Slot], slots: Iterable[Slot]) -> None:
        """Add free slots to a client's credit, which pins them."""
        for slot in slots:
            self._pins[slot] += 1
            credit.add(slot)

    def _end_credit(self, client: int) -> None:
        """Forget a client's credit if it has come to nothing."""
        if not self._credits.get(client):
            self._credits.pop(client, None)

    def _cut(self, lease: Lease, length: int) -> None:
        """Shorten a read lease to its first `length` blocks."""
        for slot in lease.slots[length:]:
            self._pins[slot] -= 1
        for key in lease.loading.intersection(lease.keys[length:]) if lease.loading else ():
            lease.loading.remove(key)
            self._waiting[key].remove(lease.id)
            if not self._waiting[key]:
                del self._waiting[key]
        del lease.keys[length:], lease.slots[length:], lease.sources[length:]

    def _put_aside(self, keys: Sequence[BlockKey], slots: Sequence[Slot], use: Use) -> list[Slot]:
        """Keep those of a path's last blocks, which lie in `slots`, that somebody fills just now.

        The slots that this takes; which blocks they are is known until whoever fills them ends.
        """
        taken: list[Slot] = []
        for index, slot in enumerate(slots, len(keys) - len(slots)):
            block = self._blocks.get(keys[index])
            if block is None or block.phase is not Phase.FILLING or keys[index] in self._aside:
                continue
            self._aside[keys[index]] = Aside(keys[: index + 1], slot, use)
            taken.append(slot)
        return taken

    def _not_needed(self, keys: Sequence[BlockKey]) -> None:
        """Who was to fill these has done so."""
        for key in keys if self._aside else ():
            if aside := self._aside.pop(key, None):
                self._pins[aside.slot] -= 1
                self._free.append(aside.slot)

    def _undo(self, keys: Sequence[BlockKey]) -> None:
        """Free the slots of blocks that were not filled."""
        for key in keys:
            block = self._blocks[key]
            assert block.slot is not None
            self._pins[block.slot] -= 1
            self._free_slot(block)
            if (aside := self._aside.pop(key, None)) is None:
                self._sort(key)
            else:
                block.slot = aside.slot
                self._filled([key], [aside.slot], aside.use)
                self._used(aside.path, aside.use)

    def _settled(self, lease: Lease) -> None:
        """Every block of a read lease is in its slot."""
        self._effects.append(Settled(lease.id))

    def _touch(self, lease: Lease) -> None:
        self._used(lease.path, lease.use)
