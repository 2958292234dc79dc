"""The protocol between an engine and its node daemon: msgpack over a Unix socket. No I/O here.

Each message is a little-endian u32 length and a msgpack array of that many bytes:

    request   [op, *arguments]          reply   [True, *values]  or  [False, text]

COMMIT, RELEASE, CREDIT, PUT and USED have no reply (a refused one is told, as the last words before
hanging up, to whatever is asked next); of all others an engine has one under way at a time. HELLO
comes first; its reply carries two descriptors (SCM_RIGHTS): the arena, in which the engine may also
look for itself (core/slot_index.py), and the writing end of a pipe for requests without a reply.
Their messages, of at most MAX_NOTE bytes, wake nobody: they are read before any engine's next
request is, and at the latest after some milliseconds. Where the pipe is full, or they are longer,
they go to the socket. Leases end with the connection, and credit too. Keys travel as one string of
16 bytes each, slots and indexes as little-endian u32, source tiers as one byte each.

What slots an engine has on credit the daemon tells by itself, once for each CREDIT and PUT:
[CREDIT, slots]. That may come before any reply, or when none is awaited.
"""

import struct
import sys
from array import array
from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import Final, cast

import msgpack

from kvtier.core.blocks import KEY_NBYTES, BlockKey
from kvtier.errors import LocalProtocolError, RemoteProtocolError

VERSION: Final = 7
MAX_KEYS: Final = 65_536  # in one request: two million tokens at 32 a block
MAX_MESSAGE: Final = 2 << 20  # bytes
MAX_NOTE: Final = 32 << 10  # half of what Linux keeps in a pipe: a path of 2,000 blocks
MAX_SEEN: Final = 4096  # slots in the answer to a MATCH
NUMBER_NBYTES: Final = 4  # of a slot or an index
MAX_REQUEST: Final = 2**64 - 1
MAX_OUTPUT: Final = 2**31 - 1  # tokens

_LENGTH = struct.Struct("<I")

Value = int | str | bytes | bool | list[int]


class Op(IntEnum):
    """What an engine can ask; arguments -> values."""

    # `epoch` is the arena's: a later one of the same layout, or of the next daemon, has another.
    HELLO = 1  # version, layout, engine's name -> node, epoch, slot_nbytes, slots, tiers
    # `slots`: where the leading ones of the host tier lie, MAX_SEEN at most; `turn`: since when
    # they must not have left these, for a copy that is made from there without a lease. USED says
    # of a path that such copies were made: to the node's eviction it is as READ and RELEASE.
    MATCH = 2  # keys -> blocks, blocks by tier, slots, turn
    # A read is answered once `wanted` leading blocks are in their slots, or as many as there will
    # be; AWAIT once there are more than `have`. `wait` is the deadline of the lease's loads, from
    # READ on. With a block us the daemon does not load what is faster computed again: the time
    # that this takes for the path's first block, and how many ns more for each one before it.
    # What READ and WRITE tell with the same `request` is one prompt to the node's eviction: a
    # number that no other prompt on the node has, 0: not known. `output` is how many tokens were
    # generated for it, -1: not known (yet).
    READ = 3  # keys, first, wanted, wait ms, block us, growth ns, request, output
    #           -> lease, slots, sources, arrived
    WRITE = 4  # keys, first, request, output -> lease, indexes, slots
    COMMIT = 5  # lease, filled; no reply
    RELEASE = 6  # lease; no reply
    AWAIT = 7  # lease, have -> arrived, blocks that the lease has now
    # Load what the node lacks of keys[first:] from another node's daemon, if it knows one of that
    # name; the numbers are as in READ. An engine that never asks needs not know it.
    PULL = 8  # keys, node, first, wait ms, block us, growth ns, request, output -> blocks
    # Slots to fill ahead of need, so many or none. PUT says with what: the last blocks of `keys`
    # lie in `slots`. Of each the daemon tells which slots the engine has more, or instead.
    CREDIT = 9  # slots wanted; no reply
    PUT = 10  # keys, slots, request, output; no reply
    USED = 11  # keys, request, output; no reply


NOTED: Final = frozenset(
    {Op.COMMIT, Op.RELEASE, Op.CREDIT, Op.PUT, Op.USED}
)  # may come by the pipe

_ARGUMENTS: Final[dict[Op, list[type]]] = {
    Op.HELLO: [int, str, str],
    Op.MATCH: [bytes],
    Op.READ: [bytes, int, int, int, int, int, int, int],
    Op.WRITE: [bytes, int, int, int],
    Op.COMMIT: [int, int],
    Op.RELEASE: [int],
    Op.AWAIT: [int, int],
    Op.PULL: [bytes, str, int, int, int, int, int, int],
    Op.CREDIT: [int],
    Op.PUT: [bytes, bytes, int, int],
    Op.USED: [bytes, int, int],
}
_REQUESTS: Final[dict[Value, tuple[Op, list[type]]]] = {
    op: (op, expected) for op, expected in _ARGUMENTS.items()
}


def encode(*values: Value) -> bytes:
    """One message on the wire.

    Raises:
        LocalProtocolError: It is longer than the other side takes.
    """
    body: bytes = msgpack.packb(values)
    if len(body) > MAX_MESSAGE:
        raise LocalProtocolError(f"message of {len(body)} bytes, limit {MAX_MESSAGE}")
    return _LENGTH.pack(len(body)) + body


class Decoder:
    """Cuts a stream of bytes into messages of at most `limit` bytes."""

    def __init__(self, limit: int = MAX_MESSAGE) -> None:
        self._kept = bytearray()  # of a message that is not all there
        self.limit = limit

    def feed(self, data: bytes | bytearray | memoryview) -> list[list[Value]]:
        """The messages that `data` completes; nothing of it is referred to afterwards.

        Raises:
            RemoteProtocolError: Too long, or not msgpack.
        """
        kept = self._kept
        if kept:
            kept += data
            data = kept
        messages: list[list[Value]] = []
        start, size = 0, len(data)
        while size - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(data, start)
            if length > self.limit:
                raise RemoteProtocolError(f"message of {length} bytes, limit {self.limit}")
            end = start + _LENGTH.size + length
            if end > size:
                break
            try:
                message = msgpack.unpackb(data[start + _LENGTH.size : end], max_array_len=64)
            except (ValueError, msgpack.exceptions.UnpackException) as error:
                raise RemoteProtocolError(f"not a msgpack message: {error}") from None
            if not isinstance(message, list) or not message:
                raise RemoteProtocolError("a message must be a non-empty array")
            messages.append(message)
            start = end
        if data is kept:
            del kept[:start]
        elif start < size:  # seldom: messages come whole
            kept += data[start:]
        return messages


def parse_request(message: list[Value]) -> tuple[Op, list[Value]]:
    """The operation and its arguments, of the right number and types.

    Raises:
        RemoteProtocolError: They are not; the message names the operation.
    """
    code, *arguments = message
    try:
        op, expected = _REQUESTS[code]
    except (KeyError, TypeError):  # a list is no key
        raise RemoteProtocolError(f"no operation {code!r}") from None
    if [*map(type, arguments)] != expected:
        names = ", ".join(each.__name__ for each in expected)
        raise RemoteProtocolError(f"{op.name} takes ({names})")
    return op, arguments


def pack_keys(keys: Sequence[BlockKey]) -> bytes:
    """Keys as one string.

    Raises:
        LocalProtocolError: More than MAX_KEYS.
    """
    if len(keys) > MAX_KEYS:
        raise LocalProtocolError(f"{len(keys)} keys in one request, limit {MAX_KEYS}")
    return b"".join(keys)


def unpack_keys(raw: bytes, start: int = 0) -> list[BlockKey]:
    """The keys of `pack_keys`, from byte `start` on.

    Raises:
        RemoteProtocolError: Not a whole number of keys, or more than MAX_KEYS.
    """
    if len(raw) % KEY_NBYTES or len(raw) > MAX_KEYS * KEY_NBYTES:
        raise RemoteProtocolError(
            f"{len(raw)} bytes of keys: must be a multiple of {KEY_NBYTES}, "
            f"at most {MAX_KEYS * KEY_NBYTES}"
        )
    keys = [raw[at : at + KEY_NBYTES] for at in range(start, len(raw), KEY_NBYTES)]
    return cast("list[BlockKey]", keys)


def pack_numbers(numbers: Iterable[int]) -> bytes:
    """Slots or indexes as little-endian u32."""
    packed = array("I", numbers)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_numbers(raw: bytes) -> list[int]:
    """The numbers of `pack_numbers`.

    Raises:
        RemoteProtocolError: Not a whole number of them.
    """
    if len(raw) % NUMBER_NBYTES:
        raise RemoteProtocolError(
            f"{len(raw)} bytes of numbers: must be a multiple of {NUMBER_NBYTES}"
        )
    packed = array("I", raw)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tolist()
