"""The VRAM pool under each policy: what the simulator promises is what the pool does."""

from pathlib import Path
from random import Random

import pytest

from kvtier.core.blocks import BlockKey
from kvtier.core.policies import POLICIES
from kvtier.core.policy import PolicyFactory, Use
from kvtier.engine.model import LoadedModel
from kvtier.engine.pool import BlockPool
from kvtier.engine.transformers import Engine
from kvtier.sim.evict import Hits, Prompt, Workload, replay
from kvtier.sim.live import VramPool
from kvtier.sim.workloads import generate
from tests.engine.support import BLOCK, ask, small


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


MOST = 12  # blocks of a prompt that the tiny model is asked for


def tokens_of(key: BlockKey, vocab: int) -> list[int]:
    draw = Random(key)
    return [draw.randrange(3, vocab) for _ in range(BLOCK)]


def short(kind: str, requests: int) -> Workload:
    """A workload whose prompts a tiny model takes, each answered by one token."""
    workload = Workload(generate(kind, 13, requests))
    workload.prompts = [
        Prompt(at_s, BLOCK * len(keys[:MOST]) + 1, 1, BLOCK, keys[:MOST])
        for at_s, _, _, _, keys in workload.prompts
        if keys
    ]
    return workload


@pytest.mark.parametrize("policy", ["lru", "phd"])
def test_the_simulator_counts_what_an_engine_finds(tiny: LoadedModel, policy: str) -> None:
    """A real engine with a real pool; only the clock is the trace's."""
    workload, capacity, now, found = short("chat", 500), 150, [0.0], 0
    config = small(tiny, capacity, policy=policy, prefill_tokens=512)
    engine = Engine(tiny, config, clock=lambda: now[0])
    try:
        assert engine.pool.capacity == capacity
        for prompt in workload.prompts:
            now[0] = prompt.at_s
            blocks = [tokens_of(key, tiny.vocab_size) for key in prompt.keys]
            # One token more: what an engine finds never is the whole prompt.
            found += ask(engine, [*(token for each in blocks for token in each), 3], 1).hit
    finally:
        engine.close()
    said = replay(workload, POLICIES[policy], capacity, cache=VramPool).hits
    assert found == said.hit_blocks * BLOCK > 0


def test_a_restarted_engine_does_not_begin_blind(tiny: LoadedModel, tmp_path: Path) -> None:
    now, file = [0.0], tmp_path / "learned"
    config = small(tiny, 64, learned=str(file))
    seen = []
    for _ in range(2):
        engine = Engine(tiny, config, clock=lambda: now[0])
        try:
            for _ in range(40):
                now[0] += 5.0
                ask(engine, [*range(3, 3 + 2 * BLOCK), 3], 1)
        finally:
            engine.close()
        (policy,) = engine.pool.learning.values()
        seen.append(sum(map(sum, policy.save()["hit"])))
    assert file.exists()
    assert seen[1] > 1.5 * seen[0] > 0
