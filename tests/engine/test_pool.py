"""The paged pool's bookkeeping: nothing is lost, nothing pinned goes, what goes is told first."""

from collections.abc import Iterator, Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvtier.core.blocks import BEGINS, BlockKey
from kvtier.core.policy import LRU, Keep
from kvtier.engine.pool import BlockPool, Changes


def path(text: str) -> list[BlockKey]:
    """One key for each letter, chained: "ab" and "cb" share no key."""
    return [BlockKey(text[: end + 1].encode()) for end in range(len(text))]


def put(pool: BlockPool, text: str) -> list[int]:
    """Make the whole path resident; its block ids."""
    keys = path(text)
    ids, _ = pool.allocate(len(keys) - len(pool.match(keys)))
    pool.insert(keys, ids)
    return pool.match(keys)


class TestMatch:
    def test_leading_resident_blocks_are_found(self) -> None:
        pool = BlockPool(8)
        ids = put(pool, "abc")
        assert pool.match(path("abcd")) == ids
        assert pool.match(path("abx")) == ids[:2]
        assert pool.match(path("xbc")) == []

    def test_branches_share_their_common_blocks(self) -> None:
        pool = BlockPool(8)
        left, right = put(pool, "abc"), put(pool, "abd")
        assert left[:2] == right[:2]
        assert left[2] != right[2]
        assert len(pool) == 4
        pool.check()


class TestAllocate:
    def test_gives_up_the_deep_end_of_the_coldest_path(self) -> None:
        pool = BlockPool(5)
        cold, warm = put(pool, "abc"), put(pool, "xy")
        ids, evicted = pool.allocate(2)
        assert [(run.path, run.first, run.block_ids) for run in evicted] == [
            (tuple(path("abc")), 1, (cold[1], cold[2]))
        ]
        assert set(ids) == set(cold[1:])
        assert pool.match(path("xy")) == warm
        assert pool.match(path("abc")) == cold[:1]
        pool.check()

    def test_branches_are_told_as_paths_of_their_own(self) -> None:
        pool = BlockPool(4)
        left, right = put(pool, "abc"), put(pool, "abd")
        _, evicted = pool.allocate(4)
        told = {key: i for run in evicted
                for key, i in zip(run.path[run.first :], run.block_ids, strict=True)}  # fmt: skip
        expected = dict(zip(path("abc") + path("abd"), left + right, strict=True))
        assert told == expected
        assert all(run.path[0] == path("a")[0] for run in evicted)

    def test_free_blocks_come_before_anybody_is_evicted(self) -> None:
        pool = BlockPool(4)
        put(pool, "ab")
        ids, evicted = pool.allocate(2)
        assert (len(ids), evicted, len(pool)) == (2, [], 2)

    def test_pinned_blocks_stay_and_fewer_come_back(self) -> None:
        pool = BlockPool(3)
        kept = put(pool, "ab")
        pool.pin(path("ab"))
        put(pool, "x")
        ids, evicted = pool.allocate(3)
        assert len(ids) == 1
        assert [run.path for run in evicted] == [tuple(path("x"))]
        assert pool.match(path("ab")) == kept
        pool.unpin(path("ab"))
        pool.free(ids)
        assert len(pool.allocate(3)[0]) == 3

    def test_a_pin_counts_as_often_as_it_was_set(self) -> None:
        pool = BlockPool(1)
        put(pool, "a")
        pool.pin(path("a"))
        pool.pin(path("a"))
        pool.unpin(path("a"))
        assert pool.allocate(1) == ([], [])
        pool.unpin(path("a"))
        with pytest.raises(AssertionError, match="more often"):
            pool.unpin(path("a"))

    def test_pinning_makes_a_path_warm(self) -> None:
        pool = BlockPool(2)
        put(pool, "a")
        put(pool, "b")
        pool.pin(path("a"))
        pool.unpin(path("a"))
        _, evicted = pool.allocate(1)
        assert [run.path for run in evicted] == [tuple(path("b"))]

    def test_the_given_policy_decides(self) -> None:
        class NewestFirst(LRU):
            def coldest(self, keep: Keep | None = None) -> Iterator[BlockKey]:
                return iter(reversed(list(super().coldest())))

        pool = BlockPool(2, NewestFirst)
        put(pool, "a")
        put(pool, "b")
        assert [run.path for run in pool.allocate(1)[1]] == [tuple(path("b"))]

    def test_a_policy_that_forgets_parents_cannot_orphan_a_block(self) -> None:
        class RootFirst(LRU):
            def coldest(self, keep: Keep | None = None) -> Iterator[BlockKey]:
                return iter(sorted(super().coldest(), key=len))

        pool = BlockPool(3, RootFirst)
        put(pool, "abc")
        pool.allocate(1)
        assert len(pool.match(path("abc"))) == 2
        pool.check()


class TestSaved:
    def test_the_first_unsaved_block_is_found(self) -> None:
        pool = BlockPool(3)
        put(pool, "abc")
        pool.mark_saved(path("abc")[:2])
        assert pool.first_unsaved(path("abc")) == 2
        assert pool.first_unsaved(path("ab")) == 2
        assert pool.first_unsaved(path("abc"), 3) == 3

    def test_a_block_that_comes_back_is_unsaved_again(self) -> None:
        pool = BlockPool(1)
        put(pool, "a")
        pool.mark_saved(path("a"))
        pool.clear()
        put(pool, "a")
        assert pool.first_unsaved(path("a")) == 0


class TestChanges:
    def test_each_key_is_told_once(self) -> None:
        pool = BlockPool(2)
        put(pool, "ab")
        assert pool.take_changes() == Changes(tuple(path("ab")), (), (BEGINS, b"a"))
        assert pool.take_changes() == Changes()
        put(pool, "x")
        assert pool.take_changes() == Changes(tuple(path("x")), (path("ab")[1],), (BEGINS,))

    def test_coming_and_going_between_two_looks_is_nothing(self) -> None:
        pool = BlockPool(1)
        put(pool, "a")
        pool.clear()
        assert pool.take_changes() == Changes()

    def test_clear_drops_what_is_not_pinned(self) -> None:
        pool = BlockPool(4)
        put(pool, "abc")
        pool.pin(path("a"))
        assert pool.clear() == 2
        assert len(pool.match(path("abc"))) == 1
        pool.check()


class PoolMachine(RuleBasedStateMachine):
    """Requests come and go at random; a dict says what each block's bytes would be."""

    capacity = 6

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(self.capacity)
        self.bytes: dict[int, BlockKey] = {}
        self.requests: list[list[BlockKey]] = []  # what each has pinned
        self.seen: set[BlockKey] = set()  # as told by the changes

    @rule(text=st.text("ab", min_size=1, max_size=5))
    def begin(self, text: str) -> None:
        keys = path(text)
        found = self.pool.match(keys)
        assert [self.bytes[i] for i in found] == keys[: len(found)]
        self.pool.pin(keys[: len(found)])
        ids = self.allocate(len(keys) - len(found), keys[: len(found)])
        kept = keys[: len(found) + len(ids)]
        self.bytes.update(zip(ids, kept[len(found) :], strict=True))
        self.pool.insert(kept, ids)
        self.pool.pin(kept, len(found))
        self.requests.append(kept)

    def allocate(self, count: int, mine: Sequence[BlockKey] = ()) -> list[int]:
        pinned = {key for keys in (*self.requests, mine) for key in keys}
        held = set(self.pool)
        ids, evicted = self.pool.allocate(count)
        for run in evicted:
            lost: Sequence[BlockKey] = run.path[run.first :]
            assert [self.bytes[i] for i in run.block_ids] == list(lost)
            assert not pinned & set(lost)
            held -= set(lost)
        assert set(self.pool) == held
        assert len(set(ids)) == len(ids) == min(count, self.capacity - len(pinned))
        return ids

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        at = data.draw(st.integers(0, len(self.requests) - 1))
        self.pool.unpin(self.requests.pop(at))

    @rule(count=st.integers(1, 3))
    def restore_that_fails(self, count: int) -> None:
        self.pool.free(self.allocate(count))

    @rule()
    def clear(self) -> None:
        self.pool.clear()
        assert set(self.pool) == {key for keys in self.requests for key in keys}

    @rule()
    def look(self) -> None:
        changes = self.pool.take_changes()
        assert not self.seen & set(changes.added)
        assert self.seen >= set(changes.removed)
        self.seen = (self.seen | set(changes.added)) - set(changes.removed)
        assert self.seen == set(self.pool)

    @invariant()
    def sound(self) -> None:
        self.pool.check()
        for keys in self.requests:
            assert [self.bytes[i] for i in self.pool.match(keys)] == keys


PoolMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestPoolMachine = PoolMachine.TestCase
