"""What codec `auto` begins with: a tier's store and the codecs, timed before any block is there."""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from kvtier.codec.auto import Cost, Timing, line, median
from kvtier.codec.base import Codec
from kvtier.codec.codecs import CODECS
from kvtier.codec.measure import Measured, measure
from kvtier.core.blocks import BlockLayout
from kvtier.errors import ConfigError, StoreUnavailable
from kvtier.stores.base import Trial

BOUND_S: Final = 0.5  # for all, and then what it is in the middle of
STORE_S: Final = 0.25  # of these, for the store
FRAMES: Final = 4  # of one call
_LARGEST: Final = 2 << 20  # bytes of a frame, or of the block if that is smaller
_SMALLEST: Final = 4096
_HALVES: Final = 5  # of the largest frame, for the first one
_LEAST: Final = 2  # frames of so many sizes, however slow: a line needs them
_PASSES: Final = 2  # over all sizes
# Spread of the channels' scales. With it a code of each kind saves what it saves of SmolLM2's KV:
# bp-zh 1.46 (1.48), bp4 1.33 (1.33), bs-lz4 1.33 (1.35) in bfloat16, bp-zh 1.15 (1.16) in float16.
_SCALES: Final = 0.7
_FLOATS: Final = ("bfloat16", "float16", "float32")

OpenTrial = Callable[[int, int], Trial]  # of bytes a frame at most, and frames

log = logging.getLogger(__name__)


class Probed(NamedTuple):
    """The store each way, and the codecs on numbers that stand for KV; none for other dtypes."""

    write: Cost
    read: Cost
    timings: list[Timing]


class Probe:
    """Measures once, on a thread of its own, and tells; says nothing where it could not.

    Args:
        name: The tier's label.
        layout: Of the blocks to come.
        workers: Threads that will encode or decode at once.
        open_trial: Where the store is measured.
        told: Called on the thread with what was found.
        clock: Seconds.
    """

    def __init__(
        self,
        name: str,
        layout: BlockLayout,
        workers: int,
        open_trial: OpenTrial,
        told: Callable[[Probed], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._name, self._layout, self._workers = name, layout, workers
        self._open_trial, self._told, self._clock = open_trial, told, clock
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self.run, name=f"probe-{name}")

    def start(self) -> None:
        """Begin in the background."""
        self._thread.start()

    def close(self) -> None:
        """End it after the call that it is in, if it still runs. Idempotent."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def run(self) -> None:
        """Measure and tell, on this thread."""
        begun = self._clock()
        try:
            costs = self._store(begun + STORE_S)
        except (StoreUnavailable, ConfigError) as error:
            log.info("%s tier: not measured at the start: %s", self._name, error)
            return
        if costs is None or self._stop.is_set():
            log.info("%s tier: not measured at the start: no room or no time", self._name)
            return
        self._told(Probed(*costs, self._codecs(begun + BOUND_S)))

    def _store(self, end: float) -> tuple[Cost, Cost] | None:
        """From small frames to large ones, as many as there is time for."""
        top = max(_SMALLEST, min(self._layout.nbytes, _LARGEST) // _SMALLEST * _SMALLEST)
        sizes = [top >> half for half in range(_HALVES, -1, -1) if top >> half >= _SMALLEST]
        writes: list[tuple[float, float]] = []
        reads: list[tuple[float, float]] = []
        trial = self._open_trial(top, FRAMES)
        try:
            if not (trial.write(sizes[0]) and trial.read(sizes[0])):  # opens connections
                return None
            for size in sizes * _PASSES:
                start = self._clock()
                if not trial.write(size):
                    return None
                written = self._clock()
                if not trial.read(size):
                    return None
                now = self._clock()
                writes.append((size, (written - start) / FRAMES))
                reads.append((size, (now - written) / FRAMES))
                late = now + 2 * (now - start) > end and len(writes) >= _LEAST
                if late or self._stop.is_set():
                    break
        finally:
            trial.close()
        write, read = line(writes), line(reads)
        return None if write is None or read is None else (write, read)

    def _codecs(self, end: float) -> list[Timing]:
        """Raw, and those that there is time for; nothing where the ratio cannot be guessed."""
        blocks = stand_in(self._layout)
        if blocks is None:
            return []
        timings: list[Timing] = []
        with ThreadPoolExecutor(self._workers, f"probe-{self._name}") as pool:
            for codec in CODECS:
                if not codec.exact:
                    continue
                found = timed(codec, blocks, self._layout, self._workers, pool, self._clock)
                if found is not None:
                    timings.append(found)
                if self._stop.is_set() or self._clock() > end:
                    break
        return timings


def stand_in(layout: BlockLayout) -> npt.NDArray[np.uint8] | None:
    """A block [1, layout.nbytes] of numbers that codecs find as a model's KV; None: none is known.

    Normal numbers, the scale of each of 64 channels from a lognormal distribution.
    """
    if layout.dtype not in _FLOATS:
        return None
    random = np.random.default_rng(1)
    count = layout.nbytes // layout.itemsize
    scales = np.exp(random.standard_normal(64) * _SCALES).astype(np.float32)
    values = random.standard_normal(count, np.float32) * np.resize(scales, count)
    if layout.dtype == "bfloat16":
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8).reshape(1, -1)
    return values.astype(layout.dtype).view(np.uint8).reshape(1, -1)


def timed(
    codec: Codec,
    blocks: npt.NDArray[np.uint8],
    layout: BlockLayout,
    workers: int,
    pool: Executor,
    clock: Callable[[], float],
) -> Timing | None:
    """`codec` on so many of `pool`'s threads at once: they share an interpreter and its lock.

    Their median; None where the codec passes on a block.
    """

    def once(_: int) -> Measured | None:
        return measure(codec, blocks, layout, rounds=1, clock=clock)

    timings = [
        Timing(codec, found.nbytes, found.encode[0], found.decode[0])
        for found in pool.map(once, range(workers))
        if found is not None
    ]
    return median(timings) if timings else None
