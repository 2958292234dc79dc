"""What every eviction policy must do. Subclass `PolicyTests` with a `policy` fixture."""

from random import Random

import pytest

from kvtier.core.blocks import BlockKey
from kvtier.core.policy import EvictionPolicy


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

    def test_a_block_comes_after_those_that_continue_it(self, policy: EvictionPolicy) -> None:
        """Random prompts out of a small tree, touched whole, now and then losing their coldest."""
        rng = Random(0)
        for _ in range(500):
            policy.touch(path(*(rng.randrange(3) for _ in range(rng.randint(1, 6)))))
            while len(policy) > 40 or (len(policy) and rng.random() < 0.3):
                policy.remove(next(iter(policy.coldest())))
            order = [*policy.coldest()]
            place = {key: n for n, key in enumerate(order)}
            assert len(place) == len(order) == len(policy)
            for key in order:
                parent = place.get(BlockKey(key[:-1]))
                assert parent is None or place[key] < parent
