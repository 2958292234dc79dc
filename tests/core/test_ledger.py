"""Leases: what the ledger grants, to whom, and for how long."""

import sys
from collections.abc import Sequence
from dataclasses import replace

import pytest

from kvtier.core.blocks import BlockKey
from kvtier.core.cascade import LOOK
from kvtier.core.ledger import (
    HOST,
    Effect,
    Forget,
    Gone,
    Held,
    Ledger,
    Move,
    Settled,
    TierUsage,
)
from kvtier.core.policy import LRU, NO_USE, Use
from kvtier.core.tiers import Tier, TierSpec
from kvtier.testing.keys import path_of
from tests.core.driver import (
    DISK,
    NBYTES,
    Node,
    host_only,
    lowered,
    prompt,
    spec,
    three_tiers,
    with_disk,
)

SHARED = 2

# --- set up -------------------------------------------------------------------------------


def test_slots_are_as_many_as_whole_blocks_fit():
    ledger = Ledger(NBYTES, [TierSpec(tier=Tier.HOST, capacity=399, drain_at=0)])
    assert ledger.slots == 3


@pytest.mark.parametrize(
    "tiers",
    [
        [],
        [spec(Tier.DISK, 1)],
        [spec(Tier.VRAM, 1), spec(Tier.HOST, 1)],
        [spec(Tier.HOST, 1), spec(Tier.HOST, 1)],
        [spec(Tier.HOST, 1), spec(Tier.SHARED, 1), spec(Tier.DISK, 1)],
    ],
)
def test_tiers_out_of_order_are_refused(tiers):
    with pytest.raises(ValueError, match="must be host, then disk, shared, or both"):
        Ledger(NBYTES, tiers)


@pytest.mark.parametrize("nbytes", [0, 101])
def test_a_block_that_does_not_fit_is_refused(nbytes):
    with pytest.raises(ValueError, match=f"a block of {nbytes} bytes"):
        Ledger(nbytes, [spec(Tier.HOST, 5), spec(Tier.DISK, 1)])


@pytest.mark.parametrize("tier", [-1, 0, 2])
@pytest.mark.parametrize("ask", ["pause", "resume", "found", "lost"])
def test_what_only_a_lower_tier_can_do_is_refused_elsewhere(ask, tier):
    method = getattr(with_disk(1, 1).ledger, ask)
    with pytest.raises(ValueError, match=f"tier {tier} is no lower tier"):
        method(*([tier] if ask in ("pause", "resume") else [tier, []]))


# --- write, commit, match -----------------------------------------------------------------


def test_a_block_can_be_read_once_it_is_committed_and_not_before():
    node = host_only(4)
    lease = node.ledger.write(1, prompt("abc"))
    assert lease.keys == prompt("abc")
    assert lease.indexes == [0, 1, 2]
    assert len(set(lease.slots)) == 3
    assert node.held(prompt("abc")) == (0,)
    assert node.effects() == []
    node.ledger.commit(lease.id)
    assert node.effects() == [Held((key,), HOST) for key in prompt("abc")]
    assert node.held(prompt("abcd")) == (3,)
    assert node.ledger.leases == 0


def test_a_match_ends_at_the_first_gap():
    node = host_only(4)
    node.save(prompt("abc"))
    lease = node.ledger.write(1, prompt("x"))
    assert node.held([*prompt("a"), *prompt("x"), *prompt("abc")[1:]]) == (1,)
    node.ledger.release(lease.id)
    assert node.held([*prompt("ab"), *prompt("x"), prompt("abc")[2]]) == (2,)


def test_a_write_is_granted_only_what_nobody_has_or_fills():
    node = host_only(8)
    node.save(prompt("ab"))
    first = node.ledger.write(1, prompt("abc"))
    second = node.ledger.write(2, prompt("abcde"))
    assert (first.keys, first.indexes) == ([prompt("abc")[2]], [2])
    assert (second.keys, second.indexes) == (prompt("abcde")[3:], [3, 4])


def test_a_partial_commit_keeps_what_was_filled_and_frees_the_rest():
    node = host_only(3)
    lease = node.ledger.write(1, prompt("abc"))
    node.ledger.commit(lease.id, 1)
    assert node.effects() == [Held((prompt("a")[0],), HOST)]
    assert node.held(prompt("abc")) == (1,)
    assert node.save(prompt("xy")) == 2


def test_an_abandoned_write_leaves_nothing():
    node = host_only(3)
    node.ledger.release(node.ledger.write(1, prompt("abc")).id)
    assert node.ledger.usage() == [TierUsage(0, 0)]
    assert node.save(prompt("xyz")) == 3


def test_a_commit_that_cannot_be_is_refused_and_changes_nothing():
    node = host_only(3)
    write, read = node.ledger.write(1, prompt("ab")), node.ledger.read(1, prompt("ab"))
    for filled in (-1, 3):
        with pytest.raises(ValueError, match=f"has 2 blocks, so {filled} are not filled"):
            node.ledger.commit(write.id, filled)
    with pytest.raises(ValueError, match="is a read lease"):
        node.ledger.commit(read.id)
    node.ledger.commit(write.id)
    assert node.held(prompt("ab")) == (2,)


@pytest.mark.parametrize("end", ["commit", "release", "settle"])
def test_a_lease_ends_once(end):
    node = host_only(3)
    lease = node.ledger.write(1, prompt("ab"))
    node.ledger.release(lease.id)
    with pytest.raises(KeyError):
        getattr(node.ledger, end)(lease.id)


def test_a_full_host_tier_gives_up_the_coldest_prompt_from_its_deep_end():
    node = host_only(4)
    node.save(prompt("ab"))
    node.save(prompt("xy"))
    node.touch(prompt("ab"))
    node.ledger.commit(node.ledger.write(1, prompt("n")).id)
    assert Gone((prompt("xy")[1],), HOST) in node.effects()
    assert node.held(prompt("xy")) == (1,)
    assert node.held(prompt("ab")) == (2,)


def test_a_deep_block_never_takes_the_slot_of_the_one_before_it():
    node = host_only(3)
    node.save(prompt("ab"))
    lease = node.ledger.write(1, prompt("abcde"))
    assert lease.indexes == [2]
    node.ledger.commit(lease.id)
    assert node.held(prompt("abcde")) == (3,)


def test_a_write_makes_what_is_held_of_its_prompt_warm():
    node = host_only(4)
    node.save(prompt("ab"))
    node.save(prompt("xy"))
    node.ledger.release(node.ledger.write(1, prompt("ab")).id)
    node.save(prompt("n"))
    assert node.held(prompt("ab")) == (2,)
    assert node.held(prompt("xy")) == (1,)


def test_leased_blocks_stay():
    node = host_only(2)
    node.save(prompt("ab"))
    lease = node.ledger.read(1, prompt("ab"))
    assert node.save(prompt("x")) == 0
    node.ledger.release(lease.id)
    assert node.save(prompt("x")) == 1


# --- read ---------------------------------------------------------------------------------


def test_a_read_of_what_is_in_host_is_settled_at_once():
    node = host_only(4)
    node.save(prompt("ab"))
    lease = node.ledger.read(1, prompt("abc"))
    assert (lease.keys, lease.sources, lease.loading) == (prompt("ab"), [HOST, HOST], set())
    assert node.effects() == [Settled(lease.id)]


def test_a_read_of_nothing_is_settled_too():
    node = host_only(4)
    lease = node.ledger.read(1, prompt("a"))
    assert (lease.keys, lease.slots) == ([], [])
    assert node.effects() == [Settled(lease.id)]


def test_a_read_loads_what_lies_lower_and_the_lower_copy_stays():
    node = with_disk(host=4, disk=8)
    lowered(node, prompt("ab"))
    lease = node.ledger.read(1, prompt("ab"))
    assert node.effects() == [
        Move(key, DISK, HOST, slot) for key, slot in zip(lease.keys, lease.slots, strict=True)
    ]
    assert lease.sources == [DISK, DISK]
    assert node.held(prompt("ab")) == (0, 2)
    assert node.end_moves() == [
        Held((prompt("ab")[0],), HOST), Held((prompt("ab")[1],), HOST), Settled(lease.id),
    ]  # fmt: skip
    assert [usage.blocks for usage in node.ledger.usage()] == [2, 2]
    assert node.ledger.undrained() == 0


def test_loaded_blocks_are_as_warm_as_one_prompt():
    node = with_disk(host=3, disk=8)
    lowered(node, prompt("abc"))
    node.touch(prompt("abc"))
    lease = node.ledger.read(1, prompt("abc"))
    node.rest()  # the root arrives first
    node.ledger.release(lease.id)
    node.save(prompt("n"))
    assert node.held(prompt("abc")) == (2, 1)
    assert node.held(prompt("ab")) == (2, 0)


def test_two_readers_share_one_load():
    node = with_disk(host=4, disk=8)
    lowered(node, prompt("a"))
    first, second = (node.ledger.read(client, prompt("a")) for client in (1, 2))
    assert first.slots == second.slots
    node.effects()
    assert len(node.moves) == 1
    assert {*node.end_moves()} == {
        Held((prompt("a")[0],), HOST), Settled(first.id), Settled(second.id),
    }  # fmt: skip


def test_a_failed_load_cuts_the_lease_and_the_copy_is_gone():
    node = with_disk(host=4, disk=8)
    lowered(node, prompt("abc"))
    lease = node.ledger.read(1, prompt("abc"))
    node.effects()
    b = prompt("ab")[1]
    moves = {move.key: move for move in node.moves}
    node.ledger.moved(moves[b], False)
    assert node.effects() == [Forget(b, DISK), Gone((b,), DISK)]
    assert lease.keys == prompt("a")
    node.ledger.moved(moves[prompt("a")[0]], True)
    assert node.effects() == [Held((prompt("a")[0],), HOST), Settled(lease.id)]
    node.ledger.moved(moves[prompt("abc")[2]], True)  # nobody waits for it, but it has arrived
    node.effects()
    assert node.held(prompt("abc")) == (1, 0)


def test_after_a_failed_load_the_next_read_gets_the_block_from_a_lower_tier():
    node = three_tiers()
    lowered(node, prompt("a"))
    first = node.ledger.read(1, prompt("a"))
    node.effects()
    node.end_moves(ok=False)
    assert first.keys == []
    second = node.ledger.read(1, prompt("a"))
    assert second.sources == [2]
    node.effects()
    assert Settled(second.id) in node.end_moves()


def test_settling_cuts_a_lease_to_what_is_in_its_slots():
    node = with_disk(host=4, disk=8)
    lowered(node, prompt("abc"))
    lease = node.ledger.read(1, prompt("abc"))
    node.effects()
    node.ledger.moved(node.moves.pop(0), True)  # a
    node.ledger.moved(node.moves.pop(1), True)  # c
    node.effects()
    node.ledger.settle(lease.id)
    assert node.effects() == [Settled(lease.id)]
    assert lease.keys == prompt("a")
    node.ledger.settle(lease.id)
    assert node.effects() == []
    node.rest()
    assert node.held(prompt("abc")) == (3, 0)  # the load went on for the next reader


def test_a_prompt_longer_than_the_host_tier_is_read_as_far_as_it_fits():
    node = with_disk(host=2, disk=8)
    node.save(prompt("ab"))
    node.rest()
    node.save(prompt("abcd"))
    node.rest()
    assert node.ledger.match(prompt("abcd")).blocks == 4
    lease = node.ledger.read(1, prompt("abcd"))
    assert lease.keys == prompt("ab")


def test_the_beginning_of_a_prompt_takes_the_slots_of_its_end():
    """Only the root lies lower, and the rest fills the host tier: it must not stay out for ever."""
    node = with_disk(host=2, disk=8)
    node.save(prompt("ab"))
    node.rest()
    node.ledger.clear(HOST)
    held = node.ledger.read(2, prompt("a"))
    node.effects()
    node.rest()
    node.save(prompt("abc"))  # b is on disk, so c takes the other slot
    node.rest()
    node.ledger.release(held.id)
    assert node.held(prompt("abc")) == (2, 1)
    lease = node.ledger.read(1, prompt("abc"))
    assert lease.keys == prompt("ab")
    node.effects()
    assert Settled(lease.id) in node.end_moves()


def being_shared(path: list[BlockKey]) -> Node:
    """`path` lies on disk, as after a restart, and all of it is on its way to the shared store."""
    node = Node(spec(Tier.HOST, 4, 4), spec(Tier.DISK, 8, 8), spec(Tier.SHARED, 8))
    node.ledger.found(DISK, [(key, NBYTES) for key in path])
    node.ledger.drain_all(on=True)
    node.effects()
    assert [move[1:3] for move in node.moves] == [(DISK, SHARED)] * len(path)
    return node


def ended(node: Node, target: int, *, ok: bool = True) -> list[Effect]:
    """End the one move into `target`."""
    (move,) = (each for each in node.moves if each.target == target)
    node.moves.remove(move)
    node.ledger.moved(move, ok, NBYTES)
    return node.effects()


@pytest.mark.parametrize("first", [HOST, SHARED])
def test_a_block_on_its_way_between_two_lower_tiers_is_read_beside_it(first: int):
    """Whichever ends first: both only read the copy that they share."""
    path = prompt("a")
    node = being_shared(path)
    lease = node.ledger.read(1, path)
    assert (lease.keys, lease.sources) == (path, [DISK])
    node.effects()
    ended(node, first)
    assert (Settled(lease.id) in ended(node, SHARED - first)) == (first == SHARED)
    node.ledger.release(lease.id)
    node.effects()
    assert [key for tier in node.ledger.held() for key in tier] == path * 3


def test_what_is_read_and_copied_at_once_makes_no_room_until_both_have_ended():
    path = prompt("a")
    for first in (HOST, SHARED):
        node = Node(spec(Tier.HOST, 4, 4), spec(Tier.DISK, 1), spec(Tier.SHARED, 8))
        node.ledger.found(DISK, [(path[0], NBYTES)])
        node.effects()
        node.ledger.release(node.ledger.read(1, path).id)
        node.effects()
        ended(node, first)
        node.ledger.found(DISK, [(prompt("x")[0], NBYTES)])  # would take its place
        assert Forget(prompt("x")[0], DISK) in node.effects()
        assert node.ledger.clear(DISK) == 0
        ended(node, SHARED - first)
        node.ledger.found(DISK, [(prompt("x")[0], NBYTES)])
        assert Gone((path[0],), DISK) in node.effects()


@pytest.mark.parametrize("copied", [True, False])
def test_a_copy_that_a_load_found_bad_is_given_up_once_nobody_reads_it(copied: bool):
    path = prompt("a")
    node = being_shared(path)
    lease = node.ledger.read(1, path)
    node.effects()
    ended(node, HOST, ok=False)
    assert (lease.keys, node.held(path)) == ([], (0, 0, 0)), "from now on it is a miss"
    again = node.ledger.write(1, path)
    assert again.keys == path, "and may be computed again"
    effects = ended(node, SHARED, ok=copied)
    assert {Forget(path[0], DISK), Gone((path[0],), DISK)} <= {*effects}
    node.ledger.commit(again.id)
    node.effects()
    node.rest()
    assert [node.ledger.held()[tier] for tier in (HOST, SHARED)] == [path, path]


def test_a_load_from_a_paused_tier_that_fails_beside_a_copy_says_nothing_about_it():
    path = prompt("a")
    node = being_shared(path)
    lease = node.ledger.read(1, path)
    node.effects()
    node.ledger.pause(DISK)
    ended(node, HOST, ok=False)
    ended(node, SHARED, ok=False)
    node.ledger.resume(DISK)
    assert lease.keys == []
    assert node.held(path) == (0, 1, 0)


def test_what_the_engine_has_already_is_not_read_but_becomes_warm():
    node = host_only(4)
    node.save(prompt("ab"))
    node.save(prompt("xy"))
    lease = node.ledger.read(1, prompt("abc"), first=1)
    assert lease.keys == [prompt("ab")[1]]
    node.ledger.release(lease.id)
    node.save(prompt("n"))
    assert node.held(prompt("ab")) == (2,)


def test_what_the_engine_does_not_give_is_not_granted():
    node = host_only(4)
    lease = node.ledger.write(1, prompt("abcd"), first=2)
    assert (lease.indexes, lease.keys) == ([2, 3], prompt("abcd")[2:])


# --- slots, clients and moves -------------------------------------------------------------


def test_a_client_that_dies_leaves_its_slots_once_nothing_moves_in_them():
    node = with_disk(host=1, disk=8)
    lowered(node, prompt("a"))
    node.ledger.read(7, prompt("a"))
    node.effects()
    assert node.ledger.disconnect(7) == 1
    assert node.save(prompt("x")) == 0  # the load still fills the slot
    node.rest()
    assert node.save(prompt("x")) == 1


def test_a_copy_keeps_its_slot_after_the_client_is_gone():
    node = with_disk(host=1, disk=8)
    node.save(prompt("a"), client=7)
    assert node.ledger.disconnect(7) == 0
    assert node.save(prompt("x")) == 0
    node.rest()
    assert node.save(prompt("x")) == 1


def test_only_the_leases_of_the_client_that_is_gone_end():
    node = host_only(8)
    node.save(prompt("ab"))
    for client in (7, 7, 8):
        node.ledger.read(client, prompt("ab"))
    node.ledger.write(7, prompt("xy"))
    assert node.ledger.disconnect(7) == 3
    assert node.ledger.disconnect(7) == 0
    assert node.ledger.leases == 1
    assert node.ledger.usage() == [TierUsage(2, 200)]


def test_a_frame_of_unknown_size_counts_as_a_whole_block():
    node = with_disk(host=4, disk=8)
    node.save(prompt("a"))
    node.ledger.moved(node.moves[0], True)
    assert node.ledger.usage()[DISK] == TierUsage(1, NBYTES)


def test_a_move_is_reported_once():
    node = with_disk(host=4, disk=8)
    node.save(prompt("a"))
    move = node.moves[0]
    node.ledger.moved(move, True)
    with pytest.raises(AssertionError):
        node.ledger.moved(move, True)


def test_what_a_read_could_not_take_is_not_held():
    """There is no slot for the root, so the read ends before the block in host."""
    node = Node(spec(Tier.HOST, 1, 1), spec(Tier.DISK, 8, 8))
    lowered(node, prompt("a"))
    node.save(prompt("b"))
    other = node.ledger.read(2, prompt("b"))
    lease = node.ledger.read(1, [prompt("a")[0], prompt("b")[0]])
    assert (lease.keys, other.keys) == ([], prompt("b"))
    node.ledger.release(other.id)
    node.effects()
    node.rest()
    assert node.ledger.clear(HOST) == 1


def test_a_key_that_a_client_names_twice_is_granted_once():
    node = with_disk(host=4, disk=8)
    a = prompt("a")[0]
    assert node.ledger.write(1, [a, a]).indexes == [0]
    node.ledger.disconnect(1)
    lowered(node, [a])
    lease = node.ledger.read(1, [a, a])
    assert lease.keys == [a]
    node.effects()
    node.rest()
    node.ledger.release(lease.id)
    node.effects()
    assert node.save(prompt("wxyz")) == 4


def test_when_room_for_a_block_costs_its_last_copy_it_is_a_miss():
    """Both x must be copied down before they can go, and the disk has room for two blocks."""
    node = with_disk(host=3, disk=2, drain_at=3)
    y, a = prompt("y")[0], prompt("a")[0]
    node.ledger.found(DISK, [(y, NBYTES)])
    node.save(prompt("w"))
    node.save(prompt("x"))
    node.touch([y])
    node.rest()
    node.ledger.found(DISK, [(a, NBYTES)])
    node.effects()
    lease = node.ledger.read(1, [a])
    assert node.effects()[-1] == Settled(lease.id)
    assert lease.keys == []
    assert {move.key for move in node.moves} == {*prompt("w"), *prompt("x")}
    assert node.save(prompt("z")) == 1  # the slot that was made free is not lost


# --- bounds -------------------------------------------------------------------------------


class CountingLRU(LRU):
    """Counts the candidates that were looked at."""

    looked = 0

    def coldest(self, keep=None):
        for key in super().coldest(keep):
            CountingLRU.looked += 1
            yield key


def test_a_disk_full_of_what_stays_in_host_memory_does_not_stop_saves():
    hot = prompt("a", 4)
    node = with_disk(host=4 * LOOK, disk=4)
    node.save(hot)
    node.rest()
    for path in [prompt(name, 2 * LOOK) for name in "bcdefg"]:
        tries = 0
        while sum(node.held(path)) < len(path):
            tries += 1
            assert tries < 100, "nothing will ever change"
            node.touch(hot)  # always the warmest
            node.save(path)
            node.rest()
        assert node.held(hot) == (4, 0)


def test_a_search_for_room_looks_at_a_bounded_number_of_candidates():
    host = replace(spec(Tier.HOST, 4 * LOOK), policy=CountingLRU)
    ledger = Ledger(NBYTES, [host, spec(Tier.DISK, 8 * LOOK)])
    for n in range(4 * LOOK):
        ledger.commit(ledger.write(1, [BlockKey(n.to_bytes(16))]).id)
    CountingLRU.looked = 0
    assert ledger.write(1, prompt("x")).keys == []  # copies are under way, nothing may go
    assert 0 < CountingLRU.looked <= 2 * LOOK


def calls_of_a_round(slots: int) -> int:
    """Function calls that saving and restoring a prompt takes in a full node."""
    ledger = Ledger(NBYTES, [spec(Tier.HOST, slots), spec(Tier.DISK, 4 * slots)])

    def round_of(path: list[BlockKey]) -> tuple[int, int]:
        write = ledger.write(1, path)
        ledger.commit(write.id)
        for effect in ledger.take_effects():
            if isinstance(effect, Move):
                ledger.moved(effect, True, NBYTES)
        read = ledger.read(1, path)
        blocks = len(read.keys)
        ledger.release(read.id)
        return len(write.keys), blocks

    for n in range(slots):
        round_of([BlockKey(n.to_bytes(8) + m.to_bytes(8)) for m in range(8)])
    assert [usage.blocks for usage in ledger.usage()] == [slots, 4 * slots]
    calls = 0

    def count(_frame: object, event: str, _arg: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        written, read = round_of(path_of(b"new" + bytes([1]) * 5))
    finally:
        sys.setprofile(None)
    assert (written, read) == (8, 8)
    return calls


def test_the_work_of_a_request_does_not_grow_with_what_is_held():
    assert calls_of_a_round(2048) <= 1.1 * calls_of_a_round(64)


def test_a_read_lease_says_which_leading_blocks_have_arrived():
    node = three_tiers()
    lowered(node, prompt("abc"))
    lease = node.ledger.read(1, prompt("abc"))
    node.effects()
    loads = sorted(node.moves, key=lambda move: move.key)
    assert lease.arrived() == 0
    node.ledger.moved(loads[1], ok=True)
    assert lease.arrived() == 0, "not before the one in front of it"
    node.ledger.moved(loads[0], ok=True)
    assert lease.arrived() == 2
    node.ledger.settle(lease.id)
    assert (lease.arrived(), lease.keys) == (2, prompt("ab")), "what came is not lost"


def test_what_is_not_worth_loading_is_not_loaded():
    node = three_tiers()
    lowered(node, prompt("abcd"))
    asked = []

    def worth(sources: Sequence[int], first: int) -> int:
        asked.append((list(sources), first))
        return 2

    lease = node.ledger.read(1, prompt("abcd"), 1, worth)
    assert asked == [([DISK] * 3, 1)]
    assert lease.keys == prompt("abcd")[1:3]
    assert lease.refused == 1
    node.effects()
    assert len(node.moves) == 2
    node.rest()
    assert node.ledger.read(1, prompt("abc"), 1, worth).keys == prompt("abc")[1:]
    assert len(asked) == 1, "what lies in host memory needs no load"


class Told(LRU):
    """Remembers how it was told of uses."""

    def __init__(self) -> None:
        super().__init__()
        self.touches: list[tuple[int, Use]] = []

    def touch(self, path, use=NO_USE, here=None):
        path = path if here is None else here.among(path)
        if path:
            self.touches.append((len(path), use))
        super().touch(path, use)


def test_a_prompt_told_in_steps_is_told_on_with_its_request_and_as_a_path():
    policy = Told()
    host = replace(spec(Tier.HOST, 8), policy=lambda: policy)
    node = Node(host, spec(Tier.DISK, 8, 8))
    node.save(prompt("abcd"))
    node.rest()
    node.ledger.clear(HOST)
    node.effects()
    policy.touches.clear()
    asked, known = Use(5.0, 7), Use(6.0, 7, 30)
    read = node.ledger.read(1, prompt("abcd"), use=asked)
    node.effects()
    node.rest()
    assert policy.touches == [], "what is loaded enters with its path, at the lease's end"
    node.ledger.release(read.id)
    node.ledger.commit(node.ledger.write(1, prompt("abcdef"), use=known).id)
    assert policy.touches == [(4, asked), (4, known), (6, known)]


def test_what_was_loaded_can_be_dropped_also_when_nobody_waited_for_it_any_more():
    node = with_disk(4, 8)
    lowered(node, prompt("abcd"))
    node.ledger.release(node.ledger.read(1, prompt("abcd")).id)
    node.effects()
    node.rest()
    assert node.held(prompt("abcd"))[HOST] == 4
    assert node.save(prompt("wxyz")) == 4


def test_a_copy_that_a_paused_source_cut_off_says_nothing_of_its_target():
    """Else the disk would drop what only it has, as if the shared tier took nothing."""
    node = Node(spec(Tier.HOST, 4), spec(Tier.DISK, 2, drain_at=1), spec(Tier.SHARED, 100))
    one, two = prompt("a"), prompt("b")
    node.ledger.pause(SHARED)
    lowered(node, one)
    lowered(node, two)
    node.ledger.resume(SHARED)
    node.effects()
    assert [move.key for move in node.moves] == one
    node.ledger.pause(DISK)
    node.end_moves(ok=False)
    node.ledger.resume(DISK)
    node.effects()
    assert [move.key for move in node.moves] == two, "what has failed comes last"
    node.save(prompt("x"))
    assert node.held(one) == (0, 1, 0)
