"""Every daemon is told where the others lend blocks: its agent writes its `peers.file`."""

import asyncio
from collections.abc import Iterable, Mapping
from functools import partial

from kvtier.cluster import control
from kvtier.cluster.control import AgentId
from kvtier.cluster.plan import AgentView, RayNode, names
from kvtier.config import PeerConfig


def lenders(nodes: Iterable[RayNode], agents: Iterable[AgentView]) -> tuple[PeerConfig, ...]:
    """The daemons that lend, by name; one that drains goes on lending until it ends."""
    called = names(nodes)
    found = (
        PeerConfig(node=called[each.node_id], address=each.lends)
        for each in agents
        if each.kind == "node" and each.condition == "ready" and each.lends
        if each.node_id in called
    )
    return tuple(sorted(found, key=lambda each: each.node))


class Daemons:
    """Tells them, each on its own, so that a slow one delays no other.

    What they were told is remembered for as long as the same process runs.
    """

    def __init__(self) -> None:
        self._told: dict[AgentId, tuple[int, tuple[PeerConfig, ...]]] = {}
        self._telling: dict[AgentId, asyncio.Task[bool]] = {}

    def tell(self, pids: Mapping[AgentId, int], members: tuple[PeerConfig, ...]) -> None:
        """Start to tell `members` to each of these agents that does not know them yet."""
        for agent in self._told.keys() - pids.keys():
            del self._told[agent]
        for agent, pid in pids.items():
            now = pid, members
            if agent not in self._telling and self._told.get(agent) != now:
                task = asyncio.create_task(control.tell_peers(agent, members))
                self._telling[agent] = task
                task.add_done_callback(partial(self._done, agent, now))

    def informed(self, pids: Mapping[AgentId, int], members: tuple[PeerConfig, ...]) -> bool:
        """Whether all of them know."""
        return all(self._told.get(agent) == (pid, members) for agent, pid in pids.items())

    async def close(self) -> None:
        """Tell nobody any more."""
        tasks = list(self._telling.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _done(
        self, agent: AgentId, what: tuple[int, tuple[PeerConfig, ...]], task: asyncio.Task[bool]
    ) -> None:
        del self._telling[agent]
        if not task.cancelled() and task.exception() is None and task.result():
            self._told[agent] = what
