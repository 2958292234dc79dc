"""What a store takes for a frame, from the calls that it was busy with."""

import threading
from collections.abc import Callable
from typing import Final

from kvtier.codec.auto import Cost

LEAST_ROWS: Final = 8  # before anything is said
FORGET_S: Final = 600.0  # in which half of what a frame costs by itself is doubted again
_STRETCH_S: Final = 1.0  # of being busy, as one row
_DECAY: Final = 0.97
_SPREAD: Final = 0.05  # of the frames' sizes, below which they count as of one size


class Pace:
    """A line through (bytes a frame, busy seconds a frame), the newest counting most.

    Calls that overlap count once, so that the line is that of the whole store. As long as frames
    are all of one size, nothing tells what grows with their bytes from what does not: what was
    known of that is kept and slowly doubted, and at first everything is taken to grow. Where that
    makes a codec look better than it is, its own frames are the second size that corrects it.
    Thread-safe. `clock` gives seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._under_way = 0
        self._since = 0.0
        self._blocks = self._nbytes = 0  # in this stretch of being busy
        self._spoiled = True  # the first stretch opens connections and files
        self._rows = 0
        self._weight = self._x = self._y = self._xx = self._xy = 0.0
        self._block_s, self._block_at = 0.0, 0.0

    @property
    def known(self) -> bool:
        """Whether enough was seen for `cost`."""
        return self._rows >= LEAST_ROWS

    def begin(self) -> None:
        """A call goes to the store."""
        with self._lock:
            if not self._under_way:
                self._since = self._clock()
                self._blocks = self._nbytes = 0
            self._under_way += 1

    def end(self, blocks: int, nbytes: int) -> None:
        """A call has ended that moved so many frames; 0: it failed, and its time says nothing."""
        with self._lock:
            self._under_way -= 1
            self._blocks += blocks
            self._nbytes += nbytes
            self._spoiled |= not blocks
            now = self._clock()
            if self._under_way and now - self._since < _STRETCH_S:
                return
            if not self._spoiled:
                self._add(self._nbytes / self._blocks, (now - self._since) / self._blocks)
            self._since, self._blocks, self._nbytes, self._spoiled = now, 0, 0, False

    def expect(self, block_s: float) -> None:
        """What a frame costs by itself, as another measurement had it: kept, and doubted."""
        with self._lock:
            self._block_s, self._block_at = block_s, self._clock()

    def cost(self) -> Cost:
        """Of a frame, of late. Asked only once it is `known`."""
        assert self.known
        with self._lock:
            x, y = self._x / self._weight, self._y / self._weight
            variance = self._xx / self._weight - x * x
            now = self._clock()
            if variance > (_SPREAD * x) ** 2:
                slope = (self._xy / self._weight - x * y) / variance
                self._block_s = y - min(max(slope, 0.0), y / x) * x
                self._block_at = now
            doubt = 0.5 ** ((now - self._block_at) / FORGET_S)
            block_s = min(self._block_s * doubt, y)
            return Cost(block_s, (y - block_s) / x)

    def _add(self, nbytes: float, seconds: float) -> None:
        self._rows += 1
        self._weight = self._weight * _DECAY + 1
        self._x = self._x * _DECAY + nbytes
        self._y = self._y * _DECAY + seconds
        self._xx = self._xx * _DECAY + nbytes * nbytes
        self._xy = self._xy * _DECAY + nbytes * seconds
