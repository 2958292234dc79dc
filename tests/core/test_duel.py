"""What LRU would have found, and that PHD does not stay behind it."""

from collections.abc import Iterator

import pytest

from kvtier.core.phd import PHD
from kvtier.core.policy import LRU, Use
from kvtier.sim.evict import Workload, replay
from kvtier.sim.live import HostTier
from kvtier.sim.trace import Request
from kvtier.sim.workloads import generate


def played(policies: list[PHD]):
    def make() -> PHD:
        policies.append(PHD())
        return policies[-1]

    return make


@pytest.mark.parametrize("kind", ["chat", "agents", "shared", "rag"])
@pytest.mark.parametrize("share", [0.02, 0.2])
@pytest.mark.parametrize("rounds", [1, 4])
def test_knows_what_lru_would_have_found(kind: str, share: float, rounds: int) -> None:
    """Also where most epochs are merged, as in a cache whose blocks are used all the time."""
    requests = [*generate(kind, 3, 1200 // rounds)]
    workload = Workload(
        [each._replace(at_s=each.at_s + 9999 * n) for n in range(rounds) for each in requests]
    )
    capacity, policies = workload.capacity(share), list[PHD]()
    found = replay(workload, played(policies), capacity).hits
    lru = replay(workload, LRU, capacity).hits
    duel = policies[0]._duel
    assert duel._asked == found.blocks
    slack = 2 + 0.005 * found.blocks
    assert abs(duel._lead - (found.hit_blocks - lru.hit_blocks)) <= slack


def change_of_kind(seed: int, requests: int) -> Iterator[Request]:
    """People first, then programs, whose blocks come back at once or never."""
    first = [*generate("chat", seed, requests)]
    yield from first
    for request in generate("agents", seed, requests):
        ids = tuple(block + 10_000_000 for block in request.blocks)
        yield request._replace(at_s=request.at_s + first[-1].at_s, blocks=ids)


def at_pace(factor: float, seed: int, requests: int) -> Iterator[Request]:
    for request in generate("chat", seed, requests):
        yield request._replace(at_s=request.at_s / factor)


@pytest.mark.parametrize(
    ("requests", "share"),
    [(change_of_kind(1, 750), 0.05), (at_pace(1 / 30, 2, 3000), 0.2), (at_pace(50, 2, 3000), 0.2)],
    ids=["change of kind", "slow", "fast"],
)
def test_is_never_far_behind_lru(requests: Iterator[Request], share: float) -> None:
    """In each of these it was, by up to 1.6 points, before it was compared with LRU."""
    workload = Workload(requests)
    phd, lru = (replay(workload, each, workload.capacity(share)).hits for each in (PHD, LRU))
    assert phd.token_ratio > lru.token_ratio - 0.005


def test_a_node_that_is_told_in_steps_is_compared_as_well() -> None:
    workload, policies = Workload(generate("chat", 3, 1500)), list[PHD]()
    capacity = workload.capacity(0.1)
    found = replay(workload, played(policies), capacity, cache=HostTier).hits
    lru = replay(workload, LRU, capacity, cache=HostTier).hits
    duel = policies[0]._duel
    assert duel._asked == pytest.approx(found.blocks, rel=0.01)
    assert abs(duel._lead - (found.hit_blocks - lru.hit_blocks)) <= 0.01 * found.blocks


def test_a_lead_of_lru_is_forgotten_in_time() -> None:
    """Whoever lost everything at once, as by a purge, is not held to it for ever."""
    policy, workload = PHD(), Workload(generate("shared", 1, 3000))
    for number, prompt in enumerate(workload.prompts[:200]):
        policy.touch(prompt.keys, Use(prompt.at_s, number))
    for key in [*policy.coldest()]:
        policy.remove(key)
    for number, prompt in enumerate(workload.prompts[:200], 1000):
        policy.touch(prompt.keys, Use(10_000 + prompt.at_s, number))
    duel = policy._duel
    assert duel.lru_leads
    for number, prompt in enumerate(workload.prompts, 2000):
        policy.touch(prompt.keys, Use(20_000 + prompt.at_s, number))
    assert not duel.lru_leads
