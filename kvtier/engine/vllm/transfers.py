"""Copies between vLLM's CPU region and the arena, off the engine's thread, each with a deadline."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np

from kvtier.core.blocks import BlockKey
from kvtier.core.policy import Use
from kvtier.core.tiers import Tier
from kvtier.engine.leases import ReadLease, WriteLease
from kvtier.engine.requests import number_of
from kvtier.engine.vllm.line import Attached, Bytes, Line, News
from kvtier.engine.vllm.lookups import Keys

PIECE_NBYTES: Final = 256 << 20  # leased at once, and
PIECE_SHARE: Final = 4  # no more than a fourth of the arena: a small one serves a long prompt, too
STEP_NBYTES: Final = 16 << 20  # of a load from lower tiers, copied while the next are on their way


class Outcome(NamedTuple):
    """How a job ended."""

    job: int
    storing: bool
    keys: Sequence[bytes]
    done: int  # the first so many of `keys` were copied, or, of a store, are held
    nbytes: int  # copied
    seconds: float
    request: str | None = None  # of a load
    sources: Sequence[Tier] = ()  # of a load's first `done` blocks: where they were

    @property
    def whole(self) -> bool:
        """Whether nothing is missing."""
        return self.done == len(self.keys)


class _Job:
    """One job; `lock` is held while its rows are touched, and `ended` is only set under it."""

    def __init__(
        self, number: int, storing: bool, keys: Sequence[bytes], rows: Sequence[int],
        before: Mapping[bytes, bytes] | None, request: str | None, began: float, deadline: float,
    ) -> None:  # fmt: skip
        self.number = number
        self.request = request
        self.use = Use(request=None if request is None else number_of(request))
        self.sources: list[Tier] = []
        self.storing = storing
        self.keys = keys
        self.rows = rows
        self.before = before
        self.began = began
        self.deadline = deadline
        self.lock = threading.Lock()
        self.ended = False
        self.counted = 0  # rows that it takes of those that stores may pin
        self.done = 0
        self.nbytes = 0


class Transfers:
    """The scheduler's side of loads and stores: no method but `drain` and `close` waits.

    `region` is vLLM's CPU region, one row a block. A job's rows belong to it until its outcome
    was given out; a job past its deadline is ended even when the daemon hangs, but never in the
    middle of a copy.
    """

    def __init__(
        self,
        region: memoryview,
        loads: Line,
        stores: Line,
        keys: Keys,
        *,
        load_s: float,
        store_s: float,
        news: News,
        clock: Callable[[], float],
    ) -> None:
        self._region: Bytes = np.asarray(region).view(np.uint8)
        self._piece = max(1, PIECE_NBYTES // self._region.shape[1])
        self._step = max(1, STEP_NBYTES // self._region.shape[1])
        self._lines = {False: loads, True: stores}
        self._limits = {False: load_s, True: store_s}
        self._keys = keys
        self._clock = clock
        self._jobs: dict[int, _Job] = {}
        self._ended: deque[Outcome] = deque()
        self._news = news
        # A store pins rows that loads and new blocks need: not all of them.
        self._max_storing = self._region.shape[0] * 3 // 4
        self._storing = 0  # rows
        self.dropped = 0  # blocks of stores refused because too many were under way

    def submit(
        self,
        number: int,
        *,
        storing: bool,
        keys: Sequence[bytes],
        rows: Sequence[int],
        before: Mapping[bytes, bytes] | None = None,
        request: str | None = None,
    ) -> None:
        """Begin a job, of vLLM's `request` where there is one; its outcome comes by `finished`.

        `before` says of blocks that are stored which one comes before each, the others begin
        prompts; without it those of a group are taken to follow each other.
        """
        now = self._clock()
        job = _Job(number, storing, keys, rows, before, request, now, now + self._limits[storing])
        self._jobs[number] = job
        if storing:
            if self._storing and self._storing + len(keys) > self._max_storing:
                self.dropped += len(keys)
                self._end(job)
                return
            job.counted = len(keys)
            self._storing += len(keys)
        self._lines[storing].put(lambda attached: self._run(attached, job))

    def finished(self) -> list[Outcome]:
        """The jobs that ended since the last call."""
        now = self._clock()
        for job in list(self._jobs.values()):
            if now >= job.deadline and job.lock.acquire(blocking=False):
                self._end(job)
                job.lock.release()
        outcomes: list[Outcome] = []
        while self._ended:
            outcome = self._ended.popleft()
            job = self._jobs.pop(outcome.job)
            outcomes.append(outcome)
            self._storing -= job.counted
        return outcomes

    @property
    def under_way(self) -> int:
        """Jobs whose outcome was not given out yet."""
        return len(self._jobs)

    @property
    def loading(self) -> bool:
        """Whether a load is among them."""
        return any(not job.storing for job in self._jobs.values())

    def pending(self, request: str) -> bool:
        """Whether a load for this request has not ended."""
        return any(
            job.request == request and not job.storing and not job.ended
            for job in self._jobs.values()
        )

    def drain(self) -> None:
        """End every job now; after that nobody touches the region. Waits for copies under way."""
        for job in list(self._jobs.values()):
            with job.lock:
                self._end(job)

    def close(self, timeout_s: float) -> None:
        """Give the stores `timeout_s` to end, then end every job and let go of the region."""
        self._news.wait(lambda: all(job.ended for job in list(self._jobs.values())), timeout_s)
        self.drain()
        self._region = np.empty((0, self._region.shape[1]), np.uint8)

    def _end(self, job: _Job) -> None:
        if job.ended:
            return
        job.ended = True
        seconds = self._clock() - job.began
        self._ended.append(
            Outcome(
                job.number,
                job.storing,
                job.keys,
                job.done,
                job.nbytes,
                seconds,
                job.request,
                job.sources,
            )
        )

    # --- on a line's thread -----------------------------------------------------------

    def _run(self, attached: Attached | None, job: _Job) -> None:
        try:
            if attached is not None and not job.ended:
                self._copy_all(attached, job)
        finally:
            with job.lock:
                self._end(job)
            self._news.tell()

    def _copy_all(self, attached: Attached, job: _Job) -> None:
        keys = self._keys(job.keys)
        copy = self._store if job.storing else self._load
        start = 0
        while start < len(keys) and not job.ended:
            most = min(self._piece, max(1, attached.client.arena.slots // PIECE_SHARE))
            end = _piece_end(job, start, most)
            if not copy(attached, job, keys, start, end):
                return
            start = end

    def _load(
        self, attached: Attached, job: _Job, keys: Sequence[BlockKey], start: int, end: int
    ) -> bool:
        wait_s = max(0.0, job.deadline - self._clock())
        client, done = attached.client, 0
        with client.read(keys[start:end], wait_s=wait_s, wanted=self._step, use=job.use) as lease:
            while True:
                if lease.arrived > done:
                    with job.lock:
                        if job.ended:
                            return False
                        self._fill(attached, job, lease, start, done)
                    done = lease.arrived
                if done == len(lease.slots):
                    return done == end - start
                client.more(lease, self._step)

    def _fill(self, attached: Attached, job: _Job, lease: ReadLease, start: int, done: int) -> None:
        """Copy what has arrived since `done` blocks had."""
        for index in range(done, lease.arrived):
            np.copyto(self._region[job.rows[start + index]], attached.slots[lease.slots[index]])
        job.done = start + lease.arrived
        job.sources += lease.sources[done : lease.arrived]
        job.nbytes += (lease.arrived - done) * self._region.shape[1]

    def _store(
        self, attached: Attached, job: _Job, keys: Sequence[BlockKey], start: int, end: int
    ) -> bool:
        run = start
        while run and _follows(job, run):
            run -= 1
        before = (job.before or {}).get(job.keys[run])
        path = [*(self._keys([before]) if before is not None else ()), *keys[run:end]]
        shift = end - len(path)  # from the path's indexes to the job's
        with attached.client.write(path, start - shift, job.use) as lease:
            with job.lock:
                if job.ended:
                    return False
                self._take(attached, job, lease, shift)
            # What was not granted is held already, or, at the end of the path, found no room.
            last = lease.indexes[-1] + 1 + shift if lease.indexes else start
        whole = last == end or attached.client.match(keys[last:end]).blocks == end - last
        with job.lock:
            if not job.ended:
                job.done = end if whole else last
        return whole

    def _take(self, attached: Attached, job: _Job, lease: WriteLease, shift: int) -> None:
        for index, slot in zip(lease.indexes, lease.slots, strict=True):
            np.copyto(attached.slots[slot], self._region[job.rows[index + shift]])
        lease.filled = len(lease.slots)
        job.nbytes += len(lease.slots) * self._region.shape[1]


def _piece_end(job: _Job, start: int, most: int) -> int:
    """Where the piece from `start` on ends: its blocks follow each other, in one group of layers.

    Those of a load only have to be of one group.
    """
    keys, end = job.keys, start + 1
    while end < min(len(keys), start + most) and (
        _follows(job, end) if job.storing else keys[end][-4:] == keys[start][-4:]
    ):
        end += 1
    return end


def _follows(job: _Job, at: int) -> bool:
    """Whether a block that is stored comes right behind the one before it in the job."""
    if job.before is None:
        return job.keys[at][-4:] == job.keys[at - 1][-4:]
    return job.before.get(job.keys[at]) == job.keys[at - 1]


def befores(named: object, keys: Iterable[bytes]) -> dict[bytes, bytes] | None:
    """The block before each of `keys`, of those that have one in their group of layers.

    `named` are all blocks of their request, each group in order, the newest last. None where it is
    anything else, as it may be in another release of vLLM.
    """
    wanted, found = set(keys), dict[bytes, bytes]()
    if not isinstance(named, dict) or not wanted <= named.keys():
        return None
    after: dict[bytes, bytes] = {}  # by group: whose block before it comes next
    for name in reversed([*named]):
        if not isinstance(name, bytes):
            return None
        group = name[-4:]
        if group in after:
            found[after.pop(group)] = name
        if name in wanted:
            wanted.remove(name)
            after[group] = name
        elif not wanted and not after:
            break
    return found
