"""Which worker gets a request, and why."""

from dataclasses import replace
from itertools import count, pairwise
from random import Random

import hypothesis.strategies as st
import pytest
from hypothesis import given

from kvtier.core.audience import Warmth
from kvtier.core.score import DEFAULT_RATES, Candidate, Choice, Rates, rank, why
from kvtier.core.tiers import Tier

RATES = Rates(
    prefill_tokens_per_s=1000.0, host_bytes_per_s=1e6, disk_bytes_per_s=1e5, shared_bytes_per_s=1e4
)
PEERS = Rates(peer_bytes_per_s=1e6, doubles_at=500.0, decode_drag=0.01)
PROMPT_TOKENS = 1000
BLOCK_TOKENS = 100
BLOCK_NBYTES = 1000


def ranked(*candidates: Candidate, behind: float = 2.0, seed: int = 0) -> list[Choice]:
    return rank(
        candidates,
        prompt_tokens=PROMPT_TOKENS,
        block_tokens=BLOCK_TOKENS,
        block_nbytes=BLOCK_NBYTES,
        behind=behind,
        tie=Random(seed).random,
    )


def names(*candidates: Candidate, seed: int = 0) -> list[str]:
    return [choice.name for choice in ranked(*candidates, seed=seed)]


def candidate(name: str, warmth: Warmth | None = None, **fields) -> Candidate:
    return Candidate(name=name, warmth=warmth or Warmth(), **{"rates": RATES, **fields})


def test_the_score_adds_up():
    (choice,) = ranked(candidate("n", Warmth(vram=1, host=2, disk=3, shared=1), waiting_tokens=500))
    assert choice.wait_s == pytest.approx(0.5)
    assert choice.load_s == pytest.approx(2 * 1e-3 + 3 * 1e-2 + 1 * 1e-1)
    assert choice.prefill_s == pytest.approx(0.3)
    assert choice.seconds == pytest.approx(0.5 + 3 * (0.132 + 0.3))


def test_what_takes_longer_to_load_than_to_compute_is_computed():
    warm = Warmth(vram=1, host=1, disk=2, shared=3)
    slow = {"disk_bytes_per_s": 1e5, "shared_bytes_per_s": 5e3}  # 0.2 s a block; 0.1 s to compute
    (choice,) = ranked(candidate("n", warm, rates=replace(RATES, **slow)))
    assert (choice.used, choice.taken) == (4, Warmth(1, 1, 2, 0))
    assert choice.load_s == pytest.approx(1e-3 + 2e-2)
    assert choice.prefill_s == pytest.approx(0.6)
    assert choice.warmth == warm, "it has them all the same"
    assert [each.blocks for each in choice.loads(BLOCK_NBYTES)] == [1, 2]
    slow["disk_bytes_per_s"] = 1e3
    (choice,) = ranked(candidate("n", warm, rates=replace(RATES, **slow)))
    assert (choice.used, choice.load_s, choice.prefill_s) == (2, 1e-3, pytest.approx(0.8))
    # A fast store behind a slow disk: nothing is loaded past what is computed.
    slow["shared_bytes_per_s"] = 1e6
    (choice,) = ranked(candidate("n", warm, rates=replace(RATES, **slow)))
    assert choice.used == 2


def test_a_slow_store_makes_nobody_worse_than_cold():
    slow = replace(RATES, shared_bytes_per_s=10.0)
    cold, warm = candidate("cold"), candidate("warm", Warmth(shared=9), rates=slow)
    seconds = {choice.name: choice.seconds for choice in ranked(cold, warm)}
    assert seconds["warm"] == seconds["cold"]


def test_without_requests_behind_only_its_own_seconds_count():
    (choice,) = ranked(candidate("n", waiting_tokens=500), behind=0.0)
    assert choice.seconds == pytest.approx(0.5 + 1.0)


def test_at_least_one_token_is_computed():
    (choice,) = ranked(candidate("n", Warmth(vram=10)))
    assert choice.prefill_s == pytest.approx(1e-3)


def test_what_was_not_measured_is_taken_as_usual():
    (unmeasured,) = ranked(candidate("n", Warmth(1, 1, 1, 1), rates=Rates()))
    (usual,) = ranked(candidate("n", Warmth(1, 1, 1, 1), rates=DEFAULT_RATES))
    assert unmeasured == usual
    assert unmeasured.seconds > 0


def test_warm_beats_cold_and_warmer_beats_warm():
    order = names(
        candidate("cold"),
        candidate("shared", Warmth(shared=8)),
        candidate("disk", Warmth(disk=8)),
        candidate("vram", Warmth(vram=8)),
        candidate("host", Warmth(host=8, vram=0)),
        candidate("half", Warmth(vram=4)),
    )
    assert order == ["vram", "host", "disk", "half", "shared", "cold"]


def test_a_worker_that_loads_all_it_finds_is_charged_for_it():
    """800 tokens are computed in 0.8 s; the disk would take 8 s."""
    rates = replace(RATES, disk_bytes_per_s=RATES.host_bytes_per_s / 1000)
    warmth = Warmth(disk=8)
    declines, loads = (
        candidate(name, warmth, rates=rates, loads_all=name == "loads")
        for name in ("declines", "loads")
    )
    assert names(declines, loads, candidate("cold"))[-1] == "loads"
    (choice,) = ranked(loads)
    (other,) = ranked(declines)
    assert choice.used == 8
    assert other.used == 0
    assert [each.tier for each in choice.loads(BLOCK_NBYTES)] == [Tier.DISK]
    assert choice.load_s == pytest.approx(sum(e.seconds for e in choice.loads(BLOCK_NBYTES)))
    assert choice.prefill_s < other.prefill_s


def test_a_long_queue_outweighs_warmth():
    warm = candidate("warm", Warmth(vram=9), waiting_tokens=5000)
    assert names(warm, candidate("cold")) == ["cold", "warm"]
    assert names(warm._replace(waiting_tokens=500), candidate("cold")) == ["warm", "cold"]


def test_a_faster_worker_wins_with_the_same_warmth():
    fast = replace(RATES, prefill_tokens_per_s=2000.0)
    assert names(candidate("slow"), candidate("fast", rates=fast)) == ["fast", "slow"]


def test_draining_workers_come_after_all_others():
    order = names(
        candidate("draining and warm", Warmth(vram=9), draining=True),
        candidate("draining", draining=True),
        candidate("busy", waiting_tokens=100_000),
    )
    assert order == ["busy", "draining and warm", "draining"]


def test_cold_prompts_go_round():
    clock = count(1)
    workers = {name: candidate(name) for name in "abc"}
    order = []
    for seed in range(9):
        best = names(*workers.values(), seed=seed)[0]
        workers[best] = workers[best]._replace(last_cold=float(next(clock)))
        order.append(best)
    assert sorted(order[:3]) == ["a", "b", "c"]
    assert order[:3] == order[3:6] == order[6:]


def test_cold_candidates_within_one_percent_are_equals_and_others_are_not():
    late = candidate("late", last_cold=9.0)
    near = candidate("near", waiting_tokens=25)  # 0.8% more
    far = candidate("far", waiting_tokens=35)  # 1.2% more
    assert names(late, near) == ["near", "late"]
    assert names(late, far) == ["late", "far"]


def test_cold_candidates_within_one_millisecond_are_equals():
    rates = replace(RATES, prefill_tokens_per_s=1e6)
    late = candidate("late", rates=rates, last_cold=9.0)
    near = candidate("near", rates=rates, waiting_tokens=900)  # 3 ms and 3.9 ms
    far = candidate("far", rates=rates, waiting_tokens=1100)
    assert names(late, near) == ["near", "late"]
    assert names(late, far) == ["late", "far"]


def test_warm_equals_are_in_random_order_whoever_was_cold_last():
    pair = [candidate(name, Warmth(vram=5), last_cold=at) for name, at in (("a", 1.0), ("b", 9.0))]
    firsts = [names(*pair, seed=seed)[0] for seed in range(200)]
    assert 60 < firsts.count("a") < 140


def test_cold_equals_of_the_same_time_are_in_random_order():
    firsts = [names(candidate("a"), candidate("b"), seed=seed)[0] for seed in range(200)]
    assert 60 < firsts.count("a") < 140


def test_later_tokens_take_longer():
    rates = replace(RATES, doubles_at=500.0)
    (cold,) = ranked(candidate("n", rates=rates))
    (warm,) = ranked(candidate("n", Warmth(vram=5), rates=rates))
    assert cold.prefill_s == pytest.approx(1 + 1000**2 / 1000 / 1000)
    assert warm.prefill_s == pytest.approx(0.5 + (1000**2 - 500**2) / 1000 / 1000)


def test_a_warm_worker_that_decodes_for_many_is_passed_over():
    rates = replace(RATES, decode_drag=0.05)
    warm = candidate("warm", Warmth(vram=5), rates=rates)
    idle = candidate("idle", rates=rates)
    assert names(warm, idle) == ["warm", "idle"]
    assert names(warm._replace(decoding=10), idle) == ["warm", "idle"]
    assert names(warm._replace(decoding=40), idle) == ["idle", "warm"]


def test_a_prefix_is_loaded_from_a_peer_where_that_is_faster():
    rates = replace(RATES, peer_bytes_per_s=1e5)  # 10 ms a block that takes 100 ms to compute
    holder = candidate("holder", Warmth(host=8), rates=rates, lends=8, waiting_tokens=9000)
    idle = candidate("idle", Warmth(host=2), rates=rates)
    best, other = ranked(holder, idle)
    assert (best.name, best.pull_from, best.pull_blocks) == ("idle", "holder", 6)
    assert best.load_s == pytest.approx(2 * 1e-3 + 6 * 1e-2)
    assert best.prefill_s == pytest.approx(0.2)
    assert "600 from holder" in why(best)
    assert not other.pull_from  # nobody loads from itself
    slow = replace(rates, peer_bytes_per_s=5e3)
    best, _ = ranked(holder, idle._replace(rates=slow))
    assert not best.pull_from
    best, _ = ranked(holder._replace(rates=RATES), idle._replace(rates=RATES))
    assert not best.pull_from  # nobody has measured what a peer gives


def test_what_a_node_has_on_its_own_slow_disk_is_not_loaded_from_a_peer():
    """Its daemon would not ask for it: blocks 3 to 8 come from the disk, or are computed."""
    rates = replace(RATES, peer_bytes_per_s=1e5, disk_bytes_per_s=1e3)  # a disk of 1 s a block
    own = Warmth(host=2, disk=6)
    (idle,) = ranked(candidate("idle", own, rates=rates))
    holder = candidate("holder", Warmth(host=8), rates=rates, lends=8, waiting_tokens=9000)
    mate = candidate("mate", own, rates=rates, lends=8, waiting_tokens=9000)
    for lender in (holder, mate):
        best, _ = ranked(lender, candidate("idle", own, rates=rates))
        assert (best.name, best.seconds) == ("idle", idle.seconds)
        assert (best.used, best.pull_from, best.pull_blocks) == (2, "", 0)


def test_what_lies_before_the_blocks_of_a_peer_is_loaded_too():
    rates = replace(RATES, peer_bytes_per_s=1e7, disk_bytes_per_s=5e3)  # 0.2 s, twice computing
    holder = candidate("holder", Warmth(host=8), rates=rates, lends=8, waiting_tokens=9000)
    best, _ = ranked(holder, candidate("idle", Warmth(disk=1), rates=rates))
    assert (best.used, best.pull_from, best.pull_blocks) == (1, "holder", 7)
    assert best.load_s == pytest.approx(0.2 + 7 * 1e-4)
    best, _ = ranked(holder, candidate("idle", Warmth(disk=7), rates=rates))
    assert (best.used, best.pull_from) == (0, ""), "one block of 0.1 s is not worth 1.4 s"


def test_only_as_many_as_asked_for():
    some = [candidate(name, waiting_tokens=100 * n) for n, name in enumerate("abcd")]
    all_of_them = names(*some)
    few = rank(some, prompt_tokens=PROMPT_TOKENS, block_tokens=BLOCK_TOKENS,
               block_nbytes=BLOCK_NBYTES, behind=2.0, tie=Random(0).random, most=2)  # fmt: skip
    assert [choice.name for choice in few] == all_of_them[:2]


def test_a_wait_that_is_no_number_harms_nobody():
    order = names(candidate("odd", wait_s=float("nan")), candidate("good"))
    assert sorted(order) == ["good", "odd"]


def test_nobody_to_choose_from():
    assert ranked() == []


warmths = st.builds(Warmth, *[st.integers(0, 3)] * 4)
candidates = st.lists(
    st.builds(
        Candidate,
        name=st.uuids().map(str),
        warmth=warmths,
        waiting_tokens=st.integers(0, 10_000),
        rates=st.sampled_from([RATES, Rates(), PEERS]),
        last_cold=st.floats(0, 100),
        draining=st.booleans(),
        wait_s=st.floats(0, 10),
        decoding=st.integers(0, 100),
        lends=st.integers(0, 12),
    ),
    max_size=8,
    unique_by=lambda each: each.name,
)


@given(candidates, st.integers(0, 99))
def test_everybody_is_ranked_once_and_nobody_before_one_clearly_better(some, seed):
    choices = ranked(*some, seed=seed)
    assert sorted(choice.name for choice in choices) == sorted(each.name for each in some)
    draining = {each.name: each.draining for each in some}
    for earlier, later in pairwise(choices):
        if draining[earlier.name] == draining[later.name]:
            assert earlier.seconds <= later.seconds + max(0.001, 0.01 * later.seconds) + 1e-9
        else:
            assert draining[later.name]


def test_the_reason_is_one_line_for_people():
    choice = Choice(
        name="n", warmth=Warmth(host=62), seconds=0.2, wait_s=0.0, load_s=0.05, prefill_s=0.12,
        prompt_tokens=2010, block_tokens=32,
    )  # fmt: skip
    assert why(choice) == (
        "1,984 of 2,010 tokens warm (host 1,984): 0.05 s load + 0.12 s prefill + 0.00 s wait"
    )
    assert why(choice._replace(warmth=Warmth(1, 0, 2, 0))).startswith(
        "96 of 2,010 tokens warm (vram 32, disk 64): "
    )
    assert why(choice._replace(warmth=Warmth())).startswith("0 of 2,010 tokens warm: ")
