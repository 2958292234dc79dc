"""Layouts are opened one after the other, and one whose disk hangs keeps no other waiting."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Final

from kvtier.core.blocks import BlockLayout
from kvtier.errors import ConfigError
from kvtier.node.manager import TierManager

OPEN_S: Final = 60.0  # that one may keep others waiting; an engine waits for twice as long

log = logging.getLogger(__name__)


class Opening:
    """What a daemon's layouts are opened by. Lives on its loop; hold `lock` around `run`."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self._late: dict[str, asyncio.Task[TierManager]] = {}

    def __len__(self) -> int:
        """Layouts that are still being opened though nobody waits for them any more."""
        return len(self._late)

    async def run(
        self,
        layout: BlockLayout,
        make: Callable[[BlockLayout], Coroutine[None, None, TierManager]],
        *,
        bounded: bool,
    ) -> TierManager:
        """What `make` gives for `layout`.

        Raises:
            ConfigError: `make` does, or, `bounded`, takes longer than OPEN_S, now or before. It
                goes on then: whoever asks once it has ended has it.
        """
        if layout.id in self._late:
            raise _too_late(layout)
        # An engine that leaves meanwhile must not cut this off: its threads would go on, and what
        # they open (the arena's memory, the folder's lock) would be nobody's.
        opening = asyncio.create_task(make(layout))
        limit_s = OPEN_S if bounded else None
        in_time = asyncio.create_task(asyncio.wait([opening], timeout=limit_s))
        try:
            await asyncio.shield(in_time)
        except asyncio.CancelledError:
            await in_time  # the next one waits, too
            if opening.done():
                _say(layout, opening)
            raise
        finally:
            if not opening.done():
                self._late[layout.id] = opening
                opening.add_done_callback(partial(self._ended, layout))
        if not opening.done():
            raise _too_late(layout)
        return opening.result()

    async def ended(self) -> None:
        """Wait for those that are late."""
        if self._late:
            await asyncio.wait([*self._late.values()])

    def _ended(self, layout: BlockLayout, opening: asyncio.Task[TierManager]) -> None:
        del self._late[layout.id]
        _say(layout, opening)


def _too_late(layout: BlockLayout) -> ConfigError:
    return ConfigError(
        f"layout {layout.id} is not open after {OPEN_S:g} s, as with very much memory or a disk "
        "that hangs; it is opened on: try again"
    )


def _say(layout: BlockLayout, opening: asyncio.Task[TierManager]) -> None:
    """Why there is none, where nobody waits for it any more."""
    if not opening.cancelled() and (error := opening.exception()):
        log.warning("layout %s: %s", layout.id, error)
