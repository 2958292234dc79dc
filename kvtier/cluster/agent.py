"""The process that runs one room on one node: a node daemon, a worker or a router."""

import asyncio
import contextlib
import importlib
import logging
import os
import threading
import time
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Final, Protocol, cast

from kvtier.config import Config, PeerConfig, write_peers

_LOG = logging.getLogger(__name__)
_ANSWER_S: Final = 0.5  # a room's loop that takes longer to answer counts as not answering


class Started(Protocol):
    """What a room calls once it serves."""

    def __call__(self, address: str, *, lends: str = "") -> None:
        """It listens at `address`; a daemon lends blocks at `lends`."""
        ...


class Room(Protocol):
    """A server of kvtier as a coroutine: runs until `stop`, tells its address by `started`."""

    def __call__(self, config: Config, *, started: Started, stop: asyncio.Event) -> Awaitable[None]:
        """Serve; port 0 in a listen address means any, `started` gets the bound host:port."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """An agent about itself."""

    pid: int
    address: str  # host:port; empty until the room serves
    lends: str  # host:port where a daemon lends blocks; empty: it does not
    digest: str  # of its settings
    answering: bool  # the room's event loop runs
    stopped: bool
    failure: str  # why the room ended by itself; the process follows it shortly


class Agent:
    """Runs a room on an event loop of its own, in a thread; the process ends when the room does.

    A plain class: the Ray actor around it is made where it is placed. Its methods never wait for
    the room, so that a stuck room can still be told from a dead process.
    """

    def __init__(self, run: str, config: Config, digest: str, pause_s: float = 2.0) -> None:
        """Start the room at once.

        Args:
            run: "module:function" of the room; imported here and nowhere earlier.
            config: The settings of this node.
            digest: Handed back by `report`.
            pause_s: Between a room's unasked end and the end of the process, so that one which
                cannot start is not started over and over in a hot loop.
        """
        self._run = run
        self._config = config
        self._digest = digest
        self._pause_s = pause_s
        self._address = ""
        self._lends = ""
        self._failure = ""
        self._stopping = False
        # Where uvloop is installed, Ray makes it every process's default. Rooms have asyncio's own.
        self._loop = asyncio.SelectorEventLoop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._live, name="kvtier-room", daemon=True)
        self._thread.start()

    def report(self) -> Report:
        """How the room is, at most half a second after the call."""
        return Report(
            pid=os.getpid(),
            address=self._address,
            lends=self._lends,
            digest=self._digest,
            answering=self._answers(),
            stopped=not self._thread.is_alive(),
            failure=self._failure,
        )

    def peers(self, members: tuple[PeerConfig, ...]) -> bool:
        """Write down for the daemon who lends blocks; False: that is not possible here."""
        path = self._config.peers.file if self._config.peers else ""
        if not path:
            return True  # its settings name whom it may ask
        try:
            write_peers(path, members)
        except OSError as error:
            _LOG.warning("peers.file %s: %s", path, error)
            return False
        return True

    def stop(self, deadline_s: float) -> bool:
        """Ask the room to end and wait for it; False: it did not within `deadline_s`."""
        self._stopping = True
        with contextlib.suppress(RuntimeError):  # the loop is closed: the room has ended
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(deadline_s)
        return not self._thread.is_alive()

    def _answers(self) -> bool:
        answered = threading.Event()
        try:
            self._loop.call_soon_threadsafe(answered.set)
        except RuntimeError:  # closed
            return False
        return answered.wait(_ANSWER_S)

    def _live(self) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._room())
        finally:
            if not self._stopping:
                _LOG.error("%s: %s; the process ends", self._run, self._failure or "interrupted")
                time.sleep(self._pause_s)
                os._exit(1)  # Ray restarts the actor; a thread cannot end its process otherwise

    async def _room(self) -> None:
        module, _, function = self._run.partition(":")

        async def room() -> None:
            serve = cast("Room", getattr(importlib.import_module(module), function))
            await serve(self._config, started=self._started, stop=self._stop)

        task = asyncio.ensure_future(room())
        await asyncio.wait({task})
        self._address = self._lends = ""
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._failure = f"{type(error).__name__}: {error}"
        elif not self._stopping:
            self._failure = "ended by itself"
        if error is not None and self._stopping:
            _LOG.error("%s: %s while it stopped", self._run, self._failure)

    def _started(self, address: str, *, lends: str = "") -> None:
        self._address, self._lends = address, lends
