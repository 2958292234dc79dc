"""The keys of a tier as a forest of runs: blocks that were last used together, and so go together.

A run's parent is the nearest run above it on a path that was touched; the keys between may have
left. Every step costs O(runs) and not O(blocks) where it can: a split leaves the lower part its
identity, so that the runs below need not be told, and a merge the longer of the two, so that a
path of single blocks becomes one run in O(its length * log) and not in its square.
"""

import math
from collections.abc import Sequence
from itertools import islice

from kvtier.core.blocks import BlockKey
from kvtier.core.shards import KeyMap


class Run:
    """Blocks last used by the same request and of the same class, shallow to deep."""

    __slots__ = (
        "blocks",
        "children",
        "cls",
        "epoch",
        "new",
        "open",
        "parent",
        "place",
        "queued",
        "request",
        "seq",
        "seq_before",
        "slot",
        "t",
        "until",
    )

    def __init__(self, blocks: list[BlockKey], parent: "Run | None") -> None:
        self.blocks = blocks  # empty: gone, its children are its parent's
        self.parent = parent
        self.children = 0
        self.place = -1  # among the leaves; -1: it has children
        self.cls = 0
        self.t = 0.0  # of the last use, in seconds
        self.slot = 0  # of its class and its age since `t`, as long as it is before
        self.until = -math.inf
        self.seq = 0  # of that use: what was used later has a higher one
        self.seq_before = 0  # and of the use before
        self.epoch = 0  # and of a `Duel`, when that was
        self.request: int | None = None  # the last one; None: it was never asked for
        self.new = 0  # blocks of that request that nobody had asked for before, down to here
        self.open = False  # whether it is observed when the next use comes
        self.queued = 0  # places in the queue of uses, the last of which counts


class Forest:
    """Runs by key, and those without children in an array, in no order."""

    def __init__(self, most: int | None = None) -> None:
        self.of = KeyMap[Run](most)
        self.size = 0  # keys
        self.leaves: list[Run] = []

    def add(self, blocks: list[BlockKey], parent: Run | None) -> Run:
        """A new run below `parent`, of keys that are not here."""
        run = Run(blocks, parent)
        if parent is not None:
            if parent.place >= 0:
                self._unleaf(parent)
            parent.children += 1
        self.size += len(blocks)
        self._are_in(blocks, run)
        self._leaf(run)
        return run

    def extend(self, run: Run, blocks: list[BlockKey]) -> None:
        """Put keys that are not here at the deep end of a leaf."""
        run.blocks += blocks
        self.size += len(blocks)
        self._are_in(blocks, run)

    def split(self, run: Run, at: int) -> Run:
        """Cut before blocks[at]; the upper part, which is new and is the one still observed."""
        upper = Run(run.blocks[:at], run.parent)
        upper.cls, upper.t, upper.seq, upper.open = run.cls, run.t, run.seq, run.open
        upper.epoch = run.epoch
        upper.request, upper.new, upper.children = run.request, run.new, 1
        del run.blocks[:at]
        run.parent, run.open = upper, False
        self._are_in(upper.blocks, upper)
        return upper

    def merge(self, upper: Run, lower: Run) -> Run:
        """Put `upper`, whose only child is `lower`, before it; the one that remains.

        It has the time and the observation of `upper`, and the class that both have.
        """
        if len(upper.blocks) > len(lower.blocks):
            upper.blocks += lower.blocks
            self._are_in(lower.blocks, upper)
            lower.blocks = []  # the runs below find `upper` through it
            lower.parent, upper.children = upper, lower.children
            if lower.place >= 0:
                self._unleaf(lower)
                self._leaf(upper)
            return upper
        lower.blocks = upper.blocks + lower.blocks
        lower.parent, lower.open = upper.parent, upper.open
        lower.t, lower.seq, lower.epoch = upper.t, upper.seq, upper.epoch
        lower.slot, lower.until = upper.slot, upper.until
        self._are_in(upper.blocks, lower)
        upper.blocks = []
        return lower

    def parent(self, run: Run) -> Run | None:
        """The run above."""
        above = run.parent
        while above is not None and not above.blocks:
            above = above.parent
        run.parent = above
        return above

    def through(self, path: Sequence[BlockKey]) -> tuple[list[Run], int]:
        """The runs that `path` goes through from its first key on, and where they end.

        Each as a whole and each the child of the one before it, as nearly all: no key is there
        twice, and `walk` would change nothing.
        """
        runs: list[Run] = []
        shards, i, above = self.of.shards, 0, None
        while i < len(path):
            key = path[i]
            run = shards[key[-1]].get(key)
            if run is None or (runs and run.parent is not above):
                break
            end = i + len(run.blocks)
            if path[i:end] != run.blocks:
                break
            runs.append(run)
            i, above = end, run
        return runs, i

    def walk(
        self, path: Sequence[BlockKey], start: int, above: Run | None
    ) -> tuple[list[Run], int]:
        """The runs that the known keys of path[start:] make up, up to the first unknown one.

        They are cut where the path leaves them, and each is made a child of the one before it,
        the first of `above`. Also the index of that unknown key.
        """
        runs: list[Run] = []
        i, end = start, len(path)
        shards = self.of.shards
        while i < end:
            key = path[i]
            run = shards[key[-1]].get(key)
            if run is None:
                break
            if run.blocks[0] != key:
                self.split(run, run.blocks.index(key))
            moves = above is not None and run.parent is not above and self.parent(run) is not above
            # A path may come backwards, as that of a sliding window: no run is below itself.
            if moves and above is not None and not self._lies_on(run, above):
                self._move(run, above)
            length = len(run.blocks)
            if path[i : i + length] != run.blocks:
                length = _common(run.blocks, path, i)
                run = self.split(run, length)
            runs.append(run)
            above = run
            i += length
        return runs, i

    def remove(self, key: BlockKey) -> Run | None:
        """Take one key out; the run that it was in, None if it is not here."""
        run = self.of.shards[key[-1]].pop(key, None)
        if run is None:
            return None
        self.size -= 1
        blocks = run.blocks
        if blocks[-1] == key:
            blocks.pop()
            if blocks:
                return run
        else:
            at = run.blocks.index(key) + 1
            self.of[key] = run  # for a moment, so that the split is an ordinary one
            run = self.split(run, at)
            del self.of[key]
            run.blocks.pop()
        if not run.blocks:
            above = self.parent(run)
            if run.place >= 0:
                self._unleaf(run)
            if above is not None:
                above.children += run.children - 1
                if not above.children:
                    self._leaf(above)
        return run

    def _are_in(self, blocks: list[BlockKey], run: Run) -> None:
        shards = self.of.shards
        for key in blocks:
            shards[key[-1]][key] = run

    def _lies_on(self, run: Run, below: Run) -> bool:
        """Whether `run` is `below`, or above it."""
        each: Run | None = below
        while each is not None and each is not run:
            each = self.parent(each)
        return each is run

    def _move(self, run: Run, above: Run) -> None:
        before = self.parent(run)
        if before is not None:
            before.children -= 1
            if not before.children:
                self._leaf(before)
        self._unleaf(above)
        above.children += 1
        run.parent = above

    def _leaf(self, run: Run) -> None:
        run.place = len(self.leaves)
        self.leaves.append(run)

    def _unleaf(self, run: Run) -> None:
        if run.place < 0:
            return
        last = self.leaves.pop()
        if last is not run:
            self.leaves[run.place] = last
            last.place = run.place
        run.place = -1

    def check(self) -> None:
        """Assert every invariant; O(keys)."""
        runs = {id(run): run for _, run in self.of.items()}.values()
        children = dict.fromkeys(map(id, runs), 0)
        for run in runs:
            assert run.blocks, "a run without blocks is known"
            assert all(self.of.get(key) is run for key in run.blocks), "a key is in another run"
            above = self.parent(run)
            if above is not None:
                children[id(above)] += 1
        assert sum(len(run.blocks) for run in runs) == len(self.of) == self.size, "a key is lost"
        for run in runs:
            assert run.children == children[id(run)], "children are miscounted"
            assert (run.place >= 0) == (not run.children), "a leaf is none, or the other way"
        assert [run.place for run in self.leaves] == [*range(len(self.leaves))]
        assert all(id(run) in children for run in self.leaves)


def _common(blocks: list[BlockKey], path: Sequence[BlockKey], start: int) -> int:
    """How many of `blocks` the path goes on with at `start`, where they differ somewhere."""
    length = 0
    for block, key in zip(blocks, islice(path, start, None), strict=False):
        if block != key:
            break
        length += 1
    return length
