"""What may wait until an engine has its answer, but not for long."""

import asyncio
from collections.abc import Callable


class Soon:
    """Does work right behind the requests at hand, or else when the loop next comes to it.

    A turn of the loop for it costs as much as most of that work does. Lives on one loop.
    """

    def __init__(self) -> None:
        self._held = False
        self._work: list[Callable[[], None]] = []

    def __call__(self, work: Callable[[], None]) -> None:
        """To be done soon."""
        if self._held:
            self._work.append(work)
        else:
            asyncio.get_running_loop().call_soon(work)

    def hold(self) -> None:
        """Requests are at hand: until `now` work waits."""
        self._held = True

    def now(self) -> None:
        """They have their answers. Raises what work does; the next call goes on behind that."""
        self._held = False
        while self._work:
            self._work.pop(0)()
