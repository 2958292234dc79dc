"""Which copies of which blocks there are: the books of one layout on one node.

`Cascade` adds what is copied down and dropped, `Ledger` the leases.
"""

from collections.abc import Iterable, Sequence

from kvtier.core.blocks import BEGINS, BlockKey, Slot
from kvtier.core.copies import Aside, Block, Copies, Phase
from kvtier.core.effects import HOST, Effect, Forget, Gone, Held, Move, TierUsage
from kvtier.core.policy import NO_USE, Learning, Use
from kvtier.core.shards import KeyMap
from kvtier.core.slot_index import SlotIndex
from kvtier.core.slots import SlotTable
from kvtier.core.tiers import Tier, TierSpec


class Residency:
    """The copies of all blocks of one layout on one node, by tier and by slot."""

    def __init__(
        self, block_nbytes: int, tiers: Sequence[TierSpec], index: SlotIndex | None = None
    ) -> None:
        kinds = [spec.tier for spec in tiers]
        if not kinds or kinds[0] is not Tier.HOST or kinds != sorted(set(kinds)):
            given = ", ".join(kind.label for kind in kinds) or "none"
            raise ValueError(f"tiers are {given}; must be host, then disk, shared, or both")
        if not 1 <= block_nbytes <= min(spec.capacity for spec in tiers):
            raise ValueError(f"a block of {block_nbytes} bytes does not fit in every tier")
        self.block_nbytes = block_nbytes
        self.slots = tiers[HOST].capacity // block_nbytes
        self._free = [Slot(i) for i in reversed(range(self.slots))]
        self._in_host = SlotTable(self.slots, index)
        self._tiers = [Copies(spec, block_nbytes, self._in_host.of) for spec in tiers]
        self._held = [copies.held.shards for copies in self._tiers]
        admission = tiers[1].admission if len(tiers) > 1 else None
        self.admission = admission() if admission else None  # of the tier below the host's
        self._blocks = KeyMap[Block](self.slots if len(tiers) == 1 else None)
        self._pins = self._in_host.pins
        self.index = self._in_host.index
        self._loads: dict[BlockKey, Move] = {}  # under way, at most one a block
        self._abandoned: set[Move] = set()  # loads that nobody waits for and that may still write
        self._moves = 0
        self._credits: dict[int, set[Slot]] = {}  # slots that clients fill ahead, by client
        self._aside: dict[BlockKey, Aside] = {}  # put while another client fills them
        self._draining_all = False
        self._effects: list[Effect] = []

    # --- asked and told by the manager ------------------------------------------------

    def take_effects(self) -> list[Effect]:
        """What has come up since the last call, in order; to be carried out in that order."""
        effects, self._effects = self._effects, []
        return effects

    def closed(self) -> None:
        """Nobody looks any more at what lies in which slot: that memory goes."""
        self.index = self._in_host.index = SlotIndex(self.slots)

    def paused(self, tier: int) -> bool:
        """Whether `pause` was the last word on this tier."""
        return self._tiers[tier].paused

    def undrained(self) -> int:
        """Blocks that some tier but the last has, and no tier below it; those moving included."""
        return sum(len(copies.undrained) + copies.coming for copies in self._tiers)

    def held(self) -> list[list[BlockKey]]:
        """The blocks of each tier."""
        return [list(copies.held) for copies in self._tiers]

    def usage(self) -> list[TierUsage]:
        """What each tier takes, the host tier first."""
        in_use = self.slots - len(self._free) - self.credited
        host = TierUsage(in_use, in_use * self.block_nbytes)
        return [host, *(TierUsage(len(each.held), each.nbytes) for each in self._tiers[1:])]

    def learning(self) -> dict[int, Learning]:
        """The policies that learn, by tier."""
        policies = enumerate(copies.policy for copies in self._tiers)
        return {tier: policy for tier, policy in policies if isinstance(policy, Learning)}

    @property
    def credited(self) -> int:
        """Slots that clients fill ahead of saying with what."""
        return sum(map(len, self._credits.values()))

    @property
    def moves(self) -> int:
        """Moves under way."""
        return self._moves

    # --- copies -----------------------------------------------------------------------

    def _known(self, key: BlockKey) -> Block:
        """What is known of `key`, from now on if nothing was."""
        shard = self._blocks.shards[key[-1]]
        block = shard.get(key)
        if block is None:
            block = shard[key] = Block()
        return block

    def _lay(
        self,
        keys: Sequence[BlockKey],
        slots: Sequence[Slot],
        phase: Phase,
        path: Sequence[BlockKey],
        indexes: Iterable[int],
    ) -> None:
        """Each of `keys`, which have none, has its one of `slots` now. They lie so in `path`."""
        shards = self._blocks.shards
        for key, slot, index in zip(keys, slots, indexes, strict=True):
            shard = shards[key[-1]]
            block = shard.get(key)
            if block is None:
                before = path[index - 1] if index else BEGINS
                shard[key] = Block(phase, slot, None, None, before)
                continue
            block.phase, block.slot = phase, slot
            if index:
                block.before = path[index - 1]

    def _warmest(self, key: BlockKey, start: int = HOST) -> int | None:
        """The warmest tier from `start` down that has `key`, answers, and goes on having it."""
        tiers = self._tiers
        for tier in range(start, len(tiers)):
            copies = tiers[tier]
            held = key in self._held[tier][key[-1]]
            if held and not copies.paused and key not in copies.leaving:
                return tier
        return None

    def _place(self, key: BlockKey, tier: int, nbytes: int, *, touch: bool = True) -> None:
        """`tier` has `key` now. Without `touch` the caller touches the path that it is part of."""
        copies = self._tiers[tier]
        if tier == HOST:
            slot = self._blocks[key].slot
            assert slot is not None
            self._in_host.enter(key, slot)
        else:
            copies.add(key, nbytes)
        if touch:
            copies.policy.touch([key], NO_USE)
        self._effects.append(Held((key,), tier))
        self._sort(key)

    def _used(self, path: Sequence[BlockKey], use: Use) -> None:
        """A request used `path`: what of it is somewhere becomes warm there."""
        for copies in self._tiers:
            copies.policy.touch(path, use, copies.held)
        if self.admission is not None:
            for key in self.admission.used(path, use.request):
                self._sort(key)

    def _filled(self, keys: Sequence[BlockKey], slots: Sequence[Slot], use: Use) -> None:
        """An engine has put `keys`, deep end last, into `slots`; the caller touches their path.

        Their deep end goes down first, as it is dropped first. Later uses change nothing about
        that order: what is old is copied down also while it is hot, once, and uses, on every
        engine's path, have less to do.
        """
        if not keys:
            return
        self._in_host.enter_all(keys, slots)
        if self.admission is not None:
            self.admission.entered(keys, use.request)
        self._effects.append(Held(keys, HOST))
        shards, pins, stable = self._blocks.shards, self._pins, Phase.STABLE
        for key, slot in zip(keys, slots, strict=True):
            shards[key[-1]][key].phase = stable
            pins[slot] -= 1
        if len(self._tiers) > 1:  # else there is no order that they could belong to
            for key in reversed(keys):
                self._sort(key)

    def _leave(self, key: BlockKey, tier: int, *, forget: bool, gone: bool) -> None:
        """`tier` no longer has `key`; a block that no tier has is forgotten."""
        copies = self._tiers[tier]
        if tier == HOST:
            copies.policy.remove(key)
            self._in_host.leave(key)
            if self.admission is not None:
                self.admission.left(key)
            self._free_slot(self._blocks[key])
        else:
            copies.remove(key)
        if forget:
            self._effects.append(Forget(key, tier))
        if gone:
            self._effects.append(Gone((key,), tier))
        self._sort(key)

    def _drop(self, key: BlockKey, tier: int) -> None:
        """Give up a copy to make room. What a shared store has, it keeps."""
        owned = not self._tiers[tier].spec.shared
        self._leave(key, tier, forget=owned and tier != HOST, gone=owned)

    def _drop_all(self, keys: Sequence[BlockKey], tier: int) -> None:
        """`_drop` for each of `keys`."""
        if tier != HOST:
            for key in keys:
                self._drop(key, tier)
            return
        if not keys:
            return
        self._tiers[HOST].policy.remove(*keys)
        slots = self._in_host.leave_all(keys)
        assert not any(map(self._pins.__getitem__, slots))
        self._free += slots
        self._effects.append(Gone(keys, HOST))
        shards, once = self._blocks.shards, self.admission
        if len(self._tiers) == 1:  # nothing has them now
            for key in keys:
                del shards[key[-1]][key]
            return
        for key in keys:
            block = shards[key[-1]][key]
            block.slot = None
            refused = once is not None and once.left(key)
            if refused or block.undrained_in == HOST:  # else what lies lower stays as it was
                self._sort(key)

    def _free_slot(self, block: Block) -> None:
        assert block.slot is not None
        assert self._pins[block.slot] == 0
        self._free.append(block.slot)
        block.slot = None
        block.phase = Phase.STABLE

    def _sort(self, key: BlockKey) -> None:
        """Put `key` at the warm end of the undrained order that it now belongs to, if any."""
        place, held = key[-1], self._held
        shard = self._blocks.shards[place]
        block = shard[key]
        lowest = last = len(held) - 1
        while lowest >= HOST and key not in held[lowest][place]:
            lowest -= 1
        wanted = None if block.move or lowest == last or lowest < HOST else lowest
        if lowest < HOST and block.slot is None:
            assert block.move is None
            del shard[key]
        elif wanted == HOST and self.admission is not None and key in self.admission:
            wanted = None  # it may be dropped as if it lay lower
        if block.undrained_in != wanted:
            self._line_up(key, block, wanted)

    def _line_up(self, key: BlockKey, block: Block, tier: int | None) -> None:
        """Put `key` at the warm end of the undrained order of `tier`, if any, and of no other."""
        if block.undrained_in is not None:
            self._tiers[block.undrained_in].remove_undrained(key)
        if tier is not None:
            self._tiers[tier].add_undrained(key)
        block.undrained_in = tier

    def check(self) -> None:
        """Assert every invariant; for tests and `kvtier check`: O(blocks)."""
        blocks = dict(self._blocks.items())
        slots = [block.slot for block in blocks.values() if block.slot is not None]
        ahead = [slot for credit in self._credits.values() for slot in credit]
        hung = [move.slot for move in self._abandoned if move.slot is not None]
        aside = [each.slot for each in self._aside.values()]
        every = [*slots, *ahead, *hung, *aside, *self._free]
        assert sorted(every) == list(range(self.slots)), "a slot is lost or shared"
        assert all(self._pins[slot] == 1 for slot in ahead), "a slot is not its client's alone"
        assert all(self._credits.values()), "an empty set was kept"
        assert all(self._pins[slot] == 1 for slot in hung), "a slot that may be written is free"
        assert all(self._pins[slot] == 1 for slot in aside), "what was put is nobody's"
        assert all(blocks[key].phase is Phase.FILLING for key in self._aside)
        moves = [block.move for block in blocks.values() if block.move is not None]
        assert len(moves) + len(self._loads) == self._moves
        assert all(key in blocks for key in self._loads)
        host = {key: blocks[key].slot for key in self._tiers[HOST].held}
        assert dict(self._in_host.of.items()) == host, "a block is not where it should be"
        self._in_host.check()
        assert all(key in host for key in self.admission or ()), "a block is held back for ever"
        assert not any(self._pins[slot] for slot in self._free), "a free slot is pinned"
        for tier, copies in enumerate(self._tiers):
            coming = sum(tier == move.target for move in moves)
            assert copies.coming == coming <= copies.spec.queue
            assert copies.nbytes == (tier and sum(size for _, size in copies.held.items()))
            assert copies.nbytes <= copies.spec.capacity, f"tier {tier} is over its capacity"
            ranked = [key for key in copies.held if key in copies.policy]
            assert len(copies.policy) == len(ranked)
            assert tier == HOST or len(ranked) == len(copies.held)
            assert all(key in blocks for key in copies.held)
            assert copies.undrained_nbytes == sum(size for _, size in copies.undrained.items())
        for key, block in blocks.items():
            self._check_block(key, block)

    def _check_block(self, key: BlockKey, block: Block) -> None:
        tiers = [tier for tier, copies in enumerate(self._tiers) if key in copies]
        move, load, host = block.move, self._loads.get(key), self._tiers[HOST]
        assert tiers or block.phase is Phase.FILLING, "a block that is nowhere is known"
        assert (block.slot is None) <= (block.phase is Phase.STABLE)
        assert (key in host) == (block.slot is not None and block.phase is Phase.STABLE)
        assert (block.phase is Phase.LOADING) == (load is not None)
        for each in (move, load):
            if each is not None:
                assert each.key == key
                assert each.source in tiers, "the source of a move was dropped"
        if move is not None:
            assert move.target not in (HOST, *tiers)
            assert move.slot == (block.slot if move.source == HOST else None)
        if load is not None:
            assert (load.target, load.slot) == (HOST, block.slot)
            assert move is None or move.source == load.source, "a copy down is not of the warmest"
        undrained = move is None and bool(tiers) and tiers[-1] < len(self._tiers) - 1
        if tiers == [HOST] and self.admission is not None and key in self.admission:
            undrained = False
            # It goes on where a tier between, of which it was made, has lost the block since.
            assert move is None or move.target > 1, "a block is copied that is not worth it"
        assert block.undrained_in == (tiers[-1] if undrained else None)
        for tier, copies in enumerate(self._tiers):
            assert (key in copies.undrained) == (block.undrained_in == tier)
            assert key not in copies.leaving or (move and move.source == tier), "a bad copy is kept"
