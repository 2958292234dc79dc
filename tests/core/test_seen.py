"""Blocks that are copied without a lease, from where a match saw them."""

from random import Random

import pytest

from kvtier.core.blocks import Slot
from kvtier.core.ledger import HOST, Ledger, Match
from kvtier.core.phd import PHD
from kvtier.core.policy import LRU, PolicyFactory, Use
from kvtier.core.slot_index import SlotIndex
from kvtier.core.tiers import Tier, TierSpec
from tests.core.driver import NBYTES, Node, host_only, lowered, prompt, with_disk


def unmoved(node: Node, seen: Match) -> list[bool]:
    """Of each block that was seen, whether it is known to have stayed."""
    return [node.ledger.index.left[slot] <= seen.turn for slot in seen.slots]


def test_what_was_seen_and_stays_is_right() -> None:
    node = host_only(8)
    node.save(prompt("abc"))
    seen = node.ledger.match(prompt("abcd"))
    assert len({*seen.slots}) == seen.blocks == 3
    node.save(prompt("xy"))
    node.touch(prompt("abc"))
    node.ledger.credit(2, 2)
    assert unmoved(node, seen) == [True] * 3
    assert node.ledger.match(prompt("abc")) == seen


def test_what_left_its_slot_is_known_to_have_before_anybody_has_the_slot() -> None:
    node = host_only(3)
    node.save(prompt("abc"))
    seen = node.ledger.match(prompt("abc"))
    node.ledger.clear(HOST)
    assert unmoved(node, seen) == [False] * 3


def test_the_same_block_in_the_same_slot_again_is_not_what_was_seen() -> None:
    """Whoever copied it meanwhile may have copied half of something else."""
    node = host_only(2)
    node.save(prompt("ab"))
    seen = node.ledger.match(prompt("ab"))
    node.save(prompt("xy"))
    node.ledger.clear(HOST)
    node.save(prompt("ab"))
    again = node.ledger.match(prompt("ab"))
    assert again.slots == seen.slots
    assert unmoved(node, seen) == [False, False]
    assert unmoved(node, again) == [True, True]


def test_a_block_that_loads_into_the_slot_where_it_was_seen_is_not_what_was_seen() -> None:
    node = with_disk(host=2, disk=8)
    lowered(node, prompt("ab"))
    node.touch(prompt("ab"))
    node.rest()
    seen = node.ledger.match(prompt("ab"))
    assert seen.by_tier[HOST] == 2
    node.ledger.clear(HOST)
    lease = node.ledger.read(1, prompt("ab"))
    assert {*lease.slots} == {*seen.slots}
    assert unmoved(node, seen) == [False, False]
    assert node.ledger.match(prompt("ab")).slots == [], "they are on their way"
    node.effects()
    node.rest()
    assert unmoved(node, seen) == [False, False]


def test_only_what_lies_in_the_host_tier_is_seen_anywhere() -> None:
    node = with_disk(host=4, disk=8)
    lowered(node, prompt("abcd"))
    assert node.ledger.match(prompt("abcd"))[:3] == (4, (0, 4), [])


def test_what_leaves_is_written_where_clients_can_see_it() -> None:
    memory = memoryview(bytearray(SlotIndex.nbytes(3)))
    tiers = [TierSpec(tier=Tier.HOST, capacity=3 * NBYTES, drain_at=0)]
    ledger, theirs = Ledger(NBYTES, tiers, SlotIndex(3, memory)), SlotIndex(3, memory)
    ledger.commit(ledger.write(1, prompt("ab")).id)
    seen = ledger.match(prompt("ab"))
    assert theirs.find(prompt("ab")) == (seen.slots, seen.turn)
    assert theirs.unmoved(seen.slots, seen.turn) == 2
    ledger.clear(HOST)
    assert theirs.unmoved(seen.slots, seen.turn) == 0
    assert theirs.find(prompt("ab"))[0] == []
    (other,) = {0, 1, 2}.difference(seen.slots)
    assert theirs.unmoved([Slot(other)], seen.turn) == 1


def test_what_is_read_is_found_from_then_on() -> None:
    node, path = host_only(8), prompt("abcdefgh")
    node.save(path)
    index = node.ledger.index
    index._hints[:] = memoryview(bytes(index._hints.nbytes)).cast("I")
    assert index.find(path)[0] == []
    node.touch(path)
    assert len(index.find(path)[0]) == 8


@pytest.mark.parametrize("policy", [LRU, PHD])
def test_using_is_reading_and_releasing(policy: PolicyFactory) -> None:
    """Of as many blocks, the same are held, whichever way they are read."""
    size = 60 * NBYTES
    tier = TierSpec(tier=Tier.HOST, capacity=size, drain_at=size, policy=policy)
    leased, seen = Ledger(NBYTES, [tier]), Ledger(NBYTES, [tier])
    rng, hits = Random(5), 0
    for request in range(1, 400):
        name = f"{rng.choice('abcdefgh')}{rng.choice('ijkl')}{rng.choice('mnop')}"
        path = prompt(name, rng.randint(3, 12))
        use = Use(request * 7.0, request)
        hits += seen.match(path).blocks
        leased.release(leased.read(1, path, use=use).id)
        seen.used(path, use)
        for ledger in (leased, seen):
            ledger.commit(ledger.write(1, path, use=use).id)
            ledger.check()
        assert {*leased.held()[HOST]} == {*seen.held()[HOST]}
    assert hits > 100
    assert seen.usage()[HOST].blocks > 60 - 12, "it was full"
