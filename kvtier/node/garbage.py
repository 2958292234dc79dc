"""Keeps Python's garbage collector out of a daemon's way.

A pass of the collector looks at every container made since the last ones, or at all, with all that
they refer to: over a million blocks 1 to 140 ms, in the middle of an engine's call. Nearly
everything here goes by its count of references; cycles are left by connections and errors. So
there is no pass but when the process is quiet.
"""

import asyncio
import gc
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Final

EVERY_S: Final = 600.0  # between two passes, at least
LOOK_S: Final = 5.0
_QUIET: Final = 0.02  # of one processor, over LOOK_S


@asynccontextmanager
async def collected_when_quiet(
    every_s: float = EVERY_S, look_s: float = LOOK_S
) -> AsyncIterator[None]:
    """While this lasts, the collector of this process works only when little else does."""
    was = gc.isenabled()
    gc.collect()
    gc.freeze()  # what was loaded until now stays; no pass looks at it again
    gc.disable()
    looking = asyncio.create_task(_look(every_s, look_s))
    try:
        yield
    finally:
        looking.cancel()
        with suppress(asyncio.CancelledError):
            await looking
        gc.unfreeze()
        if was:
            gc.enable()


async def _look(every_s: float, look_s: float) -> None:
    last = time.monotonic()
    while True:
        worked = time.process_time()
        await asyncio.sleep(look_s)
        quiet = time.process_time() - worked < _QUIET * look_s
        if quiet and time.monotonic() - last >= every_s:
            gc.collect()
            last = time.monotonic()
