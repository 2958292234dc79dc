"""A Ray cluster of several nodes on this machine, for trying out and for tests."""

import dataclasses
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

import kvtier
from kvtier.cluster.settings import LABEL, RESOURCE, ClusterSettings
from kvtier.config import Config

if TYPE_CHECKING:
    from ray._private.node import Node
    from ray.cluster_utils import Cluster

_OBJECT_STORE: Final = 80 << 20  # bytes a node; no block ever goes through it
# Characters of "/ray/session_2026-01-02_03-04-05_123456_1234567/sockets/plasma_store.1".
_RAY_SOCKET: Final = 74
_SOCKET_LIMIT: Final = 107  # of sockaddr_un
_ENVIRONMENT: Final = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # else Ray binds the machine's outer address
    "RAY_AUTH_MODE": "disabled",  # loopback only; else a token file is left in the home folder
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    # Say that a node is dead after seconds, not after 15; yet a busy machine is not a dead one.
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "5",
    # Several nodes share one machine's memory: a busy one must not have our agents shot.
    "RAY_memory_monitor_refresh_ms": "0",
}


def prepare_environment() -> None:
    """Set what Ray reads from the environment, here and in the processes that it starts.

    Ray takes these settings in no other way, and some of them only while it is imported.

    Raises:
        RuntimeError: Ray was imported before without them.
    """
    if "ray" in sys.modules and any(os.environ.get(k) != v for k, v in _ENVIRONMENT.items()):
        raise RuntimeError("ray was imported before kvtier.cluster.local.prepare_environment()")
    os.environ.update(_ENVIRONMENT)
    # Agents are fresh processes: they must find this very kvtier, and what their rooms import.
    paths = [str(Path(kvtier.__file__).parent.parent), *(str(Path(p).resolve()) for p in sys.path)]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))


def environment(scratch: Path) -> dict[str, str]:
    """What a process that starts such a cluster runs with: temporary files in `scratch`.

    Ray's too, logs and sockets. Where the sockets' paths would be too long, they stay where
    temporary files are by default.
    """
    fits = len(str(scratch)) + _RAY_SOCKET <= _SOCKET_LIMIT
    return {**os.environ, **({"TMPDIR": str(scratch)} if fits else {})}


class LocalCluster:
    """`nodes` Ray nodes on loopback as a context manager; the first one is the head.

    Each carries the `kvtier` resource and its name as a label. Leaving the context ends every
    process that was started in it, detached actors included.
    """

    def __init__(self, nodes: Sequence[str] = ("a", "b"), *, dashboard: bool = False) -> None:
        """Start nothing yet.

        Args:
            nodes: Their kvtier names.
            dashboard: Also start the dashboard, which takes jobs; needs the ray[default] extra.
        """
        self._names = tuple(nodes)
        self._dashboard = dashboard
        self._cluster: Cluster | None = None
        self._nodes: dict[str, Node] = {}

    def __enter__(self) -> Self:
        prepare_environment()
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(shutdown_at_exit=True)
        try:
            for name in self._names:
                self.add(name)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        import ray

        ray.shutdown()
        if self._cluster is not None:
            self._cluster.shutdown()
            self._cluster = None

    @property
    def address(self) -> str:
        """host:port to connect to."""
        assert self._cluster is not None, "outside of its context"
        return str(self._cluster.address)

    @property
    def jobs_url(self) -> str:
        """Where jobs are submitted, where there is a dashboard."""
        assert self._cluster is not None, "outside of its context"
        assert self._dashboard, "started without a dashboard"
        return f"http://{self._cluster.webui_url}"

    def add(self, name: str) -> None:
        """One more node, waited for."""
        assert self._cluster is not None, "outside of its context"
        head = not self._nodes
        self._nodes[name] = self._cluster.add_node(
            num_cpus=os.cpu_count() or 1,
            resources={RESOURCE: 1},
            labels={LABEL: name},
            object_store_memory=_OBJECT_STORE,
            include_dashboard=self._dashboard and head,
            dashboard_port=0,
        )

    def remove(self, name: str) -> None:
        """Take a node away at once, with every process on it."""
        assert self._cluster is not None, "outside of its context"
        self._cluster.remove_node(self._nodes.pop(name), allow_graceful=False)


def up(
    config: Config,
    *,
    nodes: int,
    say: Callable[[str], None],
    wait: Callable[[], object],
    routers: Sequence[str] = (),
    settings: ClusterSettings = ClusterSettings(),  # noqa: B008 - frozen
    deadline_s: float = 120.0,
) -> int:
    """`kvtier cluster up --local N`: a Ray cluster of this process, with kvtier up on it.

    Args:
        config: Made fit by `local_config`.
        nodes: How many, called node-1, node-2 and so on.
        say: Gets the lines for people.
        wait: Called once all is up; when it returns or raises, everything is ended.
        routers: As of `launch.up`.
        settings: As of `launch.up`.
        deadline_s: As of `launch.up`.

    Returns:
        0, or what `launch.up` returned.

    Raises:
        KVTierError: The config does not fit.
    """
    prepare_environment()
    from kvtier.cluster import launch

    called = [f"node-{i + 1}" for i in range(nodes)]
    with (
        tempfile.TemporaryDirectory(prefix="kvtier-") as folder,
        LocalCluster(called) as cluster,
        launch.connected(cluster.address),
    ):
        say(f"Ray at {cluster.address}")
        config = local_config(config, Path(folder))
        try:
            code = launch.up(
                config, say=say, routers=routers, settings=settings, deadline_s=deadline_s
            )
            if code == 0:
                wait()
        finally:
            launch.down(say=say)
    return code


def local_config(config: Config, folder: Path) -> Config:
    """A config for several nodes on this one machine: sockets and disks apart, free ports.

    Sockets go to `folder`, which must be short; a path that has `{node}` in it stays.
    """

    def apart(path: str) -> str:
        return path if "{node}" in path else str(folder / "{node}.sock")

    disk = config.disk
    if disk and "{node}" not in disk.path:
        disk = dataclasses.replace(disk, path=f"{disk.path}/{{node}}")
    return dataclasses.replace(
        config,
        node=dataclasses.replace(
            config.node, socket=apart(config.node.socket), listen="127.0.0.1:0"
        ),
        worker=dataclasses.replace(
            config.worker,
            socket=config.worker.socket and apart(config.worker.socket),
            listen="127.0.0.1:0",
        ),
        disk=disk,
        peers=config.peers and dataclasses.replace(config.peers, listen=""),
    )
