"""Slots on credit: filled first, and put afterwards."""

from random import Random

import pytest

from kvtier.core.blocks import BlockKey
from kvtier.core.ledger import HOST, Held, Ledger
from kvtier.core.phd import PHD
from kvtier.core.policy import LRU, PolicyFactory, Use
from kvtier.core.tiers import Tier, TierSpec
from tests.core.driver import DISK, NBYTES, Node, host_only, prompt, with_disk


def put(node: Node, path: list[BlockKey], slots: list, client: int = 1) -> list:
    """Put the last blocks of `path`; the slots that the client has instead."""
    instead = node.ledger.put(client, path, slots).slots
    node.effects()
    return instead


def test_what_was_put_is_there_and_its_client_has_other_slots() -> None:
    node = host_only(8)
    slots = node.ledger.credit(1, 3)
    assert node.ledger.usage()[HOST].blocks == 0, "no blocks yet"
    kept, instead, _ = node.ledger.put(1, prompt("abc"), slots)
    assert kept == prompt("abc")
    assert [each for each in node.effects() if isinstance(each, Held)] == [
        Held((key,), HOST) for key in prompt("abc")
    ]
    assert node.held(prompt("abcd")) == (3,)
    assert len(instead) == 3
    assert not {*instead} & {*slots}
    with_lease = node.ledger.read(2, prompt("abc"))
    assert with_lease.slots == slots, "where they were filled"


def test_the_end_of_a_path_can_be_put_alone() -> None:
    node = host_only(8)
    node.save(prompt("ab"))
    put(node, prompt("abcd"), node.ledger.credit(1, 2))
    assert node.held(prompt("abcd")) == (4,)
    assert node.ledger.before(prompt("abc")[-1]) == prompt("ab")[-1]


@pytest.mark.parametrize("end", ["commit", "release", "die"])
def test_what_another_client_fills_is_held_whatever_becomes_of_that(end: str) -> None:
    node = host_only(8)
    node.save(prompt("a"))
    other = node.ledger.write(2, prompt("ab"))
    slots = node.ledger.credit(1, 3)
    instead = put(node, prompt("abc"), slots)
    assert slots[0] in instead, "a is there"
    assert slots[1] not in instead, "b is kept aside"
    assert node.held(prompt("abc")) == (1,), "b is filled by the other one"
    if end == "commit":
        node.ledger.commit(other.id)
    elif end == "release":
        node.ledger.release(other.id)
    else:
        node.ledger.disconnect(2)
    assert node.held(prompt("abc")) == (3,)
    node.ledger.check()
    read = node.ledger.read(3, prompt("abc"))
    assert read.slots[1] == (other.slots[0] if end == "commit" else slots[1])
    node.ledger.release(read.id)
    node.ledger.disconnect(1)
    assert node.save(prompt("vwxyz")) == 5, "no slot was lost"


def test_where_no_room_can_be_made_nothing_is_refused_and_the_credit_shrinks() -> None:
    node = host_only(4)
    slots = node.ledger.credit(1, 2)
    node.save(prompt("ab"))
    node.ledger.read(2, prompt("ab"))  # pins them
    assert put(node, prompt("xy"), slots) == []
    assert node.held(prompt("xy")) == (2,)
    assert node.ledger.credited == 0
    assert node.ledger.credit(1, 1), "x or y may go"


def test_a_client_s_credit_ends_with_it() -> None:
    node = host_only(4)
    node.ledger.credit(1, 3)
    assert node.save(prompt("abcd")) == 1
    assert node.ledger.disconnect(1) == 0, "no lease was open"
    assert node.ledger.credited == 0
    assert node.save(prompt("abcd")) == 3


def test_one_client_cannot_put_what_another_has() -> None:
    node = host_only(4)
    slots = node.ledger.credit(1, 2)
    for client, path, which in (
        (2, prompt("ab"), slots),
        (1, prompt("a"), slots),  # more slots than keys
        (1, prompt("ab"), [slots[0]] * 2),
        (1, prompt("a"), [3 - max(slots)]),
    ):
        with pytest.raises(ValueError, match="not on credit"):
            node.ledger.put(client, path, which)
        node.ledger.check()
    assert put(node, prompt("ab"), slots)


def test_what_is_put_goes_down_and_makes_room_as_what_is_written() -> None:
    node = with_disk(host=4, disk=8)
    slots = node.ledger.credit(1, 2)
    for name in ("ab", "cd", "ef"):
        slots = put(node, prompt(name), slots)
        assert len(slots) == 2
        node.rest()
    assert all(node.ledger.match(prompt(name)).blocks == 2 for name in ("ab", "cd", "ef"))
    assert node.held(prompt("ab")) == (0, 2)
    assert node.ledger.usage()[DISK].blocks == 6


@pytest.mark.parametrize("policy", [LRU, PHD])
def test_putting_is_writing_and_committing(policy: PolicyFactory) -> None:
    """Of as many blocks, the same are held: slots on credit lie beside them."""
    room, ahead = 60, 20

    def made(slots: int) -> Ledger:
        size = slots * NBYTES
        tier = TierSpec(tier=Tier.HOST, capacity=size, drain_at=size, policy=policy)
        return Ledger(NBYTES, [tier])

    written, with_credit = made(room), made(room + ahead)
    slots = with_credit.credit(1, ahead)
    rng, hits = Random(5), 0
    for request in range(1, 400):
        name = f"{rng.choice('abcdefgh')}{rng.choice('ijkl')}{rng.choice('mnop')}"
        path = prompt(name, rng.randint(3, 12))
        use = Use(request * 7.0, request)
        hits += written.match(path).blocks
        for ledger in (written, with_credit):
            ledger.release(ledger.read(1, path, use=use).id)
        first = len(path) - rng.randint(1, len(path))
        written.commit(written.write(1, path, first, use).id)
        count = len(path) - first
        slots = slots[count:] + with_credit.put(1, path, slots[:count], use).slots
        assert len(slots) == ahead
        assert {*written.held()[HOST]} == {*with_credit.held()[HOST]}
        with_credit.check()
    assert hits > 100
    assert written.usage()[HOST].blocks > room - 12, "it was full"
