"""What LRU would have found, and that PHD does not stay behind it."""

import json
from itertools import islice

import pytest

from kvtier.core.phd import PHD
from kvtier.core.policy import LRU, Use
from kvtier.sim.evict import Workload, replay
from kvtier.sim.live import HostTier
from kvtier.sim.workloads import generate
from tests.core.traffic import KINDS


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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_is_never_far_behind_lru(kind: str, seed: int) -> None:
    """Before it knew what it could afford, it was in 7 of these, by up to 0.8 points."""
    requests = 750 if kind in {"twice", "change of kind"} else 1500
    workload = Workload(KINDS[kind](seed, requests))
    for share in (0.02, 0.1, 0.3):
        phd, lru = (replay(workload, each, workload.capacity(share)).hits for each in (PHD, LRU))
        assert phd.token_ratio > lru.token_ratio - 0.005, share


@pytest.mark.parametrize("kind", ["growing", "change of kind", "by recency"])
def test_knows_what_may_yet_be_lost(kind: str) -> None:
    """The keys that LRU would have and that are not here, but for what an epoch hides."""
    workload = Workload(KINDS[kind](1, 1500))
    capacity, ours, theirs = workload.capacity(0.1), PHD(), LRU()
    most = 0
    for number, prompt in enumerate(workload.prompts):
        for policy in (ours, theirs):
            policy.touch(prompt.keys, Use(prompt.at_s, number))
            for key in [*islice(policy.coldest(), max(0, len(policy) - capacity))]:
                policy.remove(key)
        ours.touch([])
        missing = sum(key not in ours for key in theirs.coldest())
        assert abs(ours._duel.missing - missing) <= 2 + 0.01 * capacity
        most = max(most, missing)
    assert most > 0.05 * capacity


def test_what_it_can_afford_is_kept_over_a_restart() -> None:
    """A node that was ahead of LRU need not begin as LRU after each restart."""
    first, workload = list[PHD](), Workload(generate("shared", 1, 3000))
    replay(workload, played(first), workload.capacity(0.02))
    saved = json.loads(json.dumps(first[0].save()))
    taught, forgot = PHD(), PHD()
    taught.restore(saved)
    assert taught._duel._purse == first[0]._duel._purse > 0
    del saved["duel"]  # as an earlier version saved it
    forgot.restore(saved)
    for policy, follows in ((taught, False), (forgot, True)):
        for number, prompt in enumerate(workload.prompts[:20]):
            policy.touch(prompt.keys, Use(prompt.at_s, number))
        assert policy._duel.follow_lru == follows


@pytest.mark.parametrize(
    "duel", [None, [], [[0.0] * 7], [[0.0] * 7 + [float("nan")]], [["0"] * 8], [[0.0] * 8] * 2]
)
def test_a_bad_duel_is_refused_and_nothing_changes(duel: object) -> None:
    policy = PHD()
    before = policy.save()
    with pytest.raises(ValueError, match="duel"):
        policy.restore({**before, "uses": 7, "duel": duel})
    assert policy.save() == before


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
    assert duel.follow_lru
    for number, prompt in enumerate(workload.prompts, 2000):
        policy.touch(prompt.keys, Use(20_000 + prompt.at_s, number))
    assert not duel.follow_lru
