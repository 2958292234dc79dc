"""`kvtier node | worker | router`: the servers."""

import argparse
import asyncio
import contextlib
import dataclasses
import importlib
import logging
import os
import select
import signal
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
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
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)

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
        if name in _ENDS_WITHIN_S:
            limit_s = _ENDS_WITHIN_S[name] - _SAID_WITHIN_S
            forced = threading.Timer(limit_s, _end_by_force, [name])
            forced.daemon = True  # or it would be waited for as well
            forced.start()
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(stop.set)

    def started(address: str, *, lends: str = "") -> None:
        print(f"kvtier {name}: ready at {address}", flush=True)
        if lends:
            print(f"kvtier {name}: lends blocks at {lends}", flush=True)

    with _listening(told, until_eof=until_eof):
        await serve(config, started=started, stop=stop)
        print(f"kvtier {name}: stopped", flush=True)


@contextlib.contextmanager
def _listening(told: Callable[[], None], *, until_eof: bool) -> Iterator[None]:
    """Call `told` once, on a thread, when this process is to stop.

    A handler would run on the main thread, which may be stuck, as in a log that nobody reads.
    """
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)  # the kernel's signal handler writes to it
    thread = threading.Thread(
        target=_listen, args=[ours, told, until_eof], name="kvtier-told", daemon=True
    )
    before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
    thread.start()
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(before)
        theirs.close()
        thread.join()


def _listen(ours: socket.socket, told: Callable[[], None], until_eof: bool) -> None:
    poll, heard = select.poll(), False
    poll.register(ours, select.POLLIN)
    if until_eof:
        # A parent that dies, in whatever way, closes its end: nothing of it stays behind.
        poll.register(0, select.POLLIN)
    with ours:
        while True:
            for number, _ in poll.poll():
                data = b""
                with contextlib.suppress(OSError):  # a terminal that is gone
                    data = os.read(number, 4096)
                if number == ours.fileno():
                    if not data:
                        return
                    due = not {*_SIGNALS}.isdisjoint(data)
                else:
                    due = not data
                    if due:
                        poll.unregister(number)
                if due and not heard:
                    heard = True
                    told()


def _end_by_force(name: str) -> None:
    text = "%s: not stopped %g s after it was told to, as where a disk hangs; ended as it is"
    said = threading.Thread(target=log.error, args=[text, name, _ENDS_WITHIN_S[name]], daemon=True)
    said.start()
    said.join(_SAID_WITHIN_S)
    os._exit(1)
