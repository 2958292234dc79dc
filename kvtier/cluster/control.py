"""Everything that the Coordinator asks of Ray, each call short and blocking."""

import asyncio
import logging
from collections.abc import Mapping
from typing import Final, Protocol, cast

import ray
from ray.exceptions import ActorDiedError, RayError
from ray.util import list_named_actors
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from kvtier.cluster.agent import Agent, Report
from kvtier.cluster.plan import RayNode, names
from kvtier.cluster.settings import (
    KINDS,
    LABEL,
    NAME_RESOURCE,
    NAMESPACE,
    RESOURCE,
    ClusterSettings,
    Kind,
    Place,
    config_for,
)
from kvtier.config import Config, PeerConfig

_LOG = logging.getLogger(__name__)
_HEAD: Final = "node:__internal_head__"
_TELL_S: Final = 5.0

AgentId = tuple[Kind, str]  # kind, Ray node id


class _Remote(Protocol):
    def remote(self, *args: object) -> "ray.ObjectRef[object]": ...


class AgentHandle(Protocol):
    """The Ray actor around an Agent."""

    report: _Remote
    peers: _Remote
    stop: _Remote


def actor_name(kind: Kind, node_id: str) -> str:
    """The fixed name of an agent, so that whoever asks finds it."""
    return f"kvtier:{kind}:{node_id}"


def parse_actor_name(name: str) -> AgentId | None:
    """What an actor's name says; None: not one of our agents."""
    ours, _, rest = name.partition(":")
    kind, _, node_id = rest.partition(":")
    if ours != "kvtier" or kind not in KINDS or not node_id:
        return None
    return kind, node_id


def ray_node(row: Mapping[str, object], draining: Mapping[str, int]) -> RayNode:
    """One alive row of `ray.nodes()`."""
    resources = cast("Mapping[str, float]", row["Resources"])
    labels = cast("Mapping[str, str]", row.get("Labels") or {})
    given = [r for r in sorted(resources) if r.startswith(NAME_RESOURCE)]
    node_id = str(row["NodeID"])
    return RayNode(
        id=node_id,
        ip=str(row["NodeManagerAddress"]),
        label=labels.get(LABEL) or (given[0].removeprefix(NAME_RESOURCE) if given else ""),
        tier=resources.get(RESOURCE, 0) > 0,
        head=_HEAD in resources,
        draining=node_id in draining,
        cpus=int(resources.get("CPU", 0)),
    )


def nodes() -> list[RayNode]:
    """The alive nodes of the Ray cluster that this process is connected to."""
    draining = draining_nodes()
    return [ray_node(row, draining) for row in ray.nodes() if row["Alive"]]


def draining_nodes() -> dict[str, int]:
    """Nodes that Ray is about to take away, with the deadline in unix ms (0: none).

    Ray has no public way to ask; a version that lacks this one has no draining nodes for us.
    """
    state = getattr(getattr(getattr(ray, "_private", None), "state", None), "state", None)
    ask = getattr(state, "get_draining_nodes", None)
    return dict(ask()) if ask else {}


def agents() -> list[AgentId]:
    """Every agent that Ray knows by name, on whatever node."""
    listed = cast("list[dict[str, str]]", list_named_actors(all_namespaces=True))
    ours = [parse_actor_name(a["name"]) for a in listed if a["namespace"] == NAMESPACE]
    return sorted(a for a in ours if a is not None)


def handle(agent: AgentId) -> AgentHandle:
    """The actor of that name.

    Raises:
        ValueError: No such actor.
    """
    return cast("AgentHandle", ray.get_actor(actor_name(*agent), namespace=NAMESPACE))


def create(
    agent: AgentId, config: Config, settings: ClusterSettings, digest: str, alive: list[RayNode]
) -> None:
    """Place an agent on its node; nothing happens where it is there already.

    Raises:
        ConfigError: The settings do not fit that node.
        RayError: Ray refused.
    """
    kind, node_id = agent
    node = next(n for n in alive if n.id == node_id)
    place = Place(
        name=names(alive)[node_id],
        ip=node.ip,
        cpus=node.cpus,
        shared_ip=sum(n.ip == node.ip for n in alive) > 1,
    )
    actor = ray.remote(Agent).options(
        name=actor_name(*agent),
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        max_restarts=-1,
        max_task_retries=0,  # the next round asks again
        num_cpus=0,
        num_gpus=settings.worker_gpus if kind == "worker" else 0,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
    )
    actor.remote(settings.room(kind), config_for(config, place), digest)


def kill(agent: AgentId) -> None:
    """End an agent's process for good; one that is gone already is no error."""
    try:
        ray.kill(cast("ray.actor.ActorHandle[Agent]", handle(agent)), no_restart=True)
    except (ValueError, RayError) as error:
        _LOG.info("%s was gone already: %s", actor_name(*agent), error)


async def ask(agent: AgentId) -> Report | ActorDiedError | None:
    """What the agent says of itself; None: no answer this time; the error: Ray holds it for dead.

    Waits as long as the actor is being placed, restarted or stuck.
    """
    try:
        reference = await asyncio.to_thread(lambda: handle(agent).report.remote())
        return cast("Report", await reference)
    except ActorDiedError as error:
        return error
    except (ValueError, RayError):
        return None


async def tell_peers(agent: AgentId, members: tuple[PeerConfig, ...]) -> bool:
    """Tell a daemon's agent who lends; whether it has taken it."""
    try:
        reference = await asyncio.to_thread(lambda: handle(agent).peers.remote(members))
        return bool(await asyncio.wait_for(asyncio.wrap_future(reference.future()), _TELL_S))
    except (TimeoutError, ValueError, RayError):
        return False  # the next round tries again


async def stop(agent: AgentId, deadline_s: float) -> None:
    """Let the agent's room end in order, then end its process in any case."""
    try:
        reference = await asyncio.to_thread(lambda: handle(agent).stop.remote(deadline_s))
        await asyncio.wait_for(asyncio.wrap_future(reference.future()), deadline_s + 1)
    except (TimeoutError, ValueError, RayError) as error:
        _LOG.warning("%s did not stop in order: %s", actor_name(*agent), error)
    await asyncio.to_thread(kill, agent)
