"""The ledger driven by Hypothesis, which looks for the shortest way to break it."""

from collections import Counter
from random import Random

import hypothesis.strategies as st
from hypothesis import event, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvtier.core.admission import SecondUse
from kvtier.core.ledger import HOST, Ledger
from kvtier.core.phd import PHD
from kvtier.core.policy import LRU, Use
from kvtier.core.tiers import Tier, TierSpec
from kvtier.testing.keys import path_of
from kvtier.testing.seen import SeenWorld
from kvtier.testing.world import BLOCK_NBYTES

PROMPTS = [path_of(name * 4) for name in (b"a", b"b", b"c")]
paths = st.builds(lambda prompt, n: prompt[:n], st.sampled_from(PROMPTS), st.integers(1, 4))
requests = st.one_of(st.none(), st.integers(1, 3))
clients = st.integers(0, 2)
picks = st.integers(0, 99)
LOWER = {
    "host only": [],
    "disk": [(Tier.DISK, 4)],
    "shared": [(Tier.SHARED, 4)],
    "disk and shared": [(Tier.DISK, 4), (Tier.SHARED, 6)],
}


class NodeMachine(RuleBasedStateMachine):
    """One node, its clients and its stores, as `World` models them."""

    @initialize(
        lower=st.sampled_from([*LOWER]),
        drain_at=st.integers(0, 4),
        queue=st.integers(1, 3),
        policy=st.sampled_from([LRU, PHD]),
        admission=st.sampled_from([None, lambda: SecondUse(8)]),
    )
    def start(self, lower, drain_at, queue, policy, admission):
        specs = [
            TierSpec(
                tier=tier, capacity=blocks * BLOCK_NBYTES, drain_at=drain_at * BLOCK_NBYTES,
                queue=queue, policy=policy, admission=admission,
            )
            for tier, blocks in [(Tier.HOST, 4), *LOWER[lower]]
        ]  # fmt: skip
        self.world = SeenWorld(Ledger(BLOCK_NBYTES, specs), specs, Random(0), Counter())

    def lower_tier(self, pick: int) -> int:
        return 1 + pick % (len(self.world.specs) - 1)

    @rule(client=clients, path=paths, request=requests)
    def read(self, client, path, request):
        lease = self.world.ledger.read(client, path, use=Use(request=request))
        self.world.leases[lease.id] = lease
        self.world.carry_out()
        event(f"read waits: {bool(lease.loading)}")

    @rule(client=clients, path=paths, request=requests)
    def write(self, client, path, request):
        lease = self.world.ledger.write(client, path, use=Use(request=request))
        self.world.leases[lease.id] = lease
        self.world.carry_out()
        for key, slot in zip(lease.keys, lease.slots, strict=True):
            self.world.claim(slot, key, lease)

    @rule(client=clients, wanted=st.integers(1, 3))
    def credit(self, client, wanted):
        self.world.credit(client, wanted)

    @rule(client=clients, path=paths, blocks=st.integers(1, 4), request=requests)
    def put(self, client, path, blocks, request):
        self.world.put(client, path, blocks, Use(request=request))

    @rule(path=paths)
    def look(self, path):
        self.world.look(path)

    @rule(request=requests)
    def copied(self, request):
        self.world.copied(Use(request=request))

    @precondition(lambda self: self.world.leases)
    @rule(pick=picks, filled=st.integers(0, 4))
    def end_lease(self, pick, filled):
        world = self.world
        lease = world.leases.pop([*world.leases][pick % len(world.leases)])
        world.settled.pop(lease.id, None)
        if lease.writing:
            filled = min(filled, len(lease.keys))
            world.arena.update(zip(lease.slots[:filled], lease.keys[:filled], strict=True))
            world.ledger.commit(lease.id, filled)
        else:
            world.ledger.release(lease.id)
        world.carry_out()

    @precondition(lambda self: self.world.moves)
    @rule(pick=picks, failed=st.booleans())
    def end_move(self, pick, failed):
        world = self.world
        world.end(world.moves.pop(pick % len(world.moves)), failed=failed)

    @rule()
    def end_all_moves(self):
        for _ in range(100):
            if not self.world.moves:
                return
            self.world.end(self.world.moves.pop(0), failed=False)
        raise AssertionError("blocks move in a circle")

    @precondition(lambda self: any(lease.loading for lease in self.world.leases.values()))
    @rule(pick=picks)
    def settle(self, pick):
        waiting = [lease.id for lease in self.world.leases.values() if lease.loading]
        self.world.ledger.settle(waiting[pick % len(waiting)])
        self.world.carry_out()

    @rule(client=clients)
    def die(self, client):
        world = self.world
        mine = {lease.id for lease in world.leases.values() if lease.client == client}
        world.leases = {n: lease for n, lease in world.leases.items() if n not in mine}
        world.settled = {n: keys for n, keys in world.settled.items() if n not in mine}
        assert world.ledger.disconnect(client) == len(mine)
        world.credits.pop(client, None)
        world.carry_out()

    @precondition(lambda self: len(self.world.specs) > 1)
    @rule(pick=picks, pause=st.booleans())
    def pause_or_resume(self, pick, pause):
        ledger = self.world.ledger
        (ledger.pause if pause else ledger.resume)(self.lower_tier(pick))
        self.world.carry_out()

    @precondition(lambda self: len(self.world.specs) > 1)
    @rule(pick=picks, path=paths)
    def find(self, pick, path):
        world, tier = self.world, self.lower_tier(pick)
        frames = world.stores[tier].frames
        new = [key for key in path if key not in frames and not world.is_coming(key, tier)]
        frames.update((key, world.frame_nbytes(key)) for key in new)
        world.ledger.found(tier, [(key, frames[key]) for key in new])
        world.carry_out()

    @precondition(lambda self: len(self.world.specs) > 1)
    @rule(pick=picks, path=paths)
    def lose(self, pick, path):
        world, tier = self.world, self.lower_tier(pick)
        reading = {move.key for move in world.moves if move.source == tier}
        for key in {*path} - reading:
            world.stores[tier].forget(key)
        world.ledger.lost(tier, path)
        world.carry_out()

    @rule(path=paths)
    def match(self, path):
        before = self.world.ledger.match(path)
        self.world.check_match(path[0])
        assert self.world.ledger.match(path) == before
        assert before.blocks <= len(path)

    @invariant()
    def all_agree(self):
        self.world.check()
        usage = self.world.ledger.usage()[HOST]
        assert usage.blocks <= self.world.ledger.slots


TestNode = NodeMachine.TestCase
TestNode.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
