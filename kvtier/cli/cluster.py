"""`kvtier cluster up | status | down`: daemons and workers on a Ray cluster."""

import argparse
import signal

from kvtier import config as configuration
from kvtier.cli.parser import CONFIG_HELP

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
    from kvtier.cluster.settings import ClusterSettings

    on_loopback = options.ray.startswith(("127.", "localhost:", "[::1]:"))  # made by --local
    if on_loopback or (options.action == "up" and options.local):
        from kvtier.cluster import local

        local.prepare_environment()  # before anything imports ray
    from kvtier.cluster import launch

    if options.action != "up":
        action = launch.status if options.action == "status" else launch.down
        return action(say=print, ray_address=options.ray)
    settings = ClusterSettings(
        everywhere=options.everywhere,
        workers=not options.no_workers,
        worker_gpus=options.worker_gpus,
    )
    config = configuration.load(options.config)
    if options.local:
        print("starting; up until interrupted (Ctrl-C)", flush=True)
        return local.up(
            config,
            nodes=options.local,
            say=print,
            wait=_until_interrupted,
            routers=options.router,
            settings=settings,
        )
    return launch.up(
        config,
        say=print,
        routers=options.router,
        settings=settings,
        ray_address=options.ray,
    )


def _until_interrupted() -> None:
    # Only now: Ray, which has started meanwhile, takes SIGTERM for itself.
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the same as Ctrl-C
    signal.pause()
