"""The world around one ledger, with clients that fill slots before they say with what."""

from collections.abc import Sequence

from kvtier.core.blocks import BlockKey
from kvtier.core.ledger import HOST
from kvtier.core.policy import Use
from kvtier.testing.world import World


class CreditWorld(World):
    """See the module."""

    def credit(self, client: int, wanted: int) -> None:
        """A client gets slots to fill ahead."""
        slots = self.ledger.credit(client, wanted)
        assert len(slots) <= wanted
        for slot in slots:
            self.claim(slot)
        self.credits.setdefault(client, set()).update(slots)
        self.carry_out()

    def put(self, client: int, path: Sequence[BlockKey], blocks: int, use: Use) -> None:
        """A client fills slots that it has, says with what, and is told which it has instead."""
        mine = self.credits.get(client, set())
        slots = sorted(mine)[: min(blocks, len(path))]
        put = path[len(path) - len(slots) :]
        readable = {key for key in put if self.ledger.match([key]).blocks}
        filling = {key for each in self.leases.values() if each.writing for key in each.keys}
        self.arena.update(zip(slots, put, strict=True))
        kept, instead = self.ledger.put(client, path, slots, use)
        assert not filling & {*kept}, "put over another writer's block"
        assert not any(key in readable and self.is_held(key) for key in kept), "put twice"
        assert not {*instead} & (mine - {*slots}), "given twice"
        used = {slot for slot, key in zip(slots, put, strict=True) if key in kept}
        assert used.isdisjoint(instead), "a slot that was filled is on credit"
        assert {*slots} - used <= {*instead}, "a slot that was not used is taken away"
        mine -= {*slots}
        for slot in instead:
            self.claim(slot)
        mine.update(instead)
        self.carry_out()
        assert all(self.ledger.match([key]).by_tier[HOST] for key in kept), "put, but not there"
        self.seen["put"] += len(kept)
        self.seen["put of what is there"] += len(slots) - len(kept)
        self.seen["put without a new slot"] += len(slots) - len(instead)
