"""The world around one ledger, with clients that fill slots before they say with what."""

from collections.abc import Sequence

from kvtier.core.blocks import BlockKey
from kvtier.core.ledger import HOST
from kvtier.core.policy import Use
from kvtier.testing.world import World


class CreditWorld(World):
    """See the module."""

    def check(self) -> None:
        """See `World.check`; what was put beside a writer that has ended is held."""
        writing = [each for each in self.leases.values() if each.writing]
        filling = {key for each in writing for key in each.keys}
        for key in [each for each in self.aside if each not in filling]:
            del self.aside[key]
            assert key in self.announced[HOST], "put, and lost with another writer"
        assert all(self.arena[slot] == key for key, slot in self.aside.items()), "it was written to"
        super().check()

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
        kept, instead, aside = self.ledger.put(client, path, slots, use)
        assert not filling & {*kept}, "put over another writer's block"
        assert not any(key in readable and self.is_held(key) for key in kept), "put twice"
        assert not {*instead} & (mine - {*slots}), "given twice"
        assert {*aside} == filling & {*put} - self.aside.keys(), "what others fill is put aside"
        places = dict(zip(put, slots, strict=True))
        self.aside.update((key, places[key]) for key in aside)
        kept = [*kept, *aside]
        used = {slot for slot, key in zip(slots, put, strict=True) if key in kept}
        assert used.isdisjoint(instead), "a slot that was filled is on credit"
        assert {*slots} - used <= {*instead}, "a slot that was not used is taken away"
        mine -= {*slots}
        for slot in instead:
            self.claim(slot)
        mine.update(instead)
        self.carry_out()
        there = [key for key in kept if key not in aside]
        assert all(self.ledger.match([key]).by_tier[HOST] for key in there), "put, but not there"
        self.seen["put beside a writer"] += len(aside)
        self.seen["put"] += len(kept)
        self.seen["put of what is there"] += len(slots) - len(kept)
        self.seen["put without a new slot"] += len(slots) - len(instead)
