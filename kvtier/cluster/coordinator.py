"""The one actor that keeps the cluster as it should be: looks, plans, acts, tells the routers.

It holds nothing that it could not find out again: agents are found by their names, addresses are
asked for, versions grow with the clock. So it may die at any moment and nobody but the next
round notices.
"""

import asyncio
import logging
import os
import time
from dataclasses import dataclass
from typing import Final, TypedDict

from ray.exceptions import ActorDiedError, RayError

from kvtier.cluster import control, members
from kvtier.cluster.agent import Report
from kvtier.cluster.control import AgentId
from kvtier.cluster.lenders import Daemons, lenders
from kvtier.cluster.plan import (
    Action,
    AgentView,
    Condition,
    Create,
    Kill,
    Placed,
    RayNode,
    names,
    plan,
    table,
    wanted,
)
from kvtier.cluster.settings import ClusterSettings, digest
from kvtier.config import Config, PeerConfig
from kvtier.errors import ConfigError
from kvtier.wire.access import Access

_LOG = logging.getLogger(__name__)
_ROUND_S: Final = 1.0
_ANSWER_S: Final = 1.0  # a round waits no longer for answers; late ones count in the next
STOP_S: Final = 20.0  # for a room to end in order; a daemon saves its blocks meanwhile
_DRAIN_S: Final = 60.0  # at most; less where Ray's own deadline is nearer
_PATIENCE_S: Final = 10.0  # for first answers, before routers are told
_DEAD_ROUNDS: Final = 3  # Ray reports a restarting actor as dead for an instant


class NodeRow(TypedDict):
    """A node in `status`."""

    name: str
    id: str
    ip: str
    draining: bool
    drain: str  # what came of it


class AgentRow(TypedDict):
    """An agent in `status`."""

    node: str
    kind: str
    state: str
    pid: int
    address: str
    restarts: int  # seen by this Coordinator
    failure: str  # why its room last ended by itself


class RouterRow(TypedDict):
    """A router in `status`."""

    address: str
    version: int  # of the members that it was last told
    error: str


class Status(TypedDict):
    """What `Coordinator.status` answers."""

    pid: int
    digest: str
    version: int
    settled: bool  # all that is wanted runs, and every router and daemon knows of the others
    nodes: list[NodeRow]
    agents: list[AgentRow]
    routers: list[RouterRow]


@dataclass(slots=True)
class _Known:
    """What the Coordinator remembers of an agent between rounds."""

    heard_at: float
    report: Report | None = None
    condition: Condition = "starting"
    dead_rounds: int = 0
    restarts: int = 0
    failure: str = ""


class Coordinator:
    """Reconciles agents with nodes, once a second. An async Ray actor is made of it."""

    def __init__(self, config: Config, settings: ClusterSettings) -> None:
        """Begin at once; must be called on a running event loop."""
        self._config = config
        self._settings = settings
        self._digest = digest(config, settings)
        self._nodes: list[RayNode] = []
        self._known: dict[AgentId, _Known] = {}
        self._asking: dict[AgentId, asyncio.Task[Report | ActorDiedError | None]] = {}
        self._retiring: dict[AgentId, asyncio.Task[None]] = {}
        self._drains: dict[str, asyncio.Task[str]] = {}
        self._access = Access(config, serving=False)
        self._routers = members.Routers(self._access)
        self._daemons = Daemons()
        self._lenders: tuple[PeerConfig, ...] = ()
        self._placed: tuple[Placed, ...] = ()
        self._version = 0
        self._born = time.monotonic()
        self._calm = False  # the last plan had nothing to do
        self._loop_task = asyncio.get_running_loop().create_task(self._run())
        self._loop_task.add_done_callback(_end_process)

    async def status(self) -> Status:
        """The cluster as of the last round."""
        called = names(self._nodes)
        told = self._routers.status()
        agents = [
            AgentRow(
                node=called.get(node_id, node_id[:12]),
                kind=kind,
                state=k.condition,
                pid=k.report.pid if k.report else 0,
                address=k.report.address if k.report else "",
                restarts=k.restarts,
                failure=k.failure,
            )
            for (kind, node_id), k in self._known.items()
        ]
        nodes = [
            NodeRow(name=called[n.id], id=n.id, ip=n.ip, draining=n.draining,
                    drain=self._drain_text(n.id))
            for n in self._nodes
        ]  # fmt: skip
        return Status(
            pid=os.getpid(),
            digest=self._digest,
            version=self._version,
            settled=self._settled(),
            nodes=sorted(nodes, key=lambda n: n["name"]),
            agents=sorted(agents, key=lambda a: (a["node"], a["kind"])),
            routers=[RouterRow(address=a, version=told[a][0], error=told[a][1])
                     for a in sorted(told)],
        )  # fmt: skip

    async def down(self, deadline_s: float) -> int:
        """End every agent, each in order within `deadline_s`, else by force; how many there were.

        Daemons go last, since what workers still save ends up in them.
        The Coordinator itself stays, idle, for its caller to end.
        """
        self._loop_task.remove_done_callback(_end_process)
        self._loop_task.cancel()
        await asyncio.gather(self._loop_task, return_exceptions=True)
        there = await asyncio.to_thread(control.agents)
        for daemons in (False, True):
            now = [agent for agent in there if (agent[0] == "node") is daemons]
            await asyncio.gather(*(control.stop(agent, deadline_s) for agent in now))
        await self._routers.close()
        await self._daemons.close()
        self._calm = False
        return len(there)

    async def _run(self) -> None:
        while True:
            try:
                await self._round()
            except (RayError, OSError, ConfigError) as error:
                self._calm = False
                _LOG.warning("round given up: %s: %s", type(error).__name__, error)
            await asyncio.sleep(_ROUND_S)

    async def _round(self) -> None:
        self._nodes = await asyncio.to_thread(control.nodes)
        there = await asyncio.to_thread(control.agents)
        await self._ask(there)
        actions = plan(self._nodes, self._views(), self._settings, self._digest)
        # What is being retired was planned in an earlier round.
        actions = [a for a in actions if (a.kind, a.node_id) not in self._retiring]
        self._calm = not actions and not self._retiring
        for action in actions:
            await self._act(action)
        self._drain()
        self._tell()

    async def _ask(self, there: list[AgentId]) -> None:
        """One question at a time to each agent: a slow one is not asked again meanwhile."""
        for agent in self._known.keys() - set(there):
            del self._known[agent]
            if agent in self._asking:
                self._asking.pop(agent).cancel()
        now = time.monotonic()
        for agent in there:
            self._known.setdefault(agent, _Known(now))
            if agent not in self._asking:
                self._asking[agent] = asyncio.create_task(control.ask(agent))
        if self._asking:
            await asyncio.wait(self._asking.values(), timeout=_ANSWER_S)
        for agent, task in list(self._asking.items()):
            if task.done():
                self._heard(self._known[agent], task.result())
                del self._asking[agent]

    def _heard(self, known: _Known, answer: Report | ActorDiedError | None) -> None:
        if isinstance(answer, Report):
            if known.report and known.report.pid != answer.pid:
                known.restarts += 1
            known.report = answer
            known.dead_rounds = 0
            known.failure = answer.failure or known.failure
            known.condition = "stopped" if answer.stopped else "starting"
            if answer.address and not answer.stopped:
                known.condition = "ready"
            if answer.answering:
                known.heard_at = time.monotonic()
        elif answer is None:  # on its way down or up again: its address is worth nothing
            known.condition = "starting"
        else:
            known.dead_rounds += 1
            known.condition = "lost" if known.dead_rounds >= _DEAD_ROUNDS else "starting"

    def _views(self) -> list[AgentView]:
        now = time.monotonic()
        return [
            AgentView(
                kind=kind,
                node_id=node_id,
                condition=k.condition,
                address=k.report.address if k.report else "",
                lends=k.report.lends if k.report else "",
                digest=k.report.digest if k.report else "",
                silent_s=now - k.heard_at,
            )
            for (kind, node_id), k in self._known.items()
        ]

    async def _act(self, action: Action) -> None:
        agent = (action.kind, action.node_id)
        if isinstance(action, Create):
            _LOG.warning("start %s", control.actor_name(*agent))
            await asyncio.to_thread(
                control.create, agent, self._config, self._settings, self._digest, self._nodes
            )
            return
        _LOG.warning("end %s: %s", control.actor_name(*agent), action.why)
        if isinstance(action, Kill):
            await asyncio.to_thread(control.kill, agent)
            return
        task = asyncio.create_task(control.stop(agent, STOP_S))
        self._retiring[agent] = task
        task.add_done_callback(lambda _: self._retiring.pop(agent))

    def _drain(self) -> None:
        """Begin the drain of each node that Ray has begun to take away, once."""
        draining = {n.id for n in self._nodes if n.draining}
        for node_id in self._drains.keys() - draining:
            self._drains.pop(node_id).cancel()
        daemons = {n.id: self._known.get(("node", n.id)) for n in self._nodes}
        for node_id in draining - self._drains.keys():
            daemon = daemons[node_id]
            if daemon and daemon.condition == "ready" and daemon.report:
                work = members.drain(daemon.report.address, _DRAIN_S, self._access)
                self._drains[node_id] = asyncio.create_task(work)

    def _drain_text(self, node_id: str) -> str:
        task = self._drains.get(node_id)
        if task is None:
            return ""
        return task.result() if task.done() else "under way"

    def _tell(self) -> None:
        young = time.monotonic() - self._born < _PATIENCE_S
        if young and any(k.report is None for k in self._known.values()):
            return  # after a restart: agents not heard yet are not agents that are not there
        views = self._views()
        placed = table(self._nodes, views)
        if placed != self._placed or not self._version:
            self._placed = placed
            # Grows also across restarts of the Coordinator, which start from the clock.
            self._version = max(self._version + 1, time.time_ns() // 1_000_000)
        own = [v.address for v in views if v.kind == "router" and v.condition == "ready"]
        told = members.message(self._version, placed)
        self._routers.tell([*self._settings.routers, *own], told)
        self._lenders = lenders(self._nodes, views)
        self._daemons.tell(self._daemon_pids(), self._lenders)

    def _daemon_pids(self) -> dict[AgentId, int]:
        """The processes of the daemons that serve."""
        return {
            agent: known.report.pid
            for agent, known in self._known.items()
            if agent[0] == "node" and known.condition == "ready" and known.report
        }

    def _settled(self) -> bool:
        there = {a: k.condition == "ready" for a, k in self._known.items()}
        want = {
            (kind, n.id)
            for n in self._nodes
            if not n.draining
            for kind in wanted(n, self._settings)
        }
        told = self._routers.status().values()
        informed = all(version == self._version and not error for version, error in told)
        return (
            self._calm
            and bool(want)
            and all(there.get(agent, False) for agent in want)
            and informed
            and self._daemons.informed(self._daemon_pids(), self._lenders)
            and bool(told) == bool(self._settings.routers or self._settings.router)
        )


def _end_process(task: asyncio.Task[None]) -> None:
    """A Coordinator whose loop died is of no use: Ray restarts it."""
    error = None if task.cancelled() else task.exception()
    _LOG.error("the Coordinator's loop ended: %r", error)
    os._exit(1)
