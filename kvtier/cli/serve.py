"""`kvtier node | worker | router`: the servers."""

import argparse
import asyncio
import dataclasses
import importlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Coroutine
from typing import Final, Protocol, cast

from kvtier import config as configuration
from kvtier.cli.parser import CONFIG_HELP
from kvtier.config import Config

# What runs under each name: loaded only when asked for, so that a node daemon never loads torch.
_SERVERS = {
    "node": "kvtier.node.daemon",
    "worker": "kvtier.engine.run",
    "router": "kvtier.router.server",
}
_TEXTS = {
    "node": "run the node daemon of this host",
    "worker": "run an engine with a model, attached to this host's daemon",
    "router": "run the gRPC router",
}
# From being told to stop to the end, whatever hangs: Python itself waits for ever for threads
# whose disk does not answer. 10 s of a node's are for saving what only its host memory holds.
_ENDS_WITHIN_S: Final = {"node": 20.0}
_SAID_WITHIN_S: Final = 0.5  # of these; the log may hang as well

log = logging.getLogger(__name__)


class _Started(Protocol):
    def __call__(self, address: str, *, lends: str = "") -> None: ...


class _Serve(Protocol):
    def __call__(
        self, config: Config, *, started: _Started, stop: asyncio.Event
    ) -> Coroutine[None, None, None]: ...


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the servers' parsers."""
    for name, text in _TEXTS.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--config", metavar="FILE", help=CONFIG_HELP)
        command.add_argument(
            "--until-eof", action="store_true", help="also stop when standard input ends"
        )
        if name == "worker":
            command.add_argument(
                "--engine",
                choices=["transformers", "vllm", "vllm-http"],
                help="what computes (default: worker.engine of the settings)",
            )
        command.set_defaults(run=_serve, server=name)


def _serve(options: argparse.Namespace) -> int:
    config = configuration.load(options.config)
    if getattr(options, "engine", None):
        worker = dataclasses.replace(config.worker, engine=options.engine)
        config = dataclasses.replace(config, worker=worker)
    module = importlib.import_module(_SERVERS[options.server])
    serve = cast("_Serve", module.serve)
    asyncio.run(_until_told(serve, config, options.server, until_eof=options.until_eof))
    return 0


async def _until_told(serve: _Serve, config: Config, name: str, *, until_eof: bool) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def told() -> None:
        if not stop.is_set() and name in _ENDS_WITHIN_S:
            limit_s = _ENDS_WITHIN_S[name] - _SAID_WITHIN_S
            forced = threading.Timer(limit_s, _end_by_force, [name])
            forced.daemon = True  # or it would be waited for as well
            forced.start()
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told)
    if until_eof:
        # A parent that dies, in whatever way, closes its end: nothing of it stays behind.
        loop.add_reader(0, lambda: None if os.read(0, 4096) else _ended(told))

    def started(address: str, *, lends: str = "") -> None:
        print(f"kvtier {name}: ready at {address}", flush=True)
        if lends:
            print(f"kvtier {name}: lends blocks at {lends}", flush=True)

    await serve(config, started=started, stop=stop)
    print(f"kvtier {name}: stopped", flush=True)


def _ended(told: Callable[[], None]) -> None:
    asyncio.get_running_loop().remove_reader(0)
    told()


def _end_by_force(name: str) -> None:
    text = "%s: not stopped %g s after it was told to, as where a disk hangs; ended as it is"
    said = threading.Thread(target=log.error, args=[text, name, _ENDS_WITHIN_S[name]], daemon=True)
    said.start()
    said.join(_SAID_WITHIN_S)
    os._exit(1)
