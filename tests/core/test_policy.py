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
