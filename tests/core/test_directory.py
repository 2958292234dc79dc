"""What the router knows of everybody's blocks."""

from collections import OrderedDict

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, rule

from kvtier.core.blocks import BlockKey
from kvtier.core.directory import Directory, Warmth
from kvtier.core.tiers import Tier

KEYS = [BlockKey(bytes([n])) for n in range(6)]
A, B, C, D, *_ = KEYS


def warmth(directory: Directory, keys: list[BlockKey], *sources: str) -> Warmth:
    return directory.warmth(keys, {"candidate": sources})["candidate"]


def test_blocks_count_in_the_warmest_tier_of_any_source_of_the_candidate():
    directory = Directory()
    directory.snapshot("worker", 1, 0, [(Tier.VRAM, [A])])
    directory.snapshot("node", 1, 0, [(Tier.HOST, [A, B]), (Tier.DISK, [B, C])])
    directory.snapshot("other", 1, 0, [(Tier.SHARED, [C, D])])
    assert warmth(directory, [A, B, C, D], "worker", "node") == Warmth(1, 1, 1, 1)
    assert warmth(directory, [A, B, C, D], "node") == Warmth(host=2, disk=1, shared=1)
    assert warmth(directory, [A, B, C, D], "worker") == Warmth(vram=1)
    assert warmth(directory, [C, D], "worker") == Warmth(shared=2)
    assert Warmth(1, 1, 1, 1).blocks == 4


def test_warmth_ends_at_the_first_gap():
    directory = Directory()
    directory.snapshot("node", 1, 0, [(Tier.HOST, [A, C, D])])
    assert warmth(directory, [A, B, C, D], "node") == Warmth(host=1)
    assert warmth(directory, [B, C, D], "node") == Warmth()
    assert warmth(directory, [], "node") == Warmth()


def test_an_unknown_source_holds_nothing_and_every_candidate_is_answered():
    directory = Directory()
    directory.snapshot("node", 1, 0, [(Tier.HOST, [A])])
    answer = directory.warmth([A], {"one": ["node"], "two": ["nobody"], "three": []})
    assert answer == {"one": Warmth(host=1), "two": Warmth(), "three": Warmth()}
    assert directory.counts("nobody") == {}


def test_deltas_follow_the_snapshot_one_by_one():
    directory = Directory()
    directory.snapshot("node", 1, 5, [(Tier.HOST, [A])])
    assert directory.apply("node", 1, 6, [(Tier.DISK, [A])], [])
    assert directory.apply("node", 1, 7, [(Tier.HOST, [B])], [(Tier.HOST, [A])])
    assert warmth(directory, [A, B], "node") == Warmth(disk=1, host=1)
    assert directory.counts("node") == {Tier.VRAM: 0, Tier.HOST: 1, Tier.DISK: 1}


@pytest.mark.parametrize(
    ("source", "epoch", "seq"),
    [("node", 1, 7), ("node", 2, 6), ("node", 0, 6), ("node", 2, 3), ("nobody", 1, 6)],
    ids=["gap", "later epoch", "earlier epoch", "old number, other epoch", "unknown source"],
)
def test_a_delta_that_does_not_follow_changes_nothing_and_says_so(source, epoch, seq):
    directory = Directory()
    directory.snapshot("node", 1, 5, [(Tier.HOST, [A])])
    assert not directory.apply(source, epoch, seq, [(Tier.SHARED, [B])], [(Tier.HOST, [A])])
    assert warmth(directory, [A, B], "node") == Warmth(host=1)
    assert directory.apply("node", 1, 6, [], [])


def test_a_delta_seen_before_is_ignored():
    directory = Directory()
    directory.snapshot("node", 1, 5, [(Tier.HOST, [A])])
    assert directory.apply("node", 1, 6, [], [(Tier.HOST, [A])])
    for seq in (4, 5, 6):
        assert directory.apply("node", 1, seq, [(Tier.HOST, [A, B]), (Tier.SHARED, [A])], [])
    assert warmth(directory, [A, B], "node") == Warmth()


def test_a_snapshot_replaces_what_the_source_said_and_leaves_the_others():
    directory = Directory()
    directory.snapshot("node", 1, 5, [(Tier.HOST, [A, B])])
    directory.snapshot("other", 1, 5, [(Tier.HOST, [A])])
    directory.snapshot("node", 2, 0, [(Tier.HOST, [A])])
    assert warmth(directory, [A, B], "node") == Warmth(host=1)
    assert warmth(directory, [A, B], "other") == Warmth(host=1)
    assert directory.apply("node", 2, 1, [], [(Tier.HOST, [A])])
    assert warmth(directory, [A], "other") == Warmth(host=1)


def test_a_source_that_goes_takes_its_own_and_leaves_what_it_shared():
    directory = Directory()
    directory.snapshot("node", 1, 5, [(Tier.HOST, [A]), (Tier.SHARED, [A, B])])
    directory.remove("node")
    directory.remove("node")
    assert warmth(directory, [A, B], "node") == Warmth(shared=2)
    assert not directory.apply("node", 1, 6, [], [])


def test_what_one_source_misses_in_the_shared_store_is_gone_for_everybody():
    directory = Directory()
    directory.snapshot("one", 1, 0, [(Tier.SHARED, [A])])
    directory.snapshot("two", 1, 0, [(Tier.SHARED, [A])])
    assert directory.apply("two", 1, 1, [], [(Tier.SHARED, [A, B])])
    assert warmth(directory, [A], "one") == Warmth()


def test_at_most_so_many_shared_blocks_are_remembered():
    directory = Directory(max_shared=2)
    directory.snapshot("node", 1, 0, [(Tier.SHARED, [A, B])])
    assert directory.apply("node", 1, 1, [(Tier.SHARED, [A])], [])  # announced again
    assert directory.apply("node", 1, 2, [(Tier.SHARED, [C])], [])
    assert directory.shared_blocks == 2
    assert warmth(directory, [B]) == Warmth()
    assert warmth(directory, [A]) == Warmth(shared=1)  # asked for
    assert directory.apply("node", 1, 3, [(Tier.SHARED, [D])], [])
    assert warmth(directory, [C]) == Warmth()
    assert warmth(directory, [A]) == Warmth(shared=1)


def test_a_limit_that_remembers_nothing_is_refused():
    with pytest.raises(ValueError, match="max_shared is 0"):
        Directory(max_shared=0)


# --- against a naive model ----------------------------------------------------------------

SOURCES = ["worker", "node", "other"]
LIMIT = 4
keys = st.lists(st.sampled_from(KEYS), max_size=4)
held = st.lists(st.tuples(st.sampled_from(Tier), keys), max_size=3)
sources = st.sampled_from(SOURCES)


class DirectoryMachine(RuleBasedStateMachine):
    """The model keeps one set of (source, tier, key), and the shared keys in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Directory(max_shared=LIMIT)
        self.owned: set[tuple[str, Tier, BlockKey]] = set()
        self.shared: OrderedDict[BlockKey, None] = OrderedDict()
        self.at: dict[str, tuple[int, int]] = {}

    def add(self, source, groups):
        for tier, added in groups:
            for key in added:
                if tier is not Tier.SHARED:
                    self.owned.add((source, tier, key))
                    continue
                self.shared.pop(key, None)
                self.shared[key] = None
                while len(self.shared) > LIMIT:
                    del self.shared[next(iter(self.shared))]

    def forget(self, source):
        self.owned = {each for each in self.owned if each[0] != source}
        self.at.pop(source, None)

    @rule(source=sources, epoch=st.integers(0, 2), seq=st.integers(0, 9), held=held)
    def snapshot(self, source, epoch, seq, held):
        self.directory.snapshot(source, epoch, seq, held)
        self.forget(source)
        self.at[source] = (epoch, seq)
        self.add(source, held)

    @rule(source=sources, added=held, removed=held, step=st.sampled_from([1, 1, 1, 0, -2, 2]),
          other_life=st.sampled_from([0, 0, 0, 1]))  # fmt: skip
    def apply(self, source, added, removed, step, other_life):
        epoch, seq = self.at.get(source, (0, 0))
        done = self.directory.apply(source, epoch + other_life, seq + step, added, removed)
        assert done == (source in self.at and not other_life and step <= 1)
        if not done or step < 1:
            return
        self.at[source] = (epoch, seq + 1)
        for tier, gone in removed:
            for key in gone:
                if tier is Tier.SHARED:
                    self.shared.pop(key, None)
                else:
                    self.owned.discard((source, tier, key))
        self.add(source, added)

    @rule(source=sources)
    def remove(self, source):
        self.directory.remove(source)
        self.forget(source)

    @rule(path=st.lists(st.sampled_from(KEYS), unique=True),
          candidates=st.lists(st.lists(sources, unique=True), max_size=3))  # fmt: skip
    def ask(self, path, candidates):
        named = {str(n): names for n, names in enumerate(candidates)}
        expected = {}
        for name, names in named.items():
            counts = [0] * len(Tier)
            for key in path:
                tiers = [tier for source, tier, held in self.owned
                         if source in names and held == key]  # fmt: skip
                tiers += [Tier.SHARED] * (key in self.shared)
                if not tiers:
                    break
                counts[min(tiers)] += 1
            expected[name] = Warmth(*counts)
        assert self.directory.warmth(path, named) == expected
        for key in reversed(path):
            if key in self.shared:
                self.shared.move_to_end(key)

    @rule(source=sources)
    def count(self, source):
        counts = self.directory.counts(source)
        assert (source in self.at) == bool(counts)
        for tier, blocks in counts.items():
            assert blocks == sum(each[:2] == (source, tier) for each in self.owned)
        assert self.directory.shared_blocks == len(self.shared)


TestDirectory = DirectoryMachine.TestCase
TestDirectory.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
