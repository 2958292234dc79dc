"""Which workers and daemons there are: from the config, and from whoever announces them."""

import asyncio
import random
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from typing import Final

from kvtier import metrics
from kvtier.config import RouterConfig, parse_address
from kvtier.core.directory import Directory
from kvtier.errors import ConfigError, InvalidRequest
from kvtier.router.link import Context, Link, Serves, State
from kvtier.router.pace import Pace
from kvtier.router.text import TextPool
from kvtier.wire.access import Access
from kvtier.wire.pb import router_pb2

MAX_MEMBERS: Final = 4096
MAX_NAME: Final = 253  # characters


@dataclass(frozen=True, slots=True)
class Member:
    """A node's daemon, its worker, or both; an empty address means that there is none."""

    node: str
    daemon: str = ""
    worker: str = ""
    draining: bool = False


class Members:
    """The set of members and a `Link` for each of their addresses. Lives on one loop.

    `failed` gets the exception of a task that ended by a bug of ours.
    """

    def __init__(
        self, config: RouterConfig, directory: Directory, texts: TextPool, rng: random.Random,
        access: Access,
    ) -> None:  # fmt: skip
        self.version = 0
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        pace = Pace()
        self._context = Context(config, directory, texts, rng, pace, self._changed, access)
        self._tidying = asyncio.get_running_loop().create_task(pace.tidy(directory))
        self._tidying.add_done_callback(self._ended)
        self._fixed = tuple(Member(m.node, m.daemon, m.worker) for m in config.members)
        check_members(self._fixed, "router.members")
        self._members: tuple[Member, ...] = ()
        self._links: dict[tuple[Serves, str], Link] = {}
        self._workers: tuple[Link, ...] = ()
        self._daemons: dict[str, list[Link]] = {}  # by node
        self._unwanted: set[str] = set()  # workers that somebody wants no new requests on
        self._settled = False
        self._retiring: set[asyncio.Task[None]] = set()
        self._revision = 0
        self._turn = asyncio.Event()  # set, and replaced, at every change
        self._closed = False
        self._follow(())

    def announce(self, version: int, members: Iterable[Member]) -> bool:
        """Replace what was announced before; False if `version` is older than that.

        Version 0 replaces whatever is there. Addresses that stay keep their connections.

        Raises:
            InvalidRequest: A member makes no sense; nothing was changed.
        """
        announced = tuple(members)
        try:
            check_members(announced, "members")
        except ConfigError as error:
            raise InvalidRequest(str(error)) from None
        if 0 < version < self.version:
            return False
        self.version = version
        self._follow(announced)
        return True

    def workers(self) -> tuple[Link, ...]:
        """Every worker's link, whatever its state, in the order of the members."""
        return self._workers

    def any_ready(self) -> bool:
        """Whether at least one worker takes requests."""
        return any(link.state is State.READY for link in self.workers())

    def serving(self) -> bool:
        """Whether a worker takes requests and everybody who lives has told what they hold.

        Who can't be reached is not waited for, nor who takes longer than `link.SETTLE_S`, nor who
        joins later: once is enough.
        """
        links = self._links.values()
        self._settled = self._settled or (bool(links) and all(link.settled for link in links))
        return self._settled and self.any_ready()

    def sources(self, worker: Link) -> list[str]:
        """The sources in the directory that this worker can restore from: its own and its node's.

        Blocks of a shared store come with whichever source told of them, see `Directory`.
        """
        return [worker.source, *(link.source for link in self._daemons.get(worker.node, ()))]

    def pulls(self, worker: Link) -> bool:
        """Whether the worker's node can load blocks from others for it; its rates know how fast."""
        if worker.info is None or not worker.info.pulls:
            return worker.pulls_at(0.0)
        daemons = self._daemons.get(worker.node, ())
        return worker.pulls_at(max((link.pulls_bytes_per_s for link in daemons), default=0.0))

    def lends(self, worker: Link) -> bool:
        """Whether other nodes can load blocks from the worker's node."""
        return any(link.heartbeat.lends for link in self._daemons.get(worker.node, ()))

    def draining(self, worker: Link) -> bool:
        """Whether somebody wants no new requests on this worker, or nothing new on its node."""
        return (
            worker.heartbeat.draining
            or (worker.asks is not None and worker.asks.draining)
            or worker.address in self._unwanted
            or any(link.heartbeat.draining for link in self._daemons.get(worker.node, ()))
        )

    def table(self) -> router_pb2.Members:
        """The routing table with the state of each member: its worker's, or else its daemon's."""
        table = router_pb2.Members(version=self.version)
        for member in self._members:
            serves = Serves.WORKER if member.worker else Serves.DAEMON
            link = self._links[serves, member.worker or member.daemon]
            table.members.add(
                node=member.node, daemon_address=member.daemon, worker_address=member.worker,
                draining=member.draining or link.heartbeat.draining, state=link.state,
            )  # fmt: skip
        return table

    async def changes(self) -> AsyncIterator[None]:
        """Yields at once, and then whenever something has changed since, until `end_changes`."""
        seen = -1
        while not self._closed:
            if self._revision > seen:
                seen = self._revision
                yield
            else:
                await self._turn.wait()

    def end_changes(self) -> None:
        """Sends everybody home who waits for a change."""
        self._closed = True
        self._changed()

    async def close(self) -> None:
        """Follow nobody any more; calls under way are cut off."""
        self.end_changes()
        links, self._links = list(self._links.values()), {}
        self._members, self._workers, self._daemons = (), (), {}
        for task in (self._tidying, *self._retiring):
            task.cancel()
        stops = [link.stop(0) for link in links]
        await asyncio.gather(self._tidying, *self._retiring, *stops, return_exceptions=True)
        self.failed.cancel()

    def _follow(self, announced: tuple[Member, ...]) -> None:
        """Start and stop links until they are those of the config and of `announced`."""
        taken = {m.worker or m.daemon for m in announced}
        fixed = (m for m in self._fixed if (m.worker or m.daemon) not in taken)
        self._members = (*fixed, *announced)
        wanted = {
            (serves, address): member.node
            for member in self._members
            for serves, address in (
                (Serves.WORKER, member.worker),
                (Serves.DAEMON, member.daemon),
            )
            if address
        }
        for key in self._links.keys() - wanted.keys():
            retire = self._links.pop(key).stop(self._context.config.timeout_s)
            task = asyncio.get_running_loop().create_task(retire)
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)
        for key, node in wanted.items():
            if key not in self._links:
                self._links[key] = Link(*key, node, self._context)
                self._links[key].task.add_done_callback(self._ended)
            self._links[key].node = node
        workers = dict.fromkeys(m.worker for m in self._members if m.worker)
        self._workers = tuple(self._links[Serves.WORKER, each] for each in workers)
        self._daemons = {}
        for member in self._members:
            link = self._links.get((Serves.DAEMON, member.daemon))
            daemons = self._daemons.setdefault(member.node, [])
            if link is not None and link not in daemons:
                daemons.append(link)
        self._unwanted = {m.worker for m in self._members if m.draining}
        self._changed()

    def _ended(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None and not self.failed.done():
            self.failed.set_exception(error)

    def _changed(self) -> None:
        self._revision += 1
        self._turn.set()
        self._turn = asyncio.Event()
        states = [link.state for link in self.workers()]
        for state in State:
            metrics.MEMBERS.labels(state).set(states.count(state))
        links = self._links.values()
        self._context.texts.keep_only({link.text.digest for link in links if link.text})


def check_members(members: Iterable[Member], name: str) -> None:
    """Refuse members that cannot be followed.

    Raises:
        ConfigError: Too many, a bad name or address, a worker twice; it begins with `name`.
    """
    workers: set[str] = set()
    for i, member in enumerate(members):
        where = f"{name}[{i}]"
        if i >= MAX_MEMBERS:
            raise ConfigError(f"{name}: more than {MAX_MEMBERS} members")
        if not 1 <= len(member.node) <= MAX_NAME:
            raise ConfigError(
                f"{where}.node has {len(member.node)} characters, must have 1 to {MAX_NAME}"
            )
        if not member.daemon and not member.worker:
            raise ConfigError(f"{where}: neither a daemon nor a worker address")
        for part, address in (("daemon", member.daemon), ("worker", member.worker)):
            if address:
                parse_address(address, f"{where}.{part}")
        if member.worker in workers:
            raise ConfigError(f"{where}.worker is {member.worker}, which another member has too")
        if member.worker:
            workers.add(member.worker)
