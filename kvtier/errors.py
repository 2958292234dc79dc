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


class KVTierError(Exception):
    """Base of everything that kvtier raises on purpose."""


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
