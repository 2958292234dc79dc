"""The tiers as an engine sees them: every failure of ours is a miss here, and a counter."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, suppress
from functools import partial
from typing import Final, TypeVar

from kvtier import metrics
from kvtier.core.blocks import BlockKey, Namespace, block_keys
from kvtier.core.breakeven import ComputeCost
from kvtier.core.policy import NO_USE, Use
from kvtier.core.tiers import Tier
from kvtier.engine.client import TierClient
from kvtier.engine.copier import ArenaTensor
from kvtier.engine.credit import Met
from kvtier.engine.hangup import HangUp
from kvtier.engine.leases import WriteLease
from kvtier.engine.paged import PagedKV
from kvtier.engine.restoring import Restorer, Wanted
from kvtier.engine.speeds import TierSpeeds
from kvtier.errors import KVTierError

RECONNECT_S: Final = 0.5  # between two attempts to reach a daemon that is away
SOON_S: Final = 0.05  # the same, beside the calls, shortly after it went
SOON_TIMES: Final = 200
END_S: Final = 1.0  # for memory to be given back at the end
REST_S: Final = 0.005  # between two pieces of an arena that are mapped ahead of need, 1 ms each
ATTACH_S: Final = 0.5  # that a call waits for a daemon to take us in
BATCH: Final = 32  # blocks that a save has on credit
WRITE_BATCHES: Final = 3  # that it leases at once behind these, and at most
WRITE_SHARE: Final = 5  # of the arena: one smaller than a prompt serves it

log = logging.getLogger(__name__)
T = TypeVar("T")


class EngineTier:
    """Saves and restores an engine's blocks through the node daemon.

    No method raises for a failure of kvtier: the answer is then 0 or nothing, as for a miss. One
    thread calls them, and the blocks that they name stay as they are meanwhile.

    Many blocks go in batches: `batch` of them at first, then twice as many, as in each lease of a
    restore. While one is copied the daemon works on the lease of the next, so that at most two are
    held. With `credit` the first batch of a save needs no lease and waits for nothing, once the
    daemon has given this engine slots ahead; `met` is what two of one engine share about that. A
    failure ends a call; what it had done before counts.

    A daemon that went is attached to again, beside the calls, as soon as it is back; one that never
    was there, or that failed, is tried again at most every RECONNECT_S by whichever call comes
    next.
    """

    def __init__(
        self,
        socket: str,
        namespace: Namespace,
        paged: PagedKV,
        *,
        wait_s: float = 2.0,
        pin: bool = False,
        batch: int = BATCH,
        credit: bool = True,
        met: Met | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._socket = socket
        self._layout = namespace.layout
        self._root = namespace.root()
        self._paged = paged
        self._wait_s = wait_s  # of a pull
        self._pin, self._batch, self._met = pin, batch, met
        self._credit = batch if credit else 0
        self._clock = clock
        self._turn = threading.Lock()  # a call, or `_watch`
        self._busy = False  # a call is under way
        self._closed = threading.Event()
        self._mappers: list[threading.Thread] = []
        self._client: TierClient | None = None
        self._arena: ArenaTensor | None = None
        self._retry_at, self._away = 0.0, False
        # At once: by the time of the first request the arena is there.
        self._attaching: Future[tuple[TierClient, ArenaTensor]] | None = _beside(self._attach)
        self._began = clock()
        self._speeds = TierSpeeds(self._layout.nbytes)
        self._restorer = Restorer(paged, batch, wait_s, self._speeds, clock)

    def keys(self, token_ids: Sequence[int]) -> list[BlockKey]:
        """The keys of the prompt's full blocks.

        Raises:
            ValueError: A token id is negative or does not fit in 32 bits.
        """
        return block_keys(self._root, token_ids, self._layout.block_tokens)

    def match(self, keys: Sequence[BlockKey]) -> int:
        """Leading blocks that the node knows to hold.

        What of them lies in the host tier a `restore` that follows copies without asking again.
        """
        return self._shielded("match", 0, lambda client: self._restorer.match(client, keys))

    def restore(
        self,
        keys: Sequence[BlockKey],
        first: int,
        block_ids: Sequence[int],
        compute: ComputeCost | None = None,
        use: Use = NO_USE,
    ) -> list[Tier]:
        """Fill `block_ids` with the held blocks of keys[first:], from the first on.

        `keys` is the whole path from the root; it may go on beyond `block_ids` with what is to be
        restored next. `compute` says what a block costs to be computed again, where that is known:
        then nothing is loaded from a lower tier that takes longer. That is judged with all that
        is held of `keys`: dear blocks far behind pay for cheap ones before them. Returns the tier
        that each restored block came from; blocks beyond them are unchanged or undefined. `use`
        names the request.
        """
        restored: list[Tier] = []
        if block_ids:
            wanted = Wanted(keys, first, block_ids, compute, use)
            self._shielded("restore", None, partial(self._restore, wanted, restored))
        return restored

    def pull(
        self,
        keys: Sequence[BlockKey],
        first: int,
        node: str,
        compute: ComputeCost | None = None,
        use: Use = NO_USE,
    ) -> int:
        """Have the daemon load what it lacks of keys[first:] from another node's; how many came.

        `restore` finds them in the host tier then. Takes as long as a restore may, at most.
        """
        told = partial(TierClient.pull, wait_s=self._wait_s, compute=compute, use=use)
        return self._shielded("pull", 0, lambda client: told(client, keys, first, node))

    def save(
        self, keys: Sequence[BlockKey], first: int, block_ids: Sequence[int], use: Use = NO_USE
    ) -> int:
        """Hand the blocks keys[first:], which lie in `block_ids`, to the host tier.

        `keys` is the whole path from the root. Returns how many were taken; those that the node
        holds already are not counted, unless another engine has saved them: then the first `batch`
        may be. `use` names the request.
        """
        saved: list[int] = []
        if block_ids:
            work = partial(
                self._save, keys=keys, first=first, block_ids=block_ids, use=use, saved=saved
            )
            self._shielded("save", None, work)
        count = sum(saved)
        metrics.SAVED_BLOCKS.inc(count)
        return count

    def wait(self, timeout_s: float) -> bool:
        """Whether the daemon has taken us in, after at most so long; till then all is a miss."""
        until = self._clock() + timeout_s
        while not self._shielded("attach", False, lambda _: True):
            if self._clock() >= until or self._closed.wait(SOON_S):
                return False
        return True

    def bytes_per_s(self) -> dict[Tier, float]:
        """How fast restores from each tier have been, waiting included."""
        return self._speeds.bytes_per_s()

    def close(self) -> None:
        """Hang up. Idempotent."""
        self._closed.set()
        with self._turn:
            self._hang_up()
        for each in self._mappers:
            each.join(END_S)

    # --- inside -----------------------------------------------------------------------

    def _shielded(self, what: str, miss: T, work: Callable[[TierClient], T]) -> T:
        """The result of `work`, or `miss` if anything of ours fails."""
        with self._turn:
            self._busy = True
            try:
                client = self._connected()
                return miss if client is None else work(client)
            except Exception as error:
                # The promise "never in the way" is kept here and nowhere else.
                metrics.TIER_FAILURES.labels(what).inc()
                self._retry_at = self._clock() + RECONNECT_S
                if not self._away:
                    log.warning("kvtier is away (%s: %s); going on without it", what, error)
                self._away = True
                self._hang_up()
                return miss
            finally:
                self._busy = False

    def _hang_up(self) -> None:
        if self._attaching is not None:
            self._attaching.add_done_callback(_hang_up)
            self._attaching = None
        if self._client is not None:
            assert self._arena is not None
            self._arena.close()
            self._client.close()
            # The last of an arena's mappings gives its memory back, 0.2 s a GiB: not here.
            mapped = [self._client, self._arena]
            self._client = self._arena = None
            self._map("kvtier-unmap", mapped.clear)

    def _watch(self, gone: HangUp) -> None:
        """On a thread: when the daemon goes, attach to the next one before a call needs it."""
        gone.wait()
        times = 0
        while not self._closed.is_set():
            # Nobody is there yet, or somebody else: tried again; what calls see is counted there.
            with self._turn, suppress(KVTierError, OSError):
                if self._connected() is not None:
                    return
            times += 1
            self._closed.wait(SOON_S if times < SOON_TIMES else RECONNECT_S)

    def _connected(self) -> TierClient | None:
        """The client, attached anew if need be; None while there is none.

        Attaching may take long (the daemon takes its memory, pages are locked, or it hangs), so
        it happens beside: a call waits ATTACH_S for it, and a later one takes what has come.
        """
        if self._client is not None and not self._client.alive:
            # Restarted since the last call, most likely: this call need not pay for that.
            self._hang_up()
        if self._client is not None:
            return self._client
        now = self._clock()
        if self._attaching is not None and now > self._began + RECONNECT_S:
            failed = self._attaching.done() and self._attaching.exception() is not None
            if failed:  # long ago: the daemon may be there by now
                self._attaching = None
        if self._attaching is None:
            if now < self._retry_at:
                return None
            self._attaching, self._began = _beside(self._attach), now
        try:
            self._client, self._arena = self._attaching.result(
                max(0.0, self._began + ATTACH_S - self._clock())
            )
        except TimeoutError:
            if not self._attaching.done():
                return None
            self._attaching = None
            raise
        except BaseException:
            self._attaching = None
            raise
        self._attaching = None
        if self._away:
            log.warning("kvtier is back")
        self._away = False
        watch = partial(self._watch, self._client.hang_up())
        threading.Thread(target=watch, name="kvtier-watch", daemon=True).start()
        return self._client

    def _attach(self) -> tuple[TierClient, ArenaTensor]:
        client = TierClient(self._socket, self._layout, met=self._met)
        arena = ArenaTensor(client.arena, pin=self._pin)
        populate = partial(client.arena.populate, partial(self._idle, client))
        self._map("kvtier-map", populate)
        return client, arena

    def _map(self, name: str, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, name=name, daemon=True)
        thread.start()
        self._mappers = [*filter(threading.Thread.is_alive, self._mappers), thread]

    def _idle(self, client: TierClient) -> bool:
        """Wait, at least for the end of the call under way; False once the arena has no more use.

        A piece of small pages takes a core for 1 ms, and the engine wants it.
        """
        while not self._closed.wait(REST_S) and self._busy:
            pass
        return client.arena.fd >= 0 and not self._closed.is_set()

    def _restore(self, wanted: Wanted, restored: list[Tier], client: TierClient) -> None:
        assert self._arena is not None
        self._restorer.run(client, self._arena, wanted, restored)

    def _save(
        self,
        client: TierClient,
        keys: Sequence[BlockKey],
        first: int,
        block_ids: Sequence[int],
        use: Use,
        saved: list[int],
    ) -> None:
        """Save batch by batch, each asked for before the one before it is copied."""
        assert self._arena is not None
        most = max(self._batch, min(WRITE_BATCHES * self._batch, client.arena.slots // WRITE_SHARE))

        def ask(at: int, most: int) -> tuple[int, AbstractContextManager[WriteLease] | None]:
            if at >= len(block_ids):
                return at, None
            end = min(at + most, len(block_ids))
            return end, client.write(keys[: first + end], first + at, use)

        at, asked = ask(0, self._batch)  # so many are there on credit
        while asked is not None:
            with asked as lease:
                at, asked = ask(at, most)
                client.ask_credit(self._credit)
                count = len(lease.slots)
                if count:
                    blocks = [block_ids[index - first] for index in lease.indexes]
                    self._paged.gather(blocks, self._arena.rows(lease.slots)).wait()
                lease.filled = count
            saved.append(count)


def _beside(work: Callable[[], T]) -> "Future[T]":
    """Run `work` in a thread that keeps no process from ending."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # carried to whoever asks
            future.set_exception(error)

    threading.Thread(target=run, name="kvtier-attach", daemon=True).start()
    return future


def _hang_up(attached: "Future[tuple[TierClient, ArenaTensor]]") -> None:
    if attached.exception() is None:
        for each in reversed(attached.result()):
            each.close()
