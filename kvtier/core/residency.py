"""Which copies of which blocks there are, and the one cascade rule that keeps them in bounds.

Every tier but the last obeys one rule: when the blocks that have no copy further down exceed
`drain_at` bytes, the coldest of them are copied one tier down, from the warmest tier that has
them. A block that has a lower copy can be dropped at no cost. So room is made ahead of need, and
a write never waits for a copy: it gets a slot now or it is refused.

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
could not go for want of a lower copy is copied down at once, whatever `drain_at` says.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from kvtier.core.blocks import BlockKey, Slot
from kvtier.core.copies import Block, Copies, Phase
from kvtier.core.effects import HOST, Effect, Forget, Gone, Held, Move, TierUsage
from kvtier.core.policy import NO_USE, Keep, Learning
from kvtier.core.shards import KeyMap
from kvtier.core.slots import SlotTable
from kvtier.core.tiers import Tier, TierSpec

LOOK = 256  # candidates that one search for a victim, or for a block to drain, looks at
_Found = tuple[list[BlockKey], list[BlockKey]]


class Residency:
    """The copies of all blocks of one layout on one node. `Ledger` adds the leases."""

    def __init__(self, block_nbytes: int, tiers: Sequence[TierSpec]) -> None:
        kinds = [spec.tier for spec in tiers]
        if not kinds or kinds[0] is not Tier.HOST or kinds != sorted(set(kinds)):
            given = ", ".join(kind.label for kind in kinds) or "none"
            raise ValueError(f"tiers are {given}; must be host, then disk, shared, or both")
        if not 1 <= block_nbytes <= min(spec.capacity for spec in tiers):
            raise ValueError(f"a block of {block_nbytes} bytes does not fit in every tier")
        self.block_nbytes = block_nbytes
        self.slots = tiers[HOST].capacity // block_nbytes
        self._free = [Slot(i) for i in reversed(range(self.slots))]
        self._tiers = [Copies(spec, block_nbytes) for spec in tiers]
        self._blocks = KeyMap[Block]()
        self._in_host = SlotTable(self.slots)
        self._pins = self._in_host.pins
        self._moves = 0
        self._draining_all = False
        self._effects: list[Effect] = []

    # --- asked and told by the manager ------------------------------------------------

    def take_effects(self) -> list[Effect]:
        """What has come up since the last call, in order; to be carried out in that order."""
        effects, self._effects = self._effects, []
        return effects

    def found(self, tier: int, held: Iterable[tuple[BlockKey, int]]) -> None:
        """The store of a lower `tier` has these keys, with their frames' bytes, oldest first.

        Beyond the tier's capacity the coldest leave, and what finds no room does not enter.
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
                self._blocks.setdefault(key, Block())
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
            move = self._blocks[key].move
            if move is None or move.source != tier:
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

    def paused(self, tier: int) -> bool:
        """Whether `pause` was the last word on this tier."""
        return self._tiers[tier].paused

    def clear(self, tier: int) -> int:
        """Drop every copy in `tier` that is neither leased nor moving; the number dropped.

        In a shared tier only this node's knowledge goes. O(copies in the tier).
        """
        going = [key for key in self._tiers[tier].sizes if self._idle(key, tier)]
        for key in going:
            self._drop(key, tier)
        return len(going)

    def undrained(self) -> int:
        """Blocks that some tier but the last has, and no tier below it; those moving included."""
        return sum(len(copies.undrained) + copies.coming for copies in self._tiers)

    def drain_all(self, *, on: bool) -> None:
        """While `on`, copy down whatever has no lower copy: every `drain_at` counts as 0."""
        self._draining_all = on
        self._drain()

    def held(self) -> Iterator[tuple[BlockKey, int]]:
        """Every block with each tier that has it; ends at the next change."""
        for tier, copies in enumerate(self._tiers):
            for key in copies.sizes:
                yield key, tier

    def usage(self) -> list[TierUsage]:
        """What each tier takes, the host tier first."""
        in_use = self.slots - len(self._free)
        host = TierUsage(in_use, in_use * self.block_nbytes)
        return [host, *(TierUsage(len(each.sizes), each.nbytes) for each in self._tiers[1:])]

    def learning(self) -> dict[int, Learning]:
        """The policies that learn, by tier."""
        policies = enumerate(copies.policy for copies in self._tiers)
        return {tier: policy for tier, policy in policies if isinstance(policy, Learning)}

    @property
    def moves(self) -> int:
        """Moves under way."""
        return self._moves

    def _warmest(self, key: BlockKey, start: int = HOST) -> int | None:
        """The warmest tier from `start` down that has `key` and answers."""
        for tier, copies in enumerate(self._tiers[start:], start):
            if key in copies and not copies.paused:
                return tier
        return None

    def _place(self, key: BlockKey, tier: int, nbytes: int, *, touch: bool = True) -> None:
        """`tier` has `key` now. Without `touch` the caller touches the path that it is part of."""
        self._tiers[tier].add(key, nbytes)
        if touch:
            self._tiers[tier].policy.touch([key], NO_USE)
        if tier == HOST:
            slot = self._blocks[key].slot
            assert slot is not None
            self._in_host.enter(key, slot)
        self._effects.append(Held(key, tier))
        self._sort(key)

    def _leave(self, key: BlockKey, tier: int, *, forget: bool, gone: bool) -> None:
        """`tier` no longer has `key`; a block that no tier has is forgotten."""
        self._tiers[tier].remove(key)
        if forget:
            self._effects.append(Forget(key, tier))
        if gone:
            self._effects.append(Gone(key, tier))
        if tier == HOST:
            self._in_host.leave(key)
            self._free_slot(self._blocks[key])
        self._sort(key)

    def _drop(self, key: BlockKey, tier: int) -> None:
        """Give up a copy to make room. What a shared store has, it keeps."""
        owned = not self._tiers[tier].spec.shared
        self._leave(key, tier, forget=owned and tier != HOST, gone=owned)

    def _free_slot(self, block: Block) -> None:
        assert block.slot is not None
        assert self._pins[block.slot] == 0
        self._free.append(block.slot)
        block.slot = None
        block.phase = Phase.STABLE

    def _sort(self, key: BlockKey) -> None:
        """Put `key` at the warm end of the undrained order that it now belongs to, if any."""
        block = self._blocks[key]
        held = [tier for tier, copies in enumerate(self._tiers) if key in copies]
        lowest = held[-1] if held else None
        if lowest is None and block.slot is None:
            assert block.move is None
            wanted = None
            del self._blocks[key]
        else:
            going_down = block.move is not None and block.move.target != HOST
            wanted = None if going_down or lowest == len(self._tiers) - 1 else lowest
        if block.undrained_in == wanted:
            return
        if block.undrained_in is not None:
            self._tiers[block.undrained_in].remove_undrained(key)
        if wanted is not None:
            self._tiers[wanted].add_undrained(key)
        block.undrained_in = wanted

    # --- room, and the cascade --------------------------------------------------------

    def _free_slots(self, count: int) -> bool:
        """Have `count` slots free, by one search for host blocks that may go; whether it did."""
        if count > len(self._free):
            self._evict(HOST, count - len(self._free))
        return count <= len(self._free)

    def _take_slot(self) -> Slot | None:
        """A free slot, by dropping the coldest host block that may go if need be."""
        if not self._free and not self._evict(HOST):
            return None
        return self._free.pop()

    def _make_room(self, tier: int, nbytes: int) -> bool:
        """Whether `nbytes` more fit into a lower `tier`, after dropping what may go."""
        copies = self._tiers[tier]
        if nbytes > copies.spec.capacity:
            return False
        while not copies.fits(nbytes):
            if not self._evict(tier):
                return False
        return True

    def _evict(self, tier: int, count: int = 1) -> bool:
        """Drop the coldest copies that may go, and copy down the colder ones that may not yet."""
        victims, overdue = self._coldest(tier, count)
        for key in victims:
            self._drop(key, tier)
        for key in overdue:
            if not self._copy_down(key, tier):
                break
        return bool(victims)

    def _coldest(self, tier: int, count: int = 1) -> _Found:
        """The `count` coldest that may go; those before them that first want a lower copy."""
        if tier == HOST and (found := self._search(tier, count, self._pinned))[0]:
            return found
        # A block that somebody else pins hides those above it; they go if nothing else can.
        return self._search(tier, count, None)

    def _search(self, tier: int, count: int, keep: Keep | None) -> _Found:
        victims, overdue = list[BlockKey](), list[BlockKey]()
        last_resort: BlockKey | None = None
        refused = tier + 1 < len(self._tiers) and self._tiers[tier + 1].refusing
        for key in islice(self._tiers[tier].policy.coldest(keep), LOOK + count - 1):
            if self._may_go(key, tier):
                victims.append(key)
                if len(victims) == count:
                    break
            elif refused and last_resort is None and self._idle(key, tier, alone=True):
                last_resort = key
            elif key in self._tiers[tier].undrained:
                overdue.append(key)
        if not victims and last_resort is not None:
            victims.append(last_resort)
        return victims, overdue

    def _pinned(self, key: BlockKey) -> bool:
        return self._pins[self._in_host.of[key]] > 0

    def _idle(self, key: BlockKey, tier: int, *, alone: bool = False) -> bool:
        if self._blocks[key].move is not None:
            return False
        if alone and any(key in copies for copies in self._tiers[:tier]):
            return False
        return tier != HOST or self._pins[self._in_host.of[key]] == 0

    def _may_go(self, key: BlockKey, tier: int) -> bool:
        """Whether the copy in `tier` may be dropped for room: the table of this module."""
        if not self._idle(key, tier):
            return False
        if any(key in copies for copies in self._tiers[tier + 1 :]):
            return True
        below = self._tiers[tier + 1] if tier + 1 < len(self._tiers) else None
        if tier == HOST:
            return below is None or below.paused
        if any(key in copies for copies in self._tiers[:tier]):
            return False
        return below is None or not below.takes_copies

    def _drain(self) -> None:
        """The cascade rule, for every tier that has one below it."""
        for tier, copies in enumerate(self._tiers[:-1]):
            while copies.undrained_nbytes > (0 if self._draining_all else copies.spec.drain_at):
                key = self._coldest_undrained(tier)
                if key is None or not self._copy_down(key, tier):
                    break

    def _coldest_undrained(self, tier: int) -> BlockKey | None:
        for key in islice(self._tiers[tier].undrained, LOOK):
            if self._blocks[key].move is None and self._warmest(key) is not None:
                return key
        return None

    def _copy_down(self, key: BlockKey, tier: int) -> bool:
        """Start copying `key` from its warmest tier to the one below `tier`, if that has room."""
        block, target = self._blocks[key], self._tiers[tier + 1]
        source = self._warmest(key)
        if block.move is not None or source is None or not target.takes_copies:
            return False
        if not self._make_room(tier + 1, target.frame_nbytes):
            return False
        target.coming += 1
        self._start(block, Move(key, source, tier + 1, block.slot if source == HOST else None))
        self._sort(key)
        return True

    def _start(self, block: Block, move: Move) -> None:
        block.move = move
        self._moves += 1
        self._effects.append(move)

    def _copied(self, block: Block, move: Move, ok: bool, nbytes: int) -> None:
        """A copy down has ended.

        After a failure nothing is started until something else happens, and then this block comes
        last: a store that refuses one block is not asked for it in a loop. A store of ours that
        refuses is full for reasons that we cannot see, so it gives up its coldest block.
        """
        target = self._tiers[move.target]
        target.coming -= 1
        target.refusing = not ok
        if not ok:
            given_up = not target.paused and not target.spec.shared
            for victim in self._coldest(move.target)[0] if given_up else ():
                self._drop(victim, move.target)
            self._sort(move.key)
            return
        target.frame_nbytes = max(target.frame_nbytes, nbytes)
        self._place(move.key, move.target, nbytes)
        if not self._make_room(move.target, 0):  # the frame is larger than what was reserved
            self._drop(move.key, move.target)
        self._drain()

    def _assert_lower(self, tier: int) -> None:
        if not 0 < tier < len(self._tiers):
            raise ValueError(f"tier {tier} is no lower tier; there are 1 to {len(self._tiers) - 1}")

    def check(self) -> None:
        """Assert every invariant; for tests and `kvtier check`: O(blocks)."""
        blocks = dict(self._blocks.items())
        slots = [block.slot for block in blocks.values() if block.slot is not None]
        assert sorted([*slots, *self._free]) == list(range(self.slots)), "a slot is lost or shared"
        moves = [block.move for block in blocks.values() if block.move is not None]
        assert len(moves) == self._moves, "moves are miscounted"
        host = {key: blocks[key].slot for key in self._tiers[HOST].sizes}
        assert dict(self._in_host.of.items()) == host, "a block is not where it should be"
        self._in_host.check()
        assert not any(self._pins[slot] for slot in self._free), "a free slot is pinned"
        for tier, copies in enumerate(self._tiers):
            coming = sum(tier == move.target != HOST for move in moves)
            assert copies.coming == coming <= copies.spec.queue
            assert copies.nbytes == sum(size for _, size in copies.sizes.items())
            assert copies.nbytes <= copies.spec.capacity, f"tier {tier} is over its capacity"
            ranked = [key for key in copies.sizes if key in copies.policy]
            assert len(copies.policy) == len(ranked)
            assert tier == HOST or len(ranked) == len(copies.sizes)
            assert all(key in blocks for key in copies.sizes)
            assert copies.undrained_nbytes == sum(size for _, size in copies.undrained.items())
        for key, block in blocks.items():
            self._check_block(key, block)

    def _check_block(self, key: BlockKey, block: Block) -> None:
        tiers = [tier for tier, copies in enumerate(self._tiers) if key in copies]
        move, host = block.move, self._tiers[HOST]
        assert tiers or block.phase is Phase.FILLING, "a block that is nowhere is known"
        assert (block.slot is None) <= (block.phase is Phase.STABLE)
        assert (key in host) == (block.slot is not None and block.phase is Phase.STABLE)
        assert (block.phase is Phase.LOADING) == (move is not None and move.target == HOST)
        if move is not None:
            assert move.key == key
            assert move.source in tiers, "the source of a move was dropped"
            assert move.target not in tiers
            assert move.slot == (block.slot if HOST in (move.source, move.target) else None)
        going_down = move is not None and move.target != HOST
        undrained = not going_down and bool(tiers) and tiers[-1] < len(self._tiers) - 1
        assert block.undrained_in == (tiers[-1] if undrained else None)
        for tier, copies in enumerate(self._tiers):
            assert (key in copies.undrained) == (block.undrained_in == tier)
