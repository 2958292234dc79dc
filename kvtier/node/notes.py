"""What engines tell without waking the daemon: that they have ended a lease, or filled a slot.

A message on a socket wakes its reader, and a reader that wakes takes a core or a cache from the
engine just when it goes on computing. COMMIT, RELEASE, PUT and USED have no answer, so nobody is in
a hurry: they lie in a pipe that the daemon reads before it does anything that they could matter to,
and every HEAR_S as long as leases are open, every NOTING_S of an engine that may put or use blocks
without one. See docs/decisions/0020, 0036 and 0043.
"""

import asyncio
import os
from typing import Final, Protocol

from kvtier.wire import local
from kvtier.wire.local import Value

HEAR_S: Final = 0.005  # that a note lies unread at most, of an engine with open leases
NOTING_S: Final = 0.02  # of one that needs no lease: always, so more seldom
_READ_NBYTES: Final = 4096
_MOST_READS: Final = 16  # at once: a pipe's worth


class Notes:
    """The reading end of one engine's pipe; `write_fd` is the engine's, until `given`."""

    def __init__(self) -> None:
        self._fd, self.write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._buffer = memoryview(bytearray(_READ_NBYTES))
        self._decoder = local.Decoder()

    def given(self) -> None:
        """The engine has its end."""
        os.close(self.write_fd)

    def read(self) -> list[list[Value]]:
        """The messages that have come since.

        Raises:
            RemoteProtocolError: They are none.
        """
        messages: list[list[Value]] = []
        for _ in range(_MOST_READS):
            try:
                count = os.readv(self._fd, [self._buffer])
            except BlockingIOError:
                break
            messages += self._decoder.feed(self._buffer[:count])
            if count < _READ_NBYTES:
                break
        return messages

    def close(self) -> None:
        """No word will be read any more."""
        os.close(self._fd)


class Noting(Protocol):
    """An engine with open leases, or that may note something without one."""

    def hear(self) -> None:
        """Read and act on its notes; raises nothing."""
        ...


class Hearing:
    """The engines whose notes have to be read. Lives on one loop."""

    def __init__(self) -> None:
        self._leasing: set[Noting] = set()  # with open leases
        self._noting: set[Noting] = set()  # that may note without one
        self._due: asyncio.TimerHandle | None = None

    def begin(self, engine: Noting) -> None:
        """It has an open lease."""
        self._leasing.add(engine)
        self._within(HEAR_S)

    def end(self, engine: Noting) -> None:
        """It has none."""
        self._leasing.discard(engine)
        self._rest()

    def noting(self, engine: Noting) -> None:
        """It has slots on credit, or was told where blocks lie: now, and until it leaves."""
        self._noting.add(engine)
        self._within(NOTING_S)

    def leave(self, engine: Noting) -> None:
        """It is gone."""
        self._noting.discard(engine)
        self.end(engine)

    def now(self) -> None:
        """Act on all that was noted up to here."""
        for engine in [*(self._leasing | self._noting)]:
            engine.hear()

    def _within(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        if self._due is not None:
            if self._due.when() <= loop.time() + seconds:
                return
            self._due.cancel()
        self._due = loop.call_later(seconds, self._again)

    def _rest(self) -> None:
        if self._due is not None and not self._leasing and not self._noting:
            self._due.cancel()
            self._due = None

    def _again(self) -> None:
        self._due = None
        self.now()
        if self._leasing:
            self._within(HEAR_S)
        elif self._noting:
            self._within(NOTING_S)
