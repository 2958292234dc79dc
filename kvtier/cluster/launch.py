"""`kvtier cluster up | status | down`: what a person at a shell does to a cluster."""

import contextlib
import dataclasses
import logging
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Protocol, cast

import ray
from ray._private.services import canonicalize_bootstrap_address
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from kvtier.cluster import control
from kvtier.cluster.coordinator import STOP_S, Coordinator, Status
from kvtier.cluster.plan import names, wanted
from kvtier.cluster.settings import (
    COORDINATOR,
    NAMESPACE,
    RESOURCE,
    ClusterSettings,
    check_reachable,
    digest,
)
from kvtier.config import Config
from kvtier.errors import ConfigError, KVTierError

Say = Callable[[str], None]

_ANSWER_S: Final = 10.0
_CONNECT_S: Final = 5.0


class _Remote(Protocol):
    def remote(self, *args: object) -> "ray.ObjectRef[object]": ...


class _Handle(Protocol):
    status: _Remote
    down: _Remote


@contextlib.contextmanager
def connected(address: str = "auto") -> Iterator[None]:
    """This process as a driver of the running Ray cluster at `address`; joins one joined before.

    Raises:
        KVTierError: No Ray cluster answers there.
    """
    if ray.is_initialized():
        yield
        return
    _check_there(address)
    try:
        ray.init(
            address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.WARNING
        )
    except (ConnectionError, RayError, RuntimeError, ValueError) as error:
        raise KVTierError(f"no Ray cluster at {address}: {error}") from error
    # Ray prints a paragraph into the driver's output for every actor that is killed; it stands in
    # Ray's own logs as well. There is no public switch (seen in 2.60).
    if hasattr(ray._private.worker, "_worker_logs_enabled"):
        ray._private.worker._worker_logs_enabled = False
    try:
        yield
    finally:
        ray.shutdown()


def _check_there(address: str) -> None:
    """Refuse an address where nobody listens: Ray would go on trying it for minutes.

    "auto" is what Ray would take: RAY_ADDRESS, or what the last `ray start` on this machine left
    behind, which may be gone since.
    """
    try:
        found = canonicalize_bootstrap_address(address) if address == "auto" else address
    except (ConnectionError, ValueError):
        found = None
    if found is None:
        raise KVTierError("no Ray cluster on this machine; see `ray start`, or name one by --ray")
    host, _, port = found.rpartition(":")
    if "://" in found or not port.isdigit():
        return  # a client address or another form: Ray's own to judge
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except OSError as error:
        raise KVTierError(f"no Ray cluster at {found}: {error}") from None


def up(
    config: Config,
    *,
    say: Say,
    routers: Sequence[str] = (),
    settings: ClusterSettings = ClusterSettings(),  # noqa: B008 - frozen
    ray_address: str = "auto",
    deadline_s: float = 120.0,
) -> int:
    """Have the cluster run this config; 0 once every agent serves and every router knows.

    A Coordinator with other settings is replaced; it then replaces the agents one by one.

    Args:
        config: Of every node.
        say: Gets the lines for people.
        routers: host:port of routers to keep informed, besides those of `settings`.
        settings: What runs where.
        ray_address: host:port of the Ray cluster; "auto": the one on this machine.
        deadline_s: For all of it; the Coordinator goes on trying after it.

    Raises:
        KVTierError: No Ray cluster, or the config does not fit it.
    """
    routers = tuple(dict.fromkeys((*settings.routers, *routers)))
    settings = dataclasses.replace(settings, routers=routers)
    with connected(ray_address):
        alive = control.nodes()
        called = names(alive)
        ips = {called[n.id]: n.ip for n in alive if wanted(n, settings)}
        check_reachable(config, settings, ips)
        if not ips:
            say(f"no Ray node carries the resource {RESOURCE!r} yet")
        coordinator = _ensure(config, settings, deadline_s)
        seen = _wait(coordinator, deadline_s)
        for line in render(seen) if seen else ["the Coordinator does not answer"]:
            say(line)
        if seen and seen["settled"]:
            return 0
        say(f"not settled within {deadline_s:.0f} s")
        return 1


def status(*, say: Say, ray_address: str = "auto") -> int:
    """Say what runs where; 0 where all that is wanted does.

    Raises:
        KVTierError: No Ray cluster.
    """
    with connected(ray_address):
        coordinator = _find()
        if coordinator is None:
            say("not up: this Ray cluster has no kvtier Coordinator")
            return 1
        seen = _ask(coordinator)
        for line in render(seen) if seen else ["the Coordinator does not answer"]:
            say(line)
        return 0 if seen and seen["settled"] else 1


def read_status() -> Status | None:
    """What the Coordinator answers; None where there is none, or it gives no answer.

    This process must be `connected`.
    """
    coordinator = _find()
    return _ask(coordinator) if coordinator is not None else None


def down(*, say: Say, ray_address: str = "auto", deadline_s: float = STOP_S) -> int:
    """End every agent and the Coordinator; 0 once no actor of ours is left.

    Raises:
        KVTierError: No Ray cluster.
    """
    with connected(ray_address):
        coordinator = _find()
        ended = 0
        if coordinator is not None:
            with contextlib.suppress(RayError, GetTimeoutError):
                waited = 2 * deadline_s + _ANSWER_S  # workers first, then daemons
                ended = cast("int", ray.get(coordinator.down.remote(deadline_s), timeout=waited))
            _end(coordinator)
        # What a Coordinator that did not answer, or was just creating, has left behind.
        left = control.agents()
        for agent in left:
            control.kill(agent)
        gone = _until(lambda: not control.agents() and _find() is None, deadline_s)
        say(f"{ended + len(left)} agents ended" if gone else "some actors did not end")
        return 0 if gone else 1


def render(seen: Status) -> list[str]:
    """The status as lines of text."""
    rows = [("NODE", "AGENT", "STATE", "ADDRESS", "PID", "RESTARTS")]
    rows += [
        (a["node"], a["kind"], a["state"], a["address"] or "-", str(a["pid"] or "-"),
         str(a["restarts"]))
        for a in seen["agents"]
    ]  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    lines += [f"failed before: {a['kind']} on {a['node']}: {a['failure']}"
              for a in seen["agents"] if a["failure"]]  # fmt: skip
    lines += [f"draining: {n['name']}: {n['drain'] or 'not begun'}"
              for n in seen["nodes"] if n["draining"]]  # fmt: skip
    lines += [f"router {r['address']}: {r['error'] or 'informed'}" for r in seen["routers"]]
    state = "settled" if seen["settled"] else "not settled"
    return [*lines, f"{len(seen['nodes'])} Ray nodes, members version {seen['version']}, {state}"]


def _find() -> _Handle | None:
    try:
        return cast("_Handle", ray.get_actor(COORDINATOR, namespace=NAMESPACE))
    except ValueError:
        return None


def _ensure(config: Config, settings: ClusterSettings, deadline_s: float) -> _Handle:
    """The Coordinator with these settings; one with others is ended first."""
    there = _find()
    if there is not None:
        seen = _ask(there)
        if seen and seen["digest"] == digest(config, settings):
            return there
        _end(there)
        if not _until(lambda: _find() is None, deadline_s):
            raise KVTierError("the Coordinator with other settings does not end")
    head = next((n.id for n in control.nodes() if n.head), None)
    if head is None:
        raise ConfigError("this Ray cluster has no head node")
    actor = ray.remote(Coordinator).options(
        name=COORDINATOR,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        max_restarts=-1,
        max_task_retries=2,  # status only asks; down done twice is down
        num_cpus=0,
        scheduling_strategy=NodeAffinitySchedulingStrategy(head, soft=True),
    )
    return cast("_Handle", actor.remote(config, settings))


def _end(coordinator: _Handle) -> None:
    with contextlib.suppress(RayError, ValueError):  # it has ended by itself
        ray.kill(cast("ray.actor.ActorHandle[Coordinator]", coordinator), no_restart=True)


def _ask(coordinator: _Handle) -> Status | None:
    try:
        return cast("Status", ray.get(coordinator.status.remote(), timeout=_ANSWER_S))
    except RayError:  # GetTimeoutError is one
        return None


def _wait(coordinator: _Handle, deadline_s: float) -> Status | None:
    seen: Status | None = None

    def settled() -> bool:
        nonlocal seen
        seen = _ask(coordinator) or seen
        return bool(seen and seen["settled"])

    _until(settled, deadline_s)
    return seen


def _until(true: Callable[[], bool], deadline_s: float) -> bool:
    end = time.monotonic() + deadline_s
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True
