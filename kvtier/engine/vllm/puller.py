"""A worker's word to its node daemon that another node has a prompt's blocks, before vLLM looks.

vLLM's look-up is answered while it schedules, where nothing may wait. Here one request waits, on
the worker's loop, and finds in host memory afterwards what has come.
"""

import asyncio
import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, NamedTuple

from kvtier import metrics
from kvtier.core.blocks import BlockKey, BlockLayout
from kvtier.core.tiers import Tier
from kvtier.engine.client import TierClient
from kvtier.engine.pulling import counted
from kvtier.engine.sequence import Started
from kvtier.engine.vllm.line import Attached, Health, Line
from kvtier.wire.lending import MAX_BLOCKS
from kvtier.wire.local import MAX_KEYS

LINES: Final = 4  # connections: pulls at once. A daemon has no more under way, unless it is told so
GRACE_S: Final = 0.25  # for the daemon's answer, once what it may wait is over
LEAVE_S: Final = 1.0  # for a thread to end; a daemon thread keeps no process


class Brought(NamedTuple):
    """What a request brought to its node before the engine had it."""

    blocks: int
    seconds: float

    def told(self, started: Started, block_tokens: int) -> Started:
        """`started` with this in it; the three times still add up."""
        if not self.seconds:
            return started
        host = started.restored.get(Tier.HOST, 0)
        pulled = counted(self.blocks, host // block_tokens) * block_tokens
        # Routers learn from restores: a wait for nothing is not one.
        queue_s, restore_s = (0.0, self.seconds) if pulled else (self.seconds, 0.0)
        return dataclasses.replace(
            started, pulled_tokens=pulled, queue_s=started.queue_s + queue_s,
            restore_s=started.restore_s + restore_s,
        )  # fmt: skip


NOTHING: Final = Brought(0, 0.0)


@dataclasses.dataclass(slots=True, eq=False)
class _Asked:
    """One request's question; of the loop, but for what `Puller` asks on a line's thread."""

    keys: Sequence[BlockKey]
    first: int
    node: str
    end: float
    came: "asyncio.Future[int]"
    begun: bool = False
    ended: bool = False
    overdue: bool = False


class Puller:
    """Asks the daemon at `socket`. Lives on one loop; the waiting is done on threads.

    While an answer is overdue, which a daemon that hangs alone brings about, nobody waits for
    another one.

    Args:
        socket: The node daemon's.
        layout: Of the engine's blocks.
        wait_s: That a request may wait for its blocks.
        clock: Seconds.
    """

    def __init__(
        self,
        socket: str,
        layout: BlockLayout,
        wait_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._socket = socket
        self._layout = layout
        self._wait_s = wait_s
        self._clock = clock
        self._health = Health()
        self._free = asyncio.Semaphore(LINES)
        self._lines: list[Line] = []
        self._overdue = 0
        self._idle = [self._line()]  # at once: by the first request it is attached

    async def pull(self, keys: Sequence[BlockKey], first: int, node: str) -> int:
        """Have what the node lacks of keys[first:] brought from `node`; how many blocks came.

        Takes `wait_s` and a moment at most, and never fails: a failure is 0, and a counter.
        """
        keys = keys[:MAX_KEYS]
        if first >= len(keys):
            return 0
        if self._overdue:
            metrics.TIER_FAILURES.labels("pull").inc()
            return 0
        loop = asyncio.get_running_loop()
        came: asyncio.Future[int] = loop.create_future()
        asked = _Asked(keys, first, node, self._clock() + self._wait_s, came)
        try:
            async with asyncio.timeout(self._wait_s + GRACE_S):
                await self._free.acquire()
                line = self._idle.pop() if self._idle else self._line()
                asked.begun = True
                line.put(partial(self._ask, loop, asked, line))
                return await came
        except TimeoutError:
            metrics.TIER_FAILURES.labels("pull").inc()
            if asked.begun and not asked.ended:
                asked.overdue = True
                self._overdue += 1
            return 0

    async def close(self) -> None:
        """Hang up. Nothing is asked any more."""
        await asyncio.gather(*(asyncio.to_thread(line.close, LEAVE_S) for line in self._lines))

    def _line(self) -> Line:
        line = Line(
            "pull", self._socket, lambda: self._layout, self._health, populate=False,
            clock=self._clock,
        )  # fmt: skip
        self._lines.append(line)
        return line

    def _answered(self, asked: _Asked, line: Line, came: int) -> None:
        asked.ended = True
        self._overdue -= asked.overdue
        self._idle.append(line)
        self._free.release()
        if not asked.came.done():  # the request has not gone on without
            asked.came.set_result(came)

    # --- on a line's thread -----------------------------------------------------------

    def _ask(
        self, loop: asyncio.AbstractEventLoop, asked: _Asked, line: Line, attached: Attached | None
    ) -> None:
        came = 0
        try:
            if attached is None:
                metrics.TIER_FAILURES.labels("pull").inc()
            else:
                came = self._bring(attached.client, asked)
        except BaseException:
            metrics.TIER_FAILURES.labels("pull").inc()
            raise
        finally:
            if not loop.is_closed():  # the worker has ended
                loop.call_soon_threadsafe(self._answered, asked, line, came)

    def _bring(self, client: TierClient, asked: _Asked) -> int:
        """Pull as long as more of the path comes: one request of a daemon's is so many blocks."""
        keys, came, reached = asked.keys, 0, -1
        while (left_s := asked.end - self._clock()) > 0:
            there = asked.first + client.match(keys[asked.first :]).blocks
            missing = len(keys) - there
            if not missing or there <= reached:  # what came is gone again: there is no room
                break
            reached = there
            some = client.pull(keys, there, asked.node, wait_s=left_s)
            came += some
            if some < min(missing, MAX_BLOCKS):
                break
        return came
