"""What a codec saves of some blocks and how long it takes, beside a plain copy of them."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvtier.codec.base import Codec
from kvtier.core.blocks import BlockLayout


@dataclass(slots=True)
class Measured:
    """Seconds of one thread, one number a block; `nbytes` are those of all payloads."""

    raw_nbytes: int = 0
    nbytes: int = 0
    memcpy: list[float] = field(default_factory=list)
    encode: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Bytes of the blocks by those of their payloads."""
        return self.raw_nbytes / self.nbytes

    def of_memcpy(self, seconds: Sequence[float]) -> float:
        """The speed that these seconds mean, in units of the plain copy's; medians of both."""
        return float(np.median(self.memcpy) / np.median(seconds))

    def gb_per_s(self, seconds: Sequence[float]) -> float:
        """10**9 bytes of blocks a second, in the median."""
        return self.raw_nbytes / len(self.memcpy) / float(np.median(seconds)) / 1e9


def measure(
    codec: Codec,
    blocks: npt.NDArray[np.uint8],
    layout: BlockLayout,
    rounds: int,
    clock: Callable[[], float] = time.thread_time,
) -> Measured | None:
    """Copy, encode and decode each of `blocks` [n, layout.nbytes] in turn, `rounds` times over.

    Into memory that is not fresh, as movers do. None where the codec passes on a block. `clock`
    gives seconds, of the processor unless another one is passed.
    """
    out = np.ones_like(blocks)
    found = Measured()
    for turn in range(rounds + 1):  # the first only warms up
        for before, after in zip(blocks, out, strict=True):
            start = clock()
            after[:] = before
            copied = clock()
            parts = codec.encode(before.data, layout)
            encoded = clock()
            if parts is None:
                return None
            payload = memoryview(b"".join(parts))
            begin = clock()
            codec.decode(payload, after.data, layout)
            end = clock()
            if turn:
                found.memcpy.append(copied - start)
                found.encode.append(encoded - copied)
                found.decode.append(end - begin)
                found.nbytes += payload.nbytes
                found.raw_nbytes += layout.nbytes
    return found
