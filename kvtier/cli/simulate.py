"""`kvtier simulate`: replay a trace of requests, to see what a policy would make of it."""

import argparse

from kvtier.cli import simulate_evict, simulate_route


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the parsers of `kvtier simulate`."""
    text = "replay a trace of requests and say what a policy would make of it"
    command = commands.add_parser("simulate", help=text, description=text)
    actions = command.add_subparsers(required=True, metavar="WHAT")
    simulate_evict.add(actions)
    simulate_route.add(actions)
