"""What engines tell without waking the daemon: that they have ended a lease, or filled a slot.

A message on a socket wakes its reader, and a reader that wakes takes a core or a cache from the
engine just when it goes on computing. COMMIT, RELEASE, PUT and USED have no answer, so nobody is in
a hurry: they lie in a pipe that the daemon reads before it does anything that they could matter to,
and once nothing was read for HEAR_S while an engine is attached: it may put and use blocks without
a word before. See docs/decisions/0020, 0036, 0043, 0056 and 0058.
"""

import asyncio
import os
import select
from typing import Final, Protocol

from kvtier.wire import local

HEAR_S: Final = 0.02  # that a note lies unread at most
_PIPE_NBYTES: Final = 64 << 10  # all that one keeps


class Notes:
    """The reading end of one engine's pipe; `write_fd` is the engine's, until `given`."""

    def __init__(self) -> None:
        self.fd, self.write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._buffer = memoryview(bytearray(_PIPE_NBYTES))
        self.decoder = local.Decoder()

    def given(self) -> None:
        """The engine has its end."""
        os.close(self.write_fd)

    def read(self) -> memoryview:
        """The bytes that have come since, for `decoder`; the next call writes over them."""
        try:
            return self._buffer[: os.readv(self.fd, [self._buffer])]
        except BlockingIOError:
            return self._buffer[:0]

    def close(self) -> None:
        """No word will be read any more."""
        os.close(self.fd)


class Noting(Protocol):
    """An engine that has a pipe."""

    def hear(self) -> None:
        """Read and act on its notes; raises nothing."""
        ...


class Hearing:
    """The engines whose notes have to be read. Lives on one loop."""

    def __init__(self) -> None:
        self._pipes: dict[int, Noting] = {}
        self._noted = select.epoll()  # looked at, never waited on: a note wakes nobody
        self._due: asyncio.TimerHandle | None = None  # where there are any
        self._loop: asyncio.AbstractEventLoop

    def listen(self, pipe: int, engine: Noting) -> None:
        """From now on it is heard, until `leave`."""
        self._loop = asyncio.get_running_loop()  # asked for once: each time is a system call
        self._pipes[pipe] = engine
        self._noted.register(pipe, select.EPOLLIN)
        if self._due is None:
            self._arm(self._loop.time() + HEAR_S)

    def leave(self, engine: Noting) -> None:
        """It is gone, or will not be heard any more."""
        for pipe in [pipe for pipe, each in self._pipes.items() if each is engine]:
            del self._pipes[pipe]
            self._noted.unregister(pipe)
        if not self._pipes:
            self._rest()

    def now(self) -> None:
        """Act on all that was noted up to here."""
        if self._pipes:
            for pipe, _ in self._noted.poll(0, len(self._pipes)):
                self._pipes[pipe].hear()
        if self._due is not None:
            now = self._loop.time()
            if self._due.when() < now + HEAR_S / 2:  # where requests come often it is never due
                self._arm(now + HEAR_S)

    def _arm(self, at: float) -> None:
        self._rest()
        self._due = self._loop.call_at(at, self.now)

    def _rest(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None
