"""The command line: one module of this package a command.

Each has `add(commands)`, which adds its parser and sets `run`, a function from the parsed options
to an exit status. What a command needs is imported when it runs, so that a node daemon never
loads torch and `kvtier --help` loads nothing.
"""

import argparse
import importlib.metadata
import logging
import os
import sys
from collections.abc import Sequence
from typing import cast

import kvtier
from kvtier.cli import (
    bench,
    check,
    cluster,
    demo,
    drain,
    inspect,
    plan,
    purge,
    serve,
    simulate,
    trace,
)
from kvtier.cli.parser import EXIT_CODES, Parser
from kvtier.errors import KVTierError

_COMMANDS = (serve, cluster, demo, bench, inspect, drain, check, plan, purge, simulate, trace)
_EXTRAS = {"torch": "worker", "transformers": "worker", "ray": "cluster",
           "httptools": "http", "starlette": "http", "uvicorn": "http",
           "matplotlib": "plot"}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit status, as `parser.EXIT_CODES` says."""
    try:
        try:
            return _main(arguments)
        finally:
            if sys.stdout is not None:  # as it is where a service's starter has closed it
                sys.stdout.flush()  # here, where a closed pipe can still be told from a mistake
    except BrokenPipeError:  # whoever read the output has enough of it, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _main(arguments: Sequence[str] | None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    options.arguments = sys.argv[1:] if arguments is None else arguments
    logging.basicConfig(
        level=logging.DEBUG if options.verbose else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    try:
        return cast("int", options.run(options))
    except KVTierError as error:
        print(f"kvtier: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        extra = _EXTRAS.get(name)
        if extra is None:
            raise
        print(f"kvtier: {name} is missing: {_remedy(extra)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _remedy(extra: str) -> str:
    """What brings the packages of an extra, however kvtier itself was installed."""
    here = f"pip install '.[{extra}]' in the repository"
    try:
        needs = importlib.metadata.requires("kvtier") or []
    except importlib.metadata.PackageNotFoundError:  # it runs out of a bare tree
        return here
    parts = [need.partition(";") for need in needs]
    marker = f'extra == "{extra}"'
    found = [f"'{need.strip()}'" for need, _, when in parts if when.strip() == marker]
    return f"pip install {' '.join(found)}, or {here}"


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="kvtier", description=kvtier.__doc__, epilog=EXIT_CODES)
    parser.add_argument("--version", action="version", version=f"kvtier {kvtier.__version__}")
    parser.add_argument("--verbose", action="store_true", help="log more, to standard error")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add(commands)
    return parser
