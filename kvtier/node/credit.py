"""Slots that engines fill ahead of saying with what, of one layout on this node.

A save from them waits for nothing: its engine copies, and says afterwards which blocks these are.
See docs/decisions/0036.
"""

from collections.abc import Callable, Sequence
from typing import Final

from kvtier import metrics
from kvtier.core.blocks import BlockKey, Slot
from kvtier.core.fidelity import Lineage
from kvtier.core.ledger import Ledger
from kvtier.core.policy import Use

SHARE: Final = 16  # of the arena, all engines' slots together


class Credits:
    """See the module. `carry_out` is called after each change of `ledger`."""

    def __init__(self, ledger: Ledger, lineage: Lineage, carry_out: Callable[[], None]) -> None:
        self._ledger = ledger
        self._lineage = lineage
        self._carry_out = carry_out
        self._told = 0

    def tell(self) -> None:
        """Keep the metric right: after any change, also an engine's end."""
        credited = self._ledger.credited
        if credited != self._told:  # of one layout among several
            metrics.CREDIT_SLOTS.inc(credited - self._told)
            self._told = credited

    def give(self, client: int, wanted: int) -> list[Slot]:
        """Slots for an engine to fill and `put`; never waits.

        None where all engines together would have more than 1 / SHARE of the arena, fewer than
        wanted where no room can be made.
        """
        if wanted > self._ledger.slots // SHARE - self._ledger.credited:
            return []
        slots = self._ledger.credit(client, wanted)
        self.tell()
        self._carry_out()
        return slots

    def put(
        self, client: int, keys: Sequence[BlockKey], slots: Sequence[Slot], use: Use
    ) -> list[Slot]:
        """The last blocks of `keys` lie in these slots; those that the engine has instead.

        Raises:
            ValueError: The slots are not its own, or more than keys; nothing has changed.
        """
        kept, instead, aside = self._ledger.put(client, keys, slots, use)
        self._lineage.written(keys, [*kept, *aside])  # who fills these says so again
        self.tell()
        self._carry_out()
        return instead
