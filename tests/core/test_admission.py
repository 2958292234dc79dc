"""Which blocks a disk that takes only what was used twice is given."""

import dataclasses
from random import Random

from kvtier.core.admission import SecondUse
from kvtier.core.blocks import BlockKey
from kvtier.core.policy import Use
from kvtier.core.tiers import Tier
from tests.core.driver import DISK, Node, prompt, spec


def node(host: int, disk: int, remembered: int = 100) -> tuple[Node, list[int]]:
    refused = [0]

    def count() -> None:
        refused[0] += 1

    lower = dataclasses.replace(
        spec(Tier.DISK, disk), admission=lambda: SecondUse(remembered, count)
    )
    return Node(spec(Tier.HOST, host), lower), refused


def save(node: Node, path: list[BlockKey], request: int | None) -> int:
    lease = node.ledger.write(1, path, use=Use(request=request))
    node.ledger.commit(lease.id)
    node.effects()
    return len(lease.keys)


def read(node: Node, path: list[BlockKey], request: int | None) -> None:
    node.ledger.release(node.ledger.read(1, path, use=Use(request=request)).id)
    node.effects()


def going(node: Node) -> set[BlockKey]:
    return {move.key for move in node.moves if move.target == DISK}


def test_a_block_goes_down_with_its_second_use_and_not_before() -> None:
    one, _ = node(host=8, disk=8)
    save(one, prompt("abc"), request=1)
    assert not going(one)
    read(one, prompt("abc"), request=1)  # the same request tells more of itself
    assert not going(one)
    read(one, prompt("ab"), request=2)
    assert going(one) == set(prompt("ab")), "what was not used again stays"
    one.rest()
    assert one.held(prompt("abc")) == (3, 0)
    assert sorted(one.ledger.held()[DISK]) == prompt("ab")


def test_a_path_that_names_a_block_twice_uses_it_once() -> None:
    one, _ = node(host=8, disk=8)
    save(one, prompt("ab"), request=1)
    lease = one.ledger.read(1, prompt("a") + prompt("ab"), use=Use(request=2))
    assert len(lease.keys) == 3
    assert one.ledger.disconnect(1) == 1
    one.effects()
    assert going(one) == set(prompt("ab"))
    assert one.ledger.leases == 0


def test_what_nobody_asked_for_is_no_use() -> None:
    one, _ = node(host=8, disk=8)
    save(one, prompt("a"), request=None)
    read(one, prompt("a"), request=None)
    assert not going(one)
    read(one, prompt("a"), request=7)
    assert going(one) == set(prompt("a"))


def test_a_new_prompt_is_the_second_use_of_the_prefix_that_it_shares() -> None:
    one, _ = node(host=8, disk=8)
    save(one, prompt("abx"), request=1)
    save(one, prompt("aby"), request=2)
    assert going(one) == set(prompt("ab"))


def test_a_block_that_was_given_up_is_known_when_it_comes_back() -> None:
    one, refused = node(host=2, disk=8)
    assert save(one, prompt("ab"), request=1) == 2
    assert save(one, prompt("xy"), request=2) == 2, "room is made without a copy"
    assert refused == [2]
    assert not going(one)
    assert one.held(prompt("ab")) == (0, 0)
    assert save(one, prompt("ab"), request=3) == 2
    assert going(one) == set(prompt("ab"))
    one.rest()
    assert refused == [4], "x and y went, too"
    assert not any(key in one.ledger.admission for key in prompt("ab"))


def test_only_the_last_keys_are_remembered() -> None:
    one, refused = node(host=1, disk=8, remembered=2)
    for request, name in enumerate("abc"):
        save(one, prompt(name), request)
    save(one, prompt("d"), 9)
    assert refused == [3]
    save(one, prompt("a"), 10)  # a went first of four: forgotten
    assert not going(one)
    save(one, prompt("d"), 11)
    assert going(one) == set(prompt("d"))


def test_at_the_end_too_only_what_was_used_twice_is_written() -> None:
    one, _ = node(host=8, disk=8)
    save(one, prompt("abc"), request=1)
    read(one, prompt("a"), request=2)
    one.rest()
    one.ledger.drain_all(on=True)
    one.effects()
    one.rest()
    assert one.ledger.undrained() == 0
    assert one.ledger.held()[DISK] == prompt("a")


def test_a_block_that_is_cleared_counts_as_given_up() -> None:
    one, refused = node(host=8, disk=8)
    save(one, prompt("ab"), request=1)
    assert one.ledger.clear(0) == 2
    one.effects()
    assert refused == [2]
    save(one, prompt("ab"), request=2)
    assert going(one) == set(prompt("ab"))


def test_it_decides_as_a_plain_count_of_requests_does() -> None:
    """Against books kept in the plainest way, over random requests."""
    rng = Random(5)
    for _ in range(200):
        limit = rng.randint(1, 4)
        admission = SecondUse(limit)
        above: dict[BlockKey, set[int | None]] = {}  # who has used what is above
        gone: list[BlockKey | None] = []  # departures in order; None: it has come back
        keys = [BlockKey(b"%d" % n) for n in range(8)]
        for _ in range(60):
            key, request = rng.choice(keys), rng.choice([None, 1, 2, 3])
            if key not in above:
                admission.entered([key], request)
                known = key in gone[-limit:]
                above[key] = {-1, request} if known else {request}
                gone = [None if each == key else each for each in gone]
            elif rng.random() < 0.3:
                once = len(above.pop(key)) == 1
                assert admission.left(key) == once
                if once:
                    gone.append(key)
            else:
                before = len(above[key])
                if request is not None:
                    above[key].add(request)
                assert admission.used([key], request) == [key] * (
                    before == 1 and len(above[key]) == 2
                )
            assert set(admission) == {key for key, who in above.items() if len(who) == 1}


def test_a_copy_that_the_tier_between_was_worth_goes_on_without_it() -> None:
    """The disk turns out to have the block, and loses it while it is copied to what is shared."""
    disk = dataclasses.replace(spec(Tier.DISK, 4), admission=lambda: SecondUse(100))
    one = Node(spec(Tier.HOST, 4), disk, spec(Tier.SHARED, 100, drain_at=100))
    (key,) = prompt("a")
    save(one, [key], request=1)
    one.ledger.found(DISK, [(key, 100)])
    one.effects()
    assert [(move.key, move.target) for move in one.moves] == [(key, DISK + 1)]
    one.ledger.lost(DISK, [key])
    one.effects()
    one.end_moves(ok=False)
    assert not one.moves, "alone again, it is not worth it"
    assert one.held([key]) == (1, 0, 0)
