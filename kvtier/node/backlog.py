"""Moves of one way between two tiers, waiting for the threads that make them."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from kvtier.core.effects import Move

After = tuple[Future[None], ...]


class Backlog:
    """Hands moves, in order, to `work` on `pool`, in batches that grow with what waits.

    A thread takes its share of all that waits when it is free, and at most `most`: what is small
    is spread over the threads, and under load a store is given much at once. So a stream of small
    requests drains as fast as a large one.
    """

    def __init__(
        self,
        pool: ThreadPoolExecutor,
        threads: int,
        most: int,
        work: Callable[[list[Move]], None],
    ) -> None:
        self._pool = pool
        self._threads = threads
        self._most = most
        self._work = work
        self._lock = threading.Lock()  # over what waits
        self._waiting: deque[tuple[Move, After]] = deque()
        self._closed = False

    def add(self, moves: Sequence[Move], after: After = ()) -> None:
        """Make `moves` once `after` have ended; these run elsewhere than on this pool."""
        with self._lock:
            self._waiting.extend((move, after) for move in moves)
        for _ in range(min(self._threads, len(moves))):
            self._pool.submit(self._turn)

    def drop(self) -> list[Move]:
        """Begin none of those that wait; which these were."""
        with self._lock:
            dropped = [move for move, _ in self._waiting]
            self._waiting.clear()
            return dropped

    def close(self) -> None:
        """Begin no more. Called before the pool is shut down."""
        with self._lock:
            self._closed = True
            self._waiting.clear()

    def _turn(self) -> None:
        """One batch, and another turn behind whatever else the pool has to do."""
        with self._lock:
            share = -(-len(self._waiting) // self._threads)
            taken = [self._waiting.popleft() for _ in range(min(self._most, share))]
        if not taken:
            return
        wait(taken[-1][1])  # of those before it, all that have not ended
        self._work([move for move, _ in taken])
        with self._lock:
            if self._waiting and not self._closed:
                self._pool.submit(self._turn)
