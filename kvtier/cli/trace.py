"""`kvtier trace`: traces of requests."""

import argparse

from kvtier.cli import trace_make, trace_record


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the parsers of `kvtier trace`."""
    text = "record, make up and look at traces of requests"
    trace = commands.add_parser("trace", help=text, description=text)
    actions = trace.add_subparsers(required=True, metavar="ACTION")
    trace_record.add(actions)
    trace_make.add(actions)
