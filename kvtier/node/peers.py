"""Blocks of other nodes' daemons, loaded into this node's host tier when an engine names one.

    engine: "node b has more of this" ──► Peers.pull ──► slots that nobody else has
                                               │               ▲
                                               └──► Peer.fetch ┘ frames, each proven in its slot

To the ledger a pull is a writer like any engine: what came whole, from the first missing block on,
is committed, and the rest is undone. So whatever a peer does costs a miss, never more. Only the
nodes of `peers.members` are asked, whatever name an engine gives.
"""

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from kvtier import metrics
from kvtier.config import MAX_NAME, PeersConfig
from kvtier.core.blocks import BlockLayout
from kvtier.core.breakeven import worth_loading
from kvtier.node.manager import TierManager
from kvtier.node.peer import MAX_BLOCKS, Fetched, Order, Peer, Result
from kvtier.node.reading import Reading
from kvtier.node.speed import Speed
from kvtier.stores.redis.breaker import Breaker
from kvtier.wire.access import Access
from kvtier.wire.pb import feed_pb2

CLIENT: Final = -1  # of the ledger; engines' numbers begin at 1
MAX_UNKNOWN: Final = 64  # names that are told of in the log, once each
LONGEST_S: Final = 30.0  # that a peer is left alone which fails again and again

log = logging.getLogger(__name__)


class _Known:
    """A peer, with how it has been. Of the loop."""

    def __init__(self, peer: Peer, retry_s: float) -> None:
        self.peer = peer
        self.breaker = Breaker(retry_s, max(retry_s, LONGEST_S))
        self.failing = False
        self.speeds: dict[str, tuple[Speed, BlockLayout]] = {}  # by the layout's id

    def speed(self, layout: BlockLayout) -> Speed:
        """How fast blocks of a layout come from there."""
        return self.speeds.setdefault(layout.id, (Speed(), layout))[0]

    def bytes_per_s(self, now: float) -> list[float]:
        """Of each layout of late, as far as it was measured."""
        blocks = ((each.seconds_a_block(now), layout) for each, layout in self.speeds.values())
        return [layout.nbytes / seconds for seconds, layout in blocks if seconds]

    def rests(self, now: float) -> bool:
        """Whether it is to be left alone."""
        return self.breaker.open and now < self.breaker.until

    def judge(self, fetched: Fetched, now: float) -> None:
        """Leave it alone for a while where it fails again and again; say when that changes."""
        if fetched.result is Result.LATE and not fetched.fidelities:  # cut off: says nothing
            self.breaker.failed(now)
            return
        if fetched.result is not Result.FAILED:
            self.breaker.succeeded()
            if self.failing:
                log.warning("peer %s answers again", self.peer.node)
            self.failing = False
            return
        self.breaker.failed(now)
        if not self.failing:
            log.warning("peer %s: %s; going on without it", self.peer.node, fetched.why)
        self.failing = True


class Peers:
    """The daemons that this one may load blocks from. Lives on the daemon's loop.

    Args:
        config: Their addresses; None: there are none.
        own: This node's name. Its own entry is left out, so that one list can serve all nodes.
        access: How this process shows who it is.
    """

    def __init__(self, config: PeersConfig | None, own: str, access: Access) -> None:
        self._known = {
            each.node: _Known(Peer(each.node, each.daemon, access), config.retry_s)
            for each in (config.members if config else ())
            if config and each.node != own
        }
        self._most = config.pulls if config else 0
        self._pool: ThreadPoolExecutor | None = None
        self._under_way: set[asyncio.Task[int]] = set()
        self._unknown: set[str] = set()
        self._closed = False

    def told(self) -> feed_pb2.Pulls | None:
        """For the heartbeat: how fast pulls have been; None where there is nobody to ask."""
        if not self._known or not self._most:
            return None
        now = asyncio.get_running_loop().time()
        speeds = [speed for each in self._known.values() for speed in each.bytes_per_s(now)]
        return feed_pb2.Pulls(bytes_per_s=sum(speeds) / len(speeds) if speeds else 0.0)

    async def pull(self, manager: TierManager, asked: Reading, node: str) -> int:
        """Load what `manager` lacks of keys[first:] from `node`; how many blocks came.

        They are in the host tier then, like blocks that an engine has saved. It takes at most
        `wait_s`, and goes on where the caller is cancelled: no slot is given back while it is
        being filled. With `compute` nothing is pulled that is faster computed. A failure is 0, or
        as many blocks as had come before it.
        """
        known = self._known.get(node)
        if known is None:
            self._tell_unknown(node)
            return _counted(Result.UNKNOWN)
        if asked.wait_s <= 0:
            return _counted(Result.LATE)
        if self._closed or len(self._under_way) >= self._most:
            return _counted(Result.BUSY)
        pulling = asyncio.create_task(self._pull(manager, asked, known))
        self._under_way.add(pulling)
        pulling.add_done_callback(self._under_way.discard)
        return await asyncio.shield(pulling)

    async def close(self) -> None:
        """Cut off what is under way, and wait until no slot of it is touched any more."""
        self._closed = True
        for each in self._known.values():
            each.peer.close()
        if self._under_way:
            await asyncio.wait([*self._under_way])
        if self._pool is not None:
            self._pool.shutdown()

    async def _pull(self, manager: TierManager, asked: Reading, known: _Known) -> int:
        loop, keys = asyncio.get_running_loop(), asked.keys
        start, layout = loop.time(), manager.layout
        first = asked.first + manager.match(keys[asked.first :]).blocks
        count = min(len(keys) - first, MAX_BLOCKS)
        if asked.compute is not None:
            load_s = known.speed(layout).seconds_a_block(start)
            count = worth_loading([0] * count, first, asked.compute, [load_s])
        if count <= 0:
            return 0
        if known.rests(start):
            return _counted(Result.LEFT_ALONE)
        lease = manager.write(CLIENT, keys[: first + count], first, asked.use)
        slots = lease.slots[: _leading(lease.indexes, first)]
        fetched = Fetched()
        try:
            if not slots or not known.breaker.allow(start):
                return _counted(Result.BUSY)
            places = [manager.arena.slot(slot) for slot in slots]
            lossy = any(not each.codec.exact for each in manager.lower)
            order = Order(layout, keys[: first + len(slots)], first, places, lossy)
            fetch = known.peer.fetch
            fetched = await loop.run_in_executor(self._threads(), fetch, order, asked.wait_s)
            known.judge(fetched, loop.time())
        finally:
            manager.commit(lease.id, len(fetched.fidelities))
            for key, fidelity in zip(lease.keys, fetched.fidelities, strict=False):
                manager.lineage.loaded(key, fidelity)  # not what an engine had computed here
        self._measure(known.speed(layout), len(slots), len(fetched.fidelities), start)
        return _counted(fetched.result, len(fetched.fidelities))

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
            log.warning("an engine names node %r, which is none of peers.members", node)


def _leading(indexes: Sequence[int], first: int) -> int:
    """How many of a lease's blocks follow each other from `first` on: a prefix has no gap."""
    return next((at for at, index in enumerate(indexes) if index != first + at), len(indexes))


def _counted(result: Result, blocks: int = 0) -> int:
    metrics.PEER_PULLS.labels(result).inc()
    metrics.PULLED_BLOCKS.inc(blocks)
    return blocks
