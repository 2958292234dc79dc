"""What this node holds, who may touch it now, and what must move next.

The ledger is the only writer of residency. It does no I/O and knows no clock, thread or socket:
callers ask (`match`, `read`, `write`), report what happened (`commit`, `release`, `settle`,
`disconnect`, `moved`) and carry out the effects that `take_effects` hands back. It makes the
first promise of the project checkable: a slot is in the hands of one writer, or of readers of the
very key that was written or loaded there, or of nobody.

                write              commit              Move down, ok
      absent ──────────► FILLING ──────────► in host ────────────────► in host and lower
        ▲ ▲                 │                   ▲  ▲  Move down, failed │ ▲  │
        │ └─────────────────┘                   │  └──── (tried later) ─┘ │  │ dropped for room:
        │   abort, disconnect                   │     lost below          │  │ the slot is free
        │                                       └─────────────────────────┘  ▼
        │                                         Move up, ok           in a lower tier
        │                                   LOADING ◄──── read ────────────┐ │
        │                                      └────► Move up, failed ─────┘ │
        └────────────────────────────────────────────────────────────────────┘
              the last copy left: dropped from the last tier, lost, or a load of it failed

A block has at most one copy down and one load under way. Both may read one lower copy at once: a
read never waits for a copy down, nor is it cut by one, and the copy that they read stays until
both have ended. A slot is used again only after commit, release or disconnect of every lease on
it and the end of the move that reads or fills it.

A client may also have slots on credit: it fills them first and says with what afterwards (`put`,
which is `write` and `commit` in one). What it put lies in the slots that it filled; it has others
instead, as many as there is room for.

And a client may copy a block without a lease, from where a `match` saw it or where it found it
itself (`SlotIndex`), if it looks afterwards whether the block has left that slot since, and takes
what it copied for nothing then. It says so by `used`.
"""

from collections import deque
from collections.abc import Callable, Sequence

from kvtier.core.blocks import BlockKey, Slot
from kvtier.core.copies import Block, Phase
from kvtier.core.effects import HOST, Effect, Forget, Gone, Held, Move, Settled, TierUsage
from kvtier.core.lease import Kept, Lease, Match
from kvtier.core.leases import Leases
from kvtier.core.policy import NO_USE, Use

__all__ = [
    "HOST", "Effect", "Forget", "Gone", "Held", "Kept", "Lease", "Ledger", "Match", "Move",
    "Settled", "TierUsage",
]  # fmt: skip


class Ledger(Leases):
    """The blocks of one layout on one node, and the leases on them.

    `tiers` are warmest first and begin with the host tier, whose bytes are cut into `slots`. Tiers
    are named by their index in that list. A path is a prompt's keys from its first block on; of one
    that begins later, the first block is told to begin a prompt where no other word is known.
    `index` is where clients see what lies in which slot, if they do.

    `read`, `write`, `commit`, `put`, `release`, `settle` and `moved` take time in proportion to
    their own blocks, not to the blocks held. A lease id must be one that `read` or `write` gave out
    and that has not ended: KeyError.

    Raises:
        ValueError: `tiers` are out of order, or a block does not fit in one of them.
    """

    def has_slot(self, key: BlockKey) -> bool:
        """Whether `key` lies in the host tier, or is on its way there."""
        block = self._blocks.get(key)
        return block is not None and block.slot is not None

    def before(self, key: BlockKey) -> BlockKey | None:
        """The block before `key` in its prompt, or BEGINS; None where `key` is not known."""
        block = self._blocks.get(key)
        return block.before if block is not None else None

    def match(self, keys: Sequence[BlockKey]) -> Match:
        """How much of a path is held. Changes nothing, not even what is cold."""
        by_tier = [0] * len(self._tiers)
        slots = self._in_host.leading(keys)
        by_tier[HOST] = len(slots)
        for key in keys[by_tier[HOST] :]:
            tier = self._readable_in(key)
            if tier is None:
                break
            by_tier[tier] += 1
        return Match(sum(by_tier), tuple(by_tier), slots, self.index.turn)

    def used(self, keys: Sequence[BlockKey], use: Use) -> None:
        """A request has used the path `keys` without a lease: as a read of it and its release."""
        self._used(keys, use)

    def read(
        self,
        client: int,
        keys: Sequence[BlockKey],
        first: int = 0,
        worth: Callable[[Sequence[int], int], int] | None = None,
        use: Use = NO_USE,
    ) -> Lease:
        """Pin the held blocks of keys[first:] in host slots, and start loading what lies lower.

        `keys` is the whole path; what comes before `first` only becomes warm: the engine has it.
        It becomes warm when the lease ends, and before room is made for what must be loaded.
        The lease ends before the first block for which no slot can be had. `worth` is asked, of
        the tiers that blocks would be loaded from and the position of the first of them in the
        path, how many it is worth while to load.
        `use` says which request asks: a prompt told by several leases is one use.
        """
        lease = self._open(client, keys, use, writing=False)
        lease.slots = self._in_host.leading(keys[first:])
        self.index.hint(keys[first:], lease.slots)
        for slot in lease.slots:
            self._pins[slot] += 1
        end = first + len(lease.slots)
        lease.keys += keys[first:end]
        lease.sources += [HOST] * len(lease.slots)
        if end < len(keys):
            self._read_lower(lease, keys[end:], end, worth)
        if not lease.loading:
            self._effects.append(Settled(lease.id))
        return lease

    def write(
        self, client: int, keys: Sequence[BlockKey], first: int = 0, use: Use = NO_USE
    ) -> Lease:
        """Reserve slots for the blocks of keys[first:] that are not held and that nobody fills.

        `keys` is the whole path. `indexes` of the lease count from the path's start.
        Grants fewer when no slot can be freed, and none after the first refusal: a block is of no
        use without the one before. A block that only a paused tier has counts as not held.
        """
        lease = self._open(client, keys, use, writing=True)
        self._touch(lease)
        absent = self._absent(keys, first)
        lease.slots = self._room_beside(keys, len(absent))
        lease.keys = [*absent][: len(lease.slots)]
        lease.indexes = [*absent.values()]
        if refused := lease.indexes[len(lease.slots) :]:
            lease.refused = len(keys) - refused[0]
            del lease.indexes[len(lease.slots) :]
        for slot in lease.slots:
            self._pins[slot] = 1
        self._lay(lease.keys, lease.slots, Phase.FILLING, keys, lease.indexes)
        return lease

    def _absent(self, keys: Sequence[BlockKey], first: int) -> dict[BlockKey, int]:
        """Where in the path are the blocks of keys[first:] that nothing has and nobody fills."""
        absent: dict[BlockKey, int] = {}
        shards = self._blocks.shards
        for index, key in enumerate(keys[first:], first):
            block = shards[key[-1]].get(key)
            if block is not None and (block.slot is not None or self._warmest(key) is not None):
                continue
            absent.setdefault(key, index)
        return absent

    def _room_beside(self, path: Sequence[BlockKey], wanted: int) -> list[Slot]:
        """Up to `wanted` slots, for which nothing goes that only the host tier has of `path`.

        In order, so that neighbours in a path are neighbours in the arena, and copied as one.
        """
        if wanted > len(self._free):
            self._spared = {*path}  # or room for a block is made by losing the one before
        slots = sorted(self._take_slots(wanted))
        self._spared = frozenset()
        return slots

    def credit(self, client: int, wanted: int) -> list[Slot]:
        """Up to `wanted` slots more for `client` to fill and `put`; never waits.

        They are its own until it disconnects, and no room for others' blocks.
        """
        slots = sorted(self._take_slots(wanted))
        self._on_credit(self._credits.setdefault(client, set()), slots)
        self._end_credit(client)
        return slots

    def put(
        self, client: int, keys: Sequence[BlockKey], slots: Sequence[Slot], use: Use = NO_USE
    ) -> Kept:
        """The last blocks of the path `keys` lie in these `slots` of the client's credit.

        Those that nothing has and nobody fills are kept from now on, as by `write` and `commit`.
        Those that somebody fills are kept aside, in case that this is never committed. The slots
        of others remain the client's. So do new ones, in place of those that are kept: none is
        refused, but where no room can be made its credit shrinks.

        Raises:
            ValueError: Slots that are not its own, or more than keys; nothing has changed then.
        """
        mine, first = self._credits.get(client, set()), len(keys) - len(slots)
        if first < 0 or len(mine.intersection(slots)) < len(slots):
            raise ValueError(f"{len(slots)} slots for {len(keys)} blocks are not on credit here")
        self._used(keys, use)
        absent = self._absent(keys, first)
        aside = self._put_aside(keys, slots, use)
        fresh = self._room_beside(keys, len(absent) + len(aside))
        filled = [slots[index - first] for index in absent.values()]
        kept = [*absent]
        self._lay(kept, filled, Phase.STABLE, keys, absent.values())
        mine.difference_update(filled, aside)
        self._on_credit(mine, fresh)
        self._end_credit(client)
        self._filled(kept, filled, use)
        self._used(keys, use)
        self._drain()
        taken = dict(zip(slots, keys[first:], strict=True))
        instead = sorted({*slots}.difference(filled, aside).union(fresh))
        return Kept(kept, instead, [taken[slot] for slot in aside])

    def commit(self, lease_id: int, filled: int | None = None) -> None:
        """The first `filled` blocks of a write lease, or all, hold what belongs there.

        They become readable; the others are undone. The lease ends.

        Raises:
            ValueError: A read lease, or more blocks than were granted; nothing has changed then.
        """
        lease = self._leases[lease_id]
        granted = len(lease.keys)
        if not lease.writing:
            raise ValueError(f"lease {lease_id} is a read lease; there is nothing to commit")
        filled = granted if filled is None else filled
        if not 0 <= filled <= granted:
            raise ValueError(f"lease {lease_id} has {granted} blocks, so {filled} are not filled")
        self._close(lease)
        self._filled(lease.keys[:filled], lease.slots[:filled], lease.use)
        self._not_needed(lease.keys[:filled])
        self._undo(lease.keys[filled:])
        self._touch(lease)
        self._drain()

    def release(self, lease_id: int) -> None:
        """The client touches the slots no more: ends a read lease, or undoes a write lease."""
        lease = self._leases[lease_id]
        self._close(lease)
        if lease.writing:
            self._undo(lease.keys)
        else:
            self._cut(lease, 0)
            self._touch(lease)
        self._drain()

    def settle(self, lease_id: int) -> None:
        """The client waits no longer: cut a read lease before its first block still loading."""
        lease = self._leases[lease_id]
        if lease.loading:
            self._cut(lease, next(i for i, key in enumerate(lease.keys) if key in lease.loading))
            self._touch(lease)
            self._settled(lease)

    def disconnect(self, client: int) -> int:
        """Release every lease of a client that is gone; how many there were. O(their blocks).

        Its credit ends with it.
        """
        for slot in self._credits.pop(client, ()):
            self._pins[slot] -= 1
            self._free.append(slot)
        leases = [*self._of_client.get(client, ())]
        for lease_id in leases:
            self.release(lease_id)
        return len(leases)

    def moved(self, move: Move, ok: bool, nbytes: int = 0, *, source_lost: bool = False) -> None:
        """A move has ended. `nbytes` is what its frame now takes in the lower `move.target`.

        `source_lost`: it failed for want of a good copy in `move.source`, as `lost` is to say next.
        A failed copy down keeps the original. A failed load means that `move.source` has no such
        block any more, unless that tier is paused, and cuts the leases that wait for it.
        """
        block = self._blocks.shards[move.key[-1]][move.key]
        known = self._loads.get(move.key) if move.target == HOST else block.move
        assert known == move, "a move is reported once, as it was handed out"
        self._moves -= 1
        if move.target == HOST:
            del self._loads[move.key]
            self._loaded(block, move, ok)
        else:
            block.move = None
            self._copied(move, ok, nbytes or self.block_nbytes, source_lost)

    # --- loads ------------------------------------------------------------------------

    def _read_lower(
        self,
        lease: Lease,
        keys: Sequence[BlockKey],
        first: int,
        worth: Callable[[Sequence[int], int], int] | None,
    ) -> None:
        """Go on with a read lease where the host tier's own blocks end."""
        held = keys[: self.match(keys).blocks]
        if held and worth is not None:
            sources = [tier for key in held if (tier := self._warmest(key)) is not None]
            lease.refused = len(held) - worth(sources, first)
            held = held[: len(held) - lease.refused]
        if not held:
            return
        self._touch(lease)
        pinned = self._pin(held)  # or room for a block is made by dropping the next
        self._free += self._take_slots(len(held) - len(pinned))  # room for all in one search
        for index, key in enumerate(held, first):
            if pinned and pinned[0] == key:
                pinned.popleft()
            elif not self._load(key, pinned):
                break
            self._add(lease, key)
            if index:
                self._blocks[key].before = lease.path[index - 1]
        self._unpin(pinned)

    def _readable_in(self, key: BlockKey) -> int | None:
        block = self._blocks.get(key)
        if block is None or block.phase is Phase.FILLING:
            return None
        return self._warmest(key)

    def _load(self, key: BlockKey, pinned: deque[BlockKey]) -> bool:
        """Start loading a block and pin it; where no slot is free, the deepest of `pinned` go.

        Making room can drop its last copy; then it is a miss.
        """
        taken = [self._free.pop()] if self._free else []  # room was made for all that may go
        while not taken and pinned:
            deepest = pinned.pop()
            self._unpin([deepest])
            if self._may_go(deepest, HOST):
                self._drop(deepest, HOST)
                taken = self._take_slots(1)
        if not taken:
            return False
        (slot,) = taken
        source = self._warmest(key)
        if source is not None:
            block = self._blocks[key]
            if block.slot is None:
                block.slot, block.phase, self._pins[slot] = slot, Phase.LOADING, 1
                self._loads[key] = Move(key, source, HOST, slot)
                self._start(self._loads[key])
                return True
        self._free.append(slot)
        return False

    def _loaded(self, block: Block, move: Move, ok: bool) -> None:
        block.phase = Phase.STABLE
        waiting = self._waiting.pop(move.key, ())
        if ok:  # those that wait touch their paths at their ends
            self._place(move.key, HOST, self.block_nbytes, touch=not waiting)
        for lease_id in waiting:
            lease = self._leases[lease_id]
            lease.loading.remove(move.key)
            if not ok:
                self._cut(lease, lease.keys.index(move.key))
                self._touch(lease)  # what had come already behind it
            if not lease.loading:
                self._settled(lease)
        if not ok:
            self._free_slot(block)
            source = self._tiers[move.source]
            if not source.paused:
                if block.move is not None and block.move.source == move.source:
                    source.leaving.add(move.key)  # a copy down still reads it
                else:
                    self._leave(move.key, move.source, forget=not source.spec.shared, gone=True)
        self._drain()
