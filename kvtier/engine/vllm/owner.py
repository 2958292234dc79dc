"""Between a worker and the engine process that it started: what was restored, and who lives.

One Unix socket of packets. The engine's tier connects to it; each packet says of one request what
was restored. The connection is also a leash: an engine whose worker is killed would go on holding
its memory and its leases, so it ends when the connection does.
"""

import contextlib
import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple, Self

from kvtier.core.tiers import Tier

MAX_PACKET: Final = 4096  # bytes
MAX_KEPT: Final = 4096  # requests of which nobody has asked
ORDER_S: Final = 10.0  # for an engine to end in order, once its worker is gone

log = logging.getLogger(__name__)


class Restored(NamedTuple):
    """What a request did not compute and did not find in VRAM."""

    tokens: Mapping[Tier, int]
    seconds: float  # from the first question to the last block in place


NOTHING: Final = Restored({}, 0.0)


class Owner:
    """The worker's end. Not thread-safe; no method waits."""

    def __init__(self, path: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        self._listener.listen()
        self._listener.setblocking(False)
        self._engines: list[socket.socket] = []
        self._told: dict[str, Restored] = {}

    def take(self, request: str) -> Restored:
        """What was restored for a request that has begun to answer; by its name at the engine's.

        vLLM adds a dash and letters of its own to the name that it is given.
        """
        self._read()
        return self._told.pop(request, NOTHING)

    def close(self) -> None:
        """Hang up: an engine that still lives ends. Idempotent."""
        for each in (*self._engines, self._listener):
            each.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.close()

    def _read(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                engine, _ = self._listener.accept()
                engine.setblocking(False)
                self._engines.append(engine)
        for engine in self._engines:
            with contextlib.suppress(OSError):
                while packet := engine.recv(MAX_PACKET):
                    self._note(packet)

    def _note(self, packet: bytes) -> None:
        request, tokens, seconds = json.loads(packet)
        found = {Tier(int(tier)): int(count) for tier, count in tokens.items()}
        self._told[request.rpartition("-")[0] or request] = Restored(found, float(seconds))
        while len(self._told) > MAX_KEPT:  # of requests that were given up
            del self._told[next(iter(self._told))]


class Owned:
    """The engine's end."""

    def __init__(self, path: str, order_s: float = ORDER_S) -> None:
        self._order_s = order_s
        self._closed = False
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.connect(path)
        threading.Thread(target=self._watch, name="kvtier-owner", daemon=True).start()

    def tell(self, request: str, restored: Restored) -> None:
        """Say it, if the worker still listens; never waits."""
        tokens = {tier.value: count for tier, count in restored.tokens.items()}
        packet = json.dumps([request, tokens, restored.seconds]).encode()
        with contextlib.suppress(OSError):
            self._socket.send(packet, socket.MSG_DONTWAIT)

    def close(self) -> None:
        """The engine ends by itself. Idempotent."""
        self._closed = True
        self._socket.close()

    def _watch(self) -> None:
        with contextlib.suppress(OSError):
            if self._socket.recv(1):
                return  # the worker says nothing, so this is no worker
        if self._closed:
            return
        log.warning("kvtier: the worker of this vLLM is gone, so it ends")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(self._order_s)
        os._exit(1)
