import pytest

from kvtier.core.audience import Warmth
from kvtier.core.blocks import BlockKey
from kvtier.core.learned import Sample
from kvtier.core.tiers import Tier
from kvtier.router import sent as sent_module
from kvtier.router.placement import Prompt, _at_least
from kvtier.router.sent import MOST_ENDED, SPECULATIVE_S, Computed, Load, Speculation
from kvtier.wire.pb import worker_pb2

KEYS = [BlockKey(i.to_bytes(16, "big")) for i in range(10)]
OTHER = [BlockKey(i.to_bytes(16, "big")) for i in range(100, 110)]


def test_what_was_sent_is_expected_for_a_while():
    speculation = Speculation()
    speculation.add("a", KEYS[:6], now=0.0)
    assert speculation.blocks("a", KEYS, now=SPECULATIVE_S - 0.01) == 6
    assert speculation.blocks("a", OTHER, now=0.0) == 0
    assert speculation.blocks("b", KEYS, now=0.0) == 0
    assert speculation.blocks("a", KEYS, now=SPECULATIVE_S) == 0


def test_what_is_sent_again_is_expected_for_longer():
    speculation = Speculation()
    speculation.add("a", KEYS[:6], now=0.0)
    speculation.add("a", KEYS[:3], now=1.0)
    assert speculation.blocks("a", KEYS, now=1.5) == 6
    assert speculation.blocks("a", KEYS, now=2.5) == 3
    assert speculation.blocks("a", KEYS, now=3.0) == 0


def test_expectations_are_bounded(monkeypatch):
    monkeypatch.setattr(sent_module, "MAX_SPECULATED", 12)
    speculation = Speculation()
    speculation.add("a", KEYS, now=0.0)
    speculation.add("b", OTHER, now=0.0)
    assert speculation.blocks("a", KEYS, now=0.1) == 0  # made room
    assert speculation.blocks("b", OTHER, now=0.1) == 10
    speculation.add("c", [*KEYS, *OTHER], now=0.2)
    assert speculation.blocks("c", [*KEYS, *OTHER], now=0.2) == 12


def test_a_crowd_that_is_over_is_forgotten_by_and_by():
    speculation = Speculation()
    for n in range(50):
        speculation.add("a", [KEYS[n % 10]], now=0.0)
    assert speculation.blocks("a", KEYS, now=SPECULATIVE_S) == 0
    for n in range(20):
        speculation.add("b", [], now=SPECULATIVE_S + n)
    assert not speculation._until
    assert len(speculation._order) <= 3


def test_load_counts_until_it_is_told_or_time_is_up():
    load = Load(lambda: 0.0)
    first = load.send("a", 100, expires=None)
    load.send("a", 30, expires=2.0)
    load.send("b", 5, expires=1.0)
    assert load.waiting("a", 0.0) == 130
    assert load.waiting("a", 2.0) == 100
    assert load.waiting("b", 2.0) == 0
    first.began()
    first.began()  # only once
    assert load.waiting("a", 3.0) == 0


def test_what_a_worker_said_before_a_first_token_is_no_wait_any_more():
    """Its next word comes up to half a second later; the client that was served asks at once."""
    now = [0.0]
    load = Load(lambda: now[0])
    first, second = load.send("a", 100, expires=None), load.send("a", 30, expires=None)
    other = load.send("b", 7, expires=None)
    now[0] = 1.0
    first.began()
    other.began()
    assert load.said("a", 150, heard_s=0.9) == 50
    assert load.said("a", 60, heard_s=0.9) == 0
    assert load.said("c", 60, heard_s=0.9) == 60
    now[0] = 1.3
    second.began()
    assert load.said("a", 150, heard_s=0.9) == 20
    assert load.said("a", 150, heard_s=1.1) == 120
    assert load.said("a", 150, heard_s=1.4) == 150
    load.send("a", 40, expires=1.5)
    assert load.waiting("a", 1.6) == 0, "nobody follows it"
    assert load.said("a", 150, heard_s=1.4) == 150, "the worker says whether it still waits"
    for _ in range(2 * MOST_ENDED):
        load.send("b", 1, expires=None).began()
    assert load.said("b", 10 * MOST_ENDED, heard_s=1.2) == 9 * MOST_ENDED, "so many are known"


def test_what_is_computed_of_a_prompt_is_no_wait():
    now = [0.0]
    load = Load(lambda: now[0])
    first = load.send("a", 100, expires=None)
    second = load.send("a", 30, expires=None)
    assert load.waiting("a", 1.0, Computed(60.4, heard_s=1.0)) == 70
    assert load.waiting("a", 1.0, Computed(1e9, heard_s=1.0)) == 0, "others have sent more"
    now[0] = 1.5
    first.began()
    assert load.waiting("a", 2.0, Computed(60.4, heard_s=1.0)) == 30, "it was of the first"
    assert load.waiting("a", 2.0, Computed(10.0, heard_s=2.0)) == 20
    second.began()
    assert load.waiting("a", 3.0, Computed(10.0, heard_s=2.0)) == 0
    load.send("a", 50, expires=None)
    assert load.waiting("a", 3.0, Computed(20.0, heard_s=1.2)) == 50, "it was of one before"
    assert load.waiting("a", 4.0, Computed(5.0, heard_s=4.0)) == 45
    load.keep_only({"b"})
    assert load.waiting("a", 4.0, Computed(5.0, heard_s=1.0)) == 45, "nothing is known of it"


def test_expected_blocks_are_taken_from_the_coldest_count_last():
    warmth = Warmth(vram=2, host=3, disk=1, shared=4)
    assert _at_least(warmth, 1) == warmth
    assert _at_least(warmth, 4) == Warmth(4, 1, 1, 4)
    assert _at_least(warmth, 7) == Warmth(7, 0, 0, 3)
    assert _at_least(warmth, 20) == Warmth(20, 0, 0, 0)


def test_keys_are_computed_once_for_each_kind_of_worker():
    prompt = Prompt("m", list(range(16)))
    small, large = (worker_pb2.WorkerInfo(block_tokens=n) for n in (4, 8))
    assert prompt.keys(small, b"a") is prompt.keys(worker_pb2.WorkerInfo(block_tokens=4), b"a")
    assert len(prompt.keys(small, b"a")) == 4
    assert len(prompt.keys(large, b"a")) == 2
    assert prompt.keys(small, b"b") != prompt.keys(small, b"a")


def test_the_first_token_teaches_what_the_worker_did():
    samples = []
    sent = Load(lambda: 0.0).send("a", 100, expires=None)
    sent.teach = samples.append
    restored = [worker_pb2.TierTokens(tier=1, tokens=32), worker_pb2.TierTokens(tier=2, tokens=64)]
    started = worker_pb2.Started(
        computed_tokens=50, prefill_s=0.5, restore_s=0.1, restored=restored
    )
    info = worker_pb2.WorkerInfo(kv_bytes_per_token=1000)
    sent.told(started, info)
    assert samples == [Sample(50, 0.5, ((Tier.HOST, 64_000),), 0.1)]
    # 50 tokens from 96 on, where one at 200 takes twice as long as the first.
    started.prompt_tokens, info.doubles_at = 146, 200
    sent.told(started, info)
    assert samples[1].computed_tokens == pytest.approx(50 + (146**2 - 96**2) / 400)
