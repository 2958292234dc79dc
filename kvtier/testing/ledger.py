"""A seeded simulation of one node around a ledger: every byte modelled, everything failing.

The model is the bytes. An arena slot and a lower store hold the key of the block that was put
there, a slot that is being filled holds nothing, and clients look at their slots again and again:
a slot that is handed out twice, used again too early or loaded from the wrong place is seen at
once. Beside it stands what the ledger announced, which must agree with the stores at all times.
One seed gives one run; nothing else is random.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from random import Random
from typing import Final

from kvtier.core.admission import AdmissionFactory, SecondUse
from kvtier.core.blocks import BlockKey
from kvtier.core.ledger import HOST, Ledger
from kvtier.core.phd import PHD
from kvtier.core.policy import LRU, NO_USE, Here, Keep, PolicyFactory, Use
from kvtier.core.tiers import Tier, TierSpec
from kvtier.testing.hanging import HangingWorld
from kvtier.testing.keys import path_of, steps_to
from kvtier.testing.seen import SeenWorld
from kvtier.testing.world import BLOCK_NBYTES, MAX_FRAME_NBYTES

CLIENTS = 3
DEPTH = 5  # blocks of the longest prompt

MakeLedger = Callable[[int, Sequence[TierSpec]], Ledger]

# What a run can come across; a suite of seeds that never meets one of these proves too little.
STATES = (
    "block granted", "write refused", "write beside a filling block", "write over a paused tier",
    "commit", "partial commit", "write abandoned", "read waits", "read shares a load",
    "load beside a copy down", "load ok beside another move", "load failed beside another move",
    "copy down ok beside another move", "copy down failed beside another move",
    "copy down of what a load found bad",
    "read cut by a failed load", "read cut by settle", "read checked", "read in part",
    "load declined", "read past a load that nobody waits for",
    "client died", "dropped from host", "dropped from disk", "dropped for good while paused",
    "dropped for good while refused", "dropped after one use",
    "copy host>disk ok", "copy host>disk failed", "copy host>shared ok",
    "copy host>shared failed", "copy disk>shared ok", "copy disk>shared failed",
    "load disk ok", "load disk failed", "load shared ok", "load shared failed",
    "failed load of a paused tier", "frame larger than a block", "hint forgotten", "paused",
    "put", "put of what is there", "put without a new slot", "put beside a writer", "credit ended",
    "copied as seen", "seen, and gone since", "seen, and written over since",
    "found without asking", "load abandoned", "lease cut from a load that hangs", "load came late",
    "resumed", "cleared", "found", "found beyond capacity", "lost", "quiet", "drained",
)  # fmt: skip

PICKY: Final = 6  # every so many seeds, a tier takes only what was used twice


class AnyOrder:
    """A policy that gives up keys in random order: safety must not hang on a good one."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._keys: dict[BlockKey, None] = {}

    def touch(self, path: Sequence[BlockKey], use: Use = NO_USE, here: Here = None) -> None:
        """See `EvictionPolicy.touch`."""
        self._keys.update(dict.fromkeys(path if here is None else here.among(path)))

    def remove(self, *keys: BlockKey) -> None:
        """See `EvictionPolicy.remove`."""
        for key in keys:
            self._keys.pop(key, None)

    def coldest(self, keep: Keep | None = None) -> Iterator[BlockKey]:
        """See `EvictionPolicy.coldest`; not what it says."""
        return iter(self._rng.sample([*self._keys], len(self._keys)))

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __len__(self) -> int:
        return len(self._keys)


def simulate(seed: int, steps: int, seen: Counter[str], make_ledger: MakeLedger = Ledger) -> None:
    """One run of `steps` random events; counts in `seen` how often each of `STATES` was met.

    Raises:
        AssertionError: The ledger broke a promise; a note names the seed and the step.
    """
    step = -1
    try:
        admission = None if seed % PICKY else partial(SecondUse, 8)
        node = _Node(Random(seed), seen, make_ledger, admission)
        node.hangs = seed % 4 == 1
        for step in range(steps):  # noqa: B007
            node.step()
            node.check()
            node.check_match(node.path()[0])
        node.finish()
    except (AssertionError, LookupError) as error:
        error.add_note(f"ledger simulation: seed {seed}, step {step}")
        raise


def _random_tiers(rng: Random, admission: AdmissionFactory | None) -> list[TierSpec]:
    kinds = rng.choice([[], [Tier.DISK], [Tier.SHARED], [Tier.DISK, Tier.SHARED]])
    policies: list[PolicyFactory] = [LRU, PHD, lambda: AnyOrder(rng)]
    specs = []
    for tier in [Tier.HOST, *kinds]:
        blocks = rng.randint(2, 6) if tier is Tier.HOST else rng.randint(1, 9)
        capacity = blocks * BLOCK_NBYTES + rng.randint(0, 9)
        drain_at = rng.choice([0, rng.randint(0, capacity), capacity])
        specs.append(
            TierSpec(
                tier=tier, capacity=capacity, drain_at=drain_at, queue=rng.randint(1, 4),
                policy=rng.choice(policies), admission=admission,
            )
        )  # fmt: skip
    return specs


class _Node(SeenWorld, HangingWorld):
    """One node, its clients, and what befalls them."""

    def __init__(
        self,
        rng: Random,
        seen: Counter[str],
        make_ledger: MakeLedger,
        admission: AdmissionFactory | None,
    ) -> None:
        specs = _random_tiers(rng, admission)
        super().__init__(make_ledger(BLOCK_NBYTES, specs), specs, rng, seen)
        self.request = 0
        self.now = 0.0
        self.failing = rng.choice([0.0, 0.1, 0.5])  # share of moves that fail

    def step(self) -> None:
        """One random event."""
        lower = len(self.specs) > 1
        events: list[tuple[int, Callable[[], None]]] = [
            (14, self._write), (14, self._read), (2, self._credit), (8, self._put),
            (5, lambda: self.look(self.path())), (5, lambda: self.copied(self._use())),
            (26, self._end_lease), (3, self._settle),
            (3, self._die), (30, self._end_move), (1, self._clear), (1, self._be_quiet),
            (3 * lower, self._find), (3 * lower, self._rot), (2 * lower, self._lose),
            (1 * lower, self._pause), (3 * lower, self._resume),
            (20 * lower * self.hangs, self.hang), (4 * bool(self.abandoned), self.come_late),
            (14 * (len(self.specs) > 2), self._read_what_moves),
            (10 * lower, self._read_past_a_load),
        ]  # fmt: skip
        weights = [weight for weight, _ in events]
        _, event = self.rng.choices(events, weights)[0]
        event()
        self.now += self.rng.choice([0.0, 0.1, 30.0, 300.0])
        self.carry_out()

    def _use(self) -> Use:
        """Of a new request, of the newest one, or of nobody's."""
        self.request += self.rng.random() < 0.5
        request = self.rng.choice([None, self.request, self.request])
        return Use(self.now, request, self.rng.choice([None, 5, 500]))

    def path(self) -> list[BlockKey]:
        """A prompt: a way down a small tree, so that prompts share their beginnings."""
        steps = [self.rng.choice(b"ab") for _ in range(self.rng.randint(1, DEPTH))]
        return path_of(steps)

    def _first(self, path: list[BlockKey]) -> int:
        """How many blocks of a prompt its engine has already."""
        return self.rng.choice([0, 0, self.rng.randrange(len(path))])

    def _write(self) -> None:
        path = self.path()
        readable = {key for key in path if self.ledger.match([key]).blocks}
        filling = {key for each in self.leases.values() if each.writing for key in each.keys}
        first = self._first(path)
        lease = self.ledger.write(self.rng.randrange(CLIENTS), path, first, self._use())
        self.leases[lease.id] = lease
        assert lease.keys == [path[index] for index in lease.indexes]
        assert lease.indexes == sorted(set(lease.indexes) - {*range(first)})
        assert not filling & {*lease.keys}, "granted to two writers"
        loading = {move.key for move in self.moves if move.target == HOST}
        known = readable | filling | loading | {*lease.keys}
        refused = [n for n, key in enumerate(path) if n >= first and key not in known]
        if refused and lease.indexes:
            assert refused[0] > lease.indexes[-1], "granted after a refusal"
        if len(self.specs) == 1 and lease.indexes:
            before = path[first : lease.indexes[0]]
            assert filling or self.ledger.match(before).blocks == len(before), "a parent was lost"
        self.carry_out()
        if lease.refused and len(self.specs) > 1 and self.refused[1]:
            busy = {key for each in self.leases.values() for key in each.keys}
            idle = self.announced[HOST] - busy - {move.key for move in self.moves}
            assert idle <= {*path}, "a tier that takes nothing stops the host tier"
        for key, slot in zip(lease.keys, lease.slots, strict=True):
            self.claim(slot, key, lease)
            assert key not in readable or not self.is_held(key), "granted although it is held"
            self.seen["write over a paused tier"] += any(key in held for held in self.announced)
        self.seen["block granted"] += len(lease.keys)
        self.seen["write refused"] += bool(refused)
        self.seen["write beside a filling block"] += bool(filling & {*path})

    def _credit(self) -> None:
        self.credit(self.rng.randrange(CLIENTS), self.rng.randint(1, 2))

    def _put(self) -> None:
        client = self.rng.choice([*self.credits] or [0])
        self.put(client, self.path(), self.rng.randint(0, DEPTH), self._use())
        self.check_cascade()

    def _read(self) -> None:
        path = self.path()
        self._read_path(path, self._first(path))

    def _read_what_moves(self) -> None:
        """A drain begins; an engine that has the blocks before it asks for one that is moving."""
        self.ledger.drain_all(on=True)
        self.ledger.drain_all(on=False)
        self.carry_out()
        moving = [move for move in self.moves if move.source != HOST != move.target]
        if moving:
            key, source, *_ = self.rng.choice(moving)
            if self.rng.random() < 0.3:
                self.stores[source].rotten.add(key)
            if self.rng.random() < 0.3:
                self.ledger.lost(source, [key])  # too late: it is being read
            self._read_path(path_of(steps_to(key)), len(steps_to(key)) - 1)
            loads = [each for each in self.moves if each.key == key and each.target == HOST]
            if loads and self.rng.random() < 0.3:  # it ends before the copy does
                self.moves.remove(loads[0])
                self.end(loads[0], failed=False)

    def _read_past_a_load(self) -> None:
        """A load outlives the readers that wanted it; then its block and more are asked for."""
        wanted = {key for each in self.leases.values() for key in each.loading}
        loading = {move.key for move in self.moves if move.target == HOST} - wanted
        if loading:
            key = self.rng.choice(sorted(loading))
            steps = steps_to(key)
            path = path_of([*steps, *self.rng.choices(b"ab", k=DEPTH - len(steps))])
            self.seen["read past a load that nobody waits for"] += 1
            self._read_path(path, self.rng.choice([0, len(steps) - 1]))

    def _read_path(self, path: list[BlockKey], first: int) -> None:
        held = path[first : first + self.ledger.match(path[first:]).blocks]
        alone = {key: self.ledger.match([key]).by_tier for key in held}
        assert all(1 in by_tier for by_tier in alone.values()), "held in a path, but not alone"
        warmest = {key: by_tier.index(1) for key, by_tier in alone.items()}
        loading = {move.key: move.source for move in self.moves if move.target == HOST}
        worth = self.rng.choice([None, None, self._worth])
        lease = self.ledger.read(self.rng.randrange(CLIENTS), path, first, worth, self._use())
        self.leases[lease.id] = lease
        assert lease.keys == held[: len(lease.keys)]
        self.carry_out()
        for key, source in zip(lease.keys, lease.sources, strict=True):
            expected = loading.get(key, warmest[key])
            assert source == expected or key not in self.announced[expected]
        self.seen["read waits"] += bool(lease.loading)
        self.seen["read shares a load"] += bool({*loading} & lease.loading)
        moving = {move.key for move in self.moves if move.source != HOST != move.target}
        missed = held[len(lease.keys) :]
        if missed and missed[0] in moving:
            full = self.ledger.usage()[HOST].blocks + self.ledger.credited == self.ledger.slots
            assert lease.refused or full, "cut by a copy between two lower tiers"

    def _worth(self, sources: Sequence[int], _first: int) -> int:
        """How many blocks somebody wants to load: any number."""
        self.seen["load declined"] += 1
        return self.rng.randint(0, len(sources))

    def _end_lease(self) -> None:
        if not self.leases:
            return
        lease = self.leases.pop(self.rng.choice([*self.leases]))
        self.settled.pop(lease.id, None)
        if not lease.writing or self.rng.random() < 0.2:
            self.seen["write abandoned"] += lease.writing
            self.ledger.release(lease.id)
            return
        granted = len(lease.keys)
        filled = self.rng.randint(0, granted) if self.rng.random() < 0.2 else None
        done = granted if filled is None else filled
        for key, slot in zip(lease.keys[:done], lease.slots[:done], strict=True):
            assert self.arena[slot] is None, "a slot was filled by somebody else"
            self.arena[slot] = key
        self.ledger.commit(lease.id, filled)
        self.carry_out()
        self.check_cascade()
        self.seen["partial commit" if done < granted else "commit"] += 1

    def _settle(self) -> None:
        waiting = [each for each in self.leases.values() if each.loading]
        if waiting:
            self.ledger.settle(self.rng.choice(waiting).id)
            self.seen["read cut by settle"] += 1

    def _die(self) -> None:
        client = self.rng.randrange(CLIENTS)
        mine = [each.id for each in self.leases.values() if each.client == client]
        for lease_id in mine:
            del self.leases[lease_id]
            self.settled.pop(lease_id, None)
        assert self.ledger.disconnect(client) == len(mine)
        self.seen["client died"] += bool(mine)
        self.seen["credit ended"] += bool(self.credits.pop(client, ()))

    def _find(self) -> None:
        """A store turns out to hold more: others wrote it, or this node did in another life."""
        tier = self.rng.randrange(1, len(self.specs))
        held = {}
        for key in self.path():
            if key not in self.stores[tier].frames and not self.is_coming(key, tier):
                held[key] = self.rng.randint(1, 15)
        self.stores[tier].frames.update(held)
        self.ledger.found(tier, held.items())
        self.seen["found"] += bool(held)

    def _rot(self) -> None:
        """A stored frame goes bad, and nobody is told."""
        store = self.stores[self.rng.randrange(1, len(self.specs))]
        store.rotten.update(self.rng.sample([*store.frames], min(1, len(store.frames))))

    def _lose(self) -> None:
        """A store says that some frames are gone."""
        tier = self.rng.randrange(1, len(self.specs))
        going = self.path()
        reading = {move.key for move in self.moves if move.source == tier}
        for key in {*going} - reading:
            self.seen["lost"] += key in self.stores[tier].frames
            self.stores[tier].forget(key)
        self.ledger.lost(tier, going)

    def _pause(self) -> None:
        self.ledger.pause(self.rng.randrange(1, len(self.specs)))
        self.seen["paused"] += 1

    def _resume(self) -> None:
        tier = self.rng.randrange(1, len(self.specs))
        self.seen["resumed"] += self.ledger.paused(tier)
        self.ledger.resume(tier)

    def _end_move(self) -> None:
        if self.moves:
            move = self.moves.pop(self.rng.randrange(len(self.moves)))
            self.end(move, failed=self.rng.random() < self.failing)

    def _clear(self) -> None:
        tier = self.rng.randrange(len(self.specs))
        self.clearing = True
        self.seen["cleared"] += bool(self.ledger.clear(tier))
        if self.specs[tier].shared:
            self.announced[tier] &= {move.key for move in self.moves}
        self.carry_out()
        self.clearing = False

    def _be_quiet(self) -> None:
        """Everything answers, and all that was started ends: then nothing waits."""
        while self.abandoned:
            self.come_late()
        for _ in range(2):  # what failed is tried again by the second resume
            for tier in range(1, len(self.specs)):
                self.ledger.resume(tier)
            self.carry_out()
            for _ in range(200):
                if not self.moves:
                    break
                self.end(self.moves.pop(0), failed=False)
        assert not self.moves, "blocks move in a circle"
        assert all(each.writing or each.id in self.settled for each in self.leases.values())
        for tier, spec in enumerate(self.specs[:-1]):
            undrained = [
                self.stores[tier].frames[key] if tier != HOST else BLOCK_NBYTES
                for key in self.announced[tier]
                if not any(key in held for held in self.announced[tier + 1 :])
                and not (tier == HOST and key in self.held_back())
            ]
            assert sum(undrained) <= spec.drain_at or self._is_full(tier + 1)
        self.seen["quiet"] += 1

    def _is_full(self, tier: int) -> bool:
        used = self.ledger.usage()[tier].nbytes
        return used + MAX_FRAME_NBYTES > self.specs[tier].capacity

    def finish(self) -> None:
        """At the end everybody leaves, everything is drained, and every slot can be had again."""
        for client in range(CLIENTS):
            self.ledger.disconnect(client)
        self.leases.clear()
        self.settled.clear()
        self.credits.clear()
        self.ledger.drain_all(on=True)
        self._be_quiet()
        self.check()
        last = len(self.specs) - 1
        full = any(self._is_full(tier) for tier in range(1, last + 1))
        assert self.ledger.undrained() == 0 or full
        self.seen["drained"] += last > 0 and self.ledger.undrained() == 0
        if self.ledger.undrained() == 0:
            granted = self.ledger.write(0, path_of(b"z" * self.ledger.slots))
            assert len(granted.slots) == self.ledger.slots, "slots were lost"
