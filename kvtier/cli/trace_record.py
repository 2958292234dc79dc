"""`kvtier trace record`: the requests of a router or a node daemon, as a trace without any text."""

import argparse
import heapq
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

from kvtier import config as configuration
from kvtier.cli.parser import ACCESS_HELP
from kvtier.errors import ConfigError, one_line
from kvtier.sim.record import Numbering, Pieces
from kvtier.sim.trace import Request, write_trace

if TYPE_CHECKING:
    import grpc

# Requests are told of when they end, and a trace is in the order in which they came.
_HELD_S = 600.0  # so long a request is held back for one that came before it and runs longer
_HELD = 1 << 16  # and so many of them


def add(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the parser of `kvtier trace record`."""
    text = "write down a router's or a node daemon's requests: lengths and numbered blocks, no text"
    record = actions.add_parser("record", help=text, description=text)
    record.add_argument(
        "router", metavar="HOST:PORT", help="the router's or the node daemon's gRPC address"
    )
    record.add_argument(
        "--out", required=True, metavar="FILE", help="where it goes; a .gz is packed"
    )
    record.add_argument(
        "--requests",
        type=int,
        default=0,
        metavar="N",
        help="stop after so many (default: 0, no limit)",
    )
    record.add_argument(
        "--seconds",
        type=float,
        default=0.0,
        metavar="S",
        help="stop after so long (default: 0, at Ctrl-C)",
    )
    record.add_argument(
        "--block-tokens",
        type=int,
        default=0,
        metavar="N",
        help="tokens a block (default: 0, as the workers)",
    )
    record.add_argument("--config", metavar="FILE", help=ACCESS_HELP)
    record.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    configuration.parse_address(options.router, "router")
    for name in ("requests", "seconds", "block_tokens"):
        if getattr(options, name) < 0:
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} is {getattr(options, name)}, must be at least 0")
    out = Path(options.out)
    if not out.parent.is_dir():
        raise ConfigError(f"--out: there is no folder {out.parent}")
    with _told_to_stop() as told:
        requests = _requests(options, told)
        first = [*islice(requests, 1)]  # a router that is not there leaves an older file alone
        count = write_trace(out, in_order(chain(first, requests)))
    print(f"{count} requests in {out}")
    return 0


@contextmanager
def _told_to_stop() -> "Iterator[SimpleQueue[None]]":
    """Gets an item at each signal to stop; none of them interrupts what is being done.

    An exception in the middle of it would lose what is held back, or half a line.
    """
    told: SimpleQueue[None] = SimpleQueue()
    stops = (signal.SIGTERM, signal.SIGINT)  # also where a shell started us as deaf to it
    before = [signal.signal(number, lambda *_: told.put(None)) for number in stops]
    try:
        yield told
    finally:
        for number, handler in zip(stops, before, strict=True):
            signal.signal(number, handler)


def in_order(requests: Iterable[Request]) -> Iterator[Request]:
    """`requests` sorted by time as far as _HELD_S and _HELD reach, on a clock from 0 on."""
    held: list[Request] = []
    first = last = 0.0

    def popped() -> Request:
        nonlocal first, last
        request = heapq.heappop(held)
        first = first or request.at_s
        last = max(last, request.at_s - first)
        return request._replace(at_s=last)

    for request in requests:
        heapq.heappush(held, request)
        while held[0].at_s < request.at_s - _HELD_S or len(held) > _HELD:
            yield popped()
    while held:
        yield popped()


def _requests(options: argparse.Namespace, told: "SimpleQueue[None]") -> Iterator[Request]:
    """What ends until one of the limits, the router's end, or an item in `told`.

    Raises:
        ConfigError: There is nobody, or who is there refuses.
    """
    import grpc

    from kvtier.wire.access import Access

    access = Access(configuration.load(options.config), serving=False)
    access.preflight(options.router)
    count = 0
    with access.blocking_channel(options.router) as channel:
        begin = _of_node if _is_node(channel) else _of_router
        call, requests = begin(channel, options)

        def stop() -> None:
            told.get()
            call.cancel()

        stopping = threading.Thread(target=stop, daemon=True)
        stopping.start()
        try:
            call.initial_metadata()  # comes at once: from here on nothing is missed
            print(f"recording {options.router}; Ctrl-C ends it", file=sys.stderr, flush=True)
            for request in requests:
                yield request
                count += 1
                if count == options.requests:
                    return
        except grpc.RpcError as error:
            details = access.explain(options.router, error) or error.details()
            _ended(options.router, error.code(), details, count)
        finally:
            told.put(None)
            stopping.join()


def _is_node(channel: "grpc.Channel") -> bool:
    import grpc

    from kvtier.wire.pb import node_pb2, node_pb2_grpc

    try:
        node_pb2_grpc.NodeStub(channel).Status(node_pb2.NodeStatusRequest(), timeout=10)
    except grpc.RpcError:
        return False  # a router, or nobody: which of them is found out by asking it
    return True


def _of_router(
    channel: "grpc.Channel", options: argparse.Namespace
) -> "tuple[grpc.Call, Iterator[Request]]":
    from kvtier.wire.pb import router_pb2, router_pb2_grpc

    stub = router_pb2_grpc.RouterStub(channel)
    call = stub.Record(router_pb2.RecordRequest(), timeout=options.seconds or None)
    numbering = Numbering(options.block_tokens)

    def requests() -> Iterator[Request]:
        for message in call:
            _lost(message.dropped)
            tokens = message.input_tokens, message.output_tokens
            keys = list(message.keys)
            yield numbering.request(message.at_s, tokens, keys, message.block_tokens)

    return call, requests()


def _of_node(
    channel: "grpc.Channel", options: argparse.Namespace
) -> "tuple[grpc.Call, Iterator[Request]]":
    import grpc

    from kvtier.wire.local import unpack_keys
    from kvtier.wire.pb import node_pb2, node_pb2_grpc

    stub = node_pb2_grpc.NodeStub(channel)
    call = stub.Record(node_pb2.NodeRecordRequest(), timeout=options.seconds or None)
    pieces = Pieces(Numbering(options.block_tokens))

    def requests() -> Iterator[Request]:
        begun = 0
        try:
            for use in call:
                _lost(use.dropped)
                if not pieces.knows(use.request):
                    begun += 1
                    if options.requests and begun > options.requests:
                        break  # the last one that is wanted may have had more to tell until now
                keys = unpack_keys(use.keys)
                output = use.output_tokens
                yield from pieces.add(use.at_s, use.request, keys, use.block_tokens, output)
        except grpc.RpcError:
            yield from pieces.rest()
            raise
        yield from pieces.rest()

    return call, requests()


def _lost(dropped: int) -> None:
    if dropped:
        print(f"kvtier: {dropped} requests lost so far", file=sys.stderr)


def _ended(router: str, code: object, details: object, count: int) -> None:
    """What the call's end means: time is up, we were told to stop, or the router is gone."""
    import grpc

    if code in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED):
        return
    if not count:
        raise ConfigError(f"no recording from {router}: {details}")
    print(one_line(f"kvtier: {router} has gone: {details}"), file=sys.stderr)
