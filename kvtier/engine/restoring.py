"""Blocks out of the arena: from where they were seen, and lease by lease what is not there.

A copy from where a block was seen waits for no lease, and keeps the daemon's hands off the cores
while it is made. A match has seen it, or the arena's own index says where it is. Whether the copy
is right is looked up afterwards, there too; what is not, and what lies lower, is leased. See
docs/decisions/0043, 0055 and 0058.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Final, NamedTuple

from kvtier import metrics
from kvtier.core.blocks import BlockKey, Slot
from kvtier.core.breakeven import ComputeCost
from kvtier.core.policy import Use
from kvtier.core.tiers import Tier
from kvtier.engine.client import TierClient
from kvtier.engine.copier import ArenaTensor
from kvtier.engine.leases import ReadLease
from kvtier.engine.paged import Done, PagedKV
from kvtier.engine.seen import NOTHING
from kvtier.engine.speeds import TierSpeeds
from kvtier.wire.local import MAX_KEYS

READ_BATCHES: Final = 2  # batches of a lease, and at most
READ_SHARE: Final = 8  # of the arena: what one lease pins, the next cannot load into
STEP_NBYTES: Final = 2 << 20  # of blocks that have been loaded, before the first are copied


class Wanted(NamedTuple):
    """What `EngineTier.restore` is asked for."""

    keys: Sequence[BlockKey]
    first: int
    block_ids: Sequence[int]
    compute: ComputeCost | None
    use: Use


class Restorer:
    """Restores the blocks of `paged`, `batch` at once. How fast that was goes to `speeds`."""

    def __init__(
        self,
        paged: PagedKV,
        batch: int,
        wait_s: float,
        speeds: TierSpeeds,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._seen = NOTHING
        self._paged = paged
        self._batch = batch
        self._wait_s = wait_s
        self._speeds = speeds
        self._clock = clock
        self._step = max(1, STEP_NBYTES // paged.layout.nbytes)

    def match(self, client: TierClient, keys: Sequence[BlockKey]) -> int:
        """Leading blocks that the node knows to hold; where they lie is kept for `run`."""
        found = client.match(keys)
        self._seen = found.seen
        return found.blocks

    def run(
        self, client: TierClient, arena: ArenaTensor, wanted: Wanted, restored: list[Tier]
    ) -> None:
        """Add to `restored` where each block was, once it is there."""
        keys, first, wished = wanted.keys, wanted.first, len(wanted.block_ids)
        if self._seen.epoch != client.epoch:
            self._seen = NOTHING
        if self._seen.tells_of(keys, first):
            right = self._copy_seen(client, arena, wanted, restored)
        else:
            slots, turn = client.arena.index.find(keys, first, first + wished)
            right = self._copy_unleased(client, arena, wanted, restored, slots, turn)
        held = 0
        if lacking := wished - len(restored):
            at = first + len(restored)
            beyond = at + min(self._most(client), lacking)
            dear = wanted.compute is not None and len(keys) > beyond
            if dear or (right and not self._seen.tells_of(keys, at)):
                held = self.match(client, keys[:MAX_KEYS])
                self._copy_seen(client, arena, wanted, restored)
        if len(restored) == wished:
            client.used(keys[: first + wished], wanted.use)
        else:
            self._copy_leased(client, arena, wanted, restored, held)

    def _most(self, client: TierClient) -> int:
        return max(1, min(READ_BATCHES * self._batch, client.arena.slots // READ_SHARE))

    def _copy_seen(
        self, client: TierClient, arena: ArenaTensor, wanted: Wanted, restored: list[Tier]
    ) -> bool:
        """Go on with what the last match saw; False if something of it has left its slot since."""
        seen = self._seen
        begin, end = wanted.first + len(restored), wanted.first + len(wanted.block_ids)
        slots = seen.slots(wanted.keys, begin, end)
        right = self._copy_unleased(client, arena, wanted, restored, slots, seen.turn)
        if not right:
            self._seen = NOTHING  # it is old, all of it
        return right

    def _copy_unleased(
        self,
        client: TierClient,
        arena: ArenaTensor,
        wanted: Wanted,
        restored: list[Tier],
        slots: list[Slot],
        turn: int,
    ) -> bool:
        """Go on with what lay in `slots` at `turn`; False if something of it has left since.

        Others may write to a slot while it is copied. Such a copy is found out and made again,
        or never told of: what lies beyond `restored` is nothing that an engine may look at.
        """
        if not slots:
            return True
        done = len(restored)
        block_ids = wanted.block_ids[done:]
        # One is made while another is looked at.
        copies: deque[tuple[list[Slot], Done]] = deque()
        start, at, right = self._clock(), 0, True
        try:
            while right and (copies or at < len(slots)):
                if at < len(slots) and len(copies) < 2:
                    piece = slots[at : at + self._batch]
                    blocks = block_ids[at : at + len(piece)]
                    copies.append((piece, self._paged.scatter(blocks, arena.rows(piece))))
                    at += len(piece)
                    continue
                piece, copy = copies.popleft()
                copy.wait()
                unmoved = client.arena.index.unmoved(piece, turn)
                restored += [Tier.HOST] * unmoved
                right = unmoved == len(piece)
                if not right:
                    metrics.OVERTAKEN_BLOCKS.inc(len(piece) - unmoved)
        finally:  # the blocks are copied to again, or are somebody else's next
            metrics.UNLEASED_BLOCKS.inc(len(restored) - done)
            for _, copy in copies:
                copy.wait()
        self._speeds.measure(restored[done:], self._clock() - start)
        return right

    def _copy_leased(
        self,
        client: TierClient,
        arena: ArenaTensor,
        wanted: Wanted,
        restored: list[Tier],
        held: int,
    ) -> None:
        """Go on lease by lease, each asked for before the blocks of the one before are copied."""
        keys, first, block_ids, most = (
            wanted.keys,
            wanted.first,
            wanted.block_ids,
            self._most(client),
        )

        def ask(at: int) -> AbstractContextManager[ReadLease] | None:
            if at >= len(block_ids):
                return None
            begin, end = first + at, first + min(at + most, len(block_ids))
            cost = wanted.compute
            if cost is not None and len(keys) > end:
                cost = cost.mean(begin, max(held, end))
            return client.read(
                keys[:end], begin, wait_s=self._wait_s, wanted=self._step, compute=cost,
                use=wanted.use,
            )  # fmt: skip

        start, asked = self._clock(), ask(len(restored))
        while asked is not None:
            at = len(restored)
            batch = block_ids[at : at + most]
            with asked as lease:
                asked = self._fill(client, arena, lease, batch, partial(ask, at + len(batch)))
            restored += lease.sources
            start, began = self._clock(), start
            self._speeds.measure(lease.sources, start - began)

    def _fill(
        self,
        client: TierClient,
        arena: ArenaTensor,
        lease: ReadLease,
        block_ids: Sequence[int],
        ask_next: Callable[[], AbstractContextManager[ReadLease] | None],
    ) -> AbstractContextManager[ReadLease] | None:
        """Copy a lease's blocks as they arrive; what was asked for meanwhile, once all have."""
        copies, done = list[Done](), 0
        asked: AbstractContextManager[ReadLease] | None = None
        try:
            while True:  # what has arrived is copied while the rest is loaded
                if lease.arrived == len(block_ids):
                    asked = ask_next()
                if lease.arrived > done:
                    rows = arena.rows(lease.slots[done : lease.arrived])
                    copies.append(self._paged.scatter(block_ids[done : lease.arrived], rows))
                    done = lease.arrived
                if done == len(lease.slots):
                    return asked
                client.more(lease)
        finally:  # no slot is given back while it is read
            for each in copies:
                each.wait()
