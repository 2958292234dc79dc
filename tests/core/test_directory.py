"""What the router knows of everybody's blocks."""

import hashlib
import random
import unittest.mock

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvtier.core import segments, shapes, strips
from kvtier.core.audience import Warmth
from kvtier.core.blocks import BEGINS, BlockKey
from kvtier.core.directory import STEP, Directory, Filling, Told
from kvtier.core.tiers import Tier

KEYS = [BlockKey(bytes([n + 1]) * 16) for n in range(12)]
A, B, C, D, *_ = KEYS
PATH = [BlockKey(hashlib.sha256(bytes([n % 256, n // 256])).digest()[:16]) for n in range(1200)]


def told(tier: Tier, keys: list[BlockKey], before: BlockKey = BEGINS) -> Told:
    return Told(tier, b"".join(keys), before)


def tidy(directory: Directory) -> None:
    """All that can wait."""
    while directory.tidy():
        pass


def warmth(directory: Directory, keys: list[BlockKey], *sources: str) -> Warmth:
    return directory.warmth(keys, {"candidate": list(sources)})["candidate"]


def test_blocks_count_in_the_warmest_tier_of_any_source_of_the_candidate():
    directory = Directory()
    directory.snapshot("worker", 1, 0, [told(Tier.VRAM, [A])])
    directory.snapshot("node", 1, 0, [told(Tier.HOST, [A, B]), told(Tier.DISK, [B, C])])
    directory.snapshot("other", 1, 0, [told(Tier.SHARED, [C, D])])
    assert warmth(directory, [A, B, C, D], "worker", "node") == Warmth(1, 1, 1, 1)
    assert warmth(directory, [A, B, C, D], "node") == Warmth(host=2, disk=1, shared=1)
    assert warmth(directory, [A, B, C, D], "worker") == Warmth(vram=1)
    assert warmth(directory, [C, D], "worker") == Warmth(shared=2)
    assert Warmth(1, 1, 1, 1).blocks == 4


def test_warmth_ends_at_the_first_gap():
    directory = Directory()
    directory.snapshot("node", 1, 0, [told(Tier.HOST, [A, C, D])])
    assert warmth(directory, [A, B, C, D], "node") == Warmth(host=1)
    assert warmth(directory, [B, C, D], "node") == Warmth()
    assert warmth(directory, [], "node") == Warmth()


def test_an_unknown_source_holds_nothing_and_every_candidate_is_answered():
    directory = Directory()
    directory.snapshot("node", 1, 0, [told(Tier.HOST, [A])])
    answer = directory.warmth([A], {"one": ["node"], "two": ["nobody"], "three": []})
    assert answer == {"one": Warmth(host=1), "two": Warmth(), "three": Warmth()}
    assert directory.counts("nobody") == {}


def test_deltas_follow_the_snapshot_one_by_one():
    directory = Directory()
    directory.snapshot("node", 1, 5, [told(Tier.HOST, [A])])
    assert directory.apply("node", 1, 6, [told(Tier.DISK, [A])], [])
    assert directory.apply("node", 1, 7, [told(Tier.HOST, [B])], [told(Tier.HOST, [A])])
    assert warmth(directory, [A, B], "node") == Warmth(disk=1, host=1)
    assert directory.counts("node") == {Tier.VRAM: 0, Tier.HOST: 1, Tier.DISK: 1}


def test_what_comes_late_after_a_remove_counts_for_nothing():
    directory = Directory()
    directory.snapshot("node", 1, 5, [told(Tier.HOST, [A])])
    assert directory.position("node") == (1, 5)
    directory.remove("node")
    assert directory.position("node") is None
    for seq in (5, 6, 7):
        assert not directory.apply(
            "node", 1, seq, [told(Tier.HOST, [A]), told(Tier.SHARED, [B])], []
        )
    assert warmth(directory, [A, B], "node") == Warmth()
    tidy(directory)
    assert directory.blocks == 0
    directory.snapshot("node", 2, 0, [told(Tier.HOST, [A])])
    assert not directory.apply("node", 1, 1, [told(Tier.HOST, [B])], [])  # of its former life
    assert warmth(directory, [A, B], "node") == Warmth(host=1)


def test_nodes_that_come_and_go_leave_nothing_behind():
    directory = Directory()
    for life in range(300):
        name = f"node {life}"
        directory.snapshot(name, life, 0, [told(Tier.HOST, KEYS)])
        assert warmth(directory, KEYS, name, "other").host == len(KEYS)
        directory.remove(name)
        tidy(directory)
    assert directory.blocks == 0
    directory.snapshot("last", 1, 0, [told(Tier.HOST, [A])])
    answer = directory.warmth([A, B], {name: [name] for name in ("last", "node 299", "other")})
    assert [each.host for each in answer.values()] == [1, 0, 0]
    directory.check()


@pytest.mark.parametrize(
    ("source", "epoch", "seq"),
    [("node", 1, 7), ("node", 2, 6), ("node", 0, 6), ("node", 2, 3), ("nobody", 1, 6)],
    ids=["gap", "later epoch", "earlier epoch", "old number, other epoch", "unknown source"],
)
def test_a_delta_that_does_not_follow_changes_nothing_and_says_so(source, epoch, seq):
    directory = Directory()
    directory.snapshot("node", 1, 5, [told(Tier.HOST, [A])])
    assert not directory.apply(source, epoch, seq, [told(Tier.SHARED, [B])], [told(Tier.HOST, [A])])
    assert warmth(directory, [A, B], "node") == Warmth(host=1)
    assert directory.apply("node", 1, 6, [], [])


def test_a_delta_seen_before_is_ignored():
    directory = Directory()
    directory.snapshot("node", 1, 5, [told(Tier.HOST, [A])])
    assert directory.apply("node", 1, 6, [], [told(Tier.HOST, [A])])
    for seq in (4, 5, 6):
        assert directory.apply(
            "node", 1, seq, [told(Tier.HOST, [A, B]), told(Tier.SHARED, [A])], []
        )
    assert warmth(directory, [A, B], "node") == Warmth()


def test_a_snapshot_replaces_what_the_source_said_and_leaves_the_others():
    directory = Directory()
    directory.snapshot("node", 1, 5, [told(Tier.HOST, [A, B])])
    directory.snapshot("other", 1, 5, [told(Tier.HOST, [A])])
    directory.snapshot("node", 2, 0, [told(Tier.HOST, [A])])
    assert warmth(directory, [A, B], "node") == Warmth(host=1)
    assert warmth(directory, [A, B], "other") == Warmth(host=1)
    assert directory.apply("node", 2, 1, [], [told(Tier.HOST, [A])])
    assert warmth(directory, [A], "other") == Warmth(host=1)


def test_a_source_that_goes_takes_its_own_and_leaves_what_it_shared():
    directory = Directory()
    directory.snapshot("node", 1, 5, [told(Tier.HOST, [A]), told(Tier.SHARED, [A, B])])
    directory.remove("node")
    directory.remove("node")
    assert warmth(directory, [A, B], "node") == Warmth(shared=2)
    assert not directory.apply("node", 1, 6, [], [])


def test_what_one_source_misses_in_the_shared_store_is_gone_for_everybody():
    directory = Directory()
    directory.snapshot("one", 1, 0, [told(Tier.SHARED, [A])])
    directory.snapshot("two", 1, 0, [told(Tier.SHARED, [A])])
    assert directory.apply("two", 1, 1, [], [told(Tier.SHARED, [A, B])])
    assert warmth(directory, [A], "one") == Warmth()


def test_at_most_so_many_shared_blocks_are_remembered():
    directory = Directory(max_shared=2)
    directory.snapshot("node", 1, 0, [told(Tier.SHARED, [A, B])])
    assert directory.apply("node", 1, 1, [told(Tier.SHARED, [A])], [])  # announced again
    assert directory.apply("node", 1, 2, [told(Tier.SHARED, [C])], [])
    assert directory.shared_blocks == 2
    assert warmth(directory, [B]) == Warmth()
    assert warmth(directory, [A]) == Warmth(shared=1)  # asked for
    assert directory.apply("node", 1, 3, [told(Tier.SHARED, [D])], [])
    assert warmth(directory, [C]) == Warmth()
    assert warmth(directory, [A]) == Warmth(shared=1)


def test_a_limit_that_remembers_nothing_is_refused():
    with pytest.raises(ValueError, match="max_shared is 0"):
        Directory(max_shared=0)


# --- in steps, and joined as it is told -----------------------------------------------------


def pieces(directory: Directory, path: list[BlockKey]) -> int:
    """Of how many strips the blocks of a prompt are made up: what a look-up costs."""
    found = (directory._strips._find(key, 0) for key in path)
    return len({strip.handle for strip in found if strip is not None})


def in_pieces(path: list[BlockKey], size: int) -> list[Told]:
    """Pieces of a prompt, each with the block before it."""
    return [
        told(Tier.HOST, path[i : i + size], path[i - 1] if i else BEGINS)
        for i in range(0, len(path), size)
    ]


@pytest.mark.parametrize("size", [1, 7, 16])
@pytest.mark.parametrize("order", ["in order", "backwards", "at random"])
def test_pieces_are_joined_when_they_come_in_whatever_order(size, order):
    directory = Directory()
    told_pieces = in_pieces(PATH[:500], size)
    if order == "backwards":
        told_pieces.reverse()
    elif order == "at random":
        random.Random(1).shuffle(told_pieces)
    for source in ("one", "two", "three"):
        directory.snapshot(source, 1, 0, [])
        for seq, piece in enumerate(told_pieces, start=1):
            assert directory.apply(source, 1, seq, [piece], [])
        directory.check()
        assert warmth(directory, PATH, source) == Warmth(host=500)
        assert pieces(directory, PATH) == 1


def test_prompts_in_turn_with_a_common_beginning_are_joined_each_for_itself():
    directory = Directory()
    paths = [PATH[:100] + [BlockKey(hashlib.md5(bytes([n, i])).digest()) for i in range(200)]
             for n in range(4)]  # fmt: skip
    directory.snapshot("node", 1, 0, [])
    turns = zip(*(in_pieces(path, 10) for path in paths), strict=True)
    for seq, piece in enumerate([piece for turn in turns for piece in turn], start=1):
        assert directory.apply("node", 1, seq, [piece], [])
    directory.check()
    for path in paths:
        assert warmth(directory, path, "node") == Warmth(host=300)
        assert pieces(directory, path) <= 2


def test_what_moves_to_another_tier_block_by_block_is_one_strip_again():
    directory = Directory()
    directory.snapshot("node", 1, 0, in_pieces(PATH[:300], 300))
    moves = [*in_pieces(PATH[:300], 1)]
    moves.reverse()  # the deep end first
    for seq, move in enumerate(moves, start=1):
        disk = move._replace(tier=Tier.DISK)
        assert directory.apply("node", 1, 2 * seq - 1, [disk], [])
        assert directory.apply("node", 1, 2 * seq, [], [move])
        directory.check()
    assert warmth(directory, PATH, "node") == Warmth(disk=300)
    assert pieces(directory, PATH) == 1


def count_searches(monkeypatch) -> list[int]:
    """Where look-ups of a block in the large table are noted: they cost most of a look-up."""
    searches: list[int] = []
    find = shapes.Strips._find

    def counted(self, packed, i):
        searches.append(i)
        return find(self, packed, i)

    monkeypatch.setattr(shapes.Strips, "_find", counted)
    return searches


@pytest.mark.parametrize("order", ["in order", "backwards", "at random"])
def test_a_prompt_stays_in_one_piece_where_its_holders_differ(order, monkeypatch):
    directory = Directory()
    path, whole = PATH[:500], in_pieces(PATH[:500], 16)
    holed = [told(Tier.HOST, path[i : i + 19], path[i - 1] if i else BEGINS)
             for i in range(0, 500, 20)]  # fmt: skip
    words = [("whole", each) for each in whole] + [("holed", each) for each in holed]
    words += [("even", each) for each in whole[::2]]
    if order == "backwards":
        words.reverse()
    elif order == "at random":
        random.Random(1).shuffle(words)
    seq = dict.fromkeys(("whole", "holed", "even"), 0)
    for name in seq:
        directory.snapshot(name, 1, 0, [])
    for name, word in words:
        seq[name] += 1
        assert directory.apply(name, 1, seq[name], [word], [])
    directory.check()
    assert pieces(directory, path) == 1
    searches = count_searches(monkeypatch)
    found = directory.warmth(path, {name: [name] for name in seq})
    assert found == {"whole": Warmth(host=500), "holed": Warmth(host=19), "even": Warmth(host=16)}
    assert len(searches) == 1
    directory.remove("whole")
    tidy(directory)
    directory.check()
    assert directory.blocks == len({key for name, word in words if name != "whole"
                                    for key in each(word.packed)})  # fmt: skip
    assert directory.warmth(path, {"even": ["even"]}) == {"even": Warmth(host=16)}


def test_long_prompts_are_cut_where_a_strip_is_full(monkeypatch):
    directory = Directory()
    directory.snapshot("node", 1, 0, in_pieces(PATH, 5))
    directory.check()
    searches = count_searches(monkeypatch)
    assert warmth(directory, PATH, "node") == Warmth(host=len(PATH))
    assert len(searches) == 1  # each knows the one behind it
    assert pieces(directory, PATH) <= 2 + len(PATH) // segments.MAX_STRIP


def test_prompts_are_cut_where_they_part_and_stay_so():
    directory = Directory()
    ends = [[BlockKey(hashlib.md5(bytes([n, i])).digest()) for i in range(60)] for n in range(3)]
    paths = [PATH[:40] + end for end in ends]
    for name in ("one", "two"):
        directory.snapshot(name, 1, 0, in_pieces(paths[0], 100))
    assert pieces(directory, paths[0]) == 1
    for seq, path in enumerate([*paths[1:], *paths], start=1):
        assert directory.apply("one", 1, seq, in_pieces(path, 100), [])
        directory.check()
        assert [pieces(directory, paths[0]), pieces(directory, path)] == [2, 2]
        assert warmth(directory, path, "one") == Warmth(host=100)


@pytest.mark.parametrize("lost", [(0, 30), (30, 70), (70, 100)])
def test_what_was_lost_and_comes_back_is_where_it_was(lost):
    directory = Directory()
    path, (start, stop) = PATH[:100], lost
    gone = told(Tier.HOST, path[start:stop], path[start - 1] if start else BEGINS)
    directory.snapshot("node", 1, 0, in_pieces(path, 100))
    assert directory.apply("node", 1, 1, [], [gone])
    directory.check()
    assert directory.blocks == 100 - (stop - start)
    assert warmth(directory, path, "node") == Warmth(host=start)
    assert directory.apply("node", 1, 2, [gone], [])
    directory.check()
    assert warmth(directory, path, "node") == Warmth(host=100)
    assert pieces(directory, path) == 1


def test_a_false_word_on_what_comes_before_changes_no_answer():
    directory = Directory()
    wrong = [part._replace(before=PATH[(7 * n) % 300]) for n, part in
             enumerate(in_pieces(PATH[:300], 3))]  # fmt: skip
    directory.snapshot("node", 1, 0, wrong)
    directory.check()
    assert warmth(directory, PATH, "node") == Warmth(host=300)
    assert directory.apply("node", 1, 1, [], [told(Tier.HOST, PATH[100:101])])
    directory.check()
    assert warmth(directory, PATH, "node") == Warmth(host=100)


def test_two_blocks_with_one_fingerprint_are_never_taken_for_each_other():
    twin = BlockKey(bytes(8) + PATH[5][8:])
    directory = Directory()
    directory.snapshot("node", 1, 0, [told(Tier.HOST, PATH[:10])])
    assert warmth(directory, [*PATH[:5], twin], "node") == Warmth(host=5)
    assert warmth(directory, [twin], "node") == Warmth()
    both = [told(Tier.HOST, [twin, PATH[20]], PATH[9]), told(Tier.HOST, [PATH[21], twin, PATH[22]])]
    assert directory.apply("node", 1, 1, both, [])  # counts as held by nobody
    assert warmth(directory, [PATH[20]], "node") == Warmth(host=1)
    assert warmth(directory, [PATH[22]], "node") == Warmth(host=1)
    assert directory.apply("node", 1, 2, [], [told(Tier.HOST, [twin])])
    assert warmth(directory, PATH, "node") == Warmth(host=10)
    assert directory.apply("node", 1, 3, [], [told(Tier.HOST, PATH[5:6])])
    assert directory.apply("node", 1, 4, [told(Tier.HOST, [twin])], [])
    assert warmth(directory, [twin], "node") == Warmth(host=1)
    directory.check()


def steps_of(steps) -> int:
    return sum(1 for _ in steps)


def test_no_step_takes_in_more_than_a_few_blocks():
    directory = Directory()
    filling = directory.begin("node", 1, 0)
    assert steps_of(directory.fill(filling, in_pieces(PATH, 1200))) >= len(PATH) // STEP
    directory.finish(filling)
    steps = directory.delta("node", 1, 1, [told(Tier.DISK, PATH)], [told(Tier.HOST, PATH)])
    assert steps_of(steps) >= 2 * len(PATH) // STEP
    directory.remove("node")
    assert steps_of(iter(directory.tidy, False)) > 1
    assert directory.blocks == 0


def test_a_snapshot_counts_when_it_is_whole_and_until_then_what_was_known():
    directory = Directory()
    directory.snapshot("node", 1, 5, [told(Tier.HOST, PATH[:100])])
    filling = directory.begin("node", 2, 0)
    for _ in directory.fill(filling, [told(Tier.HOST, PATH[:300])]):
        assert warmth(directory, PATH, "node") == Warmth(host=100)
    assert directory.apply("node", 1, 6, [told(Tier.HOST, PATH[100:110])], [])
    assert warmth(directory, PATH, "node") == Warmth(host=110)
    directory.finish(filling)
    assert warmth(directory, PATH, "node") == Warmth(host=300)
    assert directory.position("node") == (2, 0)
    tidy(directory)
    directory.check()


def test_a_snapshot_that_is_broken_off_leaves_nothing():
    directory = Directory()
    filling = directory.begin("node", 1, 0)
    rest = directory.fill(filling, [told(Tier.HOST, PATH)])
    next(rest)
    directory.abandon(filling)
    assert steps_of(rest) == 0
    tidy(directory)
    assert directory.blocks == 0
    directory.check()


def test_a_delta_half_taken_in_when_its_source_goes_adds_nothing_more():
    directory = Directory()
    directory.snapshot("node", 1, 0, [])
    delta = directory.delta("node", 1, 1, [told(Tier.HOST, PATH)], [told(Tier.HOST, PATH)])
    for _ in range(len(PATH) // STEP + 3):
        next(delta)
    directory.remove("node")
    tidy(directory)
    directory.snapshot("other", 1, 0, [])  # gets the room that the first one had
    assert steps_of(delta) == 0
    assert warmth(directory, PATH, "other") == Warmth()
    assert directory.blocks == 0


@pytest.mark.parametrize("taken", range(7))
def test_whoever_goes_at_whatever_step_of_its_word_leaves_nothing(taken):
    directory = Directory()
    path = PATH[: 3 * STEP]
    directory.snapshot("node", 1, 0, [told(Tier.HOST, path)])
    delta = directory.delta("node", 1, 1, [told(Tier.DISK, path)], [told(Tier.HOST, path)])
    filling = directory.begin("other", 1, 0)
    fill = directory.fill(filling, [told(Tier.HOST, path)])
    for _ in range(taken):
        next(delta)
        next(fill, None)
    directory.remove("node")
    directory.abandon(filling)
    tidy(directory)
    assert steps_of(delta) == steps_of(fill) == 0
    assert directory.blocks == 0
    directory.check()


def test_who_is_asked_for_and_unknown_is_not_taken_for_one_who_begins():
    directory = Directory()
    assert warmth(directory, PATH, "unknown") == Warmth()
    assert directory.warmth(PATH, {}) == {}  # of nobody, and `unknown` may still be asked for
    filling = directory.begin("node", 1, 0)
    for _ in directory.fill(filling, [told(Tier.HOST, PATH)]):
        assert warmth(directory, PATH, "unknown") == Warmth()
    directory.finish(filling)
    assert warmth(directory, PATH, "node") == Warmth(host=len(PATH))


def test_who_is_gone_counts_for_nothing_before_its_room_is_given_back():
    directory = Directory()
    for name in ("a", "b"):
        directory.snapshot(name, 1, 0, [told(Tier.HOST, PATH)])
    directory.remove("a")
    directory.tidy()
    directory.snapshot("c", 1, 0, [told(Tier.HOST, PATH[:3])])
    answer = directory.warmth(PATH, {name: [name] for name in "abc"})
    assert [each.host for each in answer.values()] == [0, len(PATH), 3]
    directory.snapshot("a", 2, 0, [told(Tier.DISK, PATH[:2])])
    assert warmth(directory, PATH, "a") == Warmth(disk=2)
    tidy(directory)
    assert warmth(directory, PATH, "a") == Warmth(disk=2)
    directory.check()


def test_fleets_that_are_asked_for_in_turn_do_not_mix():
    directory = Directory()
    fleets = [{f"{n} {m}": [f"source {n} {m}"] for m in range(3)} for n in range(12)]
    for n in range(12):
        directory.snapshot(f"source {n} 0", 1, 0, [told(Tier.HOST, PATH[: n + 1])])
    for turn in range(3):
        for n, fleet in enumerate(fleets):
            found = directory.warmth(PATH, fleet)
            assert [each.host for each in found.values()] == [n + 1, 0, 0]
            directory.remove(f"source {(n + 5) % 12} 1")
        directory.snapshot(f"source 3 {turn}", turn + 2, 0, [told(Tier.HOST, PATH[:4])])
        directory.remove(f"source 3 {turn}")
        directory.snapshot("source 3 0", turn + 2, 0, [told(Tier.HOST, PATH[:4])])
        directory.check()
        assert len(directory._audiences) <= 8


# --- against a naive model ----------------------------------------------------------------

SOURCES = ["worker", "node", "other"]
LIMIT = 4


def parts(start, size, back):
    """Neighbours, as feeds mostly tell of them."""
    return KEYS[start : start + size][:: -1 if back else 1]


keys = st.one_of(
    st.lists(st.sampled_from(KEYS), max_size=4),
    st.builds(parts, st.integers(0, 11), st.integers(1, 12), st.booleans()),
)
held = st.lists(
    st.builds(
        told,
        st.sampled_from(Tier),
        keys,
        st.sampled_from([BEGINS, *KEYS]),
    ),
    max_size=3,
)
sources = st.sampled_from(SOURCES)


def each(packed: bytes) -> list[BlockKey]:
    return [BlockKey(packed[at : at + 16]) for at in range(0, len(packed), 16)]


class DirectoryMachine(RuleBasedStateMachine):
    """The model keeps one set of (source, tier, key), and one of the shared keys.

    A second directory is told the same, but may remember few shared blocks only.
    """

    def __init__(self) -> None:
        super().__init__()
        self.directory = Directory()
        self.small = Directory(max_shared=LIMIT)
        self.owned: set[tuple[str, Tier, BlockKey]] = set()
        self.shared: set[BlockKey] = set()
        self.at: dict[str, tuple[int, int]] = {}
        self.begun: dict[str, tuple[Filling, list[Told]]] = {}

    def share(self, groups):
        for tier, keys, *_ in groups:
            if tier is Tier.SHARED:
                self.shared.update(each(keys))

    def add(self, source, groups):
        self.share(groups)
        for tier, keys, *_ in groups:
            if tier is not Tier.SHARED:
                self.owned.update((source, tier, key) for key in each(keys))

    def forget(self, source):
        self.owned = {held for held in self.owned if held[0] != source}
        self.at.pop(source, None)

    @rule(source=sources, epoch=st.integers(0, 2), seq=st.integers(0, 9), held=held)
    def snapshot(self, source, epoch, seq, held):
        self.directory.snapshot(source, epoch, seq, held)
        self.small.snapshot(source, epoch, seq, held)
        self.forget(source)
        self.at[source] = (epoch, seq)
        self.add(source, held)

    @rule(source=sources, epoch=st.integers(0, 2), seq=st.integers(0, 9), held=held)
    def begin(self, source, epoch, seq, held):
        """A snapshot in pieces: the shared blocks count at once, the source's own not yet."""
        if source in self.begun:
            self.directory.abandon(self.begun.pop(source)[0])
        filling = self.directory.begin(source, epoch, seq)
        for _ in self.directory.fill(filling, held):
            pass
        shared = [part for part in held if part.tier is Tier.SHARED]
        self.small.snapshot("nobody", 0, 0, shared)
        self.share(held)
        self.begun[source] = filling, held

    @rule(source=sources)
    def finish(self, source):
        if source not in self.begun:
            return
        filling, held = self.begun.pop(source)
        self.directory.finish(filling)
        self.directory.abandon(filling)  # too late
        own = [part for part in held if part.tier is not Tier.SHARED]
        self.small.snapshot(source, filling.epoch, filling.seq, own)
        self.forget(source)
        self.at[source] = (filling.epoch, filling.seq)
        self.add(source, own)

    @rule(source=sources, added=held, removed=held, step=st.sampled_from([1, 1, 1, 0, -2, 2]),
          other_life=st.sampled_from([0, 0, 0, 1]))  # fmt: skip
    def apply(self, source, added, removed, step, other_life):
        epoch, seq = self.at.get(source, (0, 0))
        done = self.directory.apply(source, epoch + other_life, seq + step, added, removed)
        assert done == self.small.apply(source, epoch + other_life, seq + step, added, removed)
        assert done == (source in self.at and not other_life and step <= 1)
        if not done or step < 1:
            return
        self.at[source] = (epoch, seq + 1)
        for tier, gone, *_ in removed:
            for key in each(gone):
                if tier is Tier.SHARED:
                    self.shared.discard(key)
                else:
                    self.owned.discard((source, tier, key))
        self.add(source, added)

    @rule(source=sources)
    def remove(self, source):
        self.directory.remove(source)
        self.small.remove(source)
        self.forget(source)

    @rule(path=st.one_of(st.lists(st.sampled_from(KEYS), unique=True), st.just(KEYS)),
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
        for name, few in self.small.warmth(path, named).items():
            assert few.blocks <= expected[name].blocks
            assert few.shared <= LIMIT

    @rule()
    def tidy_a_little(self):
        self.directory.tidy()

    @rule(source=sources)
    def count(self, source):
        tidy(self.directory)
        counts = self.directory.counts(source)
        assert (source in self.at) == bool(counts)
        for tier, blocks in counts.items():
            assert blocks == sum(held[:2] == (source, tier) for held in self.owned)
        assert self.directory.shared_blocks == len(self.shared)
        parts = [part for _, told in self.begun.values() for part in told]
        begun = {k for part in parts if part.tier is not Tier.SHARED for k in each(part.packed)}
        known = self.shared | begun | {key for _, _, key in self.owned}
        assert self.directory.blocks == len(known)
        assert self.small.shared_blocks <= LIMIT

    @invariant()
    def holds_together(self):
        self.directory.check()
        self.small.check()


TestDirectory = DirectoryMachine.TestCase
TestDirectory.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


class TestShortStrips(TestDirectory):
    """The same with strips that are soon full."""

    def setUp(self):
        for module, name, value in ((shapes, "_FULL", 3 * 16), (strips, "MAX_STRIP", 3)):
            patched = unittest.mock.patch.object(module, name, value)
            patched.start()
            self.addCleanup(patched.stop)
        super().setUp()
