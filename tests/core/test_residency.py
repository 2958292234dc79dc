"""The cascade: what is copied down, what is dropped, and what tiers that fail change."""

from collections import Counter

from kvtier.core.blocks import BlockKey
from kvtier.core.ledger import HOST, Forget, Gone, Held, Move, Settled, TierUsage
from kvtier.core.tiers import Tier
from tests.core.driver import (
    DISK,
    NBYTES,
    Node,
    block,
    lowered,
    prompt,
    spec,
    three_tiers,
    with_disk,
)

# --- the cascade --------------------------------------------------------------------------


def test_above_its_mark_a_tier_copies_its_coldest_down():
    node = with_disk(host=4, disk=8, drain_at=2)
    node.save(prompt("ab"))
    assert node.moves == []
    node.save(prompt("xy"))
    assert {move.key for move in node.moves} == {*prompt("ab")}
    assert {(move.source, move.target) for move in node.moves} == {(HOST, DISK)}
    assert node.end_moves() == [Held((prompt("ab")[1],), DISK), Held((prompt("ab")[0],), DISK)]
    assert node.held(prompt("ab")) == (2, 0)  # it is in both; the warmest counts


def test_a_block_with_a_lower_copy_makes_room_at_once():
    node = with_disk(host=2, disk=8)
    node.save(prompt("ab"))
    node.rest()
    assert node.save(prompt("x")) == 1
    assert node.held(prompt("ab")) == (1, 1)
    assert node.held(prompt("x")) == (1, 0)


def test_the_only_copy_of_a_block_is_never_dropped_for_another():
    node = with_disk(host=2, disk=8)
    node.save(prompt("ab"))
    assert node.save(prompt("xy")) == 0  # the copies are under way
    node.rest()
    assert node.save(prompt("xy")) == 2
    assert node.held(prompt("ab")) == (0, 2)


def test_a_full_tier_that_was_not_to_be_drained_yet_is_drained_when_room_is_asked_for():
    node = with_disk(host=2, disk=8, drain_at=2)
    node.save(prompt("ab"))
    assert node.moves == []
    assert node.save(prompt("x")) == 0
    node.rest()
    assert node.save(prompt("x")) == 1


def test_the_cascade_reaches_the_last_tier_from_the_warmest_copy():
    node = three_tiers()
    node.save(prompt("a"))
    node.end_moves()
    assert [move[1:3] for move in node.moves] == [(HOST, 2)]  # not out of the disk
    node.rest()
    assert node.ledger.undrained() == 0
    assert [usage.blocks for usage in node.ledger.usage()] == [1, 1, 1]


def test_at_most_queue_copies_into_a_tier_are_under_way():
    node = with_disk(host=8, disk=8, queue=3)
    node.save(prompt("abcdefgh"))
    most = 0
    while node.moves:
        most = max(most, len(node.moves))
        node.ledger.moved(node.moves.pop(0), True, NBYTES)
        node.effects()
    assert most == 3
    assert node.ledger.undrained() == 0


def test_a_failed_copy_keeps_the_original_and_is_not_tried_again_at_once():
    node = with_disk(host=4, disk=8)
    node.save(prompt("a"))
    node.save(prompt("b"))
    assert node.end_moves(ok=False) == []
    assert node.ledger.moves == 0
    assert node.held(prompt("a")) == node.held(prompt("b")) == (1, 0)
    node.save(prompt("c"))  # whatever happens next
    assert sorted(move.key for move in node.moves) == [block("a"), block("b"), block("c")]


def test_a_block_that_could_not_be_copied_comes_last():
    node = with_disk(host=4, disk=8, queue=1)
    node.save(prompt("a"))
    node.save(prompt("b"))
    node.save(prompt("c"))
    assert [move.key for move in node.moves] == [block("a")]
    node.end_moves(ok=False)
    node.touch(prompt("c"))
    assert [move.key for move in node.moves] == [block("b")]


def test_a_full_last_tier_forgets_its_coldest():
    node = with_disk(host=1, disk=2)
    for name in "abc":
        assert node.save(prompt(name)) == 1
        effects = node.end_moves()
    assert Held((prompt("c")[0],), DISK) in effects
    assert node.held(prompt("a")) == (0, 0)
    assert node.held(prompt("b")) == (0, 1)
    assert node.ledger.usage()[DISK] == TierUsage(2, 200)


def test_what_a_tier_drops_is_forgotten_in_its_store():
    node = with_disk(host=1, disk=1)
    node.save(prompt("a"))
    node.rest()
    lease = node.ledger.write(1, prompt("b"))
    node.ledger.commit(lease.id)
    effects = node.effects()
    a, b = prompt("a")[0], prompt("b")[0]
    assert effects == [
        Gone((a,), HOST), Held((b,), HOST), Forget(a, DISK), Gone((a,), DISK),
        Move(b, HOST, DISK, lease.slots[0]),
    ]  # fmt: skip


def test_blocks_do_not_move_in_a_circle_when_a_lower_tier_is_smaller():
    node = with_disk(host=4, disk=2)
    node.save(prompt("abcd"))
    node.ledger.drain_all(on=True)
    node.effects()
    copies = Counter[BlockKey]()
    while node.moves:
        copies.update(move.key for move in node.moves)
        node.end_moves()
    assert len(copies) == copies.total() == 2
    assert node.ledger.undrained() == 2
    assert node.held(prompt("abcd")) == (4, 0)


def test_a_middle_tier_gives_up_what_lies_lower():
    node = three_tiers(host=1, disk=2)
    for name in "abc":
        node.save(prompt(name))
        node.rest()
    assert node.held(prompt("a")) == (0, 0, 1)
    assert node.held(prompt("b")) == (0, 1, 0)
    assert node.held(prompt("c")) == (1, 0, 0)


def test_a_middle_tier_gives_up_its_coldest_when_the_next_is_too_slow():
    node = Node(spec(Tier.HOST, 2), spec(Tier.DISK, 2), spec(Tier.SHARED, 100, queue=1))
    for name in "abc":
        assert node.save(prompt(name)) == 1
        while to_disk := [move for move in node.moves if move.target == DISK]:
            node.moves.remove(to_disk[0])  # and those into the shared tier never end
            node.ledger.moved(to_disk[0], True, NBYTES)
            node.effects()
    assert [move.key for move in node.moves] == [block("a")]
    assert node.held(prompt("a")) == (1, 0, 0)
    assert node.held(prompt("b")) == (0, 0, 0)
    assert node.held(prompt("c")) == (1, 0, 0)


def test_what_is_found_above_the_mark_is_copied_on():
    node = Node(spec(Tier.HOST, 4), spec(Tier.DISK, 8, drain_at=1), spec(Tier.SHARED, 8))
    node.ledger.found(DISK, [(prompt(name)[0], NBYTES) for name in "abc"])
    node.effects()
    assert [(move.key, *move[1:3]) for move in node.moves] == [
        (block("a"), 1, 2),
        (block("b"), 1, 2),
    ]


def test_a_drop_from_a_warmer_tier_does_not_make_a_block_warm():
    node = Node(spec(Tier.HOST, 4, 4), spec(Tier.DISK, 8, 8), spec(Tier.SHARED, 8))
    node.ledger.found(DISK, [(prompt(name)[0], NBYTES) for name in "ab"])
    node.touch(prompt("a"))
    node.rest()
    node.ledger.release(node.ledger.write(1, prompt("b")).id)  # now a is colder
    assert node.ledger.clear(HOST) == 1
    node.ledger.drain_all(on=True)
    node.effects()
    assert [move.key for move in node.moves] == [block("a"), block("b")]


def test_what_is_lost_below_is_undrained_even_while_it_loads():
    node = three_tiers()
    lowered(node, prompt("a"))
    node.ledger.read(1, prompt("a"))
    assert node.ledger.undrained() == 0
    node.ledger.lost(2, prompt("a"))
    node.effects()
    assert node.ledger.undrained() == 1


def test_a_block_that_is_being_loaded_does_not_hold_up_the_others():
    node = Node(spec(Tier.HOST, 4), spec(Tier.DISK, 8, drain_at=2), spec(Tier.SHARED, 8))
    node.ledger.found(DISK, [(prompt(name)[0], NBYTES) for name in "ab"])
    node.ledger.read(1, prompt("a"))
    node.ledger.release(node.ledger.write(1, prompt("b")).id)  # a is the coldest, and loads
    node.ledger.found(DISK, [(prompt("c")[0], NBYTES)])
    node.effects()
    assert [(move.key, *move[1:3]) for move in node.moves] == [
        (block("a"), 1, 0),
        (block("b"), 1, 2),
    ]
    assert node.ledger.undrained() == 3


def test_what_loads_while_all_is_drained_is_drained_after_it():
    node = Node(spec(Tier.HOST, 4), spec(Tier.DISK, 8, drain_at=8), spec(Tier.SHARED, 8))
    node.ledger.found(DISK, [(prompt("a")[0], NBYTES)])
    node.ledger.read(1, prompt("a"))
    node.ledger.drain_all(on=True)
    node.effects()
    assert [move[1:3] for move in node.moves] == [(DISK, HOST)]
    node.end_moves()
    assert [move[1:3] for move in node.moves] == [(HOST, 2)]


def test_what_lies_in_host_too_can_be_drained_past_a_paused_tier():
    node = Node(spec(Tier.HOST, 4), spec(Tier.DISK, 8, drain_at=8), spec(Tier.SHARED, 8))
    node.ledger.found(DISK, [(prompt(name)[0], NBYTES) for name in "ab"])
    node.touch(prompt("b"))
    node.rest()
    node.ledger.pause(DISK)
    node.ledger.drain_all(on=True)
    node.effects()
    assert [(move.key, *move[1:3]) for move in node.moves] == [(block("b"), HOST, 2)]


def test_draining_all_leaves_nothing_behind():
    node = Node(
        spec(Tier.HOST, 4, drain_at=4), spec(Tier.DISK, 8, drain_at=8), spec(Tier.SHARED, 8)
    )
    node.save(prompt("abcd"))
    assert node.ledger.undrained() == 4
    node.ledger.drain_all(on=True)
    node.effects()
    assert node.ledger.undrained() == 4  # those that are moving included
    node.rest()
    assert node.ledger.undrained() == 0
    assert [usage.blocks for usage in node.ledger.usage()] == [4, 4, 4]


def test_lower_tiers_count_the_bytes_of_frames():
    node = with_disk(host=4, disk=2)
    node.save(prompt("abcd"))
    assert len(node.moves) == 2  # a whole block is reserved for each
    while node.moves:
        node.end_moves(nbytes=30)
    assert node.ledger.usage()[DISK] == TierUsage(4, 120)


def test_a_frame_larger_than_its_block_does_not_break_the_capacity():
    node = with_disk(host=4, disk=2)
    node.save(prompt("ab"))
    node.end_moves(nbytes=110)
    assert node.ledger.usage()[DISK] == TierUsage(1, 110)
    assert node.moves == []  # from now on as much is reserved


# --- tiers that do not answer -------------------------------------------------------------


def test_a_paused_tier_is_neither_read_nor_written():
    node = with_disk(host=4, disk=8)
    lowered(node, prompt("a"))
    node.ledger.pause(DISK)
    assert node.ledger.paused(DISK)
    assert node.held(prompt("a")) == (0, 0)
    assert node.ledger.read(1, prompt("a")).keys == []
    node.save(prompt("x"))
    assert node.moves == []
    node.ledger.resume(DISK)
    assert not node.ledger.paused(DISK)
    node.effects()
    assert [move.key for move in node.moves] == [block("x")]
    assert node.held(prompt("a")) == (0, 1)


def test_what_waits_for_a_paused_tier_may_be_dropped():
    node = with_disk(host=2, disk=8)
    node.ledger.pause(DISK)
    node.save(prompt("ab"))
    assert node.save(prompt("xy")) == 2
    assert node.held(prompt("ab")) == (0, 0)


def test_a_load_without_an_answer_says_nothing_about_the_copy():
    node = with_disk(host=4, disk=8)
    lowered(node, prompt("a"))
    lease = node.ledger.read(1, prompt("a"))
    node.effects()
    node.ledger.pause(DISK)
    assert node.end_moves(ok=False) == [Settled(lease.id)]
    assert lease.keys == []
    node.ledger.resume(DISK)
    assert node.held(prompt("a")) == (0, 1)


def test_what_only_a_paused_tier_has_can_be_written_again():
    node = with_disk(host=4, disk=8)
    lowered(node, prompt("ab"))
    node.ledger.pause(DISK)
    lease = node.ledger.write(1, prompt("abc"))
    assert lease.keys == prompt("abc")
    node.ledger.commit(lease.id, 1)
    node.effects()
    assert node.held(prompt("abc")) == (1, 0)
    node.ledger.resume(DISK)
    assert node.held(prompt("abc")) == (1, 1)  # b was not filled, but is on disk as before


def test_what_an_answering_tier_has_is_not_written_again():
    node = with_disk(host=4, disk=8)
    lowered(node, prompt("ab"))
    assert node.ledger.write(1, prompt("abc")).indexes == [2]


# --- what stores tell ---------------------------------------------------------------------


def test_a_restart_finds_what_a_disk_still_holds():
    node = with_disk(host=4, disk=8)
    node.ledger.found(DISK, [(key, 60) for key in prompt("abc")])
    assert node.effects() == [Held((key,), DISK) for key in prompt("abc")]
    assert node.held(prompt("abc")) == (0, 3)
    assert node.ledger.usage()[DISK] == TierUsage(3, 180)


def test_beyond_the_capacity_the_newest_are_kept():
    node = with_disk(host=4, disk=2)
    keys = [prompt(name)[0] for name in "abcd"]
    node.ledger.found(DISK, [(key, NBYTES) for key in keys])
    effects = node.effects()
    assert [effect.key for effect in effects if isinstance(effect, Forget)] == keys[:2]
    assert node.ledger.usage()[DISK] == TierUsage(2, 200)
    assert node.held(prompt("d")) == (0, 1)


def test_a_frame_that_can_never_fit_is_forgotten():
    node = with_disk(host=4, disk=2)
    node.ledger.found(DISK, [(prompt("b")[0], NBYTES)])
    node.effects()
    node.ledger.found(DISK, [(prompt("a")[0], 201)])
    assert node.effects() == [Forget(prompt("a")[0], DISK)]  # and b stays


def test_hints_beyond_the_capacity_are_forgotten_silently():
    node = Node(spec(Tier.HOST, 4), spec(Tier.SHARED, 2))
    keys = [prompt(name)[0] for name in "abc"]
    node.ledger.found(1, [(key, NBYTES) for key in keys])
    assert node.effects() == [Held((key,), 1) for key in keys]  # and no Gone, no Forget
    assert node.held(prompt("a")) == (0, 0)


def test_a_block_that_another_node_shared_is_loaded_like_any_other():
    node = Node(spec(Tier.HOST, 4), spec(Tier.SHARED, 8))
    node.ledger.found(1, [(prompt("a")[0], 0)])
    assert node.ledger.usage()[1] == TierUsage(1, NBYTES)  # of unknown size: as a whole block
    lease = node.ledger.read(1, prompt("a"))
    node.effects()
    assert node.end_moves() == [Held((prompt("a")[0],), HOST), Settled(lease.id)]


def test_a_shared_block_that_is_not_there_is_gone_for_all_and_not_deleted():
    node = Node(spec(Tier.HOST, 4), spec(Tier.SHARED, 8))
    node.ledger.found(1, [(prompt("a")[0], NBYTES)])
    lease = node.ledger.read(1, prompt("a"))
    node.effects()
    assert node.end_moves(ok=False) == [Settled(lease.id), Gone((prompt("a")[0],), 1)]


def test_a_lost_copy_is_made_again():
    node = with_disk(host=4, disk=8)
    node.save(prompt("ab"))
    node.rest()
    node.ledger.lost(DISK, [prompt("ab")[1], b"unknown"])
    assert node.effects()[0] == Gone((prompt("ab")[1],), DISK)
    assert [move.key for move in node.moves] == [prompt("ab")[1]]


def test_a_copy_that_is_being_read_is_not_lost_before_the_read_ends():
    node = with_disk(host=4, disk=8)
    lowered(node, prompt("a"))
    lease = node.ledger.read(1, prompt("a"))
    node.effects()
    node.ledger.lost(DISK, prompt("a"))
    assert node.effects() == []
    assert Settled(lease.id) in node.end_moves()


def test_finding_what_is_known_changes_nothing():
    node = with_disk(host=4, disk=8)
    node.save(prompt("a"))
    node.ledger.found(DISK, [(prompt("a")[0], NBYTES)])  # its copy is still under way
    assert node.effects() == []
    node.rest()
    node.ledger.found(DISK, [(prompt("a")[0], NBYTES)])
    assert node.effects() == []


# --- administration -----------------------------------------------------------------------


def test_clearing_drops_what_is_neither_leased_nor_moving():
    node = with_disk(host=4, disk=8)
    node.save(prompt("a"))
    node.rest()
    node.ledger.read(1, prompt("a"))
    node.save(prompt("b"))  # its copy is under way
    lease = node.ledger.write(1, prompt("c"))
    assert node.ledger.clear(HOST) == 0
    assert node.ledger.clear(DISK) == 1
    assert Forget(prompt("a")[0], DISK) in node.effects()
    node.ledger.commit(lease.id)
    node.effects()
    node.rest()
    assert node.ledger.clear(HOST) == 2
    assert node.held(prompt("a")) == (1, 0)


def test_clearing_a_shared_tier_forgets_what_this_node_knows_of_it():
    node = Node(spec(Tier.HOST, 4), spec(Tier.SHARED, 8))
    node.ledger.found(1, [(prompt("a")[0], NBYTES)])
    node.effects()
    assert node.ledger.clear(1) == 1
    assert node.effects() == []
    assert node.held(prompt("a")) == (0, 0)


def test_all_copies_are_listed_with_their_tiers():
    node = with_disk(host=4, disk=8)
    node.save(prompt("a"))
    node.rest()
    node.ledger.write(1, prompt("b"))
    assert node.ledger.held() == [[block("a")], [block("a")]]


def test_usage_counts_slots_that_are_being_filled():
    node = with_disk(host=4, disk=8)
    node.ledger.write(1, prompt("ab"))
    assert node.ledger.usage() == [TierUsage(2, 200), TierUsage(0, 0)]


def test_a_bad_frame_on_disk_is_no_refusal_of_the_tier_below_it():
    node = Node(spec(Tier.HOST, 8), spec(Tier.DISK, 2, drain_at=2), spec(Tier.SHARED, 8, queue=1))
    lowered(node, prompt("a"))
    lowered(node, prompt("b"))
    node.save(prompt("x"))  # wants room on disk, and so one of them is to be copied further down
    (move,) = node.moves
    node.moves.clear()
    assert (move.source, move.target) == (DISK, 2)
    node.ledger.moved(move, False, source_lost=True)
    node.ledger.lost(DISK, [move.key])
    node.effects()
    node.save(prompt("y"))
    kept = prompt("b") if move.key == prompt("a")[0] else prompt("a")
    assert node.held(kept) == (0, 1, 0), "the only copy was dropped, as if Redis took nothing"
    node.rest()
    node.ledger.check()


def test_a_store_that_refuses_gives_up_its_coldest_block_for_the_next_try():
    node = Node(spec(Tier.HOST, 8), spec(Tier.DISK, 8))
    for name in "ab":
        node.save(prompt(name))
        node.end_moves()
    assert node.ledger.clear(HOST) == 2
    node.save(prompt("c"))
    effects = node.end_moves(ok=False)  # the disk is full of others' files, say
    assert Forget(prompt("a")[0], DISK) in effects
    assert node.held(prompt("b")) == (0, 1)
    assert not node.moves, "a refusal does not lead to the next try by itself"
    node.save(prompt("d"))
    assert {move.key for move in node.moves} == {block("c"), block("d")}
