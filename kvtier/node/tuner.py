"""Codec `auto`: begins with what a probe says, then measures the blocks that are saved.

The store is measured on its own calls, codecs on blocks that are about to be encoded.
"""

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple

import numpy as np

from kvtier import metrics
from kvtier.codec.auto import Cost, Device, Timing, choose, median, working
from kvtier.codec.base import Codec
from kvtier.codec.codecs import CODECS, RAW
from kvtier.codec.frame import frame_nbytes
from kvtier.core.blocks import BlockKey, BlockLayout
from kvtier.errors import StoreUnavailable
from kvtier.node.pace import Pace
from kvtier.node.probe import OpenTrial, Probe, Probed, timed
from kvtier.stores.base import ChainedStore, Parts, ProbedStore, Store

PERIOD_S: Final = 30.0  # between two choices
SAMPLES: Final = 3  # blocks that the first choice on blocks is made on
READ_BACK: Final = 2  # blocks of a batch, until enough was read
_KEPT: Final = 5  # newest samples, whose median counts

log = logging.getLogger(__name__)


class Measured(NamedTuple):
    """The store as it was reckoned with at the last choice: bytes of raw blocks a second.

    `by` is "probe" until blocks were measured, then "blocks".
    """

    write: float
    read: float
    by: str


class Tuner:
    """Chooses the codec of one tier of one layout; `codec` is the one in use, raw at first.

    A probe at the start times the store, and codecs on numbers that stand for KV; it makes the
    first choice, unless blocks were faster. Only real KV says what a codec saves of it, so of
    the first blocks that go down one of a batch is tried with every lossless codec, on the thread
    that is about to encode it: three at first, then one a period. Chosen again is on these, as
    soon as enough of the store's own calls are known, and then once a period. `metered` gives the
    store whose calls are measured. Thread-safe.

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
        self.measured: Measured | None = None
        self._name, self._layout = name, layout
        self._threads, self._cores = threads, cores
        self._working = working(threads, cores)
        self._period_s, self._clock = period_s, clock
        self._writes, self._reads = Pace(clock), Pace(clock)
        self._probe: Probe | None = None
        self._probed: Probed | None = None
        self._samples: dict[int, deque[Timing]] = {}
        self._sampled = 0
        self._due = float("-inf")
        self._measuring = threading.Lock()

    def metered(self, store: Store) -> Store:
        """`store`, with its reads and writes measured; closing it ends the probe."""
        return _Metered(store, self._writes, self._reads, self.close)

    def probe(self, open_trial: OpenTrial) -> None:
        """Begin to measure in the background, in what `open_trial` opens; at most once."""
        assert self._probe is None
        self._probe = Probe(
            self._name, self._layout, self._working, open_trial, self.probed, self._clock
        )
        self._probe.start()

    def probed(self, found: Probed) -> None:
        """What a probe has measured: chosen by until blocks were."""
        with self._measuring:
            self._probed = found
            self._writes.expect(found.write.block_s)
            self._reads.expect(found.read.block_s)
            if self._sampled < SAMPLES:
                self._choose(found.timings)

    def close(self) -> None:
        """End the probe."""
        if self._probe is not None:
            self._probe.close()

    def offer(self, block: memoryview) -> None:
        """`block` (layout.nbytes bytes) is about to be encoded: maybe measure, maybe choose."""
        sampled = self._sampled >= SAMPLES
        if sampled and self._cost() is None:  # until the store has shown enough
            return
        by_probe = self.measured is None or self.measured.by == "probe"
        if self._clock() < self._due and not (by_probe and self._known):
            return
        if not self._measuring.acquire(blocking=False):
            return
        try:
            self._sample(block)
            if self._sampled >= SAMPLES:
                self._choose([median(each) for each in self._samples.values()])
        finally:
            self._measuring.release()

    @property
    def _known(self) -> bool:
        return self._writes.known and self._reads.known

    def _cost(self) -> tuple[Cost, Cost] | None:
        """Of the store, each way: of real blocks where enough of them were seen."""
        if self._known:
            return self._writes.cost(), self._reads.cost()
        return (self._probed.write, self._probed.read) if self._probed else None

    def _sample(self, block: memoryview) -> None:
        blocks = np.frombuffer(block, np.uint8).reshape(1, -1)
        with ThreadPoolExecutor(self._working, f"tune-{self._name}") as pool:
            for codec in CODECS:
                if not codec.exact:
                    continue
                found = timed(codec, blocks, self._layout, self._working, pool, self._clock)
                if found is None:
                    self._samples.pop(codec.id, None)
                else:
                    self._samples.setdefault(codec.id, deque(maxlen=_KEPT)).append(found)
        self._sampled += 1

    def _choose(self, timings: Sequence[Timing]) -> None:
        if (cost := self._cost()) is None:
            return
        self._due = self._clock() + self._period_s if self._sampled >= SAMPLES else self._due
        self._tell(*cost, timings)
        if not timings:
            return
        device = Device(*cost, self._threads, self._cores)
        codec = choose(timings, self._layout.nbytes, device, self.codec)
        if codec is not self.codec:
            log.info(
                "%s tier: codec %s from now on, was %s", self._name, codec.name, self.codec.name
            )
            metrics.CODEC_CHANGES.labels(self._name, codec.name).inc()
            self.codec = codec

    def _tell(self, write: Cost, read: Cost, timings: Sequence[Timing]) -> None:
        """What is reckoned with, for people."""
        nbytes = self._layout.nbytes
        by = "blocks" if self._known else "probe"
        self.measured = Measured(
            _rate(nbytes, write.of(nbytes)), _rate(nbytes, read.of(nbytes)), by
        )
        metrics.STORE_SPEED.labels(self._name, "write").set(self.measured.write)
        metrics.STORE_SPEED.labels(self._name, "read").set(self.measured.read)
        for each in timings:
            names = self._name, each.codec.name
            metrics.CODEC_RATIO.labels(*names).set(_rate(nbytes, each.nbytes))
            metrics.CODEC_SPEED.labels(*names, "encode").set(_rate(nbytes, each.encode_s))
            metrics.CODEC_SPEED.labels(*names, "decode").set(_rate(nbytes, each.decode_s))


def _rate(nbytes: int, by: float) -> float:
    return nbytes / by if by > 0 else 0.0


class _Metered:
    """`inner`, its reads and writes measured. See `Store`."""

    def __init__(
        self, inner: Store, writes: Pace, reads: Pace, closing: Callable[[], None]
    ) -> None:
        self._inner, self._writes, self._reads, self._closing = inner, writes, reads, closing

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

    def probe(self) -> None:
        """See `ProbedStore.probe`; a question to `inner` where it is none."""
        if isinstance(self._inner, ProbedStore):
            self._inner.probe()
        else:
            self._inner.count([BlockKey(bytes(16))])

    def delete(self, keys: Sequence[BlockKey]) -> None:
        """See `Store.delete`."""
        self._inner.delete(keys)

    def scan(self) -> Iterator[tuple[BlockKey, int]]:
        """See `Store.scan`."""
        return self._inner.scan()

    def take_before(self) -> Mapping[BlockKey, BlockKey]:
        """See `ChainedStore.take_before`; nothing where `inner` is none."""
        return self._inner.take_before() if isinstance(self._inner, ChainedStore) else {}

    def close(self) -> None:
        """See `Store.close`."""
        self._closing()
        self._inner.close()
