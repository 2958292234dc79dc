"""When blocks of a class are asked for again, learned; and what keeping them is worth.

For each class, `Hazards` counts how long after a use the next one came (observations that are
still open included, as Kaplan and Meier do, 1958), and makes of it an index by age: the most hits
a second that keeping a run from that age on can bring. That is Gittins' index of a job with an
unknown length (Gittins, 1979; for caches see "LHD", Beckmann, NSDI '18).
"""

import math
from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from typing import Final

from kvtier.core.policy import Learned

BINS: Final = 48
MAX_AGE: Final = 3600  # seconds that an observation stays open
_FIRST: Final = 2.0  # seconds of bin 0; each of the others is wider than the one before by
_GROWTH: Final = 1.2
_PRIOR: Final = 20.0  # observations that the prior weighs
_DECAY: Final = 0.96  # of what was learned, at each rebuild
_EMPTY: Final = 1e-12
_NEWS: Final = 0.04  # of what is known of a class: so much news is worth a rebuild
_TURNS: Final = 8  # turns after which there is one all the same
STATE_VERSION: Final = 1
TRUSTED: Final = 500  # uses that must have come before an index says more than recency does


def _bin_of(age: int) -> int:
    if age < _FIRST:
        return 0
    return min(BINS - 1, 1 + int(math.log(age / _FIRST) / math.log(_GROWTH)))


BIN_OF: Final = [_bin_of(age) for age in range(MAX_AGE)]  # by age in whole seconds
# The bins that have ages in whole seconds, and where these begin and end.
_AGES: Final = [
    (j, BIN_OF.index(j), BIN_OF.index(j) + BIN_OF.count(j)) for j in sorted(set(BIN_OF))
]
# By bin, the first age that is in a later one.
END_OF: Final = [next((end for j, _, end in _AGES if j == b), math.inf) for b in range(BINS)]
_SPAN: Final = 60  # seconds whose sum is kept as well
_NEAR: Final = [ages for ages in _AGES if ages[1] < 6 * _SPAN]  # bins of few seconds
_NEAR_AGES: Final = [(j, slice(start, stop)) for j, start, stop in _NEAR]
_FAR: Final = _AGES[len(_NEAR) :]
_WIDTHS: Final = [_FIRST, *(_FIRST * _GROWTH ** (j - 1) * (_GROWTH - 1) for j in range(1, BINS))]
_WIDTHS_BACK: Final = _WIDTHS[::-1]
# Nothing is known: uses become rarer in proportion to age, as LRU believes.
_UNKNOWN: Final = [0.01, *([0.02 * math.log(_GROWTH)] * (BINS - 1))]


def index(hazard: Sequence[float]) -> list[float]:
    """By age, the best (expected hits) / (expected seconds held) over all ways to go on keeping.

    `hazard` is by age too: the probability of a use in a bin, if there was none before. The
    answer is the slope, right of each point, of the upper hull of hits over seconds.
    """
    # The probability that there was no use before each bin.
    alive = [1.0, *accumulate([1.0 - rate for rate in hazard], mul)]
    alive.pop()
    slopes: list[float] = []
    # The edges of the hull from here on, nearest last: hits, seconds, and the first by the other.
    hull = [(0.0, 0.0, -1.0)]
    for still, rate, width in zip(reversed(alive), reversed(hazard), _WIDTHS_BACK, strict=True):
        hits, held = still * rate, still * width * (1.0 - 0.5 * rate)
        slope = hits / (held + _EMPTY)
        while slope <= hull[-1][2]:
            more, longer, _ = hull.pop()
            hits += more
            held += longer
            slope = hits / (held + _EMPTY)
        hull.append((hits, held, slope))
        slopes.append(slope)
    slopes.reverse()
    return slopes


def _smooth(counts: list[float]) -> list[float]:
    """Let each bin but the first have a share of its neighbours: few samples make a rough curve."""
    first, *rest = counts
    padded = [rest[0], *rest, rest[-1]]
    return [first] + [
        0.25 * (a + 2.0 * b + c) for a, b, c in zip(padded, rest, padded[2:], strict=False)
    ]


class _Class:
    """What was seen of one class."""

    __slots__ = ("end", "hit", "news", "oldest", "open", "passed", "seen", "spans", "upto")

    def __init__(self) -> None:
        self.hit = [0.0] * BINS
        self.end = [0.0] * BINS  # observations that ended in the bin, by a hit or by their age
        self.open = [0] * MAX_AGE  # observations by the second they were opened in, a ring
        self.spans = [0] * (MAX_AGE // _SPAN)  # and by the span that the second lies in
        self.upto = 0  # the newest second of the ring
        self.oldest = math.inf  # no observation that is open is older than that second
        self.seen = False  # whether there was any observation
        self.news = 0  # observations opened or closed since the last rebuild
        self.passed = 0  # turns that it was not rebuilt, for want of news

    def advance(self, second: int) -> None:
        """Make `second` the newest: what is older than the ring ends without a hit."""
        before = self.upto
        if second <= before:
            return
        self.upto = second
        if second - self.oldest < MAX_AGE:
            return
        self.oldest = second - MAX_AGE + 1
        if second - before >= MAX_AGE:
            expired = sum(self.spans)
            self.open = [0] * MAX_AGE
            self.spans = [0] * len(self.spans)
        else:
            a, b = (before + 1) % MAX_AGE, (second + 1) % MAX_AGE
            expired = self._clear(a, b) if a < b else self._clear(a, MAX_AGE) + self._clear(0, b)
        self.end[-1] += expired

    def _clear(self, start: int, stop: int) -> int:
        expired = sum(self.open[start:stop])
        if expired:
            self.open[start:stop] = [0] * (stop - start)
            for span in range(start // _SPAN, (stop - 1) // _SPAN + 1):
                self.spans[span] = sum(self.open[span * _SPAN : (span + 1) * _SPAN])
        return expired

    def open_by_age(self) -> list[int]:
        """Open observations in each bin."""
        found = [0] * BINS
        end, near = self.upto % MAX_AGE + 1, _NEAR[-1][2]
        start = end - near
        ages = self.open[start:end] if start >= 0 else self.open[start:] + self.open[:end]
        ages.reverse()  # by age in seconds
        younger = sum(ages)
        if younger:
            for j, span in _NEAR_AGES:
                found[j] = sum(ages[span])
        # Of the others: all up to each end, less all up to the one before.
        before = [0, *accumulate(self.spans)]
        newest = before[end // _SPAN] + sum(self.open[end - end % _SPAN : end])
        for j, _, last in _FAR:
            if younger == before[-1]:  # there are no more
                break
            place = (end - last) % MAX_AGE
            upto = newest - before[place // _SPAN] - sum(self.open[place - place % _SPAN : place])
            if place >= end:  # past the ring's end
                upto += before[-1]
            found[j], younger = upto - younger, upto
        return found


class Hazards:
    """What was learned of `classes` classes; those of `apart` stay out of the common prior.

    `worth[c * BINS + bin]` is what a run of class c is worth at an age. Times are in seconds.
    """

    def __init__(self, classes: int, apart: frozenset[int] = frozenset()) -> None:
        self._classes = [_Class() for _ in range(classes)]
        self._apart = apart
        self._prior = [_PRIOR * unknown for unknown in _UNKNOWN]  # hits
        self._pool_index = index(_UNKNOWN)
        self._sums = [([0.0] * BINS, [0.0] * BINS) for _ in range(classes)]
        self.worth = self._pool_index * classes
        self.uses = 0  # that were waited for, but for those of `apart`: what all this rests on

    def opened(self, c: int, at: float) -> None:
        """A run of class c was used at `at`: from then on it waits for its next use."""
        each, second = self._classes[c], int(at)
        if second > each.upto:
            if second - each.oldest < MAX_AGE:  # as in `advance`, for one call less
                each.upto = second
            else:
                each.advance(second)
        if second < each.oldest:
            each.oldest = second
        place = second % MAX_AGE
        each.open[place] += 1
        each.spans[place // _SPAN] += 1
        each.news += 1

    def closed(self, c: int, at: float, now: float) -> None:
        """The run that was used at `at` is used again."""
        each, second = self._classes[c], int(at)
        if now - each.oldest >= MAX_AGE:
            each.advance(int(now))
        place, waiting = second % MAX_AGE, each.open
        if waiting[place] and second > each.upto - MAX_AGE:
            waiting[place] -= 1
            each.spans[place // _SPAN] -= 1
            age = int(now - at)
            j = BIN_OF[age] if age < MAX_AGE else BINS - 1
            each.hit[j] += 1
            each.end[j] += 1
            each.news += 1
            if c not in self._apart:
                self.uses += 1

    def moved(self, old: int, new: int, at: float, now: float) -> None:
        """The class of an open observation was another one."""
        each, second = self._classes[old], int(at)
        each.advance(int(now))
        place = second % MAX_AGE
        if each.open[place] and second > each.upto - MAX_AGE:
            each.open[place] -= 1
            each.spans[place // _SPAN] -= 1
            self.opened(new, at)

    def turn(self, c: int, now: float) -> None:
        """Learn from what class c has seen, if that is something new: a rebuild costs."""
        each = self._classes[c]
        each.passed += 1
        if each.news > _NEWS * sum(each.end) or each.passed >= _TURNS or not each.seen:
            self.rebuild(c, now)
            each.passed = 0

    def rebuild(self, c: int, now: float) -> None:
        """Learn from what class c has seen; O(BINS + MAX_AGE), most of it in C."""
        each, place = self._classes[c], slice(c * BINS, (c + 1) * BINS)
        if each.news:
            each.seen, each.news = True, 0
        if not each.seen:
            self.worth[place] = self._pool_index
            return
        each.advance(int(now))
        later, risk = 0.0, list[float]()
        for ended, waiting in zip(reversed(each.end), reversed(each.open_by_age()), strict=True):
            later += ended
            if waiting:
                risk.append(later + waiting / 2)
                later += waiting
            else:
                risk.append(later)
        risk.reverse()
        hits, risk = _smooth(each.hit), _smooth(risk)
        self._sums[c] = (hits, risk)
        if risk[0] <= 0:
            self.worth[place] = self._pool_index
            return
        self.worth[place] = index([
            (hit + common) / (at_risk + _PRIOR)
            for hit, at_risk, common in zip(hits, risk, self._prior, strict=True)
        ])  # fmt: skip
        each.hit = [_DECAY * x for x in each.hit]
        each.end = [_DECAY * x for x in each.end]

    def rebuild_pool(self) -> None:
        """Learn what all classes have in common: the prior of each."""
        counted = [s for c, s in enumerate(self._sums) if c not in self._apart]
        hits = [sum(column) for column in zip(*(s[0] for s in counted), strict=True)]
        risk = [sum(column) for column in zip(*(s[1] for s in counted), strict=True)]
        pool = [
            (hit + _PRIOR * unknown) / (at_risk + _PRIOR)
            for hit, at_risk, unknown in zip(hits, risk, _UNKNOWN, strict=True)
        ]
        self._prior = [_PRIOR * common for common in pool]
        self._pool_index = index(pool)

    def save(self) -> Learned:
        """What was learned, for `restore`; what is still open counts as no use until now."""
        now = max(each.upto for each in self._classes)
        for each in self._classes:
            each.advance(now)
        return {
            "version": STATE_VERSION,
            "uses": self.uses,
            "hit": [[*each.hit] for each in self._classes],
            "end": [
                [
                    ended + waiting
                    for ended, waiting in zip(each.end, each.open_by_age(), strict=True)
                ]
                for each in self._classes
            ],
        }

    def restore(self, state: object) -> None:
        """Begin with what another life had learned.

        Raises:
            ValueError: Not a state of this version and these classes; nothing has changed.
        """
        if not isinstance(state, dict) or state.get("version") != STATE_VERSION:
            raise ValueError(f"not a learned state of version {STATE_VERSION}")
        hit, end = (self._table(state.get(name), name) for name in ("hit", "end"))
        uses = state.get("uses", TRUSTED)  # not told by earlier ones
        if type(uses) is not int or uses < 0:
            raise ValueError(f"uses is {uses!r}, must be a number of at least 0")
        self.uses = uses
        for each, hits, ends in zip(self._classes, hit, end, strict=True):
            each.hit, each.end, each.seen = hits, ends, any(ends)
        now = max(each.upto for each in self._classes)
        for rebuild in range(2):  # the pool needs the sums, and the classes the pool
            for c, each in enumerate(self._classes):
                hits, ends = each.hit, each.end
                self.rebuild(c, now)
                if not rebuild:
                    each.hit, each.end = hits, ends
            self.rebuild_pool()

    def _table(self, rows: object, name: str) -> list[list[float]]:
        if not isinstance(rows, list) or len(rows) != len(self._classes):
            raise ValueError(f"{name} must have {len(self._classes)} classes")
        for row in rows:
            if not isinstance(row, list) or len(row) != BINS:
                raise ValueError(f"each class of {name} must have {BINS} bins")
            if not all(isinstance(x, float) and 0 <= x < 1e15 for x in row):
                raise ValueError(f"{name} must hold counts of 0 to 1e15")
        return [[*row] for row in rows]
