"""What engines tell without waking the daemon: that they have ended a lease.

A message on a socket wakes its reader, and a reader that wakes takes a core or a cache from the
engine just when it goes on computing. COMMIT and RELEASE have no answer, so nobody is in a hurry:
they lie in a pipe that the daemon reads before it does anything that they could matter to, and
every HEAR_S as long as leases are open. See docs/decisions/0020.
"""

import asyncio
import os
from typing import Final, Protocol

from kvtier.wire import local
from kvtier.wire.local import Value

HEAR_S: Final = 0.005  # that a note lies unread at most
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
    """An engine with open leases."""

    def hear(self) -> None:
        """Read and act on its notes; raises nothing."""
        ...


class Hearing:
    """The engines whose notes have to be read: those with open leases. Lives on one loop."""

    def __init__(self) -> None:
        self._engines: set[Noting] = set()
        self._due: asyncio.TimerHandle | None = None

    def begin(self, engine: Noting) -> None:
        """It has an open lease."""
        self._engines.add(engine)
        if self._due is None:
            self._due = asyncio.get_running_loop().call_later(HEAR_S, self._again)

    def end(self, engine: Noting) -> None:
        """It has none."""
        self._engines.discard(engine)
        if self._due is not None and not self._engines:
            self._due.cancel()
            self._due = None

    def now(self) -> None:
        """Act on all that was noted up to here."""
        for engine in [*self._engines]:
            engine.hear()

    def _again(self) -> None:
        self._due = None
        self.now()
        if self._engines and self._due is None:
            self._due = asyncio.get_running_loop().call_later(HEAR_S, self._again)
