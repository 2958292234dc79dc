"""One engine's tier without vLLM: its lines, its lookups, its transfers, and who it is."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from kvtier.core.blocks import BlockKey, BlockLayout
from kvtier.core.vllm_keys import key_of
from kvtier.engine.vllm.line import Health, Line, News
from kvtier.engine.vllm.lookups import Lookups
from kvtier.engine.vllm.patience import Patience
from kvtier.engine.vllm.settings import TierSettings
from kvtier.engine.vllm.transfers import Transfers

# That an idle engine waits for us before it looks for new requests: a step without anything to
# compute costs it and its worker a millisecond or two. What ends in between wakes it.
REST_S: Final = 0.002
LOADING_REST_S: Final = 0.01  # where a request waits for us, which will take longer
LEAVE_S: Final = 1.0  # for a thread to end; a daemon thread keeps no process

log = logging.getLogger(__name__)


class Identity(NamedTuple):
    """What the engine's blocks are called by, and what they look like."""

    root: bytes
    layout: BlockLayout


class Hub:
    """What a tier of vLLM's calls. Nothing here imports vLLM.

    `identify` may take long (it reads the weights to fingerprint them): it runs on a thread, and
    until it has ended nothing is found and nothing kept. None from it means: no tier, for good.
    """

    def __init__(
        self,
        region: memoryview,
        identify: Callable[[], Identity | None],
        settings: TierSettings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._identify = identify
        self._identity: Identity | None = None
        self._clock = clock
        self._patience = Patience(clock)
        self._known = False
        self._asks_ahead = True
        self._once = threading.Lock()
        self.health = Health()
        self._news = news = News()
        self._lines = [self._line(name, clock) for name in ("lookup", "load", "store")]
        lookup, load, store = self._lines
        self.lookups = Lookups(lookup, self._keys, settings.lookup_s, news, clock)
        self.transfers = Transfers(
            region, load, store, self._keys,
            load_s=settings.load_s, store_s=settings.store_s, news=news, clock=clock,
        )  # fmt: skip

    def expect(self, request: str, keys: Callable[[], Sequence[bytes]]) -> bool:
        """See `Lookups.ahead`; `keys` looks for the names in vLLM's own book-keeping.

        Where a release of vLLM keeps its books otherwise, that is said and counted once, and
        requests are asked for when they are looked up.
        """
        if not self._asks_ahead:
            return False
        try:
            names = keys()
        except (AttributeError, LookupError, TypeError) as error:
            self._asks_ahead = False
            what = "this vLLM names a new request's blocks otherwise, so none is asked for ahead"
            self.health.fault(what, error)
            return False
        return self.lookups.ahead(request, names)

    def pending(self, request: str) -> bool:
        """Whether nothing can have changed for a request since it was told to wait for us."""
        return self.lookups.pending(request) or self.transfers.pending(request)

    def step(self, *, idle: bool) -> None:
        """A step is scheduled, in which the engine has nothing to compute (`idle`) or something."""
        self._patience.step(idle=idle)
        if idle:
            self._rest()

    def answered(self, request: str) -> bool:
        """Wait a moment for the answer to what a request has asked, see `Patience`.

        False where there is no answer yet, or it has asked nothing.
        """
        if not self.lookups.open(request):
            return False
        self.lookups.flush()
        if not self.lookups.pending(request):  # it came while the request was looked up
            return True
        limit_s = self._patience.limit_s
        if not limit_s:
            return False
        start = self._clock()
        self._news.wait(lambda: not self.lookups.pending(request), limit_s)
        there = not self.lookups.pending(request)
        self._patience.waited(self._clock() - start, answered=there)
        return there

    def close(self) -> None:
        """Let stores end, then let go of the region and of the daemon."""
        self.transfers.close(self._settings.drain_s)
        for line in self._lines:
            line.close(LEAVE_S)

    def _rest(self) -> None:
        # Otherwise it would ask a thousand times a second, on the cores that our threads need.
        if self.transfers.loading or self.lookups.waiting:
            self._news.rest(LOADING_REST_S)
        elif self.transfers.under_way:
            self._news.rest(REST_S)

    def _line(self, name: str, clock: Callable[[], float]) -> Line:
        copies = name != "lookup"
        return Line(
            name, self._settings.socket, self._layout, self.health, populate=copies, clock=clock
        )

    def _layout(self) -> BlockLayout | None:
        with self._once:  # whichever line comes first; the others wait for it
            if not self._known:
                self._identity = self._identify()
                self._known = True
        return self._identity.layout if self._identity else None

    def _keys(self, offload_keys: Sequence[bytes]) -> Sequence[BlockKey]:
        """Called on a line's thread with a connection, so the identity is there."""
        assert self._identity is not None
        root = self._identity.root
        return [key_of(root, each) for each in offload_keys]
