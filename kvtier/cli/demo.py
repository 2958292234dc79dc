"""`kvtier demo`: the main job on this machine."""

import argparse
import logging
import sys

from kvtier.cli.parser import JSON_HELP


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the parser of `kvtier demo`."""
    text = "run the main job on this machine: two Ray nodes, a real model, every tier"
    demo = commands.add_parser("demo", help=text, description=text)
    demo.add_argument(
        "--engine", default="transformers", choices=["transformers", "vllm"],
        help="what computes; vllm: from an environment that has it",
    )  # fmt: skip
    demo.add_argument(
        "--model", default="smollm2", metavar="DIR",
        help="a folder of a Transformers causal LM, or smollm2, the built-in one",
    )  # fmt: skip
    demo.add_argument(
        "--redis", default="", metavar="URL",
        help="a Redis or Valkey to use as shared tier (default: none, one of its own)",
    )  # fmt: skip
    demo.add_argument("--json", default="", metavar="FILE", help=JSON_HELP)
    demo.add_argument("--until-eof", action="store_true", help=argparse.SUPPRESS)  # the child
    demo.set_defaults(run=_demo)


def _demo(options: argparse.Namespace) -> int:
    if options.redis and not options.until_eof:
        from kvtier.demo.preflight import check_redis

        check_redis(options.redis)
    from kvtier.cluster import supervise

    if not options.until_eof:
        command = [sys.executable, "-m", "kvtier.cli", *options.arguments, "--until-eof"]
        return supervise.supervise(command, say=print)
    from kvtier.cluster.local import prepare_environment

    prepare_environment()  # before anything imports ray
    from kvtier.demo import run

    logging.getLogger().setLevel(logging.WARNING)
    with supervise.until_input_ends():
        return run.main(run.Options(options.engine, options.model, options.redis, options.json))
