"""PHD: what it learns, what it gives up first, and that its books stay right."""

import json
from itertools import count, islice
from random import Random

import pytest

from kvtier.core.blocks import BlockKey
from kvtier.core.hazards import BIN_OF, BINS, MAX_AGE, TRUSTED, Hazards, index
from kvtier.core.phd import GHOSTS, PHD
from kvtier.core.policy import LRU, EvictionPolicy, Use
from kvtier.core.victims import FRESH, HIDDEN, SAMPLE
from kvtier.testing.policies import PolicyTests, path


class TestPHD(PolicyTests):
    @pytest.fixture
    def policy(self) -> PHD:
        return PHD()


def prompt(name: int, blocks: int) -> list[BlockKey]:
    return [BlockKey(name.to_bytes(8, "big") + bytes([n])) for n in range(blocks)]


class Cache:
    """A tier of some blocks, used by whole prompts at given times."""

    def __init__(self, policy: EvictionPolicy, capacity: int) -> None:
        self.policy = policy
        self.capacity = capacity
        self.requests = 0

    def ask(self, keys: list[BlockKey], now: float, output: int | None = None) -> int:
        """Leading blocks that were there."""
        hits = next((n for n, key in enumerate(keys) if key not in self.policy), len(keys))
        self.requests += 1
        self.policy.touch(keys, Use(now, self.requests, output))
        over = len(self.policy) - self.capacity
        victims = [key for key, _ in zip(self.policy.coldest(), range(over), strict=False)]
        for key in victims:
            self.policy.remove(key)
        return hits


def returning_users(policy: EvictionPolicy, capacity: int, seed: int = 0) -> float:
    """Each user asks twice, a minute apart; in between many ask once. The share of hits."""
    rng, cache, hits, asked = Random(seed), Cache(policy, capacity), 0, 0
    coming: list[tuple[float, int]] = []
    for second in range(3000):
        now = float(second)
        coming.append((now + 55 + 10 * rng.random(), second))
        cache.ask(prompt(second, 6), now)  # who comes back: a prompt of 6 blocks
        for n in range(3):
            cache.ask(prompt(1_000_000 + 3 * second + n, 20), now)  # who does not: 20
        while coming and coming[0][0] <= now:
            _, user = coming.pop(0)
            hits += cache.ask(prompt(user, 6), now)
            asked += 6
    return hits / asked


def test_learns_which_prompts_come_back_where_lru_has_forgotten_them_all():
    assert returning_users(LRU(), capacity=500) == 0.0  # they live 8 s
    assert returning_users(PHD(), capacity=500) > 0.8


def test_what_was_learned_serves_another_life():
    first = PHD()
    returning_users(first, capacity=500)
    saved = json.loads(json.dumps(first.save()))  # plain data
    blind, taught = PHD(), PHD()
    taught.restore(saved)
    for policy in (blind, taught):
        cache = Cache(policy, 500)
        for second in range(60):
            cache.ask(prompt(second, 6), float(second))
            for n in range(3):
                cache.ask(prompt(1_000_000 + 3 * second + n, 20), float(second))
    there = [sum(prompt(user, 6)[0] in each for user in range(55)) for each in (blind, taught)]
    assert there[0] < 30
    assert there[1] > 50


@pytest.mark.parametrize(
    "state",
    [
        None, [], {}, {"version": 0}, {"version": 1, "hit": [], "end": []},
        {"version": 1, "hit": [[0.0] * BINS] * 37, "end": [[0.0] * 3] * 37},
        {"version": 1, "hit": [[-1.0] * BINS] * 37, "end": [[0.0] * BINS] * 37},
        {"version": 1, "hit": [[float("nan")] * BINS] * 37, "end": [[0.0] * BINS] * 37},
        {"version": 1, "hit": [["0"] * BINS] * 37, "end": [[0.0] * BINS] * 37},
        {"version": 1, "uses": -1, "hit": [[0.0] * BINS] * 37, "end": [[0.0] * BINS] * 37},
        {"version": 1, "uses": True, "hit": [[0.0] * BINS] * 37, "end": [[0.0] * BINS] * 37},
    ],
)  # fmt: skip
def test_a_bad_state_is_refused_and_nothing_changes(state):
    policy = PHD()
    before = policy.save()
    with pytest.raises(ValueError):
        policy.restore(state)
    assert policy.save() == before


def test_pieces_of_a_request_are_one_use():
    """A prompt that is found, loaded and written over seconds was not asked for twice."""
    policy = PHD()
    for n in range(400):
        keys = prompt(n, 30)
        for step, end in enumerate((3, 3, 17, 17, 29, 30)):
            policy.touch(keys[:end], Use(n * 100.0 + 5 * step, n))
        policy.touch(keys, Use(n * 100.0 + 40, n, 300))
    assert not any(map(any, policy.save()["hit"]))
    once = PHD()
    for n in range(400):
        once.touch(prompt(n, 30), Use(n * 100.0, n, 300))
    count = [sum(map(sum, each.save()["end"])) for each in (policy, once)]
    assert count[0] == pytest.approx(count[1], rel=0.02)
    policy.check()


def test_a_block_lost_in_the_middle_leaves_the_rest_in_order():
    policy = PHD()
    keys = prompt(1, 9)
    policy.touch(keys, Use(0.0, 1))
    for gone in (4, 0, 8):
        policy.remove(keys[gone])
        policy.check()
    left = [key for n, key in enumerate(keys) if n not in {4, 0, 8}]
    assert [*policy.coldest()] == left[::-1]
    policy.touch(keys, Use(50.0, 2))  # all come back
    policy.check()
    assert [*policy.coldest()] == keys[::-1]


def test_the_books_stay_right_whatever_comes_and_goes():
    rng = Random(5)
    policy = PHD()
    now = 0.0
    for n in range(3000):
        now += rng.choice([0.0, 1.0, 100.0, 4000.0])
        keys = path(*(rng.randrange(3) for _ in range(rng.randint(1, 8))))
        some = [key for key in keys if key in policy or rng.random() < 0.9]
        policy.touch(some, Use(now, rng.choice([n, n - 1, None]), rng.choice([None, 10, 500])))
        while len(policy) > 60:
            policy.remove(next(iter(policy.coldest())))
        if rng.random() < 0.2 and keys[0] in policy:
            policy.remove(keys[0])
        if not n % 10:
            policy.check()


def test_without_a_clock_it_is_lru():
    """Then there is no age to learn from, and runs of one class must not starve another."""
    rng = Random(3)
    caches = [Cache(policy, 90) for policy in (PHD(), LRU())]
    hits = [0, 0]
    for n in range(2000):
        name = rng.randrange(40)
        keys = prompt(name, 1 + name % 9) if n % 3 else prompt(1000 + n, 6)
        for i, cache in enumerate(caches):
            hits[i] += cache.ask(keys, 17.0)
    assert hits[0] >= 0.99 * hits[1] > 100


@pytest.mark.parametrize("seed", range(4))
def test_it_gives_up_what_lru_would_until_enough_was_seen(seed):
    """Prompts that share beginnings, come back, end early and go on: the very same hits."""
    rng = Random(seed)
    policy = PHD()
    caches = [Cache(policy, 200), Cache(LRU(), 200)]
    hits, now = [0, 0], 0.0
    while policy._hazards.uses < TRUSTED:
        now += rng.expovariate(0.3)
        keys = path(rng.randrange(30), *(rng.randrange(3) for _ in range(rng.randint(0, 12))))
        for i, cache in enumerate(caches):
            hits[i] += cache.ask(keys, now)
        assert hits[0] == hits[1]
        policy.check()
    assert hits[0] > 100


def test_what_was_seen_is_counted_over_a_restart():
    first, blind, taught = PHD(), PHD(), PHD()
    returning_users(first, capacity=500)
    saved = first.save()
    blind.restore({**saved, "uses": 3})
    taught.restore(saved)
    assert blind._hazards.uses == 3
    assert taught._hazards.uses == first._hazards.uses > TRUSTED
    del saved["uses"]  # as an earlier version saved it: it had learned something
    blind.restore(saved)
    assert blind._hazards.uses == TRUSTED


def test_memory_is_bounded():
    """Ghosts and open observations do not grow with the requests."""
    cache = Cache(PHD(), 100)
    for n in range(GHOSTS // 2):
        cache.ask(prompt(n, 4), float(n))
    assert len(cache.policy._ghosts) == GHOSTS
    assert all(len(each.open) == MAX_AGE for each in cache.policy._hazards._classes)


def test_the_index_prefers_what_is_due_soon():
    """Uses come 60 s after the one before, and never later than 120 s."""
    hazards = Hazards(1)
    for n in range(2000):
        hazards.opened(0, n)
        if n >= 60:
            hazards.closed(0, n - 60, n)
    hazards.rebuild_pool()
    hazards.rebuild(0, 2000)
    just, due, late = (hazards.worth[b] for b in (0, 18, 25))  # 0 s, 51 s, 183 s
    assert due > 3 * just
    assert due > 3 * late


def test_the_index_of_an_even_hazard_is_even():
    """Without memory in the hazard there is none in the worth: ages are alike."""
    widths = [2.0, *(2.0 * 1.2 ** (j - 1) * 0.2 for j in range(1, BINS))]
    worth = index([min(1.0, 0.001 * width) for width in widths[:30]] + [0.0] * (BINS - 30))
    assert max(worth[:20]) < 1.2 * min(worth[:20])


def test_observations_end_after_an_hour_without_a_hit():
    hazards = Hazards(1)
    hazards.opened(0, 10)
    hazards.opened(0, 2000)
    hazards.closed(0, 10, 10 + MAX_AGE)  # too late: it was counted as no use
    hazards.closed(0, 2000, 2000 + MAX_AGE - 1)
    saved = hazards.save()
    assert sum(saved["hit"][0]) == 1
    assert sum(saved["end"][0]) == 2
    hazards.opened(0, 9000)
    hazards.rebuild(0, 90_000)  # a long silence
    assert sum(map(sum, hazards.save()["end"])) == pytest.approx(3 * 0.96)


def test_blocks_that_came_one_by_one_are_one_run_once_a_prompt_used_them():
    """As a tier gets them from another; what a path costs must not grow with its square."""
    policy, keys = PHD(), prompt(1, 200)
    for key in keys:
        policy.touch([key])
    policy.touch(keys, Use(5.0, 1))
    policy.check()
    runs = {id(policy._forest.of[key]) for key in keys}
    assert len(runs) <= 2, "the first block may be taken for a shared prefix"
    assert [*policy.coldest()] == keys[::-1]


def test_paths_in_any_order_and_with_repeats_never_tangle_it() -> None:
    """A sliding window is asked for from its end, and a caller may name a block twice."""
    keys = [BlockKey(bytes([n]) * 16) for n in range(9)]
    for seed in range(60):
        rng, policy, now, request = Random(seed), PHD(), 0.0, 0
        for _ in range(120):
            now += rng.random() * 9
            draw = rng.random()
            if draw < 0.6:
                path = [rng.choice(keys) for _ in range(rng.randint(1, 6))]
                if rng.random() < 0.3:
                    path.sort(reverse=rng.random() < 0.5)
                request += rng.random() < 0.7
                policy.touch(path, Use(now, request if rng.random() < 0.8 else None))
            elif draw < 0.8:
                policy.remove(rng.choice(keys))
            else:
                order = [*policy.coldest()]
                assert len(order) == len({*order}) == len(policy)
                if order:
                    policy.remove(order[0])
        for key in keys:
            policy.remove(key)
        assert len(policy) == 0
        assert [*policy.coldest()] == []


def test_a_path_that_goes_through_whole_runs_is_as_any_other() -> None:
    """What `through` finds, `walk` would have found as well, and changed nothing."""
    keys, whole = [prompt(name, 9) for name in range(3)], 0
    for seed in range(60):
        rng, policy, twin, now, request = Random(seed), PHD(), PHD(), 0.0, 0
        twin._forest.through = lambda path: ([], 0)  # type: ignore[method-assign]
        for _ in range(200):
            now += rng.random() * 9
            if rng.random() < 0.7:
                path = keys[0][: rng.randint(0, 9)] + rng.choice(keys)[: rng.randint(1, 9)]
                request += rng.random() < 0.7
                use = Use(now, request if rng.random() < 0.7 else None)
                whole += policy._forest.through(path)[1] == len(path)
                for each in (policy, twin):
                    each.touch(path, use)
            elif due := [*islice(policy.coldest(), rng.randint(1, 4))]:
                assert due == [*islice(twin.coldest(), len(due))]
                policy.remove(*due)
                twin.remove(*due)
        assert [*policy.coldest()] == [*twin.coldest()]
        assert policy.save() == twin.save()
        policy.check()
    assert whole > 100  # or this shows nothing


def test_a_search_that_meets_many_runs_that_cannot_go_takes_few_samples(monkeypatch):
    cache = Cache(PHD(), 6000)
    returning_users(cache.policy, capacity=6000)
    policy, samples = cache.policy, 0
    sampled = policy._victims._sampled

    def counted(*args):
        nonlocal samples
        samples += 1
        return sampled(*args)

    monkeypatch.setattr(policy._victims, "_sampled", counted)
    met = [key for key, _ in zip(policy.coldest(), range(1000), strict=False)]
    assert len(set(met)) == 1000
    assert len({id(policy._forest.of[key]) for key in met}) > 3 * FRESH  # one sample each, before
    assert samples <= FRESH
    # Where everything is pinned it looks at a bounded number of runs, and finds nothing.
    looked: list[BlockKey] = []
    assert not [*policy.coldest(lambda key: not looked.append(key))]
    assert len(looked) == HIDDEN < len(policy._forest.leaves)


def test_a_search_goes_from_the_run_that_is_worth_least_to_the_next() -> None:
    """Few leaves are all compared, and from one sample to the next no more than has changed."""
    policy = PHD()
    returning_users(policy, capacity=400)
    victims, hazards, forest = policy._victims, policy._hazards, policy._forest
    for key in [*islice(policy.coldest(), len(policy) - 100)]:
        policy.remove(key)
    for n in range(40):
        now = 3000.0 + 7 * n
        policy.touch([*prompt(5_000_000, 3), *prompt(5_000_001 + n % 25, 2)], Use(now, 10**6 + n))
        assert not policy._duel.follow_lru
        assert FRESH < len(forest.leaves) < 2 * SAMPLE
        runs = {run for _, run in forest.of.items()}
        below = {run: run.children for run in runs}
        expected: list[BlockKey] = []
        while below:
            worst = min(
                (run for run, children in below.items() if not children),
                key=lambda run: (hazards.worth[run.cls * BINS + bin_of(now - run.t)], run.seq),
            )
            del below[worst]
            expected += reversed(worst.blocks)
            above = forest.parent(worst)
            if above is not None:
                below[above] -= 1
        victims._victim = None  # one that was chosen before would be the first
        assert [*policy.coldest()] == expected
        policy.remove(expected[0])


def test_a_search_names_a_run_once_that_was_the_least_recent_between_two_samples() -> None:
    policy, requests = PHD(), count()
    gone, above, below, other, late = ([BlockKey(bytes([n]) * 16)] for n in range(5))

    def used(keys: list[BlockKey], times: int = 1) -> None:
        for _ in range(times):
            policy.touch(keys, Use(0.0, next(requests)))

    used(gone, 128)  # one look for the least recent passes over 64 such uses, and one more sees 64
    policy.remove(*gone)
    used(above)
    used(above + below)
    used(other)
    used(late, 70)
    assert [*policy.coldest()] == below + above + other + late


def bin_of(age: float) -> int:
    return BIN_OF[int(age)] if age < MAX_AGE else BINS - 1


def test_a_whole_order_has_every_key_once_and_no_parent_before_its_child():
    policy = PHD()
    returning_users(policy, capacity=3000)
    order = [*policy.coldest()]
    assert len(order) == len({*order}) == len(policy)
    place = {key: i for i, key in enumerate(order)}
    for key in order:
        below = BlockKey(key[:8] + bytes([key[8] + 1]))
        assert place.get(below, -1) < place[key]
