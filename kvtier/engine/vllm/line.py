"""A thread of its own with a connection of its own to the node daemon.

An engine's scheduler hands work to a line and goes on; all waiting for the daemon happens here.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt

from kvtier.arena import stride
from kvtier.core.blocks import BlockLayout
from kvtier.engine.client import TierClient

RECONNECT_S: Final = 0.5  # between two attempts to reach a daemon that is away
MAX_FAULTS: Final = 64  # different ones that are said

log = logging.getLogger(__name__)

Bytes = npt.NDArray[np.uint8]


class News:
    """Wakes an engine that has nothing else to do when an answer or a copy is there."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._told = False  # since the last rest

    def tell(self) -> None:
        """Something ended."""
        with self._condition:
            self._told = True
            self._condition.notify_all()

    def wait(self, condition: Callable[[], bool], timeout_s: float) -> None:
        """Return when `condition` holds, looked at whenever something ended, or at the latest."""
        with self._condition:
            self._condition.wait_for(condition, timeout_s)

    def rest(self, timeout_s: float) -> None:
        """Return when something has ended since the last rest, or at the latest."""
        with self._condition:
            self._condition.wait_for(lambda: self._told, timeout_s)
            self._told = False


class Attached:
    """One connection, and the arena's slots as rows of an array."""

    def __init__(self, socket: str, layout: BlockLayout, name: str) -> None:
        self.client = TierClient(socket, layout, name)
        arena = self.client.arena
        pitch = stride(layout.nbytes)
        whole = np.frombuffer(arena.view, np.uint8)
        self.slots: Bytes = whole.reshape(arena.slots, pitch)[:, : layout.nbytes]

    def populate(self) -> None:
        """Map the arena's pages now, beside the first uses."""
        arena = self.client.arena
        threading.Thread(target=arena.populate, name="kvtier-map", daemon=True).start()


class Health:
    """What all lines of an engine say of the daemon: one line when it goes, one when it is back."""

    def __init__(self) -> None:
        self.away = False
        self.failures = 0
        self._lock = threading.Lock()
        self._faults: set[tuple[str, type[Exception]]] = set()

    def fault(self, what: str, error: Exception) -> None:
        """Something of ours failed that says nothing of the daemon; each kind is said once."""
        kind = what, type(error)
        with self._lock:
            self.failures += 1
            if kind not in self._faults and len(self._faults) < MAX_FAULTS:
                self._faults.add(kind)
                log.warning("kvtier: %s (%s: %s)", what, type(error).__name__, error)

    def failed(self, what: str, error: Exception) -> None:
        """The daemon cannot be reached, or what was asked of it failed."""
        with self._lock:
            self.failures += 1
            if not self.away:
                log.warning("kvtier is away (%s: %s); vLLM goes on without it", what, error)
            self.away = True

    def answered(self) -> None:
        """The daemon took us in."""
        with self._lock:
            if self.away:
                log.warning("kvtier is back")
            self.away = False


Work = Callable[[Attached | None], None]


class Line:
    """Runs work in order, each with the connection, or with None while there is none.

    Whatever work raises ends the connection, and a later one is tried; the work itself has told
    its caller of its end by then. `layout` is called on the line's thread, may take long, and
    gives None if there can be no tier.
    """

    def __init__(
        self,
        name: str,
        socket: str,
        layout: Callable[[], BlockLayout | None],
        health: Health,
        *,
        populate: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = name
        self._socket = socket
        self._layout = layout
        self._health = health
        self._populate = populate
        self._clock = clock
        self._work: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._attached: Attached | None = None
        self._retry_at = 0.0
        self._thread = threading.Thread(target=self._run, name=f"kvtier-{name}", daemon=True)
        self._thread.start()

    def put(self, work: Work) -> None:
        """Queue work; returns at once. What bounds the queue is its caller."""
        self._work.put(work)

    def close(self, timeout_s: float) -> None:
        """End the thread after the work that is queued; it is left behind if it takes longer."""
        self._work.put(None)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        self._connect()  # at once: by the first request the arena is there
        while (work := self._work.get()) is not None:
            try:
                work(self._connect())
            except Exception as error:
                # Not only what we raise on purpose: the thread must outlive a bug of ours.
                self._lost(error)
        self._hang_up()

    def _connect(self) -> Attached | None:
        if self._attached is not None and not self._attached.client.alive:
            self._hang_up()  # restarted since, most likely
        if self._attached is None and self._clock() >= self._retry_at:
            try:
                layout = self._layout()
                if layout is None:
                    self._retry_at = float("inf")
                    return None
                self._attached = Attached(self._socket, layout, f"vllm {self._name}")
                if self._populate:
                    self._attached.populate()
                self._health.answered()
            except Exception as error:
                # As of work: a thread that has ended would leave every job to its deadline.
                self._lost(error)
        return self._attached

    def _lost(self, error: Exception) -> None:
        self._health.failed(self._name, error)
        self._retry_at = self._clock() + RECONNECT_S
        self._hang_up()

    def _hang_up(self) -> None:
        attached, self._attached = self._attached, None
        if attached is not None:
            attached.client.close()
