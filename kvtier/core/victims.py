"""Which run PHD gives up next: the worst of a sample of leaves, or the least recently used.

Samples are evenly spaced over the array of leaves, from another place each time; the next worst of
a sample are compared again in the next one, which is as good as to look at all leaves
(docs/eviction.md). One search takes a bounded number of samples, however many of the runs that it
meets cannot go: after FRESH of them it goes on with the next worst of all that it has compared.
"""

from collections import deque
from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from itertools import islice
from operator import attrgetter
from typing import Final

from kvtier.core.blocks import BlockKey
from kvtier.core.duel import Duel
from kvtier.core.hazards import BIN_OF, BINS, END_OF, MAX_AGE, TRUSTED, Hazards
from kvtier.core.policy import Keep
from kvtier.core.runs import Forest, Run

SAMPLE: Final = 32  # runs that are compared to find a victim, at least; at most twice as many
POOR: Final = 16
FRESH: Final = 4  # samples of one search
HIDDEN: Final = 256  # runs of which nothing may go; where it has met so many, a search ends
_STEPS: Final = 64  # that one look for the least recent run, or one touch, takes in its queue
_MOST: Final = 1 << 20  # uses in that queue
_used = attrgetter("seq")


class Victims:
    """The order in which the runs of `forest` go, by what `hazards` has learned."""

    def __init__(self, forest: Forest, hazards: Hazards, duel: Duel) -> None:
        self.now = 0.0
        self.turn = 0  # touches so far; also where the next sample begins
        self._forest = forest
        self._hazards = hazards
        self._duel = duel
        self._moving = False  # whether the clock has ever moved: without one, LRU's order
        self._poor: list[Run] = []  # of earlier samples, the next to go
        self._compared: tuple[list[Run], list[float]] | None = None  # the last sample, its worths
        # The last sample of an earlier touch, if `_poor` was not made of it yet, and the next turn.
        self._earlier: tuple[list[Run], list[float], int] | None = None
        self._victim: Run | None = None  # goes on being given up until it is gone, or used
        self._all = 0  # one more than the bared runs of this search's last sample, if of all leaves
        self._since = 0  # when it was used last
        self._by_lru = False  # whether LRU's order held when it was chosen
        # Runs in the order of their uses: LRU's, as long as little was learned.
        self._recent: deque[Run] = deque()

    def touched(self, now: float) -> None:
        """A touch begins; `now` is 0 or earlier than another where it has no time."""
        if now > self.now:
            self._moving = self._moving or self.turn > 0
            self.now = now
        self.turn += 1
        if self._compared is not None:
            self._earlier, self._compared = (*self._compared, self.turn), None

    def used(self, runs: list[Run]) -> None:
        """Runs of one path were used, or came; those above others count as used after them."""
        recent = self._recent
        if self._hazards.uses < TRUSTED and len(recent) < _MOST:
            for run in reversed(runs):
                if run.seq == self.turn:
                    recent.append(run)
                    run.queued += 1
        elif recent:
            for _ in range(min(_STEPS, len(recent))):
                recent.popleft()

    def emptied(self, run: Run, above: Run | None) -> None:
        """`run` has lost its last block; `above` is the run above it."""
        if run is self._victim:
            self._victim = None
        self.turn += 1
        if above is not None and above.seq == run.seq and self._recent and not above.queued:
            self._recent.appendleft(above)  # it came from a split
            above.queued = 1

    def coldest(self, keep: Keep | None = None) -> Iterator[BlockKey]:
        """See `EvictionPolicy.coldest`; O(SAMPLE) a run, of FRESH runs.

        The first run is the worst of a sample, and stays so until it is gone, or used: blocks
        that came together go together.
        """
        passed: set[Run] = set()
        freed: dict[Run, int] = {}  # children that were passed
        bared: list[Run] = []  # runs of which all children were
        met: list[tuple[list[Run], list[float]]] = []  # samples
        rest: list[tuple[float, int, int, Run]] = []  # a heap of what they had
        hidden = self._all = 0
        run = self._victim
        by_lru = self._duel.follow_lru
        if run is None or run.place < 0 or run.seq != self._since or by_lru != self._by_lru:
            self._victim, self._by_lru = None, by_lru
            run = self._sampled(passed, bared)
        while run is not None and hidden < HIDDEN:
            passed.add(run)
            whole = True
            if self._victim is None:
                self._victim, self._since = run, run.seq
            if keep is None:
                yield from reversed(run.blocks)
            else:
                for key in reversed(run.blocks):
                    if keep(key):
                        whole = False
                        if key is run.blocks[-1]:
                            hidden += 1
                            self._victim = None if run is self._victim else self._victim
                        break
                    yield key
            above = self._forest.parent(run) if whole else None
            if above is not None:
                freed[above] = freed.get(above, 0) + 1
                if freed[above] == above.children:
                    bared.append(above)
                    if rest:
                        (worth,) = self._worths([above])
                        heappush(rest, (worth, above.seq, len(passed), above))
            if self._compared is not None and (not met or met[-1] is not self._compared):
                met.append(self._compared)
            if len(met) == FRESH and not rest:
                rest, met = self._all_met(met, bared, passed), []
            run = heappop(rest)[-1] if rest else self._sampled(passed, bared)

    def _all_met(
        self, samples: list[tuple[list[Run], list[float]]], bared: list[Run], passed: set[Run]
    ) -> list[tuple[float, int, int, Run]]:
        """A heap of the runs of some samples, and of `bared`, less `passed`; the worst first."""
        worths: dict[Run, float] = {}
        for sample in samples:
            worths.update(zip(*sample, strict=True))
        worths.update(zip(bared, self._worths(bared), strict=True))
        rest = [
            (worth, run.seq, -i, run)
            for i, (run, worth) in enumerate(worths.items())
            if run not in passed
        ]
        heapify(rest)
        return rest

    def _sampled(self, passed: set[Run], bared: list[Run]) -> Run | None:
        """The run with the lowest index among some leaves, and all of `bared`.

        As long as little was learned, the one that was not used for longest.
        """
        if self._hazards.uses < TRUSTED and (oldest := self._least_recent(passed, bared)):
            return oldest
        leaves = self._forest.leaves
        step = len(leaves) // SAMPLE
        if step > 1:
            if self._earlier is not None:
                self._poor, self._earlier = _next_to_go(*self._earlier), None
            # Evenly spread over the array, from another place each time.
            first = (self.turn + len(passed)) * 40_503 % 65_536 * step >> 16
            runs = leaves[first::step]
            runs += [run for run in self._poor if run.place >= 0 and run.place % step != first]
            if bared:
                runs += bared
            worst = self._worst(runs, passed)
            if worst is not None:
                return worst
        elif self._all and self._compared is not None and len(passed) <= FRESH:
            # The same as in the sample before, less what was passed since; nothing else changes.
            runs, worths = ([*each] for each in self._compared)
            for run in passed:
                if run in runs:
                    at = runs.index(run)
                    del runs[at], worths[at]
            # Some of these may have been passed already, as the least recent.
            added = [run for run in bared[self._all - 1 :] if run not in passed]
            if added:
                runs += added
                worths += self._worths(added)
            self._all = len(bared) + 1
            return self._least(runs, worths)
        self._all = len(bared) + 1
        return self._worst(leaves + bared, passed)

    def _least_recent(self, passed: set[Run], bared: list[Run]) -> Run | None:
        """The run among all leaves and `bared`, None: not found in few steps."""
        recent = self._recent
        for _ in range(min(_STEPS, len(recent))):
            if recent[0].blocks and recent[0].queued == 1:
                break
            recent.popleft().queued -= 1
        met: dict[Run, int] = {}
        for run in islice(recent, _STEPS):
            if run.queued > 1:
                met[run] = met.get(run, 0) + 1
                if met[run] < run.queued:
                    continue
            if run.place >= 0 and run.blocks and run not in passed:
                return min([run, *(each for each in bared if each not in passed)], key=_used)
        return None

    def _worths(self, runs: list[Run]) -> list[float]:
        hazards = self._hazards
        # LRU's order holds where little was learned, no clock moves, or nothing can be afforded.
        if self._duel.follow_lru or hazards.uses < TRUSTED or not self._moving:
            return [run.seq for run in runs]
        worth, now = hazards.worth, self.now
        return [worth[run.slot if now < run.until else _aged(run, now)] for run in runs]

    def _worst(self, runs: list[Run], passed: set[Run]) -> Run | None:
        """The first of `runs` to give up; those next to it are compared again later."""
        if len(passed) > FRESH:
            runs = [run for run in runs if run not in passed]
        else:
            for run in passed:
                if run in runs:
                    runs.remove(run)
        return self._least(runs, self._worths(runs))

    def _least(self, runs: list[Run], worths: list[float]) -> Run | None:
        self._compared = runs, worths
        if not runs:
            return None
        least = min(worths)
        at = worths.index(least)
        worst = runs[at]
        for _ in range(worths.count(least) - 1):  # of those alike the one used before the others
            at = worths.index(least, at + 1)
            if runs[at].seq < worst.seq:
                worst = runs[at]
        return worst


def _next_to_go(runs: list[Run], worths: list[float], turn: int) -> list[Run]:
    """Those of a sample, made before `turn`, that are worth least."""
    if len(runs) <= POOR:
        return runs
    limit = sorted(worths)[POOR]  # numbers are sorted faster than tuples
    poor = [i for i, worth in enumerate(worths) if worth <= limit]
    if len(poor) > POOR + 1:  # of those alike the ones that were used before the others
        seqs = [run.seq if run.seq < turn else run.seq_before for run in [runs[i] for i in poor]]
        least = sorted(zip([worths[i] for i in poor], seqs, poor, strict=True))
        poor = [i for _, _, i in least[: POOR + 1]]
    return [runs[i] for i in poor]


def _aged(run: Run, now: float) -> int:
    """Where the worth of `run` stands, which keeps that until its age is in another bin."""
    age = int(now - run.t)
    j = BIN_OF[age] if age < MAX_AGE else BINS - 1
    run.until = run.t + END_OF[j]
    run.slot = slot = run.cls * BINS + j
    return slot
