"""The index of strips against a plain dict, with many holders and whatever comes, seeded."""

import random
import unittest.mock

import pytest

from kvtier.core import shapes, strips
from kvtier.core.blocks import BEGINS, BlockKey
from kvtier.core.packed import pack
from kvtier.core.strips import StripIndex

RANKED = 1
HOLDERS = [1 << n for n in range(40)]


class Model:
    """Who has what, block by block, and the index told the same."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.index = StripIndex(RANKED)
        self.held: dict[BlockKey, int] = {}
        self.paths = self._tree()

    def _tree(self) -> list[list[BlockKey]]:
        """Prompts that part from each other somewhere, or nowhere."""
        paths: list[list[BlockKey]] = [[]]
        for _ in range(12):
            onto = self.rng.choice(paths)
            stem = onto[: self.rng.randrange(len(onto) + 1)]
            new = [BlockKey(self.rng.randbytes(16)) for _ in range(self.rng.randrange(1, 60))]
            paths.append(stem + new)
        return paths[1:]

    def part(self) -> tuple[list[BlockKey], BlockKey]:
        """Some blocks of a prompt in a row, and the block before them, mostly."""
        path = self.rng.choice(self.paths)
        start = self.rng.choice([0, self.rng.randrange(len(path))])
        stop = self.rng.choice([len(path), self.rng.randrange(start, len(path)) + 1])
        before = path[start - 1] if start else BEGINS
        if self.rng.random() < 0.1:
            before = self.rng.choice(self.rng.choice(self.paths))
        return path[start:stop], before

    def holder(self) -> int:
        """One of a few mostly, so that some have nearly all."""
        return self.rng.choice(HOLDERS[:4] if self.rng.random() < 0.5 else HOLDERS)

    def add(self) -> None:
        keys, before = self.part()
        if self.rng.random() < 0.1:
            self.rng.shuffle(keys)
        holder = self.holder()
        self.index.add(pack(keys), holder, before)
        for key in keys:
            self.held[key] = self.held.get(key, 0) | holder

    def discard(self) -> None:
        keys, _ = self.part()
        if self.rng.random() < 0.5:
            keys.reverse()  # as what leaves a tier is told
        if self.rng.random() < 0.3:
            keys = self.rng.sample(keys, self.rng.randrange(len(keys)) + 1)
        holder = self.holder()
        self.index.discard(pack(keys), holder)
        self._lost(keys, holder)

    def drop(self) -> None:
        """One step, or all of them; in between the index says itself what is left."""
        holder, most = self.holder(), self.rng.randrange(1, 40)
        had = self.count(holder)
        more = self.index.drop(holder, most)
        while more and self.rng.random() < 0.5:
            more = self.index.drop(holder, most)
        self._read(holder)
        assert more == (self.count(holder) > 0)
        assert self.count(holder) < had or not had

    def trim(self) -> None:
        limit = self.rng.randrange(40, 120)
        had = self.count(RANKED)
        self.index.trim(limit)
        self._read(RANKED)
        assert self.count(RANKED) == min(had, limit)

    def look_up(self) -> None:
        path = self.rng.choice(self.paths)
        if self.rng.random() < 0.3:
            path = [*path[self.rng.randrange(len(path)) :], BlockKey(self.rng.randbytes(16))]
        assert self.index.walk(path) == self.runs(path)

    def runs(self, path: list[BlockKey]) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        for key in path:
            mask = self.held.get(key, 0)
            if not mask:
                break
            if found and found[-1][1] == mask:
                found[-1] = found[-1][0] + 1, mask
            else:
                found.append((1, mask))
        return found

    def count(self, holder: int) -> int:
        return sum(1 for mask in self.held.values() if mask & holder)

    def check(self) -> None:
        self.index.check()
        assert len(self.index) == len(self.held)
        assert [self.index.count(each) for each in HOLDERS] == [self.count(h) for h in HOLDERS]
        for path in self.paths:
            for start in (0, len(path) // 2):
                assert self.mask(path[start]) == self.held.get(path[start], 0)

    def mask(self, key: BlockKey) -> int:
        """Who has a block, without making it warmer."""
        strip = self.index._find(key, 0)
        if strip is None:
            return 0
        at = strip.packed.index(key) // 16
        return next(mask for start, stop, mask in strip.segments() if start <= at < stop)

    def _lost(self, keys: list[BlockKey], holder: int) -> None:
        for key in keys:
            mask = self.held.get(key, 0) & ~holder
            if mask:
                self.held[key] = mask
            else:
                self.held.pop(key, None)

    def _read(self, holder: int) -> None:
        """The index chose what `holder` loses; nobody else loses anything."""
        self._lost([k for k in self.held if not self.mask(k) & holder], holder)
        assert all(self.mask(key) == mask for key, mask in self.held.items())


WAYS = ("add",) * 10 + ("discard",) * 6 + ("drop", "trim") + ("look_up",) * 8


@pytest.mark.parametrize("longest", [3, 40, 512])
@pytest.mark.parametrize("seed", range(4))
def test_whatever_comes_it_says_what_a_plain_dict_says(seed, longest):
    model = Model(seed)
    with (
        unittest.mock.patch.object(shapes, "_FULL", 16 * longest),
        unittest.mock.patch.object(strips, "MAX_STRIP", longest),
        unittest.mock.patch.object(shapes, "_MAX_SEGMENTS", 128 if seed % 2 else 4),
        unittest.mock.patch.object(shapes, "_FEW_SEGMENTS", 96 if seed % 2 else 3),
    ):
        for n in range(300):
            getattr(model, model.rng.choice(WAYS))()
            if n % 3 == 0:
                model.check()
        for holder in HOLDERS:
            while model.index.drop(holder, 50):
                pass
        model.index.check()
        assert len(model.index) == 0
        assert not any(model.index._of)
        assert not any(model.index._after)
