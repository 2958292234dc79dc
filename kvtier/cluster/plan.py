"""What should run where, against what does: pure decisions, no Ray, no clock."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from kvtier.cluster.settings import ClusterSettings, Kind

Condition = Literal["starting", "ready", "stopped", "lost"]

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RayNode:
    """One alive node of the Ray cluster."""

    id: str  # hex
    ip: str
    label: str = ""  # the name that it was given, if any
    tier: bool = False  # carries the `kvtier` resource
    head: bool = False
    draining: bool = False
    cpus: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentView:
    """One agent as the Coordinator sees it."""

    kind: Kind
    node_id: str
    condition: Condition = "starting"
    address: str = ""  # host:port while it serves
    lends: str = ""  # host:port where its daemon lends blocks, if it does
    digest: str = ""  # of the settings that it runs with; empty: not told yet
    silent_s: float = 0.0  # since its last sign of life


@dataclass(frozen=True, slots=True)
class Create:
    """Start an agent on a node that lacks it."""

    kind: Kind
    node_id: str


@dataclass(frozen=True, slots=True)
class Kill:
    """End an agent at once: its node is gone, or it is."""

    kind: Kind
    node_id: str
    why: str


@dataclass(frozen=True, slots=True)
class Retire:
    """End an agent in order: it runs what is not wanted, or no longer wanted so."""

    kind: Kind
    node_id: str
    why: str


Action = Create | Kill | Retire


@dataclass(frozen=True, slots=True)
class Placed:
    """One row of the routing table."""

    node: str
    daemon: str
    worker: str
    draining: bool


def names(nodes: Iterable[RayNode]) -> dict[str, str]:
    """The kvtier name of each Ray node: its label, else the first 12 digits of its id.

    A label that is not 1 to 63 of A-Z a-z 0-9 . _ - is not used, since names become parts of
    paths; where two nodes carry one label, each gets a piece of its id too.
    """
    nodes = list(nodes)
    label = {n.id: n.label if _NAME.fullmatch(n.label) else n.id[:12] for n in nodes}
    uses = Counter(label.values())
    return {n: name if uses[name] == 1 else f"{name[:56]}-{n[:6]}" for n, name in label.items()}


def wanted(node: RayNode, settings: ClusterSettings) -> set[Kind]:
    """The kinds of agents that belong on this node."""
    kinds: set[Kind] = set()
    if node.tier or settings.everywhere:
        kinds.add("node")
        if settings.workers:
            kinds.add("worker")
    if node.head and settings.router:
        kinds.add("router")
    return kinds


def plan(
    nodes: Sequence[RayNode],
    agents: Sequence[AgentView],
    settings: ClusterSettings,
    digest: str,
    hung_s: float = 60.0,
) -> list[Action]:
    """What to do now, so that every wanted agent runs, once, with today's settings.

    Agents with other settings are replaced one at a time, and only while all others are ready.
    A draining node keeps what it has and gets nothing new: Ray would not schedule it there.
    """
    alive = {n.id: n for n in nodes}
    kinds = {n.id: wanted(n, settings) for n in nodes}
    actions: list[Action] = []
    stale: list[AgentView] = []
    for agent in agents:
        at = (agent.kind, agent.node_id)
        if agent.node_id not in alive:
            actions.append(Kill(*at, "its node is gone"))
        elif agent.condition in ("lost", "stopped"):
            actions.append(Kill(*at, f"it is {agent.condition}"))
        elif agent.condition == "ready" and agent.silent_s > hung_s:
            actions.append(Kill(*at, f"silent for {agent.silent_s:.0f} s, limit {hung_s:.0f}"))
        elif agent.kind not in kinds[agent.node_id]:
            actions.append(Retire(*at, "not wanted on this node"))
        elif agent.digest not in ("", digest) and not alive[agent.node_id].draining:
            stale.append(agent)
    there = {(a.kind, a.node_id) for a in agents}
    missing: list[Action] = [
        Create(kind, node.id)
        for node in nodes
        if not node.draining
        for kind in sorted(kinds[node.id])
        if (kind, node.id) not in there
    ]
    # A stale agent that is not even ready has nothing to lose.
    stale.sort(key=lambda a: a.condition == "ready")
    calm = not actions and not missing
    if stale and calm and all(a.condition == "ready" or a is stale[0] for a in agents):
        actions.append(Retire(stale[0].kind, stale[0].node_id, "the settings changed"))
    return actions + missing


def table(nodes: Sequence[RayNode], agents: Sequence[AgentView]) -> tuple[Placed, ...]:
    """The routing table: each alive node that serves something, by name."""
    called = names(nodes)
    serving: Mapping[tuple[Kind, str], str] = {
        (a.kind, a.node_id): a.address for a in agents if a.condition == "ready"
    }
    rows = [
        Placed(
            called[n.id],
            serving.get(("node", n.id), ""),
            serving.get(("worker", n.id), ""),
            n.draining,
        )
        for n in nodes
    ]
    return tuple(sorted((r for r in rows if r.daemon or r.worker), key=lambda r: r.node))
