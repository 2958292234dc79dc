"""`kvtier demo`: the main job on this machine."""

import argparse
import logging


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the parser of `kvtier demo`."""
    text = "run the main job on this machine: two Ray nodes, a real model, every tier"
    demo = commands.add_parser("demo", help=text, description=text)
    demo.add_argument("--model", default="smollm2", metavar="DIR", help="a Transformers causal LM")
    demo.add_argument("--redis", default="", metavar="URL", help="use this server as shared tier")
    demo.add_argument("--json", default="", metavar="FILE", help="write every figure there")
    demo.set_defaults(run=_demo)


def _demo(options: argparse.Namespace) -> int:
    from kvtier.cluster.local import prepare_environment

    prepare_environment()  # before anything imports ray
    from kvtier.demo import run

    logging.getLogger().setLevel(logging.WARNING)
    return run.main(run.Options(options.model, options.redis, options.json))
