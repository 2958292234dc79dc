"""What a cluster runs beside the shared Config, and that Config made fit for one node."""

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from kvtier.config import Config, PeersConfig, is_loopback, parse_address
from kvtier.errors import ConfigError

Kind = Literal["node", "worker", "router"]

KINDS: Final[tuple[Kind, ...]] = ("node", "worker", "router")
NAMESPACE: Final = "kvtier"  # of every actor of ours
COORDINATOR: Final = "kvtier:coordinator"
RESOURCE: Final = "kvtier"  # a Ray node that carries it gets agents
LABEL: Final = "kvtier.node"  # Ray node label: the kvtier name of the node
NAME_RESOURCE: Final = "kvtier-node:"  # the same as a resource, where labels cannot be set

_SOCKET_LIMIT: Final = 100  # characters; sockaddr_un holds 107


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSettings:
    """What runs where.

    Rooms are dotted names, "module:function", so that no agent imports what only another one
    needs (torch); each is a coroutine function of (config, *, started, stop).
    """

    everywhere: bool = False  # also on Ray nodes without the `kvtier` resource
    workers: bool = True  # an engine beside each daemon
    router: bool = False  # one on the head node
    routers: tuple[str, ...] = ()  # host:port of others to keep informed; names may be many hosts
    worker_gpus: float = 0.0  # of each worker
    rooms: tuple[tuple[Kind, str], ...] = (
        ("node", "kvtier.node.daemon:serve"),
        ("worker", "kvtier.engine.run:serve"),
        ("router", "kvtier.router.server:serve"),
    )

    def __post_init__(self) -> None:
        for router in self.routers:
            parse_address(router, "routers")
        if self.worker_gpus < 0:
            raise ConfigError(f"worker_gpus is {self.worker_gpus}, must be 0 or more")

    def room(self, kind: Kind) -> str:
        """The dotted name of the coroutine that an agent of this kind runs."""
        return dict(self.rooms)[kind]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What a Config is made fit for: one node."""

    name: str  # of the kvtier node
    ip: str
    cpus: int = 0  # 0: unknown
    shared_ip: bool = False  # other nodes have this address too, so fixed ports would collide


def config_for(config: Config, place: Place) -> Config:
    """The shared settings with `{node}`, names, addresses and threads of one node filled in.

    A listen address keeps a loopback host and otherwise gets the node's own address; where nodes
    share an address, port 0 replaces a fixed one.

    Raises:
        ConfigError: A socket's path is too long with the node's name in it.
    """

    def filled(path: str, name: str) -> str:
        text = path.replace("{node}", place.name)
        if name.endswith("socket") and len(text) > _SOCKET_LIMIT:
            raise ConfigError(
                f"{name} is {len(text)} characters long, limit {_SOCKET_LIMIT}: {text}"
            )
        return text

    def listen(at: str, name: str) -> str:
        host, port = parse_address(at, name)
        host = host if is_loopback(host) else place.ip
        return f"{host}:{0 if place.shared_ip else port}"

    socket, peers = filled(config.node.socket, "node.socket"), config.peers or PeersConfig()
    lends = listen(peers.listen, "peers.listen") if peers.listen else ""
    return dataclasses.replace(
        config,
        peers=_peers_for(peers, socket, place.name, lends),
        node=dataclasses.replace(
            config.node,
            name=place.name,
            socket=socket,
            listen=listen(config.node.listen, "node.listen"),
            metrics_port=0 if place.shared_ip else config.node.metrics_port,
        ),
        disk=config.disk
        and dataclasses.replace(config.disk, path=filled(config.disk.path, "disk.path")),
        worker=dataclasses.replace(
            config.worker,
            node=place.name,
            socket=filled(config.worker.socket, "worker.socket"),
            listen=listen(config.worker.listen, "worker.listen"),
            # Ray sets OMP_NUM_THREADS=1 for an actor that reserves no CPU.
            threads=config.worker.threads or place.cpus,
        ),
        router=dataclasses.replace(
            config.router, listen=listen(config.router.listen, "router.listen")
        ),
    )


def _peers_for(peers: PeersConfig, socket: str, node: str, listen: str) -> PeersConfig:
    """`[peers]` of one node: the Coordinator says who lends, by a file, which is ours to write.

    Where the settings name members and no file, only those are asked. Who is told by the file is
    told any port as well as the usual one, so where that is taken another one will do.
    """
    file = peers.file.replace("{node}", node)
    if not file and not peers.members:
        file = f"{socket}.peers"
    any_port = peers.any_port or bool(file and not listen)
    return dataclasses.replace(peers, listen=listen, file=file, any_port=any_port)


def check_reachable(config: Config, settings: ClusterSettings, ips: Mapping[str, str]) -> None:
    """Refuse loopback listeners where nodes have more than one address.

    Args:
        config: The shared settings.
        settings: What runs.
        ips: Address of each node, by its name.

    Raises:
        ConfigError: No other host could reach a daemon or a worker.
    """
    if len(set(ips.values())) < 2:
        return
    listeners = [("node.listen", config.node.listen)]
    if config.peers and config.peers.listen:
        listeners.append(("peers.listen", config.peers.listen))
    if settings.workers:
        listeners.append(("worker.listen", config.worker.listen))
    for name, at in listeners:
        if is_loopback(parse_address(at, name)[0]):
            raise ConfigError(
                f"{name} is {at}, which the other {len(set(ips.values())) - 1} hosts cannot reach;"
                " use 0.0.0.0 for each node's own address"
            )


def digest(config: Config, settings: ClusterSettings) -> str:
    """12 hex digits that change whenever an agent would have to run with something else."""
    what = repr((config, settings.rooms, settings.worker_gpus))
    return hashlib.sha256(what.encode()).hexdigest()[:12]
