"""The VRAM pool under each policy: what the simulator promises is what the pool does."""

import pytest

from kvtier.core.policies import POLICIES
from kvtier.core.policy import PolicyFactory, Use
from kvtier.engine.pool import BlockPool
from kvtier.sim.evict import Hits, Workload, replay
from kvtier.sim.workloads import generate


def play(workload: Workload, policy: PolicyFactory, capacity: int) -> Hits:
    """Each prompt as the engine tells the pool of it: found, pinned, put in piece by piece."""
    pool, hits = BlockPool(capacity, policy), Hits()
    for number, prompt in enumerate(workload.prompts):
        keys, use = prompt.keys, Use(prompt.at_s, number)
        pinned = len(pool.match(keys))
        hits.count(prompt, pinned)
        pool.pin(keys[:pinned], 0, use)
        for end in (len(keys) // 2, len(keys)):
            ids, _ = pool.allocate(max(0, end - pinned))
            if ids:
                path = keys[: pinned + len(ids)]
                pool.insert(path, ids, use)
                pool.pin(path, pinned, use)
                pinned = len(path)
        pool.used(keys[:pinned], use._replace(output_tokens=prompt.output_tokens))
        pool.unpin(keys[:pinned])
        if not number % 100:
            pool.check()
    return hits


@pytest.mark.parametrize("kind", ["chat", "shared"])
def test_the_simulator_counts_what_the_pool_finds(kind: str) -> None:
    workload = Workload(generate(kind, 11, 800))
    for fraction in (0.05, 0.2):
        capacity = workload.capacity(fraction)
        found = play(workload, POLICIES["lru"], capacity)
        said = replay(workload, POLICIES["lru"], capacity).hits
        assert found.hit_blocks == said.hit_blocks
        assert found.token_ratio == said.token_ratio


def test_phd_finds_more_in_a_small_pool_than_lru() -> None:
    workload = Workload(generate("shared", 12, 3000))
    capacity = workload.capacity(0.02)
    phd, lru = (play(workload, POLICIES[name], capacity) for name in ("phd", "lru"))
    assert phd.token_ratio > lru.token_ratio + 0.02
