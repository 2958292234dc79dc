"""What the wire says of which block comes before which."""

from itertools import pairwise

import hypothesis.strategies as st
import pytest
from hypothesis import given

from kvtier.core.blocks import BEGINS, BlockKey
from kvtier.core.tiers import Tier
from kvtier.errors import RemoteProtocolError
from kvtier.wire import chains
from kvtier.wire.chains import MAX_STARTS, hear, in_chains, tell, tell_gone
from kvtier.wire.pb import feed_pb2

KEYS = [BlockKey(bytes([n + 1]) * 16) for n in range(12)]
A, B, C, D, *_ = KEYS


def unpack(packed: bytes) -> list[BlockKey]:
    return [BlockKey(packed[at : at + 16]) for at in range(0, len(packed), 16)]


def said(keys, before) -> list[tuple[BlockKey, list[BlockKey]]]:
    """The chains of a message."""
    told = hear(tell(Tier.HOST, keys, before.get), [Tier.HOST])
    return [(each.before, unpack(each.packed)) for each in told]


BEFORE = st.fixed_dictionaries({key: st.sampled_from([BEGINS, *KEYS]) for key in KEYS})


@given(keys=st.lists(st.sampled_from(KEYS), unique=True), before=BEFORE)
def test_all_is_heard_once_and_nothing_but_the_truth_is_said_of_it(keys, before):
    told = list(hear(tell(Tier.DISK, keys, before.get), [Tier.DISK]))
    assert sorted(key for each in told for key in unpack(each.packed)) == sorted(keys)
    for each in told:
        assert each.tier is Tier.DISK
        chain = unpack(each.packed)
        assert before[chain[0]] == each.before
        assert all(before[key] == last for last, key in pairwise(chain))


def test_a_prompt_is_one_chain_whatever_the_order_in_which_its_blocks_come():
    before = {A: BEGINS, B: A, C: B, D: C}
    for keys in ([A, B, C, D], [D, C, B, A], [C, A, D, B]):
        assert said(keys, before) == [(BEGINS, [A, B, C, D])]
    assert said([D, C], before) == [(B, [C, D])]
    assert said([D, B], before) == [(C, [D]), (A, [B])]


def test_a_circle_which_no_prompt_is_is_told_all_the_same():
    assert said([A, B, C], {A: C, B: A, C: B}) == [(C, [A, B, C])]
    assert said([A, B], {A: A, B: A}) == [(A, [A, B])]


def test_what_is_not_held_any_more_is_left_out():
    """A snapshot is told in steps, and of what has gone meanwhile the next delta speaks."""
    before = {A: BEGINS, C: B, D: C}
    assert said([A, B, C, D], before) == [(BEGINS, [A]), (B, [C, D])]
    assert [key for step in in_chains([D, C, B, A], before.get) for key in step] == [C, D, A]


@given(keys=st.lists(st.sampled_from(KEYS), unique=True), before=BEFORE)
def test_chains_have_all_blocks_once_and_the_fewest_beginnings(keys, before):
    ordered = [key for step in in_chains(keys, before.get) for key in step]
    assert sorted(ordered) == sorted(keys)
    # As many follow the one before them as there are different ones that some block follows.
    followed = {before.get(key) for key in keys} & set(keys)
    behind = sum(before.get(key) == last for last, key in pairwise(ordered))
    if all(key > before[key] for key in keys):  # no circle
        assert behind == len(followed)


def test_prompts_that_were_saved_in_turn_are_told_one_after_the_other(monkeypatch):
    monkeypatch.setattr(chains, "STEP", 5)
    prompts = [KEYS[at : at + 4] for at in range(0, 12, 4)]
    before = {key: last for prompt in prompts for last, key in pairwise([BEGINS, *prompt])}
    in_turn = [key for level in zip(*prompts, strict=True) for key in reversed(level)]
    steps = list(in_chains(in_turn, before.get))
    ordered = [key for step in steps for key in step]
    assert ordered == [*prompts[2], *prompts[1], *prompts[0]]
    assert max(map(len, steps)) <= 5


def test_of_what_is_gone_nothing_is_said():
    part = tell_gone(Tier.HOST, KEYS)
    assert part == feed_pb2.TierKeys(tier=feed_pb2.TIER_HOST, keys=b"".join(KEYS))
    (told,) = hear(part, [Tier.HOST], gone=True)
    assert unpack(told.packed) == KEYS


@pytest.mark.parametrize("starts", [[], [1], [2, 3]])
def test_a_block_that_is_in_no_chain_is_refused(starts):
    part = feed_pb2.TierKeys(
        tier=feed_pb2.TIER_HOST, keys=b"".join(KEYS[:4]), starts=starts, parents=A * len(starts)
    )
    first = starts[0] if starts else 4
    with pytest.raises(RemoteProtocolError, match=f"{first} of 4 blocks lie in no chain"):
        hear(part, [Tier.HOST])
    assert list(hear(feed_pb2.TierKeys(tier=feed_pb2.TIER_HOST), [Tier.HOST])) == []


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"starts": [0], "parents": b""}, "0 bytes of parents for 1 starts"),
        ({"starts": [0], "parents": b"x" * 17}, "17 bytes of parents"),
        ({"starts": [1, 1], "parents": b"x" * 32}, "must ascend and be below 4"),
        ({"starts": [2, 1], "parents": b"x" * 32}, "must ascend"),
        ({"starts": [4], "parents": b"x" * 16}, "below 4"),
        ({"starts": [*range(MAX_STARTS + 1)], "parents": b""}, "8193 starts, limit 8192"),
        ({"keys": b"x" * 17}, "17 bytes of keys"),
        ({"tier": feed_pb2.TIER_VRAM}, "tier 1 is none"),
    ],
)
def test_what_is_no_such_message_is_refused(fields, words):
    good = {"tier": feed_pb2.TIER_HOST, "keys": b"".join(KEYS[:4])}
    with pytest.raises(RemoteProtocolError, match=words):
        hear(feed_pb2.TierKeys(**{**good, **fields}), [Tier.HOST])
