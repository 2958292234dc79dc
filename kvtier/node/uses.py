"""Whose use of blocks it was, and when, as the node's eviction learns of it."""

from collections.abc import Callable, Sequence
from itertools import count

from kvtier.core.blocks import BlockKey
from kvtier.core.ledger import Ledger
from kvtier.core.policy import Use


class Uses:
    """The uses of one layout's blocks by engines. `carry_out` is called after each change."""

    def __init__(
        self, ledger: Ledger, clock: Callable[[], float], carry_out: Callable[[], None]
    ) -> None:
        self._ledger = ledger
        self._clock = clock
        self._carry_out = carry_out
        self._unnamed = count(-1, -1)

    def named(self, use: Use) -> Use:
        """`use`, now. A read is always for somebody, be it told or not."""
        return Use(self._clock(), use.request or next(self._unnamed), use.output_tokens)

    def tell(self, keys: Sequence[BlockKey], use: Use) -> None:
        """An engine has copied blocks of the path `keys` without a lease."""
        self._ledger.used(keys, self.named(use))
        self._carry_out()
