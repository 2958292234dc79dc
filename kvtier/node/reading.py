"""What an engine asks of a node's tiers, and what of that is not settled yet."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from kvtier.core.blocks import KEY_NBYTES, BlockKey
from kvtier.core.breakeven import ComputeCost
from kvtier.core.ledger import Lease
from kvtier.core.policy import NO_USE, Use
from kvtier.errors import RemoteProtocolError
from kvtier.wire import local

MAX_WAIT_S: Final = 60.0
MAX_COST: Final = 10**12  # of computing a block, in us or ns
MAX_REMEMBERED: Final = 4096  # keys of an engine's last path


class Paths:
    """Makes keys of the strings that one engine sends, of what it has just sent only once.

    A prompt is asked about, saved and restored piece by piece, each time with its whole path.
    """

    def __init__(self) -> None:
        self._raw = b""
        self._keys: list[BlockKey] = []

    def keys(self, raw: bytes) -> list[BlockKey]:
        """As `local.unpack_keys`, with what that raises."""
        known = 0
        if raw.startswith(self._raw):
            known = len(self._raw)
        elif self._raw.startswith(raw):
            known = len(raw)
        keys = self._keys[: known // KEY_NBYTES] + local.unpack_keys(raw, known)
        if known < len(raw):
            self._raw, self._keys = raw[: MAX_REMEMBERED * KEY_NBYTES], keys[:MAX_REMEMBERED]
        return keys


def use_of(request: int, output: int, now: float = 0.0) -> Use:
    """Whose use of blocks it is; an engine does not tell when.

    Raises:
        RemoteProtocolError: A number is beyond its limits.
    """
    if not 0 <= request <= local.MAX_REQUEST or not -1 <= output <= local.MAX_OUTPUT:
        raise RemoteProtocolError(
            f"request {request} with {output} tokens of output: limits 0 to {local.MAX_REQUEST} "
            f"and -1 to {local.MAX_OUTPUT}"
        )
    return Use(now, request or None, None if output < 0 else output)


@dataclass(frozen=True, slots=True)
class Reading:
    """What an engine asks of `TierManager.read`.

    The answer comes once `wanted` leading blocks are in their slots; `wait_s` is the deadline of
    the loads. With `compute` nothing is loaded that is faster computed again. `use` names the
    request, where the engine does; the time in it does not count.
    """

    client: int
    keys: Sequence[BlockKey]
    first: int
    wanted: int
    wait_s: float
    compute: ComputeCost | None = None
    use: Use = NO_USE

    @classmethod
    def of(
        cls,
        client: int,
        keys: Sequence[BlockKey],
        first: int,
        wanted: int,
        wait_ms: int,
        block_us: int,
        growth_ns: int,
        request: int,
        output: int,
    ) -> "Reading":
        """The arguments of a READ or PULL.

        Raises:
            RemoteProtocolError: One is beyond its limits.
        """
        wait_s = wait_ms / 1000
        if not 0 <= first <= len(keys) or not 0 <= wait_s <= MAX_WAIT_S:
            raise RemoteProtocolError(
                f"READ from {first} of {len(keys)} keys, "
                f"waiting {wait_s:g} s (limit {MAX_WAIT_S:g})"
            )
        if not 0 <= block_us <= MAX_COST or not 0 <= growth_ns <= MAX_COST:
            raise RemoteProtocolError(
                f"READ with {block_us} us a block, {growth_ns} ns more each (limit {MAX_COST})"
            )
        compute = ComputeCost(block_us / 1e6, growth_ns / 1e9) if block_us else None
        return cls(client, keys, first, wanted, wait_s, compute, use_of(request, output))


@dataclass(slots=True)
class Loading:
    """A read lease that is not settled, and who waits for more of it."""

    lease: Lease
    deadline: asyncio.TimerHandle
    wanted: int = 0
    waiter: asyncio.Future[None] | None = None

    def wake(self) -> None:
        """Let go whoever waits."""
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)
