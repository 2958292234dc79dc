"""Blocks of other nodes' daemons, loaded into this node's host tier when an engine names one.

    engine: "node b has more of this" ──► Peers.pull ──► slots that nobody else has
                                               │               ▲
                                               └──► Peer.fetch ┘ blocks, each proven in its slot

To the ledger a pull is a writer like any engine: what came whole, from the first missing block on,
is committed, and the rest is undone. So whatever a peer does costs a miss, never more. Only nodes
of the roster are asked, whatever name an engine gives. Who wants a block that is on its way for
another request waits for it.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Final, NamedTuple

from kvtier import metrics
from kvtier.config import MAX_NAME, PeersConfig
from kvtier.core.blocks import BlockKey
from kvtier.core.breakeven import worth_loading
from kvtier.core.lease import Lease
from kvtier.node.manager import TierManager
from kvtier.node.peer import Fetched, Order, Peer, Result
from kvtier.node.reading import Reading
from kvtier.node.roster import Known, Roster
from kvtier.node.speed import Speed
from kvtier.node.stream import Stream
from kvtier.wire.access import Access
from kvtier.wire.lending import MAX_BLOCKS
from kvtier.wire.pb import feed_pb2

CLIENT: Final = -1  # of the ledger; engines' numbers begin at 1
GRACE_S: Final = 1.0  # longer than it may take, so that its thread is the one to give up
MAX_UNKNOWN: Final = 64  # names that are told of in the log, once each

log = logging.getLogger(__name__)


class _Begun(NamedTuple):
    """A pull whose slots are reserved."""

    lease: Lease
    order: Order


class Peers:
    """The daemons that this one may load blocks from. Lives on the daemon's loop.

    Args:
        config: Who they are; None: there are none.
        own: This node's name.
        access: How this process shows who it is.
        layouts: What this daemon has, by layout: one may give way while a pull for it connects.
    """

    def __init__(
        self, config: PeersConfig | None, own: str, access: Access,
        layouts: Mapping[str, TierManager],
    ) -> None:  # fmt: skip
        self._layouts = layouts
        self._roster = Roster(config, own, lambda node, address: Peer(node, address, access))
        self._most = config.pulls if config else 0
        self._pool: ThreadPoolExecutor | None = None
        self._under_way: set[asyncio.Task[int]] = set()
        self._coming: dict[tuple[str, BlockKey], asyncio.Task[int]] = {}  # by layout and key
        self._unknown: set[str] = set()
        self._closed = False

    def told(self) -> feed_pb2.Pulls | None:
        """For the heartbeat: how fast pulls have been; None where there is nobody to ask."""
        known = list(self._roster.all())
        for each in known:
            each.peer.tidy()
        if not known or not self._most:
            return None
        now = asyncio.get_running_loop().time()
        speeds = [speed for each in known for speed in each.bytes_per_s(now)]
        return feed_pb2.Pulls(bytes_per_s=sum(speeds) / len(speeds) if speeds else 0.0)

    async def pull(self, manager: TierManager, asked: Reading, node: str) -> int:
        """Load what `manager` lacks of keys[first:] from `node`; how many blocks came.

        They are in the host tier then, like blocks that an engine has saved. It takes at most
        `wait_s`, and goes on where the caller is cancelled: no slot is given back while it is
        being filled. With `compute` nothing is pulled that is faster computed. A failure is 0, or
        as many blocks as had come before it. Blocks that came meanwhile for another request count.
        """
        known = self._roster.get(node)
        if known is None:
            self._tell_unknown(node)
            _tell(Result.UNKNOWN)
            return 0
        if asked.wait_s <= 0:
            _tell(Result.LATE)
            return 0
        joined, left_s = await self._join(manager, asked, known)
        if left_s <= 0:
            return joined
        asked = replace(asked, wait_s=left_s)
        if why := self._refusal(known):
            _tell(why)
            return joined
        coming = self._wanted(manager, asked, known)
        pulling = asyncio.create_task(self._pull(manager, asked, known, coming))
        self._under_way.add(pulling)
        pulling.add_done_callback(self._under_way.discard)
        self._coming.update(dict.fromkeys(coming, pulling))
        # A thread that looks a name up cannot be cut off: who asked goes on without it.
        await asyncio.wait([pulling], timeout=left_s + GRACE_S)
        return joined + (pulling.result() if pulling.done() else 0)

    async def close(self) -> None:
        """Cut off what is under way, and wait until no slot of it is touched any more."""
        self._closed = True
        self._roster.close()
        if self._under_way:
            await asyncio.wait([*self._under_way])
        if self._pool is not None:
            self._pool.shutdown()

    async def _join(self, manager: TierManager, asked: Reading, known: Known) -> tuple[int, float]:
        """Wait for what others have under way of it: blocks that came, and what is left of wait_s.

        0 is left where nothing is to be asked for any more.
        """
        loop, layout = asyncio.get_running_loop(), manager.layout.id
        end, keys = loop.time() + asked.wait_s, asked.keys
        before = first = self._missing(manager, asked)
        waited = False
        while (left_s := end - loop.time()) > 0:
            if not _worth(manager, asked, known, first):
                left_s = 0.0
                break
            coming = self._coming.get((layout, keys[first]))
            if coming is None:
                break
            if not waited:
                _tell(Result.JOINED)
            waited = True
            await asyncio.wait([coming], timeout=left_s)
            first = self._missing(manager, asked)
        return max(0, first - before), left_s

    @staticmethod
    def _missing(manager: TierManager, asked: Reading) -> int:
        """Where the first of the path's blocks is that is not here."""
        return asked.first + manager.match(asked.keys[asked.first :]).blocks

    def _refusal(self, known: Known) -> Result | None:
        """Why not to ask it now; None obliges the caller to say how it went."""
        now = asyncio.get_running_loop().time()
        if self._closed or len(self._under_way) >= self._most:
            return Result.BUSY
        if known.rests(now):
            return Result.LEFT_ALONE
        return None if known.breaker.allow(now) else Result.BUSY

    def _wanted(
        self, manager: TierManager, asked: Reading, known: Known
    ) -> list[tuple[str, BlockKey]]:
        """What is to be pulled: up to the first block that is on its way for another request.

        Or for this one, where an engine names a block twice.
        """
        first, layout = self._missing(manager, asked), manager.layout.id
        wanted: dict[tuple[str, BlockKey], None] = {}
        for key in asked.keys[first : first + _worth(manager, asked, known, first)]:
            if (layout, key) in self._coming or (layout, key) in wanted:
                break
            wanted[layout, key] = None
        return [*wanted]

    def _begin(self, manager: TierManager, asked: Reading, count: int) -> _Begun | None:
        """Reserve slots for `count` blocks at most; None: there are none. Not to be waited in."""
        keys, layout = asked.keys, manager.layout
        first = self._missing(manager, asked)  # an engine may have saved some meanwhile
        lease = manager.write(CLIENT, keys[: first + count], first, asked.use)
        slots = lease.slots[: _leading(lease.indexes, first)]
        if not slots:
            manager.release(lease.id)
            return None
        places = [manager.arena.slot(slot) for slot in slots]
        lossy = any(not each.codec.exact for each in manager.lower)
        return _Begun(lease, Order(layout, keys[: first + len(slots)], first, places, lossy))

    async def _pull(
        self, manager: TierManager, asked: Reading, known: Known, coming: list[tuple[str, BlockKey]]
    ) -> int:
        """First a connection, then slots for what comes by it: a peer that is away takes none."""
        loop = asyncio.get_running_loop()
        begun, fetched = loop.time(), Fetched()
        try:
            stream: Stream | Fetched | None = known.peer.take()
            if stream is None:
                connect = partial(known.peer.connect, asked.wait_s)
                stream = await loop.run_in_executor(self._threads(), connect)
            if isinstance(stream, Fetched):
                fetched = stream
                known.judge(fetched, begun, loop.time())
            else:
                left_s = begun + asked.wait_s - loop.time()
                fetched = await self._fetch(manager, asked, known, stream, (len(coming), left_s))
        except BaseException:  # a bug of ours; unsaid, nobody would ever ask this peer again
            known.breaker.failed(loop.time())
            raise
        finally:
            for each in coming:
                del self._coming[each]
        metrics.PEER_PULLS.labels(fetched.result).inc()
        metrics.PULLED_BLOCKS.inc(len(fetched.fidelities))
        return len(fetched.fidelities)

    async def _fetch(
        self, manager: TierManager, asked: Reading, known: Known, stream: Stream,
        most: tuple[int, float],
    ) -> Fetched:  # fmt: skip
        """Fill slots by a connection: `most` blocks, and seconds."""
        loop = asyncio.get_running_loop()
        start, (count, left_s) = loop.time(), most
        # From `_begin` on a lease keeps the layout; before it nothing does.
        open_ = self._layouts.get(manager.layout.id) is manager
        begun = self._begin(manager, asked, count) if open_ else None
        if begun is None:
            known.peer.give_back(stream)
            known.breaker.succeeded()  # it is there
            return Fetched(result=Result.BUSY if open_ else Result.GAVE_WAY)
        (lease, order), fetched = begun, Fetched()
        try:
            fetch = partial(known.peer.fetch, order, left_s, stream)
            fetched = await loop.run_in_executor(self._threads(), fetch)
            known.judge(fetched, start, loop.time())
        finally:
            manager.commit(lease.id, len(fetched.fidelities))
            for key, fidelity in zip(lease.keys, fetched.fidelities, strict=False):
                manager.lineage.loaded(key, fidelity)  # not what an engine had computed here
        came = len(fetched.fidelities)
        self._measure(known.speed(manager.layout), len(order.places), came, start)
        return fetched

    @staticmethod
    def _measure(speed: Speed, asked: int, came: int, start: float) -> None:
        now = asyncio.get_running_loop().time()
        for _ in range(asked):
            speed.begin(start)
        for number in range(asked):
            speed.end(now, ok=number < came)

    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._most, thread_name_prefix="pull")
        return self._pool

    def _tell_unknown(self, node: str) -> None:
        node = node[:MAX_NAME]
        if node not in self._unknown and len(self._unknown) < MAX_UNKNOWN:
            self._unknown.add(node)
            log.warning("an engine names node %r, which is none of [peers]", node)


def _leading(indexes: Sequence[int], first: int) -> int:
    """How many of a lease's blocks follow each other from `first` on: a prefix has no gap."""
    return next((at for at, index in enumerate(indexes) if index != first + at), len(indexes))


def _worth(manager: TierManager, asked: Reading, known: Known, first: int) -> int:
    """How many of keys[first:] to pull: none that is faster computed."""
    count = min(len(asked.keys) - first, MAX_BLOCKS)
    if asked.compute is None:
        return count
    load_s = known.speed(manager.layout).seconds_a_block(asyncio.get_running_loop().time())
    return worth_loading([0] * count, first, asked.compute, [load_s])


def _tell(result: Result) -> None:
    """Nothing is pulled, for this reason."""
    metrics.PEER_PULLS.labels(result).inc()
