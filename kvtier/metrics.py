"""Every counter and gauge of kvtier, with its unit and meaning. Served by `serve`."""

import errno
import socket
import ssl
import threading
from collections.abc import Callable, Iterable
from typing import cast
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import CollectorRegistry, Counter, Gauge, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from kvtier.errors import ConfigError

REGISTRY = CollectorRegistry()
Start = Callable[[str, list[tuple[str, str]]], object]  # WSGI's start_response


def _counter(name: str, text: str, *labels: str) -> Counter:
    return Counter(f"kvtier_{name}", text, labels, registry=REGISTRY)


def _gauge(name: str, text: str, *labels: str) -> Gauge:
    return Gauge(f"kvtier_{name}", text, labels, registry=REGISTRY)


# Node daemon
MOVED_BLOCKS = _counter("moved_blocks", "Blocks copied between tiers", "source", "target", "result")
MOVED_BYTES = _counter("moved_bytes", "Frame bytes copied between tiers", "source", "target")
CORRUPT_FRAMES = _counter("corrupt_frames", "Frames that failed a check: each a miss", "tier")
CORRUPT_REWRITTEN = _counter(
    "corrupt_rewritten", "Shared frames found corrupt and then written over with right bytes"
)
STRANGE_FRAMES = _counter(
    "strange_frames",
    "Blocks found at a start whose frame's header is of another version or damaged: dropped",
    "tier",
)
INEXACT_FRAMES = _counter("inexact_frames", "Lossy frames refused: no lossy codec is set", "tier")
ENCODED_BLOCKS = _counter(
    "encoded_blocks", "Blocks encoded for a tier, by the codec of their frame", "tier", "codec"
)
CODEC_CHANGES = _counter("codec_changes", "Times that `auto` went over to a codec", "tier", "codec")
STORE_SPEED = _gauge(
    "store_bytes_per_second",
    "A tier's store as `auto` reckons with it, in raw blocks",
    "tier",
    "way",
)
CODEC_SPEED = _gauge(
    "codec_bytes_per_second",
    "A codec on a thread as `auto` reckons with it",
    "tier",
    "codec",
    "way",
)
CODEC_RATIO = _gauge(
    "codec_ratio", "Bytes of blocks by those of their payloads, so far", "tier", "codec"
)
STORE_ERRORS = _counter("store_errors", "Times that a store gave no answer", "tier")
STORE_HUNG = _counter("store_hung", "Times that a store was left alone as a call hung", "tier")
DISK_ACCEPTED_BYTES = _counter("disk_accepted_bytes", "Frame bytes that the disk tier took")
DISK_WRITTEN_BYTES = _counter(
    "disk_written_bytes", "Bytes written to the disk: by accepted bytes, the write amplification"
)
DISK_REFUSED = _counter("disk_refused", "Blocks that the disk tier did not take", "reason")
DISK_UNREADABLE = _counter(
    "disk_unreadable", "Frames, and at a start headers, that the disk could not read"
)
STORE_REFUSED = _counter("store_refused", "Frames that a store had no room for", "tier")
REDIS_BREAKER_OPENED = _counter("redis_breaker_opened", "Times that a server was left alone")
REDIS_REDIRECTS = _counter("redis_redirects", "Commands sent on to another server")
REDIS_INCOMPLETE = _counter("redis_incomplete", "Frames with a part missing, read as misses")
REFUSED_BLOCKS = _counter("refused_blocks", "Blocks that found no free slot at a write")
DECLINED_BLOCKS = _counter("declined_blocks", "Blocks not loaded: computing them is faster")
LATE_BLOCKS = _counter("late_blocks", "Blocks that were not loaded by their read's deadline")
LEASES_LOST = _counter("leases_lost", "Leases ended because their engine's socket closed")
PEER_PULLS = _counter("peer_pulls", "Pulls of blocks from other nodes", "result")
PULLED_BLOCKS = _counter("pulled_blocks", "Blocks that came from other nodes")
LENT_BLOCKS = _counter("lent_blocks", "Blocks that were sent to other nodes")
LENDS_REFUSED = _counter("lends_refused", "Other nodes that were sent nothing", "why")
PROTOCOL_ERRORS = _counter("protocol_errors", "Messages refused by the node's socket")
CLIENTS = _gauge("clients", "Engines attached")
CREDIT_SLOTS = _gauge("credit_slots", "Slots that engines fill ahead of saying with what")

# Engine
TIER_FAILURES = _counter("tier_failures", "Failures of ours turned into misses", "operation")
RESTORED_TOKENS = _counter("restored_tokens", "Prompt tokens not computed", "tier")
COMPUTED_TOKENS = _counter("computed_tokens", "Prompt tokens computed")
SAVED_BLOCKS = _counter("saved_blocks", "Blocks copied from VRAM to the host tier")
UNLEASED_BLOCKS = _counter("unleased_blocks", "Blocks restored from where a match saw them")
OVERTAKEN_BLOCKS = _counter(
    "overtaken_blocks", "Blocks that had left there before they were copied"
)

# Router
REQUESTS = _counter("requests", "Requests ended", "status")
RUNNING = _gauge("requests_running", "Requests under way")
WAITING = _gauge("requests_waiting", "Requests that wait for a place")
SHED = _counter("requests_shed", "Requests refused because too many were under way or waiting")
RESUMES = _counter("resumes", "Answers that another worker went on with")
PICKS = _counter("picks", "Endpoints picked for a gateway, by how the prompt was read", "by")
RETRIES = _counter("retries", "Requests sent to another worker after one was lost")
ROUTED_BY_LOAD = _counter("routed_by_load", "Rankings by load alone, as the budget was over")
FEED_GAPS = _counter("feed_gaps", "Feeds watched anew after a gap or a new epoch", "node")
MEMBER_FAILURES = _counter(
    "member_failures", "Connections to a member that failed or ended", "node"
)
MEMBERS_LATE = _counter(
    "members_late", "Members that a starting router did not wait for any longer", "node"
)
RECORDS_DROPPED = _counter("records_dropped", "Requests that a trace reader was too slow for")
UNAUTHENTICATED = _counter("unauthenticated", "Calls refused for their token", "why")
MEMBERS = _gauge("members", "Workers known, by state", "state")


def serve(
    host: str,
    port: int,
    table: str,
    tls: ssl.SSLContext | None = None,
    allowed: Callable[[str], bool] | None = None,
) -> None:
    """Serve the metrics page at `host` and `port`; port 0 means don't.

    Args:
        host: An address of this machine; 0.0.0.0 and :: are all of them.
        port: Where.
        table: Of the settings `metrics_host` and `metrics_port` that say so.
        tls: For HTTPS.
        allowed: Whether the header `authorization` of a request opens the page; None: all may.

    Raises:
        ConfigError: The host or the port cannot be had; the message begins with its setting.
    """
    if not port:
        return
    if not host:
        raise ConfigError(f"{table}.metrics_host is empty; 0.0.0.0 is every address of this host")
    page = make_wsgi_app(REGISTRY)

    def app(request: dict[str, object], start: Start) -> Iterable[bytes]:
        if allowed is not None and not allowed(str(request.get("HTTP_AUTHORIZATION", ""))):
            start("401 Unauthorized", [("WWW-Authenticate", "Bearer")])
            return [b"no bearer token that is accepted here\n"]
        return cast("Iterable[bytes]", page(request, start))

    try:
        kind = _Server6 if ":" in host else _Server
        server = make_server(host.strip("[]"), port, app, kind, handler_class=_Silent)
    except OSError as error:
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            raise ConfigError(f"{table}.metrics_host is {host!r}: {error.strerror}") from None
        raise ConfigError(f"{table}.metrics_port is {port}: {error.strerror} at {host}") from None
    if tls is not None:
        server.socket = tls.wrap_socket(
            server.socket, server_side=True, do_handshake_on_connect=False
        )
    threading.Thread(target=server.serve_forever, name="kvtier-metrics", daemon=True).start()


class _Server(ThreadingWSGIServer):
    """A failed handshake or a client that hangs up is not worth a stack trace."""

    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing."""


class _Server6(_Server):
    """The same for an address of IPv6."""

    address_family = socket.AF_INET6


class _Silent(WSGIRequestHandler):
    """Each scrape would be a line of the log."""

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its base's name
        """Nothing."""
