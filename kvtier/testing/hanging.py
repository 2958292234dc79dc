"""The world around one ledger, with stores whose calls hang and may end when nobody waits."""

from kvtier.core.ledger import HOST
from kvtier.testing.credit import CreditWorld


class HangingWorld(CreditWorld):
    """See the module."""

    hangs = False  # whether tiers do

    def hang(self) -> None:
        """A tier hangs: it is paused, and what is being loaded from it is given up."""
        loads = [each.source for each in self.moves if each.target == HOST]
        if not loads:
            return
        tier = self.rng.choice(loads)
        hung = [each for each in self.moves if each.source == tier and each.target == HOST]
        keys = {each.key for each in hung}
        waiting = [each for each in self.leases.values() if each.loading & keys]
        self.ledger.pause(tier)
        self.ledger.abandon(tier)
        self.moves = [each for each in self.moves if each not in hung]
        self.abandoned += hung
        self.carry_out()
        for lease in self.leases.values():
            assert not lease.loading & keys, "somebody waits for what hangs"
        self.seen["load abandoned"] += len(hung)
        self.seen["lease cut from a load that hangs"] += len(waiting)

    def come_late(self) -> None:
        """A load that was given up ends after all, and has written to its slot."""
        move = self.abandoned.pop(self.rng.randrange(len(self.abandoned)))
        assert move.slot is not None
        self.claim(move.slot)
        self.arena[move.slot] = move.key
        assert self.ledger.late(move), "it is waited for"
        self.seen["load came late"] += 1
