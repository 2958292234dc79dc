"""Every exception that kvtier raises on purpose.

KVTierError
├── ConfigError               a setting, flag or path that a person must change
├── ProtocolError             bytes on a wire that break the protocol
│   ├── LocalProtocolError    we, or our caller, broke it
│   └── RemoteProtocolError   the other side broke it
├── StoreUnavailable          a lower tier gave no answer (not: "the block is not there")
├── CorruptFrame              stored bytes that are not what was written, or not for this key
├── ArenaLost                 the node daemon behind an arena is gone
└── RequestError              a request that cannot be served; carries the gRPC status name
    ├── InvalidRequest        the caller's fault: INVALID_ARGUMENT
    │   └── PromptTooLong     more tokens than any worker of the model takes
    ├── UnknownModel          no worker serves that model: NOT_FOUND
    ├── Unauthenticated       no token, or a wrong one: UNAUTHENTICATED
    ├── UnknownTenant         no worker knows that tenant: PERMISSION_DENIED
    ├── Overloaded            a queue is full: RESOURCE_EXHAUSTED, try again later
    ├── DeadlinePassed        it was not finished in time: DEADLINE_EXCEEDED
    └── WorkerLost            no worker could finish it: UNAVAILABLE

A miss is a value, never an exception. An AssertionError is a bug of ours.
"""

from typing import Final

MAX_LINE: Final = 2000  # bytes; gRPC carries a status in 8 KB of headers, each byte as up to three


def one_line(text: str) -> str:
    """What is said to others: one line of at most MAX_LINE bytes, "..." at its end where cut.

    Line breaks, control characters and whatever else is not shown become a space.
    """
    whole = len(text) <= MAX_LINE
    text = text[: 2 * MAX_LINE]  # what a stranger sent may be long
    if not text.isprintable():
        shown = "".join(each if each.isprintable() else "\n" for each in text)
        text = " ".join(part for each in shown.split("\n") if (part := each.strip()))
    raw = text.encode()
    if whole and len(raw) <= MAX_LINE:
        return text
    return raw[: MAX_LINE - 3].decode(errors="ignore") + "..."


class KVTierError(Exception):
    """Base of everything that kvtier raises on purpose; it reads as `one_line`, whoever says it."""

    def __str__(self) -> str:
        return one_line(super().__str__())


class ConfigError(KVTierError):
    """A setting, flag or path is wrong; the message names it, its value and the limit."""


class ProtocolError(KVTierError):
    """Bytes on a wire break the protocol."""


class LocalProtocolError(ProtocolError):
    """This side was about to break the protocol."""


class RemoteProtocolError(ProtocolError):
    """The other side broke the protocol."""


class StoreUnavailable(KVTierError):
    """A store gave no answer; what it holds is unknown."""


class CorruptFrame(KVTierError):
    """A stored frame fails its own checks or belongs to another key."""


class ArenaLost(KVTierError):
    """The daemon that owns the arena is gone; every lease on it has ended."""


class RequestError(KVTierError):
    """A request that cannot be served; `grpc_status` names the status code to answer with."""

    grpc_status = "INTERNAL"


class InvalidRequest(RequestError):
    """The request itself is wrong; sending it again cannot help."""

    grpc_status = "INVALID_ARGUMENT"


class PromptTooLong(InvalidRequest):
    """The prompt has more tokens than any worker of its model takes."""


class UnknownModel(RequestError):
    """No worker serves the model that the request names."""

    grpc_status = "NOT_FOUND"


class UnknownTenant(RequestError):
    """No worker knows the tenant that the request names; who else is known is nobody's business."""

    grpc_status = "PERMISSION_DENIED"


class Unauthenticated(RequestError):
    """The caller shows no token, or one that is not accepted."""

    grpc_status = "UNAUTHENTICATED"


class Overloaded(RequestError):
    """A bounded queue is full; the same request may succeed after `retry_s` seconds."""

    grpc_status = "RESOURCE_EXHAUSTED"

    def __init__(self, message: str, retry_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_s = retry_s


class DeadlinePassed(RequestError):
    """The request's time was over before its answer was whole."""

    grpc_status = "DEADLINE_EXCEEDED"


class WorkerLost(RequestError):
    """No worker could take the request, or the one that had it died."""

    grpc_status = "UNAVAILABLE"
