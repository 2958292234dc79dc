"""Which lossless codec makes a tier fastest, from what was measured of both.

A tier's threads take turns at its store and at the processor. A block takes at least the store's
time, and the store's and the codec's time in turn over the threads that work at once; the larger
is what a steady stream comes to (asymptotic bounds of a closed queueing network, Denning and
Buzen 1978). Only half the cores are counted on: the others are the engine's. With one thread
left this is the plain rule that a codec must save more of the store's time than it takes.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from kvtier.codec.base import Codec
from kvtier.codec.codecs import RAW
from kvtier.codec.frame import LEAST_SAVED

# A block is written once and read as often as its tier is worth having; and a request waits for
# a read, nobody for a write.
READS: Final = 3.0
LEAVE_RAW: Final = 0.1  # what a codec must gain on raw before it takes its place
MARGIN: Final = 0.05  # on a codec in use


@dataclass(frozen=True, slots=True)
class Timing:
    """One codec on blocks of one layout: bytes of a payload, seconds a block on one thread.

    As measured while as many threads as `working` says did the same: they share an interpreter.
    """

    codec: Codec
    nbytes: float
    encode_s: float
    decode_s: float


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds for which a store is busy with a frame: `block_s + nbytes * byte_s`."""

    block_s: float
    byte_s: float

    def of(self, nbytes: float) -> float:
        """Those of a frame of `nbytes`."""
        return self.block_s + nbytes * self.byte_s


def median(timings: Sequence[Timing]) -> Timing:
    """Of several timings of one codec, each figure by itself."""
    return Timing(
        timings[0].codec,
        statistics.median(each.nbytes for each in timings),
        statistics.median(each.encode_s for each in timings),
        statistics.median(each.decode_s for each in timings),
    )


def line(rows: Sequence[tuple[float, float]]) -> Cost | None:
    """The line of least squares through (bytes a frame, seconds a frame), no part below 0.

    None where the frames are not of two sizes.
    """
    if len({nbytes for nbytes, _ in rows}) < 2:
        return None
    x = sum(nbytes for nbytes, _ in rows) / len(rows)
    y = sum(seconds for _, seconds in rows) / len(rows)
    spread = sum((nbytes - x) ** 2 for nbytes, _ in rows)
    slope = sum((nbytes - x) * (seconds - y) for nbytes, seconds in rows) / spread
    slope = min(max(slope, 0.0), y / x)
    return Cost(y - slope * x, slope)


@dataclass(frozen=True, slots=True)
class Device:
    """A tier's store, and what this host has to feed it; `threads` each way."""

    write: Cost
    read: Cost
    threads: int
    cores: int

    def write_s(self, timing: Timing) -> float:
        """Seconds a block, encoded and written, in a steady stream."""
        return self._in_stream(self.write.of(timing.nbytes), timing.encode_s)

    def read_s(self, timing: Timing) -> float:
        """Seconds a block, read and decoded, in a steady stream."""
        return self._in_stream(self.read.of(timing.nbytes), timing.decode_s)

    def _in_stream(self, store_s: float, codec_s: float) -> float:
        return max(store_s, (store_s + codec_s) / working(self.threads, self.cores))


def working(threads: int, cores: int) -> int:
    """Of a tier's threads, how many are sure to have a core."""
    return max(1, min(threads, cores // 2))


def choose(
    timings: Sequence[Timing], block_nbytes: int, device: Device, current: Codec = RAW
) -> Codec:
    """The codec with the fewest seconds a block, reads weighed READS times.

    Never a lossy one, never one that saves less than a frame must save or by which restores are
    slower than raw. `current` stays where nothing gains MARGIN on it, LEAVE_RAW if it is raw.

    Args:
        timings: Raw's and those of others that suit the blocks, in any order.
        block_nbytes: Bytes of a block.
        device: The tier.
        current: The codec in use.
    """
    raw = next(each for each in timings if each.codec is RAW)
    limit_s = device.read_s(raw)

    def admitted(timing: Timing) -> bool:
        if timing is raw:
            return True
        saved = block_nbytes - timing.nbytes
        slack = 1 + MARGIN if timing.codec is current else 1.0
        return (
            timing.codec.exact
            and saved * LEAST_SAVED >= block_nbytes
            and device.read_s(timing) <= limit_s * slack
        )

    scores = {
        each.codec.id: (device.write_s(each) + READS * device.read_s(each), each.codec)
        for each in timings
        if admitted(each)
    }
    best_s, best = min(scores.values(), key=lambda each: each[0])
    margin = LEAVE_RAW if current is RAW else MARGIN
    if current.id in scores and best_s > scores[current.id][0] * (1 - margin):
        return current
    return best
