"""The end of a connection, as another thread can wait for it."""

import os
import select


class HangUp:
    """The end of a connection, for one thread to wait for; takes over the descriptor."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def wait(self) -> None:
        """Return once one side has hung up. To be called once."""
        poll = select.poll()
        poll.register(self._fd, select.POLLRDHUP)
        try:
            poll.poll()
        finally:
            os.close(self._fd)
