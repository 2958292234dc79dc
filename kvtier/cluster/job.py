"""A Ray job: `ray job submit -- python -m kvtier.cluster.job --config FILE`.

Makes sure of the Coordinator, waits until every agent serves, prints the table and exits 0; the
actors are detached and stay.
"""

import argparse
import sys
from collections.abc import Sequence

from kvtier.cluster import launch
from kvtier.cluster.settings import ClusterSettings
from kvtier.config import load
from kvtier.errors import KVTierError


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line: `config`, `settings` and `deadline`; exits with 2 where it is no such.

    Raises:
        ConfigError: An argument is of the right form but makes no sense.
    """
    parser = argparse.ArgumentParser(prog="python -m kvtier.cluster.job", description=__doc__)
    parser.add_argument("--config", required=True, help="the kvtier.toml of every node")
    parser.add_argument(
        "--routers", default="", help="host:port of routers to keep informed, with commas between"
    )
    parser.add_argument("--no-workers", action="store_true", help="only node daemons")
    parser.add_argument("--worker-gpus", type=float, default=0.0, help="GPUs of each worker")
    parser.add_argument(
        "--everywhere", action="store_true", help="also on Ray nodes without the kvtier resource"
    )
    parser.add_argument("--deadline", type=float, default=120.0, help="seconds to wait")
    options = parser.parse_args(arguments)
    options.settings = ClusterSettings(
        everywhere=options.everywhere,
        workers=not options.no_workers,
        worker_gpus=options.worker_gpus,
        routers=tuple(r for r in options.routers.split(",") if r),
    )
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job; its exit code: 0 up, 1 not up within the deadline, 2 a wrong setting."""
    try:
        options = parse(arguments)
        config = load(options.config)
        return launch.up(config, say=_say, settings=options.settings, deadline_s=options.deadline)
    except KVTierError as error:
        sys.stderr.write(f"kvtier: {error}\n")
        return 2


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
