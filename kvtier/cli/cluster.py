"""`kvtier cluster up | status | down`: daemons and workers on a Ray cluster."""

import argparse
import sys
from typing import TYPE_CHECKING

from kvtier import config as configuration
from kvtier.cli.parser import CONFIG_HELP
from kvtier.errors import ConfigError

if TYPE_CHECKING:
    from kvtier.cluster.settings import ClusterSettings

_MOST_LOCAL = 16  # nodes of a Ray cluster on one machine

_UP = "start and keep up a daemon and a worker on each node"
_STATUS = "show nodes, agents and routers"
_DOWN = "stop all that `up` started"


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the parser of `kvtier cluster`."""
    text = "place daemons and workers on the nodes of a Ray cluster"
    cluster = commands.add_parser("cluster", help=text, description=text)
    actions = cluster.add_subparsers(required=True, metavar="ACTION", dest="action")
    up = actions.add_parser("up", help=_UP, description=_UP)
    up.add_argument("--config", metavar="FILE", help=CONFIG_HELP)
    up.add_argument(
        "--router",
        action="append",
        default=[],
        metavar="HOST:PORT",
        help="a router to tell of all members; may be given again (default: none)",
    )
    up.add_argument(
        "--local",
        type=int,
        default=0,
        metavar="N",
        help="on a new Ray cluster of N nodes on this machine (default: 0, on the one of --ray)",
    )
    up.add_argument("--until-eof", action="store_true", help=argparse.SUPPRESS)  # the child
    up.add_argument("--everywhere", action="store_true", help="also where no `kvtier` resource is")
    up.add_argument("--no-workers", action="store_true", help="daemons only")
    up.add_argument(
        "--worker-gpus", type=float, default=0.0, metavar="N", help="GPUs of each worker"
    )
    for action in (
        up,
        actions.add_parser("status", help=_STATUS, description=_STATUS),
        actions.add_parser("down", help=_DOWN, description=_DOWN),
    ):
        action.add_argument(
            "--ray", default="auto", metavar="HOST:PORT",
            help="the Ray cluster; auto: $RAY_ADDRESS, or the one on this machine",
        )  # fmt: skip
    cluster.set_defaults(run=_cluster)


def _cluster(options: argparse.Namespace) -> int:
    if options.action == "up" and options.local:
        return _local(options)
    on_loopback = options.ray.startswith(("127.", "localhost:", "[::1]:"))  # made by --local
    if on_loopback:
        from kvtier.cluster import local

        local.prepare_environment()  # before anything imports ray
    from kvtier.cluster import launch

    if options.action != "up":
        action = launch.status if options.action == "status" else launch.down
        return action(say=print, ray_address=options.ray)
    return launch.up(
        configuration.load(options.config),
        say=print,
        routers=options.router,
        settings=_settings(options),
        ray_address=options.ray,
    )


def _settings(options: argparse.Namespace) -> "ClusterSettings":
    from kvtier.cluster.settings import ClusterSettings

    return ClusterSettings(
        everywhere=options.everywhere,
        workers=not options.no_workers,
        worker_gpus=options.worker_gpus,
    )


def _local(options: argparse.Namespace) -> int:
    if not 1 <= options.local <= _MOST_LOCAL:
        raise ConfigError(f"--local is {options.local}, must be 1 to {_MOST_LOCAL}")
    config, settings = configuration.load(options.config), _settings(options)
    from kvtier.cluster import supervise

    if not options.until_eof:
        command = [sys.executable, "-m", "kvtier.cli", *options.arguments, "--until-eof"]
        return supervise.supervise(
            command,
            say=lambda line: print(line, flush=True),
            greeting="starting; up until interrupted (Ctrl-C)",
        )
    from kvtier.cluster import local

    with supervise.until_input_ends() as over:

        def say(line: str) -> None:
            if not over.is_set():  # then the parent has the last word
                print(line, flush=True)

        return local.up(
            config,
            nodes=options.local,
            say=say,
            wait=over.wait,
            routers=options.router,
            settings=settings,
        )
