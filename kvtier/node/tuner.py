"""Codec `auto`: measures codecs on the blocks that are saved, and the store on its own calls."""

import contextlib
import logging
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Final

import numpy as np
import numpy.typing as npt

from kvtier import metrics
from kvtier.codec.auto import Device, Timing, choose, working
from kvtier.codec.base import Codec
from kvtier.codec.codecs import CODECS, RAW
from kvtier.codec.frame import frame_nbytes
from kvtier.codec.measure import Measured, measure
from kvtier.core.blocks import BlockKey, BlockLayout
from kvtier.errors import StoreUnavailable
from kvtier.node.pace import Pace
from kvtier.stores.base import Parts, Store

PERIOD_S: Final = 30.0  # between two choices
SAMPLES: Final = 3  # blocks that the first choice is made on
READ_BACK: Final = 2  # blocks of a batch, until enough was read
_KEPT: Final = 5  # newest samples, whose median counts

log = logging.getLogger(__name__)


class Tuner:
    """Chooses the codec of one tier of one layout; `codec` is the one in use, raw at first.

    Only real KV says what a codec saves of it, so nothing is measured before the first blocks go
    down: one of a batch is tried with every lossless codec, on the thread that is about to encode
    it; three at first, then one a period. `metered` gives the store whose calls are measured.
    Thread-safe.

    Args:
        name: The tier's label.
        layout: Of the blocks.
        threads: That the tier has for loads, and for demotions.
        cores: That they may run on.
        period_s: At least so long lies between two choices.
        clock: Seconds.
    """

    def __init__(
        self,
        name: str,
        layout: BlockLayout,
        threads: int,
        cores: int,
        *,
        period_s: float = PERIOD_S,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.codec: Codec = RAW
        self._name, self._layout = name, layout
        self._threads, self._cores = threads, cores
        self._working = working(threads, cores)
        self._period_s, self._clock = period_s, clock
        self._writes, self._reads = Pace(clock), Pace(clock)
        self._samples: dict[int, deque[Timing]] = {}
        self._sampled = 0
        self._due = float("-inf")
        self._measuring = threading.Lock()

    def metered(self, store: Store) -> Store:
        """`store`, with its reads and writes measured."""
        return _Metered(store, self._writes, self._reads)

    def offer(self, block: memoryview) -> None:
        """`block` (layout.nbytes bytes) is about to be encoded: maybe measure, maybe choose."""
        waits_for_store = self._sampled >= SAMPLES and not self._known
        if waits_for_store or self._clock() < self._due:
            return
        if not self._measuring.acquire(blocking=False):
            return
        try:
            self._sample(block)
            if self._sampled >= SAMPLES and self._known:
                self._choose()
                self._due = self._clock() + self._period_s
        finally:
            self._measuring.release()

    @property
    def _known(self) -> bool:
        return self._writes.known and self._reads.known

    def _sample(self, block: memoryview) -> None:
        blocks = np.frombuffer(block, np.uint8).reshape(1, -1)
        with ThreadPoolExecutor(self._working, f"tune-{self._name}") as pool:
            for codec in CODECS:
                if codec.exact:
                    self._try(codec, blocks, pool)
        self._sampled += 1

    def _try(self, codec: Codec, blocks: npt.NDArray[np.uint8], pool: Executor) -> None:
        """On as many threads as will work at once: they share an interpreter and its lock."""

        def once(_: int) -> Measured | None:
            return measure(codec, blocks, self._layout, rounds=1, clock=self._clock)

        timings = [
            Timing(codec, found.nbytes, found.encode[0], found.decode[0])
            for found in pool.map(once, range(self._working))
            if found is not None
        ]
        if timings:
            self._samples.setdefault(codec.id, deque(maxlen=_KEPT)).append(_median(timings))
        else:
            self._samples.pop(codec.id, None)

    def _choose(self) -> None:
        device = Device(self._writes.cost(), self._reads.cost(), self._threads, self._cores)
        timings = [_median(each) for each in self._samples.values()]
        codec = choose(timings, self._layout.nbytes, device, self.codec)
        if codec is not self.codec:
            log.info(
                "%s tier: codec %s from now on, was %s", self._name, codec.name, self.codec.name
            )
            metrics.CODEC_CHANGES.labels(self._name, codec.name).inc()
            self.codec = codec


def _median(timings: Sequence[Timing]) -> Timing:
    return Timing(
        timings[0].codec,
        statistics.median(each.nbytes for each in timings),
        statistics.median(each.encode_s for each in timings),
        statistics.median(each.decode_s for each in timings),
    )


class _Metered:
    """`inner`, its reads and writes measured. See `Store`."""

    def __init__(self, inner: Store, writes: Pace, reads: Pace) -> None:
        self._inner, self._writes, self._reads = inner, writes, reads

    def write(self, frames: Sequence[tuple[BlockKey, Parts]]) -> list[bool]:
        """See `Store.write`."""
        if not frames:
            return self._inner.write(frames)
        blocks = nbytes = 0
        self._writes.begin()
        try:
            written = self._inner.write(frames)
            if all(written):  # a refusal takes no time
                blocks, nbytes = len(frames), sum(frame_nbytes(parts) for _, parts in frames)
        finally:
            self._writes.end(blocks, nbytes)
        if blocks and not self._reads.known:
            self._read_back([key for key, _ in frames[:READ_BACK]])
        return written

    def _read_back(self, keys: Sequence[BlockKey]) -> None:
        """Until there was something to restore: so that reads are not guessed."""
        with contextlib.suppress(StoreUnavailable):  # as good as not asked
            self.read(keys)

    def read(self, keys: Sequence[BlockKey]) -> list[bytes | memoryview | None]:
        """See `Store.read`."""
        found: list[bytes | memoryview] = []
        self._reads.begin()
        try:
            frames = self._inner.read(keys)
            found = [each for each in frames if each is not None]
            return frames
        finally:
            self._reads.end(len(found), frame_nbytes(found))

    def count(self, keys: Sequence[BlockKey]) -> int:
        """See `Store.count`."""
        return self._inner.count(keys)

    def delete(self, keys: Sequence[BlockKey]) -> None:
        """See `Store.delete`."""
        self._inner.delete(keys)

    def scan(self) -> Iterator[tuple[BlockKey, int]]:
        """See `Store.scan`."""
        return self._inner.scan()

    def close(self) -> None:
        """See `Store.close`."""
        self._inner.close()
