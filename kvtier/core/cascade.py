"""The one cascade rule that keeps the copies of blocks in bounds, and what makes room.

Every tier but the last obeys one rule: when the blocks that have no copy further down exceed
`drain_at` bytes, the coldest of them are copied one tier down, from the warmest tier that has
them. A block that has a lower copy can be dropped at no cost. So room is made ahead of need, and
a write never waits for a copy: it gets a slot now or it is refused. A block of the host tier that
the tier below does not admit is in no need of a copy, and so may be dropped as one that has it.

What may be dropped to make room, coldest first and at most `LOOK` candidates deep:

    host       a block with a lower copy; any, if there is no tier below or the next is paused
    in between a block with a lower copy; else one that lies nowhere warmer, if the next tier is
               paused or its queue is full
    last       a block that lies nowhere warmer

Where none may go and the tier below refused the newest copy (its store is full, or may write no
more today), the coldest that lies nowhere warmer goes all the same: a tier that takes nothing must
not stop those above it.

Blocks that are leased or moving stay. A copy that lies warmer too, and nowhere lower, stays as
well: dropping it would only have it copied down again, and so on in a circle. A candidate that
could not go for want of a lower copy is copied down at once, whatever `drain_at` says, up to
`HASTE` of them. For these alone, so that each takes a search for room in the host tier, copies
that lie warmer give way, too: or a lower tier full of what the host tier keeps would stop it.
"""

from collections.abc import Iterable, Mapping, Sequence, Set
from itertools import chain, islice
from types import MappingProxyType
from typing import Final

from kvtier.core.blocks import BlockKey, Slot
from kvtier.core.copies import Phase
from kvtier.core.effects import HOST, Forget, Move
from kvtier.core.policy import Keep
from kvtier.core.residency import Residency

LOOK = 64  # candidates that one search for a victim, or for a block to drain, looks at
NEXT = 8  # of the former, that are looked at first
HASTE = 16  # copies that one search starts besides, for what could not go
_NOTHING: Final[Mapping[BlockKey, BlockKey]] = MappingProxyType({})


class Cascade(Residency):
    """What is copied down and dropped, of all blocks of one layout on one node."""

    _hid = False  # whether the last search met a pinned block, which hides those above it
    _spared: Set[BlockKey] = frozenset()  # what only the host tier has of these stays for now

    # --- told by the manager ----------------------------------------------------------

    def found(
        self,
        tier: int,
        held: Iterable[tuple[BlockKey, int]],
        before: Mapping[BlockKey, BlockKey] = _NOTHING,
    ) -> None:
        """The store of a lower `tier` has these keys, with their frames' bytes, oldest first.

        Beyond the tier's capacity the coldest leave, and what finds no room does not enter.
        `before` says which block comes before one; the others begin prompts, unless more is known.
        """
        self._assert_lower(tier)
        copies = self._tiers[tier]
        for key, size in held:
            nbytes = size or self.block_nbytes
            known = self._blocks.get(key)
            coming = known is not None and known.move is not None and known.move.target == tier
            if key in copies or coming:
                continue
            if self._make_room(tier, nbytes):
                block = self._known(key)
                block.before = before.get(key, block.before)
                self._place(key, tier, nbytes)
            elif not copies.spec.shared:
                self._effects.append(Forget(key, tier))
        self._drain()

    def lost(self, tier: int, keys: Iterable[BlockKey]) -> None:
        """The store of a lower `tier` does not have these keys; those being read are left."""
        self._assert_lower(tier)
        for key in keys:
            if key not in self._tiers[tier]:
                continue
            reading = (self._blocks[key].move, self._loads.get(key))
            if not any(move is not None and move.source == tier for move in reading):
                self._leave(key, tier, forget=False, gone=True)
        self._drain()

    def pause(self, tier: int) -> None:
        """A lower `tier` gives no answer: until `resume` nothing is copied into or out of it.

        Report it before the failed moves that showed it: a load that failed in a paused tier says
        nothing about the copy, which is kept.
        """
        self._assert_lower(tier)
        self._tiers[tier].paused = True

    def resume(self, tier: int) -> None:
        """The tier answers again."""
        self._assert_lower(tier)
        self._tiers[tier].paused = False
        self._drain()

    def drain_all(self, *, on: bool) -> None:
        """While `on`, copy down whatever has no lower copy: every `drain_at` counts as 0."""
        self._draining_all = on
        self._drain()

    def clear(self, tier: int) -> int:
        """Drop every copy in `tier` that is neither leased nor moving; the number dropped.

        In a shared tier only this node's knowledge goes. O(copies in the tier).
        """
        going = [key for key in self._tiers[tier].held if self._idle(key, tier)]
        for key in going:
            self._drop(key, tier)
        return len(going)

    # --- room, and the cascade --------------------------------------------------------

    def _take_slots(self, wanted: int) -> list[Slot]:
        """Up to `wanted` free slots, by dropping the coldest host blocks that may go if need be."""
        if wanted > len(self._free):
            self._evict(HOST, wanted - len(self._free))
        start = max(0, len(self._free) - wanted)
        taken = self._free[start:]
        del self._free[start:]
        return taken

    def _make_room(self, tier: int, nbytes: int, *, pressed: bool = False) -> bool:
        """Whether `nbytes` more fit into a lower `tier`, after dropping what may go.

        `pressed`: else copies that lie warmer, too.
        """
        copies = self._tiers[tier]
        if nbytes > copies.spec.capacity:
            return False
        while not copies.fits(nbytes):
            if not self._evict(tier, pressed=pressed):
                return False
        return True

    def _evict(self, tier: int, wanted: int = 1, *, pressed: bool = False) -> int:
        """Drop the coldest copies that may go, and copy down the colder ones that may not yet.

        How many were dropped, `wanted` at most.
        """
        self._hid = False
        keep = self._pinned if tier == HOST else None
        victims, overdue = self._search(tier, keep, wanted, pressed)
        self._drop_all(victims, tier)
        dropped = len(victims)
        if self._hid and dropped < wanted:
            # A block that somebody else pins hides those above it; they go if nothing else can.
            victims, overdue = self._search(tier, None, wanted - dropped, pressed)
            self._drop_all(victims, tier)
            dropped += len(victims)
        for key in overdue:
            if not self._copy_down(key, tier, pressed=tier == HOST):
                break
        return dropped

    def _search(
        self, tier: int, keep: Keep | None, wanted: int, pressed: bool = False
    ) -> tuple[list[BlockKey], list[BlockKey]]:
        """The coldest copies that may go, and those before them that first want a lower copy."""
        victims: list[BlockKey] = []
        overdue: list[BlockKey] = []
        last_resort: list[BlockKey] = []
        shards = self._blocks.shards
        refused = tier + 1 < len(self._tiers) and self._tiers[tier + 1].refusing
        coldest = islice(self._tiers[tier].policy.coldest(keep), LOOK + wanted - 1)
        first = [*islice(coldest, wanted)] if tier == HOST else []
        if len(first) == wanted and self._all_may_go(first):
            return first, overdue
        for key in chain(first, coldest):
            if self._may_go(key, tier):
                victims.append(key)
                if len(victims) == wanted:
                    return victims, overdue
                continue
            spare = refused and self._idle(key, tier, alone=True)
            if len(last_resort) < wanted and (spare or (pressed and self._doubled(key, tier))):
                last_resort.append(key)
            elif len(overdue) < HASTE and shards[key[-1]][key].undrained_in == tier:
                overdue.append(key)
        return [*victims, *last_resort][:wanted], overdue

    def _pinned(self, key: BlockKey) -> bool:
        pinned = self._pins[self._held[HOST][key[-1]][key]]
        if pinned or (key in self._spared and self._only_here(key)):
            self._hid = True
            return True
        return False

    def _only_here(self, key: BlockKey) -> bool:
        return self._warmest(key, HOST + 1) is None

    def _idle(self, key: BlockKey, tier: int, *, alone: bool = False) -> bool:
        block = self._blocks.shards[key[-1]][key]
        if tier == HOST and key in self._spared and self._only_here(key):
            return False
        if block.move is not None or block.phase is Phase.LOADING:
            return False
        if alone and any(key in copies for copies in self._tiers[:tier]):
            return False
        return tier != HOST or self._pins[self._in_host.of[key]] == 0

    def _doubled(self, key: BlockKey, tier: int) -> bool:
        """Whether the copy in `tier` is idle, and another one lies warmer."""
        return self._idle(key, tier) and not self._idle(key, tier, alone=True)

    def _may_go(self, key: BlockKey, tier: int) -> bool:
        """Whether the copy in `tier` may be dropped for room: the table of this module."""
        below = self._tiers[tier + 1] if tier + 1 < len(self._tiers) else None
        if tier == HOST:  # what a lower tier has is not undrained here: one look instead of many
            block = self._blocks.shards[key[-1]][key]
            if block.phase is Phase.LOADING or block.move is not None:
                return False
            if block.slot is not None and self._pins[block.slot]:
                return False
            if key in self._spared and self._only_here(key):
                return False
            return block.undrained_in != HOST or below is None or below.paused
        if not self._idle(key, tier):
            return False
        place, held = key[-1], self._held
        for shards in held[tier + 1 :]:
            if key in shards[place]:
                return True
        for shards in held[:tier]:
            if key in shards[place]:
                return False
        return below is None or not below.takes_copies

    def _all_may_go(self, keys: Sequence[BlockKey]) -> bool:
        """`_may_go` for all of these of the host tier at once, which holds for most."""
        held, shards = self._held[HOST], self._blocks.shards
        pinned = any(map(self._pins.__getitem__, [held[key[-1]][key] for key in keys]))
        if pinned or not self._spared.isdisjoint(keys):
            return False
        below = self._tiers[1] if len(self._tiers) > 1 else None
        if below is None:
            return True
        for block in [shards[key[-1]][key] for key in keys]:
            if block.move is not None or (block.undrained_in == HOST and not below.paused):
                return False
        return True

    def _drain(self) -> None:
        """The cascade rule, for every tier that has one below it."""
        for tier, copies in enumerate(self._tiers[:-1]):
            limit = 0 if self._draining_all else copies.spec.drain_at
            if copies.undrained_nbytes > limit:
                self._drain_to(tier, limit)

    def _drain_to(self, tier: int, limit: int) -> None:
        copies, look = self._tiers[tier], NEXT
        while copies.undrained_nbytes > limit:
            keys = [*islice(copies.undrained, look)]
            passed = 0
            for key in keys:
                if copies.undrained_nbytes <= limit:
                    return
                if (
                    self._blocks.shards[key[-1]][key].phase is Phase.LOADING
                    or self._warmest(key) is None
                ):
                    passed += 1
                elif not self._copy_down(key, tier):
                    return
            if passed == len(keys):
                if look == LOOK:
                    return
                look = LOOK

    def _copy_down(self, key: BlockKey, tier: int, *, pressed: bool = False) -> bool:
        """Start copying `key` from its warmest tier to the one below `tier`, if that has room.

        Not while it loads: then it is soon copied from a warmer tier.
        """
        block, target = self._blocks.shards[key[-1]][key], self._tiers[tier + 1]
        source = self._warmest(key)
        if block.phase is Phase.LOADING or source is None or not target.takes_copies:
            return False
        if not self._make_room(tier + 1, target.frame_nbytes, pressed=pressed):
            return False
        target.coming += 1
        slot = block.slot if source == HOST else None
        block.move = Move(key, source, tier + 1, slot, block.before)
        self._start(block.move)
        self._line_up(key, block, None)
        return True

    def _start(self, move: Move) -> None:
        self._moves += 1
        self._effects.append(move)

    def _copied(self, move: Move, ok: bool, nbytes: int, source_lost: bool) -> None:
        """A copy down has ended.

        After a failure nothing is started until something else happens, and then this block comes
        last: a store that refuses one block is not asked for it in a loop. A store of ours that
        refuses is full for reasons that we cannot see, so it gives up its coldest block.
        """
        target = self._tiers[move.target]
        target.coming -= 1
        if ok or not (source_lost or self._tiers[move.source].paused):  # else it was not asked
            target.refusing = not ok
        if not ok:
            if not target.paused and not target.spec.shared:
                for victim in self._search(move.target, None, 1)[0]:
                    self._drop(victim, move.target)
            self._sort(move.key)
            self._source_leaves(move)
            return
        target.frame_nbytes = max(target.frame_nbytes, nbytes)
        self._place(move.key, move.target, nbytes)
        if not self._make_room(move.target, 0):  # the frame is larger than what was reserved
            self._drop(move.key, move.target)
        self._source_leaves(move)
        self._drain()

    def _source_leaves(self, move: Move) -> None:
        """A copy down no longer keeps its source, if a load found that bad meanwhile."""
        source = self._tiers[move.source]
        if move.key in source.leaving:
            source.leaving.remove(move.key)
            self._leave(move.key, move.source, forget=not source.spec.shared, gone=True)

    def _assert_lower(self, tier: int) -> None:
        if not 0 < tier < len(self._tiers):
            raise ValueError(f"tier {tier} is no lower tier; there are 1 to {len(self._tiers) - 1}")
