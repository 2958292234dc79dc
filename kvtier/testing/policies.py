"""What every eviction policy must do. Subclass `PolicyTests` with a `policy` fixture."""

from collections.abc import Iterator
from copy import deepcopy
from itertools import count, islice
from random import Random

import pytest

from kvtier.core.blocks import BlockKey
from kvtier.core.policy import EvictionPolicy, Use
from kvtier.core.shards import KeyMap


def path(*steps: int) -> list[BlockKey]:
    """The keys of a made-up prompt; prompts that begin with equal steps share those keys."""
    return [BlockKey(bytes(steps[: n + 1])) for n in range(len(steps))]


class PolicyTests:
    """Conformance with `EvictionPolicy`."""

    @pytest.fixture
    def policy(self) -> EvictionPolicy:
        """The policy to be tried, empty."""
        raise NotImplementedError("subclass PolicyTests with a `policy` fixture")

    def test_knows_what_was_touched_and_not_removed(self, policy: EvictionPolicy) -> None:
        """Membership, length and order name the same keys."""
        policy.touch(path(1, 2, 3))
        policy.touch(path(1, 2, 4))
        policy.remove(path(1, 2, 3)[-1])
        assert sorted(policy.coldest()) == sorted([*path(1, 2), path(1, 2, 4)[-1]])
        assert len(policy) == 3
        assert path(1)[0] in policy
        assert path(1, 2, 3)[-1] not in policy

    def test_removing_an_unknown_key_changes_nothing(self, policy: EvictionPolicy) -> None:
        """A key that never entered can be removed."""
        policy.touch(path(1, 2))
        policy.remove(BlockKey(b"unknown"))
        assert len(policy) == 2

    def test_empty_at_first_and_again_when_all_is_removed(self, policy: EvictionPolicy) -> None:
        """Nothing is left behind."""
        assert [*policy.coldest()] == []
        policy.touch(path(1, 2, 3))
        for key in path(1, 2, 3):
            policy.remove(key)
        assert [*policy.coldest()] == []
        assert len(policy) == 0

    def test_a_touch_enters_each_key_once(self, policy: EvictionPolicy) -> None:
        """Touching again is no second entry."""
        for _ in range(3):
            policy.touch(path(1, 2, 3))
        assert len([*policy.coldest()]) == len(policy) == 3

    def test_an_empty_path_is_no_request(self, policy: EvictionPolicy) -> None:
        """There is nothing to enter."""
        policy.touch([])
        assert len(policy) == 0

    def test_asking_changes_nothing(self, policy: EvictionPolicy) -> None:
        """The order stays until the next change."""
        policy.touch(path(1, 2))
        policy.touch(path(3, 4))
        assert [*policy.coldest()] == [*policy.coldest()]

    @pytest.mark.parametrize("asked", [True, False])
    def test_a_block_comes_after_those_that_continue_it(
        self, policy: EvictionPolicy, asked: bool
    ) -> None:
        """Random prompts out of a small tree, touched whole, now and then losing their coldest."""
        rng = Random(0)
        for use in uses(rng, asked=asked, most=500):
            policy.touch(path(*(rng.randrange(3) for _ in range(rng.randint(1, 6)))), use)
            while len(policy) > 40 or (len(policy) and rng.random() < 0.3):
                policy.remove(next(iter(policy.coldest())))
            order = [*policy.coldest()]
            place = {key: n for n, key in enumerate(order)}
            assert len(place) == len(order) == len(policy)
            for key in order:
                parent = place.get(BlockKey(key[:-1]))
                assert parent is None or place[key] < parent

    def test_blocks_that_come_and_go_in_any_order_are_neither_lost_nor_invented(
        self, policy: EvictionPolicy
    ) -> None:
        """A tier loses blocks in the middle of a path, and gets single ones back."""
        rng, here = Random(1), set[BlockKey]()
        for use in uses(rng, asked=True, most=1000):
            whole = path(*(rng.randrange(3) for _ in range(rng.randint(1, 6))))
            some = [key for key in whole if key in here or rng.random() < 0.6]
            policy.touch(some, use)
            here.update(some)
            if rng.random() < 0.3:
                policy.touch([whole[-1]])
                here.add(whole[-1])
            for key in rng.sample(sorted(here), rng.randint(0, min(4, len(here)))):
                policy.remove(key)
                here.remove(key)
            assert len(policy) == len(here)
            assert all(key in policy for key in here)
            order = [*policy.coldest()]
            assert len(order) == len(here)
            assert {*order} == here

    def test_what_must_be_kept_does_not_hide_the_rest(self, policy: EvictionPolicy) -> None:
        """Of many paths one is pinned: the others can still be given up, deep ends first."""
        for n in range(50):
            policy.touch(path(n, 1, 2), Use(float(n), n))
        kept = {*path(49, 1, 2), *path(0, 1, 2)}
        going = [key for key in policy.coldest(kept.__contains__) if key not in kept]
        assert len(going) == 48 * 3
        assert all(
            going.index(path(n, 1, 2)[1]) > going.index(path(n, 1, 2)[2]) for n in range(1, 49)
        )

    def test_together_is_as_one_by_one(self, policy: EvictionPolicy) -> None:
        """Many removed at once, and a path of which not all is in the tier."""
        rng, here, twin = Random(2), KeyMap[int](), deepcopy(policy)
        for use in uses(rng, asked=True, most=600):
            whole = path(*(rng.randrange(3) for _ in range(rng.randint(1, 12))))
            for key in rng.sample(whole, rng.randint(0, len(whole))):
                here[key] = 1
            policy.touch(whole, use, here)
            if some := [key for key in whole if key in here]:
                twin.touch(some, use)
            going = [*islice(policy.coldest(), rng.choice([0, 0, 1, 3, 8, 20]))]
            assert going == [*islice(twin.coldest(), len(going))]
            going[3:3] = [rng.choice(whole)] if rng.random() < 0.3 else []
            if rng.random() < 0.5 and here:
                going += rng.sample(sorted(here), 1)
            policy.remove(*going)
            for key in going:
                twin.remove(key)
                here.shards[key[-1]].pop(key, None)
        assert len(policy) == len(twin)
        assert [*policy.coldest()] == [*twin.coldest()]

    def test_a_request_may_be_told_in_pieces(self, policy: EvictionPolicy) -> None:
        """A prompt that is found, then written bit by bit, is one path in the end."""
        whole = path(1, 2, 3, 4, 5, 6)
        for end in (2, 2, 3, 5, 6):
            policy.touch(whole[:end], Use(float(end), 7))
        policy.touch(whole, Use(9.0, 7, output_tokens=300))
        assert [*policy.coldest()] == whole[::-1]


def uses(rng: Random, *, asked: bool, most: int) -> Iterator[Use]:
    """What `most` touches tell of their requests: nothing, or times, ids and output lengths."""
    now = 0.0
    for request in count():
        if request == most:
            return
        now += rng.choice([0.0, 0.5, 3.0, 30.0, 300.0, 5000.0])
        yield Use(now, request, rng.choice([None, 5, 50, 500])) if asked else Use()
