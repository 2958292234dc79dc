"""The node daemon: the socket for engines, gRPC for routers and people, the layouts between."""

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final, Protocol

from kvtier import metrics
from kvtier.arena import Arena, stride
from kvtier.codec import codecs
from kvtier.codec.frame import max_frame_nbytes
from kvtier.config import (
    Config,
    DiskConfig,
    cores_available,
    memory_available,
    node_name,
    peers_listen,
)
from kvtier.core.admission import AdmissionFactory, SecondUse
from kvtier.core.blocks import BlockKey, BlockLayout
from kvtier.core.policies import POLICIES, sized
from kvtier.core.tiers import Tier, TierSpec
from kvtier.errors import ConfigError
from kvtier.node.admin import NodeServicer
from kvtier.node.claimed import Claimed, greet_redis
from kvtier.node.garbage import collected_when_quiet
from kvtier.node.learned import LEARNED_FILE, LearnedFile
from kvtier.node.lender import Lender
from kvtier.node.manager import Changes, TierManager
from kvtier.node.movers import LowerTier
from kvtier.node.opening import Opening
from kvtier.node.peers import Peers
from kvtier.node.probe import OpenTrial
from kvtier.node.record import Recorder
from kvtier.node.server import LocalServer
from kvtier.node.soon import Soon
from kvtier.node.tuner import Tuner
from kvtier.stores.base import Store
from kvtier.stores.disk import DiskStore
from kvtier.stores.redis import RedisStore, RedisTrial
from kvtier.wire.access import Access
from kvtier.wire.feed import FeedServicer
from kvtier.wire.pb import feed_pb2, feed_pb2_grpc, node_pb2_grpc
from kvtier.wire.rpc import Server

AUTO: Final = "auto"  # the codec that is none but chooses one
MOST_REMEMBERED: Final = 2**20  # keys that were used once: 0.1 KB each
LAYOUT_FILE: Final = "layout.json"
REDIS_HUNG_S: Final = 60.0  # it has limits of its own, but for the name of its host
DRAIN_S: Final = 10.0  # at SIGTERM, for what has no lower copy yet
CLOSE_S: Final = 10.0  # of a layout that gives way; more only where a store hangs

log = logging.getLogger(__name__)


class NodeDaemon:
    """Everything under VRAM on one host. Lives on one loop.

    `clock` is what eviction learns by, in seconds; by default the loop's. `access` is how it shows
    other nodes who it is; by default as `config` says.
    """

    def __init__(
        self,
        config: Config,
        clock: Callable[[], float] | None = None,
        access: Access | None = None,
    ) -> None:
        self._config = config
        self._clock = clock
        self.name = node_name(config.node.name)
        self.layouts: dict[str, TierManager] = {}
        self._starting: set[TierManager] = set()  # which tell already of what they find
        self._learned: dict[str, LearnedFile] = {}
        self.draining = False
        self._opening = Opening()
        self._closing: dict[asyncio.Task[None], str] = {}  # of layouts that have given way
        self.feed = FeedServicer(self._held, self._heartbeat, self._before)
        self.epoch = self.feed.epoch
        self.recorder = Recorder()
        self.soon = Soon()
        access = access or Access(config, serving=False)
        node = config.node
        self.local = LocalServer(self, node.socket, node.max_clients, node.allow_uids)
        self.lender = Lender(config.peers, self.name, self.layouts, access, self.local.hear)
        self.peers = Peers(config.peers, self.name, access, self.layouts)

    async def reopen(self) -> None:
        """Open the layouts that an earlier life left on the disk, so that routers hear of them."""
        if self._config.disk is None:
            return
        folder = Path(self._config.disk.path)
        for path in await asyncio.to_thread(_layout_files, folder):
            if len(self.layouts) >= self._config.node.max_layouts:
                log.warning("disk tier: %s is of another layout; left as it is", path.parent)
                continue
            try:
                layout = BlockLayout.parse(await asyncio.to_thread(path.read_text))
            except (OSError, ValueError) as error:
                log.warning("disk tier: %s: %s; left as it is", path, error)
                continue
            await self.open_layout(layout, bounded=False)  # a large disk may take minutes

    async def open_layout(self, layout: BlockLayout, *, bounded: bool = True) -> TierManager:
        """The tiers of `layout`, made at its first use.

        Raises:
            ConfigError: There is no room for another layout, or a tier cannot be opened, or,
                `bounded`, not in time.
        """
        if manager := self.layouts.get(layout.id):  # whatever hangs while another one is opened
            return manager
        async with self._opening.lock:
            if manager := self.layouts.get(layout.id):
                return manager
            return await self._opening.run(layout, self._open_new, bounded=bounded)

    async def _open_new(self, layout: BlockLayout) -> TierManager:
        share = self._config.node.max_layouts
        closing = self._closing.values()
        if layout.id in closing or len(self.layouts) + len(closing) + len(self._opening) >= share:
            await self._make_room(layout)
        manager = await self._open(layout, share)
        self.layouts[layout.id] = manager
        return manager

    async def _make_room(self, layout: BlockLayout) -> None:
        """A layout that was only found on disk gives way to one that is asked for."""
        for name, manager in list(self.layouts.items()):
            if layout.id in self._closing.values():  # no place helps it: its folder is not free
                break
            if not self.local.attached(manager) and not manager.leases:  # of other nodes
                await manager.drain(DRAIN_S)
                if self.local.attached(manager) or manager.leases:  # somebody has come back
                    continue
                if self.layouts.get(name) is not manager:  # it gave way to one that opened late
                    continue
                del self.layouts[name]
                held = manager.held().items()
                self._announce([(tier, keys, False) for tier, keys in held])
                closing = asyncio.create_task(self._close(manager))
                self._closing[closing] = name
                closing.add_done_callback(self._closing.pop)
                await asyncio.wait([closing], timeout=CLOSE_S)
                if not closing.done():  # its memory and its folder are not free yet
                    break
                return closing.result()
        hangs = "; one that gives way has calls to a store that hang" if self._closing else ""
        hangs += "; one is still being opened" if self._opening else ""
        raise ConfigError(
            f"layout {layout.describe()} would be one more than node.max_layouts "
            f"({self._config.node.max_layouts}){hangs}"
        )

    async def _open(self, layout: BlockLayout, share: int) -> TierManager:
        host = self._config.host
        slots = host.bytes // share // stride(layout.nbytes)
        if slots < 1:
            raise ConfigError(f"host.bytes is {host.bytes}: one block takes {layout.nbytes}")
        wanted, free = slots * stride(layout.nbytes), memory_available()
        if wanted > free:
            raise ConfigError(f"host.bytes: {wanted} bytes wanted, {free} are available")
        arena = await asyncio.to_thread(Arena.create, layout.nbytes, slots)
        capacity = slots * layout.nbytes
        specs = [
            TierSpec(
                tier=Tier.HOST,
                capacity=capacity,
                drain_at=int(capacity * host.drain_at),
                policy=sized(host.policy, slots),
            )
        ]
        opened: list[tuple[TierSpec, LowerTier]] = []
        try:
            await asyncio.to_thread(self._lower_tiers, layout, share, opened)
        except BaseException:
            for _, tier in opened:
                tier.store.close()
            await asyncio.to_thread(arena.free)  # else an error's frames would keep it
            raise
        specs += [spec for spec, _ in opened]
        lower = [tier for _, tier in opened]
        manager = TierManager(layout, arena, specs, lower, self._announce, self._clock, self.soon)
        if disk := self._config.disk:
            path = Path(disk.path) / layout.id / LEARNED_FILE
            self._learned[layout.id] = LearnedFile(path, manager.learning)
            await self._learned[layout.id].open()
        self._starting.add(manager)
        try:
            await manager.start()
        finally:
            self._starting.discard(manager)
        log.info("layout %s: %d blocks of %d bytes in host memory", layout.id, slots, layout.nbytes)
        return manager

    def _lower_tiers(
        self, layout: BlockLayout, share: int, tiers: list[tuple[TierSpec, LowerTier]]
    ) -> None:
        """Open them one by one into `tiers`, which has those that were, whatever fails."""
        if disk := self._config.disk:
            capacity = disk.bytes // share
            path = Path(disk.path) / layout.id
            store = DiskStore(
                path,
                capacity,
                requests=disk.requests,
                write_bytes_per_day=disk.write_bytes_per_day // share,
            )
            # Smaller frames lose more to whole pages: count on a codec that saves half.
            most = max_frame_nbytes(layout)
            usable = store.usable(most if disk.codec == codecs.RAW.name else most // 2)
            if usable < most:
                store.close()
                raise ConfigError(f"disk.bytes is {capacity}: one block of {most} does not fit")
            try:
                (path / LAYOUT_FILE).write_text(layout.describe())
            except OSError as error:
                store.close()
                raise ConfigError(f"disk.path {path}: {error.strerror}") from None
            spec = TierSpec(
                tier=Tier.DISK,
                capacity=usable,
                drain_at=int(usable * disk.drain_at),
                queue=disk.queue,
                policy=POLICIES[disk.policy],
                admission=_admission(disk, usable // layout.nbytes),
            )
            lower = _lower_tier(
                Tier.DISK, layout, store, disk.codec, disk.threads, 1.0, store.trial
            )
            tiers.append((spec, replace(lower, hung_s=disk.hung_s)))
        if redis := self._config.redis:
            shared = RedisStore(redis, layout.id)
            spec = TierSpec(
                tier=Tier.SHARED,
                capacity=redis.bytes // share,
                drain_at=redis.bytes // share,
                queue=redis.queue,
            )
            lower = _lower_tier(
                Tier.SHARED, layout, shared, redis.codec, redis.threads, redis.retry_s,
                partial(RedisTrial, redis, layout.id),
            )  # fmt: skip
            hung_s = max(REDIS_HUNG_S, 10 * redis.timeout_s)
            tiers.append((spec, replace(lower, hung_s=hung_s)))

    def counters(self) -> Mapping[str, float]:
        """Every counter of this process by its name."""
        return {
            sample.name + "".join(f"_{value}" for value in sample.labels.values()): sample.value
            for family in metrics.REGISTRY.collect()
            for sample in family.samples
            if not sample.name.endswith("_created")
        }

    def _announce(self, changes: Changes) -> None:
        self.feed.changed((tier, key, held) for tier, keys, held in changes for key in keys)

    def _held(self) -> dict[Tier, list[BlockKey]]:
        self.local.hear()  # what engines have told up to here is in it
        held: dict[Tier, list[BlockKey]] = {}
        for manager in (*self.layouts.values(), *self._starting):
            for tier, keys in manager.held().items():
                held.setdefault(tier, []).extend(keys)
        return held

    def _before(self, key: BlockKey) -> BlockKey | None:
        managers = (*self.layouts.values(), *self._starting)
        found = (manager.before(key) for manager in managers)
        return next((before for before in found if before is not None), None)

    def _heartbeat(self) -> feed_pb2.Heartbeat:
        return feed_pb2.Heartbeat(
            draining=self.draining, pulls=self.peers.told(), lends=self.lender.lends
        )

    async def drain(self, deadline_s: float) -> int:
        """`TierManager.drain` of all layouts at once; how many blocks were left."""
        return sum(
            await asyncio.gather(*(each.drain(deadline_s) for each in self.layouts.values()))
        )

    async def close(self, drain_s: float) -> None:
        """Copy down what can be saved, then hang up and close everything."""
        self.draining = True
        self.local.hear()
        closing = asyncio.create_task(self.peers.close())  # a pull that hangs holds nothing up
        if left := await self.drain(drain_s):
            log.warning("%d blocks had no time to be saved", left)
        await closing
        # An engine does not hear at once that its leases have ended, and goes on copying: by then
        # nobody may ask for anything that is loaded into its slots.
        await self.lender.close()
        await self.local.close()
        while self.layouts or self._opening:
            if not self.layouts:
                await self._opening.ended()
            for name in [*self.layouts]:
                await self._close(self.layouts.pop(name))
        if self._closing:
            await asyncio.wait([*self._closing])

    async def _close(self, manager: TierManager) -> None:
        if learned := self._learned.pop(manager.layout.id, None):
            await learned.close()
        await manager.close()


def _admission(disk: DiskConfig, blocks: int) -> AdmissionFactory | None:
    """What `disk` lets in, of a tier of so many blocks: as many keys are remembered."""
    if disk.admission == "all":
        return None
    refused = metrics.DISK_REFUSED.labels("admission").inc
    return partial(SecondUse, max(1, min(blocks, MOST_REMEMBERED)), refused)


def _lower_tier(
    tier: Tier,
    layout: BlockLayout,
    store: Store,
    codec: str,
    threads: int,
    retry_s: float,
    open_trial: OpenTrial,
) -> LowerTier:
    if codec != AUTO:
        return LowerTier(tier, store, codecs.by_name(codec), threads, retry_s)
    tuner = Tuner(tier.label, layout, threads, cores_available())
    tuner.probe(open_trial)
    return LowerTier(tier, tuner.metered(store), codecs.RAW, threads, retry_s, tuner)


def _layout_files(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*/{LAYOUT_FILE}"))


class Started(Protocol):
    """Told once all is open: where it listens by gRPC, and where it lends blocks, if it does."""

    def __call__(self, address: str, *, lends: str) -> None: ...  # noqa: D102


async def serve(config: Config, *, started: Started, stop: asyncio.Event) -> None:
    """Run a node daemon until `stop`; `started` gets the addresses that were bound.

    Raises:
        ConfigError: An address or path is taken or unusable, or the memory is not there.
    """
    access, claimed = Access(config), Claimed()
    daemon = NodeDaemon(config, access=access)
    services = ["kvtier.v1.Node", "kvtier.v1.Feed"]
    server = Server(config.node.listen, "node.listen", services, access=access)
    node_pb2_grpc.add_NodeServicer_to_server(NodeServicer(daemon), server.grpc)
    feed_pb2_grpc.add_FeedServicer_to_server(daemon.feed, server.grpc)
    at = config.node.metrics_host, config.node.metrics_port
    access.serve_metrics(*at, "node")
    try:
        # What may be refused comes before what takes memory, or long.
        await asyncio.to_thread(daemon.local.claim)
        daemon.lender.refuse_taken(peers_listen(config))
        await asyncio.to_thread(claimed.disk, config)
        await daemon.reopen()
        if config.redis and not daemon.layouts:  # else these have greeted it
            greet_redis(config.redis)
        await daemon.local.start()
        await daemon.lender.start(peers_listen(config))
        address = await server.start()
        await server.healthy(True)
        log.info("node %s: engines at %s, gRPC at %s", daemon.name, config.node.socket, address)
        async with collected_when_quiet():
            started(address, lends=daemon.lender.address)
            await stop.wait()
    finally:
        await server.healthy(False)
        await daemon.close(DRAIN_S)
        claimed.close()
        daemon.feed.close()
        await server.stop(1.0)
