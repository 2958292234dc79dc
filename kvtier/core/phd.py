"""PHD, "prefix hit density": give up the run of blocks that is least worth its place.

After a request nobody needs its blocks for a while (the user reads and types), then a return is
likely, then ever less so. PHD learns that, class by class, from the uses that come and those that
do not (`Hazards`), and gives up the run with the lowest index at its present age, deep end first.
LRU keeps exactly the blocks that cannot be needed yet. Figures: docs/eviction.md.

The classes are made of what is known at the time of a request:

    gap   since the blocks' use before: never seen, below 20 s (a program asks), below 90 s, more
    new   blocks that nobody had asked for: up to 3, up to 15, more
    out   tokens generated: below 20, below 150, more; 100 until it is known

and one more for shared prefixes: runs with several continuations, or at the root of a path.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Final

from kvtier.core.blocks import BlockKey
from kvtier.core.duel import Duel
from kvtier.core.ghosts import NO_CLASS, Back, Ghosts
from kvtier.core.hazards import Hazards
from kvtier.core.policy import NO_USE, Here, Keep, Learned, Use
from kvtier.core.runs import Forest, Run
from kvtier.core.victims import Victims

GHOSTS: Final = 16_384  # departures remembered, at least; else as many as keys are here
MAX_GHOSTS: Final = 131_072
SHARED: Final = 36  # the class of shared prefixes
EXPECTED_OUTPUT: Final = 100  # tokens, until they are known
TOGETHER: Final = 256  # blocks of a run that left, noted at once
CYCLE: Final = 256  # requests between two looks at what a class has learned


class PHD:
    """See the module. An `EvictionPolicy`; deterministic, without a clock of its own.

    `most` is how many keys there can be, where that is known: few are kept closer together.
    """

    def __init__(self, most: int | None = None) -> None:
        self._forest = Forest(most)
        self._hazards = Hazards(SHARED + 1, frozenset({SHARED}))
        self._shards = self._forest.of.shards
        self._ghosts = Ghosts()
        self._duel = Duel()
        self._victims = Victims(self._forest, self._hazards, self._duel)
        self._requests = 0
        self._last: int | None = None  # the request of the last touch
        self._leaving: Run | None = None  # a run of which blocks left since that,
        self._blocks: list[BlockKey] = []  # those that it still has,
        self._gone: list[BlockKey] = []  # and those

    def __contains__(self, key: object) -> bool:
        return isinstance(key, bytes) and BlockKey(key) in self._forest.of

    def __len__(self) -> int:
        return self._forest.size

    @property
    def tracked(self) -> int:
        """Keys that are here, and those that are remembered."""
        self._remember()
        return self._forest.size + len(self._ghosts)

    # --- used -------------------------------------------------------------------------

    def touch(self, path: Sequence[BlockKey], use: Use = NO_USE, here: Here = None) -> None:
        """See `EvictionPolicy.touch`; O(runs and new keys on the path)."""
        runs, known = self._forest.through(path)
        keys = path
        if known < len(path):
            keys = self._distinct(path, known, here)
        if here is not None and not keys:
            return
        if self._gone:
            self._remember()
        now, request, output = use
        self._victims.touched(now)
        self._duel.step(self._forest.size)
        if request is None:
            self._enter(keys, known, runs)
            return
        if request != self._last:
            self._last = request
            self._duel.judge(self._forest.size)
            self._learn()
        self._use(keys, known, runs, request, output)

    def _distinct(self, path: Sequence[BlockKey], known: int, here: Here) -> Sequence[BlockKey]:
        """What of `path` is `here`, each key once; its first `known` are known, and not twice."""
        first, rest = path[:known], path[known:]
        if here is not None:
            rest = here.among(rest)
        if not rest:
            return first
        if known and self._forest.of.among(rest):
            return [*dict.fromkeys([*first, *rest])]
        return [*first, *dict.fromkeys(rest)]

    # `runs` are those of keys[:i], in the two that follow.

    def _enter(self, keys: Sequence[BlockKey], i: int, runs: list[Run]) -> None:
        """Blocks came by themselves: a use is still to come."""
        above = runs[-1] if runs else None
        while i < len(keys):
            runs, i = self._forest.walk(keys, i, above)
            above = runs[-1] if runs else above
            end = self._unknown_until(keys, i)
            if end > i:
                above = self._forest.add([*keys[i:end]], above)
                above.cls, above.t, above.seq = (
                    _kind(0, None),
                    self._victims.now,
                    self._victims.turn,
                )
                above.epoch = self._duel.epoch
                self._duel.came(end - i)
                self._victims.used([above])
            i = end

    def _use(
        self, keys: Sequence[BlockKey], i: int, runs: list[Run], request: int, output: int | None
    ) -> None:
        forest, length = self._forest, len(keys)
        others, i = forest.walk(keys, i, runs[-1] if runs else None)
        runs += others
        more, ghosts = self._ghosts.take(islice(keys, i, None), self._shards)
        new = self._new(keys, runs, i, ghosts, request)
        kind = _kind(new, output)
        above: Run | None = None
        used: list[Run] = []
        while True:
            for run in runs:
                above = self._use_run(run, above, request, kind, length)
                above.new = new
                used.append(above)
            if i == length:
                break
            end = i + more
            used += self._append(keys[i:end], ghosts, above, request, kind)
            above = used[-1]
            above.new = new
            if end == length:
                break
            runs, i = forest.walk(keys, end, above)
            more, ghosts = self._ghosts.take(islice(keys, i, None), self._shards)
        self._victims.used(used)

    def _new(
        self, keys: Sequence[BlockKey], runs: list[Run], known: int, ghosts: Back, request: int
    ) -> int:
        """How many blocks of this request nobody had asked for, as far as it was told.

        `runs` have keys[:known]; `ghosts` are of those after them.
        """
        old = before = 0
        for i, _ in ghosts:
            if i != old:
                break
            old += 1
        if old and old == len(ghosts):  # there may be more behind keys that are here
            for key in islice(keys, known + old, None):
                if key not in self._ghosts:
                    break
                old += 1
        for run in runs:
            if run.request == request:  # what was new then is known no more, but counted
                before = run.new
            elif run.request is None and run.blocks[0] not in self._ghosts:
                before += len(run.blocks)
        return before + len(keys) - known - old

    def _use_run(self, run: Run, above: Run | None, request: int, kind: int, length: int) -> Run:
        """A request used all of `run`; the run that its blocks are in now."""
        if run.request == request:  # it was told before, when less was known of the request
            if run.cls != SHARED and run.cls % 9 != kind:
                cls = run.cls - run.cls % 9 + kind
                if run.open:
                    self._hazards.moved(run.cls, cls, run.t, self._victims.now)
                run.cls, run.until = cls, -math.inf
            return run
        victims, duel, size = self._victims, self._duel, len(run.blocks)
        now = victims.now
        if run.request is None:
            _, ghosts = self._ghosts.take(run.blocks)
            gap = self._stretches(ghosts, size)[0][1]
        else:
            gap = _gap(now - run.t)
            if run.open:
                self._hazards.closed(run.cls, run.t, now)
        parent = run.parent
        if parent is not None and not parent.blocks:
            parent = self._forest.parent(run)
        if length > size and (run.children > 1 or parent is None):
            run.cls = SHARED
        else:
            run.cls = gap + kind
        duel.found(run.epoch, size)
        run.epoch = duel.epoch
        run.seq_before, run.seq = run.seq, victims.turn
        run.t, run.request, run.open = now, request, False
        run.until = -math.inf
        if (
            above is not None
            and above.cls == run.cls
            and above.children == 1
            and above.request == request
            and parent is above
        ):
            return self._forest.merge(above, run)
        run.open = True
        self._hazards.opened(run.cls, now)
        return run

    def _append(
        self, keys: Sequence[BlockKey], ghosts: Back, above: Run | None, request: int, kind: int
    ) -> list[Run]:
        """New keys below `above`: the runs that they make up, or are put to."""
        runs: list[Run] = []
        self._duel.missed([epoch for _, (_, _, epoch) in ghosts], len(keys))
        now, turn, epoch = self._victims.now, self._victims.turn, self._duel.epoch
        start = 0
        for end, gap in self._stretches(ghosts, len(keys)):
            blocks, cls = [*keys[start:end]], gap + kind
            if (
                not start
                and above is not None
                and above.request == request
                and above.cls == kind == cls  # never seen, as these
                and not above.children
            ):  # more of what the same request had begun to tell
                self._forest.extend(above, blocks)
            else:
                above = self._forest.add(blocks, above)
                above.cls, above.t, above.seq = cls, now, turn
                above.request, above.open, above.epoch = request, True, epoch
                self._hazards.opened(cls, now)
            runs.append(above)
            start = end
        return runs

    def _stretches(self, ghosts: Back, length: int) -> list[tuple[int, int]]:
        """Where each stretch of keys that were last used as long ago ends, and its gap.

        `ghosts` are those of the keys that were remembered; that they were waited for ends.
        """
        found: list[tuple[int, int]] = []
        now, before = self._victims.now, None
        gap = upto = 0  # of the stretch at hand, and where the ghost before was
        for i, past in ghosts:
            if past is before and i == upto:  # most of them were used together
                upto += 1
                continue
            before = past
            at, cls, _ = past
            its = _gap(now - at)
            if gap and i > upto:
                found.append((upto, gap))
                gap = 0
            if its != gap:
                if i:
                    found.append((i, gap))
                gap = its
            upto = i + 1
            if cls >= 0:
                self._hazards.closed(cls, at, now)
        if gap and length > upto:
            found.append((upto, gap))
            gap = 0
        found.append((length, gap))
        return found

    def _unknown_until(self, keys: Sequence[BlockKey], start: int) -> int:
        shards, i = self._shards, start
        for key in islice(keys, start, None):
            if key in shards[key[-1]]:
                break
            i += 1
        return i

    def _learn(self) -> None:
        """Look at one class, or at what all have in common: no request waits for all of them."""
        self._requests += 1
        turn = self._requests % CYCLE
        if turn % 6 or turn > 6 * (SHARED + 1):
            return
        turn //= 6
        if turn <= SHARED:
            self._hazards.turn(turn, self._victims.now)
        else:
            self._hazards.rebuild_pool()

    # --- given up ---------------------------------------------------------------------

    def remove(self, *keys: BlockKey) -> None:
        """See `EvictionPolicy.remove`; they are remembered for a while.

        O(1) a key at a run's deep end.
        """
        forest, shards = self._forest, self._shards
        blocks, gone = self._blocks, self._gone
        for key in keys:
            # The next block of a run that is leaving, as most are.
            if len(blocks) > 1 and blocks[-1] == key and len(gone) < TOGETHER:
                del shards[key[-1]][key]
                gone.append(blocks.pop())
                forest.size -= 1
            else:
                self._remove(key)
                blocks, gone = self._blocks, self._gone

    def _remove(self, key: BlockKey) -> None:
        run = self._forest.remove(key)
        if run is None:
            return
        if run is not self._leaving or len(self._gone) >= TOGETHER:
            self._remember()
            self._leaving, self._blocks = run, run.blocks
        self._gone.append(key)
        if not run.blocks:
            self._victims.emptied(run, run.parent)

    def _remember(self) -> None:
        """Note what left since the last time, all of one run: one by one costs more."""
        run, keys = self._leaving, self._gone
        if run is None:
            return
        self._leaving, self._blocks, self._gone = None, [], []
        self._duel.left(run.epoch, len(keys))
        if run.request is not None:
            here = self._forest.size
            limit = GHOSTS if here < GHOSTS else here if here < MAX_GHOSTS else MAX_GHOSTS
            # The observation is its first block's.
            cls = run.cls if run.open and not run.blocks else NO_CLASS
            self._ghosts.put(keys, run.t, cls, run.epoch, limit)

    def coldest(self, keep: Keep | None = None) -> Iterator[BlockKey]:
        """See `EvictionPolicy.coldest`, and `Victims.coldest`."""
        return self._victims.coldest(keep)

    # --- kept over a restart ----------------------------------------------------------

    def save(self) -> Learned:
        """What was learned: plain lists and numbers, for `restore`."""
        return {**self._hazards.save(), "duel": self._duel.save()}

    def restore(self, state: object) -> None:
        """Go on with what an earlier life had learned.

        Raises:
            ValueError: Not such a state, or one of another version; nothing has changed.
        """
        # Earlier versions saved no duel: it begins anew.
        evidence = None
        if isinstance(state, dict) and "duel" in state:
            evidence = self._duel.read(state["duel"])
        self._hazards.restore(state)
        if evidence is not None:
            self._duel.restore(evidence)

    def check(self) -> None:
        """Assert every invariant; O(keys)."""
        self._forest.check()
        self._remember()
        for key in self._ghosts:
            run = self._forest.of.get(key)
            assert run is None or run.request is None, "a ghost is here"


def _gap(seconds: float) -> int:
    return 9 if seconds < 20 else 18 if seconds < 90 else 27


def _kind(new: int, output: int | None) -> int:
    out = EXPECTED_OUTPUT if output is None else output
    return (0 if new <= 3 else 3 if new <= 15 else 6) + (0 if out < 20 else 1 if out < 150 else 2)
