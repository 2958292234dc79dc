"""The world around one ledger under test: arena, stores, moves, and what was announced."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from kvtier.core.blocks import BlockKey, Slot
from kvtier.core.ledger import HOST, Forget, Gone, Held, Lease, Ledger, Move, Settled
from kvtier.core.tiers import TierSpec

BLOCK_NBYTES = 10
MAX_FRAME_NBYTES = 13  # a header can make a frame larger than its block


@dataclass
class Store:
    """A lower tier's store: the bytes that each key takes, and which of them have rotted."""

    frames: dict[BlockKey, int] = field(default_factory=dict)
    rotten: set[BlockKey] = field(default_factory=set)

    def forget(self, key: BlockKey) -> None:
        """The frame is gone, if it was there."""
        self.frames.pop(key, None)
        self.rotten.discard(key)


class World:
    """Carries out what a ledger asks for, byte by byte, and checks all that it says."""

    def __init__(
        self, ledger: Ledger, specs: Sequence[TierSpec], rng: Random, seen: Counter[str]
    ) -> None:
        self.ledger = ledger
        self.specs = specs
        self.rng = rng
        self.seen = seen
        self.arena: dict[Slot, BlockKey | None] = {}  # None: being filled, or garbage
        self.sizes: dict[BlockKey, int] = {}
        self.stores = [Store() for _ in specs]
        self.announced: list[set[BlockKey]] = [set() for _ in specs]
        self.moves: list[Move] = []
        self.abandoned: list[Move] = []  # loads that hang, and that nobody waits for
        self.leases: dict[int, Lease] = {}
        self.settled: dict[int, list[BlockKey]] = {}  # what each lease was said to have
        self.credits: dict[int, set[Slot]] = {}  # what clients fill ahead, by client
        self.aside: dict[BlockKey, Slot] = {}  # put while somebody else fills them
        self.clearing = False
        self.refused = [False] * len(specs)  # whether the newest copy into a tier failed
        # Copies that a load found bad while they were copied down: gone once that has ended.
        self.leaving = [set[BlockKey]() for _ in specs]

    # --- moves and effects ------------------------------------------------------------

    def frame_nbytes(self, key: BlockKey) -> int:
        """What the codec makes of a block: always the same."""
        return self.sizes.setdefault(key, self.rng.randint(1, MAX_FRAME_NBYTES))

    def is_coming(self, key: BlockKey, tier: int) -> bool:
        """Whether a move of `key` into `tier` is under way."""
        return any(move.key == key and move.target == tier for move in self.moves)

    def name(self, tier: int) -> str:
        """What people call the ledger's tier `tier`."""
        return self.specs[tier].tier.label

    def end(self, move: Move, *, failed: bool) -> None:
        """One move's bytes are copied, or not, and its end is reported."""
        lower = move.source or move.target
        down = move.target != HOST
        rotten = move.key in self.stores[move.source].rotten
        if failed and self.rng.random() < 0.3:  # no answer at all
            self.ledger.pause(lower)
        if move.source != HOST:
            assert move.key in self.stores[move.source].frames, "there is nothing to copy"
        else:
            assert move.slot is not None
            assert self.arena[move.slot] == move.key, "the wrong block is copied down"
        ok = not failed and not rotten
        nbytes = 0
        if ok and down:
            nbytes = self.frame_nbytes(move.key)
            self.stores[move.target].frames[move.key] = nbytes
            self.stores[move.target].rotten.discard(move.key)
            self.seen["frame larger than a block"] += nbytes > BLOCK_NBYTES
        elif ok and move.slot is not None:
            assert self.arena[move.slot] is None, "a slot was filled by somebody else"
            self.arena[move.slot] = move.key
        waiting = [each for each in self.leases.values() if move.key in each.loading]
        kept = self.ledger.paused(move.source)
        beside = any(move.key == each.key and move.source == each.source for each in self.moves)
        if not ok and not down and not kept:
            if beside:
                self.leaving[move.source].add(move.key)
            elif self.specs[move.source].shared:
                self.stores[move.source].forget(move.key)
        if down:
            if not rotten:
                self.refused[move.target] = not ok
            left = move.key in self.leaving[move.source]
            self.leaving[move.source].discard(move.key)
            self.seen["copy down of what a load found bad"] += left
        self.ledger.moved(move, ok, nbytes, source_lost=rotten)
        if beside:
            what = "copy down" if down else "load"
            self.seen[f"{what} {'ok' if ok else 'failed'} beside another move"] += 1
        result = "ok" if ok else "failed"
        source, target = self.name(move.source), self.name(move.target)
        self.seen[f"copy {source}>{target} {result}" if down else f"load {source} {result}"] += 1
        self.seen["read cut by a failed load"] += bool(waiting) and not ok
        self.seen["failed load of a paused tier"] += kept and not ok and not down
        started = len(self.moves)
        self.carry_out()
        assert ok or not down or len(self.moves) == started, "a failure leads to the next try"
        assert not down or not left or move.key not in self.announced[move.source], "kept for ever"
        if rotten and down:  # what could not be read to be copied is no copy
            if not beside:
                self.stores[move.source].forget(move.key)
            self.ledger.lost(move.source, [move.key])
            self.carry_out()
            assert not beside or move.key in self.announced[move.source], "lost while it is read"

    def carry_out(self) -> None:
        """Do what the ledger asks, and believe what it announces."""
        for effect in self.ledger.take_effects():
            match effect:
                case Move():
                    self.start(effect)
                case Forget(key, tier):
                    assert not self.specs[tier].shared
                    assert not any(key == m.key and tier == m.source for m in self.moves)
                    self.seen["found beyond capacity"] += key not in self.announced[tier]
                    self.stores[tier].forget(key)
                case Held(keys, tier):
                    assert len({*keys}) == len(keys), "told twice at once"
                    assert self.announced[tier].isdisjoint(keys) or self.specs[tier].shared
                    self.announced[tier].update(keys)
                case Gone(keys, tier):
                    for key in keys:
                        self.announced[tier].remove(key)
                        self.gone(key, tier)
                case Settled(lease_id):
                    assert lease_id not in self.settled, "settled twice"
                    assert not self.leases[lease_id].loading
                    self.settled[lease_id] = [*self.leases[lease_id].keys]

    def start(self, move: Move) -> None:
        """A move is handed out: it must make sense, and its slot must be free for it."""
        key, source, target, slot, _ = move
        for other in self.moves:  # of one block only a load beside a copy down
            if key == other.key:
                assert target == HOST < source == other.source, "two moves of one block"
                assert other.target != HOST, "two loads of one block"
                self.seen["load beside a copy down"] += 1
        assert key not in self.leaving[source], "what was found bad is read again"
        assert not self.ledger.paused(source)
        assert not self.ledger.paused(target)
        assert key in self.announced[source]
        for warmer in range(source):
            assert key not in self.announced[warmer] or self.ledger.paused(warmer)
        if target == HOST:
            assert slot is not None
            self.claim(slot, key)
        else:
            assert key in self.announced[target - 1], "a tier was left out"
            assert sum(each.target == target for each in self.moves) < self.specs[target].queue
            coming = 1 + sum(each.target == target for each in self.moves)
            kept = sum(self.stores[target].frames.values())
            free = self.specs[target].capacity - kept - coming * BLOCK_NBYTES
            assert self.specs[target].shared or free >= 0, "there is no room for the copy"
        self.moves.append(move)

    def claim(self, slot: Slot, key: BlockKey | None = None, by: Lease | None = None) -> None:
        """A slot is about to be filled: nobody else may have it."""
        for lease in self.leases.values():
            mine = lease is by or key in lease.loading
            assert mine or slot not in lease.slots, "the slot is leased"
        moves = [*self.moves, *self.abandoned]
        assert all(slot != move.slot for move in moves), "the slot is moving"
        assert not any(slot in credit for credit in self.credits.values()), "it is on credit"
        assert slot not in self.aside.values(), "it was put aside"
        self.arena[slot] = None

    def gone(self, key: BlockKey, tier: int) -> None:
        """A copy is gone: not the only one of a block in host memory, if there was a choice."""
        label = self.name(tier)
        self.seen[f"dropped from {label}"] += 1
        shared = self.specs[tier].shared
        assert not shared or key not in self.stores[tier].frames, "others can still read it"
        if tier == HOST and not self.clearing and len(self.specs) > 1:
            copied = any(key in held for held in self.announced)
            free = self.ledger.paused(1) or self.refused[1]
            admission = self.ledger.admission
            once = admission is not None and admission.remembers(key)
            self.seen["dropped after one use"] += once
            assert copied or free or once, "the only copy of a block was dropped"
            self.seen["dropped for good while refused"] += not copied and not self.ledger.paused(1)
            self.seen["dropped for good while paused"] += not copied

    # --- what must always hold --------------------------------------------------------

    def is_held(self, key: BlockKey) -> bool:
        """Whether an own tier that answers announced it."""
        return any(
            key in held and not spec.shared and not self.ledger.paused(tier)
            for tier, (spec, held) in enumerate(zip(self.specs, self.announced, strict=True))
        )

    def check(self) -> None:
        """The ledger, the slots, the stores and what was announced agree."""
        self.ledger.check()
        assert self.ledger.leases == len(self.leases)
        assert self.ledger.moves == len(self.moves)
        for lease in self.leases.values():
            self.check_lease(lease)
        for move in self.moves:
            if move.slot is not None:
                held = None if move.target == HOST else move.key
                assert self.arena[move.slot] == held, "a slot changed under a move"
        for credit in self.credits.values():
            assert not any(self.arena[slot] for slot in credit), "a slot on credit changed"
        assert self.ledger.credited == sum(map(len, self.credits.values()))
        usage = self.ledger.usage()
        listed = [set(keys) for keys in self.ledger.held()]
        assert listed[HOST] == self.announced[HOST]
        for tier, spec in enumerate(self.specs[1:], start=1):
            frames, blocks = self.stores[tier].frames, len(self.announced[tier])
            assert usage[tier].nbytes <= spec.capacity
            if spec.shared:
                assert listed[tier] <= self.announced[tier]
                self.seen["hint forgotten"] += usage[tier].blocks < blocks
            else:
                assert frames.keys() == self.announced[tier], "store and announcements differ"
                assert frames.keys() == listed[tier]
                assert usage[tier] == (blocks, sum(frames.values()))

    def check_lease(self, lease: Lease) -> None:
        """The client of a lease sees in its slots what it may expect."""
        held = [self.arena[slot] for slot in lease.slots]
        if lease.writing:
            assert held == [None] * len(lease.slots), "a slot changed under its writer"
        elif lease.id in self.settled:
            assert held == lease.keys == self.settled[lease.id], "a reader has a wrong block"
            self.seen["read checked"] += len(held)
        else:
            assert lease.loading, "nothing is awaited, but nobody was told"
            come = lease.arrived()
            assert held[:come] == lease.keys[:come], "a reader has a wrong block before the end"
            assert come == len(held) or lease.keys[come] in lease.loading
            self.seen["read in part"] += come > 0

    def check_cascade(self) -> None:
        """Right after a commit: what the host tier has too much of is on its way down."""
        if len(self.specs) == 1 or self.ledger.paused(1):
            return
        lower = set[BlockKey]().union(*self.announced[1:])
        waiting = self.announced[HOST] - lower - {move.key for move in self.moves}
        waiting -= self.held_back()
        coming = sum(move.target == 1 for move in self.moves)
        used = self.ledger.usage()[1].nbytes + (coming + 1) * MAX_FRAME_NBYTES
        full = coming == self.specs[1].queue or used > self.specs[1].capacity
        assert full or len(waiting) * BLOCK_NBYTES <= self.specs[HOST].drain_at

    def held_back(self) -> set[BlockKey]:
        """What of the host tier the tier below does not take yet."""
        return set(self.ledger.admission or ())

    def check_match(self, key: BlockKey) -> None:
        """What a match says of one block is what was announced of it."""
        by_tier = self.ledger.match([key]).by_tier
        if any(each.writing and key in each.keys for each in self.leases.values()):
            assert not any(by_tier), "readable before it was committed"
        elif not any(key == move.key and move.target == HOST for move in self.moves):
            answering = [
                tier
                for tier, held in enumerate(self.announced)
                if key in held and key not in self.leaving[tier] and not self.ledger.paused(tier)
            ]
            found = [tier for tier, blocks in enumerate(by_tier) if blocks]
            hint = bool(answering) and self.specs[answering[0]].shared and not found
            assert hint or found == answering[:1]
