"""Long work on the router's loop, cut so fine that no request waits for it."""

import asyncio
from collections.abc import Iterable
from typing import Final

from kvtier.core.directory import Directory

SLICE_S: Final = 0.00025  # of work in one round of the loop, whoever's it is
TIDY_S: Final = 0.05  # between two looks whether something can be tidied


class Pace:
    """Lets work take turns with everything else on the loop: one slice of it a round.

    Those who have work wait for each other, so that many feeds at once are no longer slice.
    """

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._until = 0.0  # of this round's slice, on the loop's clock

    async def through(self, steps: Iterable[object]) -> None:
        """Go through all `steps`, each of which is short."""
        clock = asyncio.get_running_loop().time
        async with self._turn:
            for _ in steps:
                if clock() >= self._until:
                    await asyncio.sleep(0)
                    self._until = clock() + SLICE_S

    async def tidy(self, directory: Directory) -> None:
        """Keep a directory tidy until cancelled."""
        while True:
            await self.through(iter(directory.tidy, False))
            await asyncio.sleep(TIDY_S)
