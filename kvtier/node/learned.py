"""Keeps what a node's eviction has learned beside the disk tier: now and then, and at the end."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from kvtier.core.policy import Learning
from kvtier.core.tiers import Tier
from kvtier.stores import learned

LEARNED_FILE: Final = "learned.msgpack"
SAVE_S: Final = 300.0


class LearnedFile:
    """The state of `policies` in the file at `path`. Lives on one loop; without policies idle."""

    def __init__(self, path: Path, policies: Mapping[Tier, Learning]) -> None:
        self._path = path
        self._policies = policies
        self._timer: asyncio.TimerHandle | None = None
        self._saving: asyncio.Future[None] | None = None

    async def open(self) -> None:
        """Let the policies go on with what the file has. Nobody uses them meanwhile."""
        if self._policies:
            await asyncio.to_thread(learned.restore, self._path, self._policies)
            self._later()

    async def close(self) -> None:
        """Save a last time."""
        if self._timer is None:
            return
        self._timer.cancel()
        self._timer = None
        if self._saving is not None:
            await self._saving
        await asyncio.to_thread(learned.write, self._path, learned.pack(self._policies))

    def _later(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(SAVE_S, self._save)

    def _save(self) -> None:
        self._later()
        if self._saving is not None and not self._saving.done():
            return  # a disk that hangs takes one thread, not one each time
        body, loop = learned.pack(self._policies), asyncio.get_running_loop()
        self._saving = loop.run_in_executor(None, learned.write, self._path, body)
