"""The order in which tiers give up blocks."""

import pytest

from kvtier.core.policy import LRU
from kvtier.testing.policies import PolicyTests, path


class TestLRU(PolicyTests):
    @pytest.fixture
    def policy(self) -> LRU:
        return LRU()


def test_lru_gives_up_the_prompt_used_longest_ago_and_its_deep_end_first():
    policy = LRU()
    policy.touch(path(1, 2, 3))
    policy.touch(path(4, 5))
    policy.touch(path(1, 6))
    assert [*policy.coldest()] == [
        path(1, 2, 3)[2],
        path(1, 2)[1],
        path(4, 5)[1],
        path(4)[0],
        path(1, 6)[1],
        path(1)[0],
    ]


def test_lru_enters_what_left_since_it_was_told_the_same():
    policy = LRU()
    for _ in range(2):
        policy.touch(path(1, 2))
    policy.touch(path(3))
    policy.touch(path(1, 2))
    policy.remove(path(1, 2)[1])
    policy.touch(path(1, 2))
    assert [*policy.coldest()] == [*path(3), path(1, 2)[1], *path(1)]
