"""The published policies: what all owe a tier, and on single keys the hits of libcachesim."""

from collections.abc import Callable, Sized
from itertools import accumulate, islice
from random import Random

import libcachesim
import pytest

from kvtier.core.blocks import BlockKey
from kvtier.core.policies import POLICIES
from kvtier.core.policies.gdsf import GDSF
from kvtier.core.policies.lirs import LIRS
from kvtier.core.policies.s3fifo import S3FIFO
from kvtier.core.policies.wtinylfu import WTinyLFU
from kvtier.core.policy import EvictionPolicy, PolicyFactory, Use
from kvtier.testing.policies import PolicyTests, path

CLASSICS = [name for name in POLICIES if name not in ("phd", "lru")]
WORKLOADS = ((0.8, 0, 100), (1.0, 50, 200), (0.7, 20, 500))  # Zipf's exponent, drift, capacity


class TestClassics(PolicyTests):
    @pytest.fixture(params=CLASSICS)
    def policy(self, request: pytest.FixtureRequest) -> EvictionPolicy:
        return POLICIES[request.param]()

    def test_what_it_remembers_has_a_bound(self, policy: EvictionPolicy) -> None:
        hits(lambda: policy, [*range(20_000), *range(19_000, 20_000)] * 2, 100)
        entries = sum(len(each) for each in vars(policy).values() if isinstance(each, Sized))
        assert len(policy) == 100
        assert entries < 20 * 100

    def test_the_deep_end_goes_for_its_beginning(self, policy: EvictionPolicy) -> None:
        """A path of which the beginning alone is cold gives up its deep end."""
        whole = path(1, 2, 3)
        policy.touch(whole[:1], Use(0.0, 0))
        for n in range(2, 30):
            policy.touch(path(n), Use(float(n), n))
        for key in whole[1:]:  # below it, though it is not used
            policy.touch([key], Use(50.0, 50))
        policy.touch(path(99), Use(51.0, 51))
        policy.touch(whole, Use(52.0, 52))
        order = [*policy.coldest()]
        assert order.index(whole[2]) < order.index(whole[1]) < order.index(whole[0])


@pytest.mark.parametrize("name", [name for name in CLASSICS if name != "wtinylfu"])
def test_victims_that_stay_are_the_next_ones(name: str) -> None:
    """What was asked for and not given up goes first. (W-TinyLFU compares what has changed.)"""
    policy = POLICIES[name]()
    for n in range(40):
        policy.touch(path(n, 1), Use(float(n), n))
    due = [*islice(policy.coldest(), 10)]
    policy.touch(path(100, 1), Use(100.0, 100))
    assert [*islice(policy.coldest(), 10)] == due


@pytest.mark.parametrize("name", ["s3fifo", "lirs", "wtinylfu"])
def test_a_prompt_longer_than_the_tier_leaves_what_is_used_often(name: str) -> None:
    """It makes room for itself out of itself, as its blocks would one at a time."""
    policy, often = POLICIES[name](), [path(n) for n in range(60)]
    requests = [
        *often * 4,
        *(path(100, n) for n in range(60)),
        *often,
        path(*range(200, 250), *[1] * 150),
    ]
    for n, keys in enumerate(requests):
        policy.touch(keys, Use(float(n), n))
        for victim in [*islice(policy.coldest(), max(0, len(policy) - 100))]:
            policy.remove(victim)
    assert sum(key in policy for (key,) in often) > 50


def zipf(exponent: float, drift: int, length: int = 20_000, seed: int = 1) -> list[int]:
    """Keys by a power law; every `drift` uses the popular ones move on by three."""
    weights = [*accumulate((rank + 1) ** -exponent for rank in range(3000))]
    drawn = Random(seed).choices(range(3000), cum_weights=weights, k=length)
    return [key + (3 * (n // drift) if drift else 0) for n, key in enumerate(drawn)]


def hits(make: PolicyFactory, keys: list[int], capacity: int) -> list[bool]:
    """Which uses found their key in a tier that has no prefixes."""
    policy, found = make(), []
    for n, number in enumerate(keys):
        key = BlockKey(number.to_bytes(8, "big"))
        found.append(key in policy)
        policy.touch([key], Use(float(n), n))
        for victim in [*islice(policy.coldest(), max(0, len(policy) - capacity))]:
            policy.remove(victim)
    return found


def theirs(cache: libcachesim.CacheBase, keys: list[int]) -> list[bool]:
    found = []
    for key in keys:
        request = libcachesim.Request()
        request.obj_id, request.obj_size = key, 1
        found.append(cache.get(request))
    return found


def share(found: list[bool]) -> float:
    return sum(found) / len(found)


@pytest.mark.parametrize(("exponent", "drift", "capacity"), WORKLOADS)
class TestLibCacheSim:
    @pytest.mark.parametrize("name", ["lru", "sieve", "arc"])
    def test_the_same_uses_are_hits(
        self, name: str, exponent: float, drift: int, capacity: int
    ) -> None:
        reference = {"lru": libcachesim.LRU, "sieve": libcachesim.Sieve, "arc": libcachesim.ARC}
        keys = zipf(exponent, drift)
        expected = theirs(reference[name](capacity, hashpower=12), keys)
        assert hits(POLICIES[name], keys, capacity) == expected

    def test_s3fifo_once_it_is_full(self, exponent: float, drift: int, capacity: int) -> None:
        """libcachesim fills the main queue before the cache is full for the first time."""

        class FilledAlike(S3FIFO):
            full = False

            def _next(self) -> tuple[BlockKey, float] | None:
                self.full = True
                return super()._next()

            def _admit(self, key: BlockKey, known: int) -> None:
                early = not self.full and len(self._small) >= capacity // 10
                super()._admit(key, 1 if early else known)

        keys = zipf(exponent, drift)
        expected = theirs(libcachesim.S3FIFO(capacity, hashpower=12), keys)
        assert hits(FilledAlike, keys, capacity) == expected
        assert share(hits(S3FIFO, keys, capacity)) == pytest.approx(share(expected), abs=0.005)

    @pytest.mark.parametrize(
        ("make", "reference", "tolerance"),
        [
            # A few victims differ, the reason was not found; test_gdsf_is_its_definition is ours.
            (GDSF, libcachesim.GDSF, 0.002),
            # Other bounds of the ghosts, and other keys become low while the cache fills.
            (lambda: LIRS(0.01), libcachesim.LIRS, 0.02),
            # They count in a sketch and age it otherwise.
            (WTinyLFU, libcachesim.WTinyLFU, 0.03),
        ],
        ids=["gdsf", "lirs", "wtinylfu"],
    )
    def test_as_many_uses_are_hits(
        self,
        make: PolicyFactory,
        reference: Callable[..., libcachesim.CacheBase],
        tolerance: float,
        exponent: float,
        drift: int,
        capacity: int,
    ) -> None:
        keys = zipf(exponent, drift)
        expected = share(theirs(reference(capacity, hashpower=12), keys))
        assert share(hits(make, keys, capacity)) == pytest.approx(expected, abs=tolerance)


def test_gdsf_is_its_definition() -> None:
    """Word for word, over a dictionary: the lowest of clock + uses, the oldest of those."""
    keys, capacity = zipf(0.8, 0, 4000), 100
    here: dict[int, tuple[float, int, int]] = {}
    clock, found = 0.0, []
    for n, key in enumerate(keys):
        found.append(key in here)
        if key not in here and len(here) == capacity:
            victim = min(here, key=here.__getitem__)
            clock = here.pop(victim)[0]
        uses = here[key][2] + 1 if key in here else 1
        here[key] = (clock + uses, n, uses)
    assert hits(GDSF, keys, capacity) == found


def test_lirs_is_its_definition() -> None:
    """Word for word, over lists: the stack, the queue of high keys, and two ghosts for each key."""
    keys, capacity, found = zipf(0.9, 40, 5000), 40, []
    stack: list[int] = []  # the oldest first
    low: list[int] = []
    high: list[int] = []
    ghosts: list[int] = []
    for key in keys:
        here = key in low or key in high
        found.append(here)
        recent = key in stack
        ghosts = [each for each in ghosts if each in stack and each != key]
        if not here and len(low) + len(high) == capacity:
            ghosts = [*ghosts, *(each for each in high[:1] if each in stack)][-2 * capacity :]
            del high[0]
        stack = [each for each in stack if each in low + high + ghosts]
        size = len(low) + len(high) + (not here)
        most_low = max(1, size - max(1, int(0.05 * size)))
        if recent or (not here and len(low) < most_low):
            low.append(key)
        else:
            high.append(key)
        low, high = [*dict.fromkeys(low)], [each for each in high if each not in low]
        high = [each for each in high if each != key] + [key] * (key in high)
        stack = [each for each in stack if each != key] + [key]
        while len(low) > most_low or stack[0] not in low:
            bottom = stack.pop(0)
            if bottom in low:
                low.remove(bottom)
                high.append(bottom)
    assert hits(LIRS, keys, capacity) == found
