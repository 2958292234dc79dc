"""`kvtier purge`: removes a namespace's blocks from the shared tier."""

import argparse

from kvtier import config as configuration
from kvtier.errors import ConfigError


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the parser of `kvtier purge`."""
    text = "remove a namespace's blocks from the shared tier (Redis), for all nodes"
    command = commands.add_parser("purge", help=text, description=text)
    command.add_argument(
        "--config", metavar="FILE", required=True, help="settings with a [redis] table"
    )
    command.add_argument("--namespace", metavar="NAME", required=True, help="whose blocks")
    command.add_argument("--yes", action="store_true", help="remove; without it only tell")
    command.set_defaults(run=_purge)


def _purge(options: argparse.Namespace) -> int:
    config = configuration.load(options.config).redis
    if config is None:
        raise ConfigError(f"{options.config} has no [redis] table")
    from kvtier.stores.redis.purge import purge

    values: dict[str, int] = {}
    nbytes: dict[str, int] = {}
    doing = "removed" if options.yes else "would remove"
    try:
        for found in purge(config, options.namespace, remove=options.yes):
            values[found.server] = values.get(found.server, 0) + found.values
            nbytes[found.server] = nbytes.get(found.server, 0) + found.nbytes
    finally:
        for server, number in values.items():
            print(f"{server}: {doing} {number} values, {nbytes[server] / 2**20:.1f} MiB")
    total = sum(values.values()), sum(nbytes.values()) / 2**20
    print(f"namespace {options.namespace}: {doing} {total[0]} values, {total[1]:.1f} MiB")
    if not options.yes and total[0]:
        print("nothing was removed; add --yes to do so")
    return 0
