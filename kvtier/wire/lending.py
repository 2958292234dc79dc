"""Blocks on their way from one node's daemon to another's: what the TCP stream says. No I/O here.

    asker                                               lender
    [version, token] ──────────────────────────────────►
                     ◄────────────────  [True, version, node]  or  [False, text], and hangs up
    [layout, keys, first, blocks, wait ms] ────────────►
                     ◄────────────────  head block  head block  ...  head
    [layout, keys, ...]                                 as often as wanted, one at a time

Messages are those of `wire/local.py`: a u32 length and a msgpack array. What is wanted are at most
`blocks` blocks of keys[first:], a path from its root on, that lie in the lender's host memory or on
its disk; fewer come where there are fewer. A head has HEAD_NBYTES bytes:

    offset  bytes
         0      4  kind: BLOCK, END, BUSY or REFUSED
         4      4  bytes that follow: of the block, or of a text in UTF-8
         8     80  of a BLOCK the header of its frame (kvtier/codec/frame.py), raw codec; else 0

Numbers are little-endian. After END and BUSY the next request may come, REFUSED is the last word.
"""

import struct
from enum import IntEnum
from typing import Final, NamedTuple, cast

from kvtier.codec.frame import HEADER_NBYTES
from kvtier.core.blocks import BlockKey
from kvtier.errors import RemoteProtocolError
from kvtier.wire import local
from kvtier.wire.local import Value

VERSION: Final = 2
MAX_BLOCKS: Final = 256  # of one request
MAX_HELLO: Final = 8 << 10  # bytes of either side's first message: a token has at most 4 KiB
MAX_TEXT: Final = 1000  # bytes

_HEAD: Final = struct.Struct(f"<II{HEADER_NBYTES}s")
HEAD_NBYTES: Final = _HEAD.size


class Kind(IntEnum):
    """What a head announces."""

    END = 0  # no more blocks
    BLOCK = 1
    BUSY = 2  # as many as may be are being served; the text says so
    REFUSED = 3  # the request is none that can be served; the text says why


class Head(NamedTuple):
    """What a lender says next."""

    kind: Kind
    nbytes: int
    header: bytes


class Wanted(NamedTuple):
    """One request: at most `blocks` of keys[first:], within `wait_s`."""

    layout: str
    keys: list[BlockKey]
    first: int
    blocks: int
    wait_s: float

    def encode(self) -> bytes:
        """The message."""
        keys = local.pack_keys(self.keys)
        return local.encode(self.layout, keys, self.first, self.blocks, int(self.wait_s * 1000))


def pack_block(header: bytes | memoryview, nbytes: int) -> bytes:
    """The head before a block of `nbytes`."""
    return _HEAD.pack(Kind.BLOCK, nbytes, bytes(header))


def pack_end(kind: Kind = Kind.END, text: str = "") -> bytes:
    """A head that no block follows, with its text."""
    said = text.encode()[:MAX_TEXT]
    return _HEAD.pack(kind, len(said), b"") + said


def parse_head(data: bytearray) -> Head:
    """What HEAD_NBYTES bytes say.

    Raises:
        RemoteProtocolError: No kind of head, or too long a text.
    """
    kind, nbytes, header = _HEAD.unpack(data)
    if kind not in Kind.__members__.values():
        raise RemoteProtocolError(f"a head of kind {kind}, must be 0 to {max(Kind)}")
    if kind != Kind.BLOCK and nbytes > MAX_TEXT:
        raise RemoteProtocolError(f"a text of {nbytes} bytes, limit {MAX_TEXT}")
    return Head(Kind(kind), nbytes, header)


def parse_hello(message: list[Value]) -> str:
    """The token of an asker's first message.

    Raises:
        RemoteProtocolError: It is none, or of another version.
    """
    if not message or type(message[0]) is not int:
        raise RemoteProtocolError("no hello: it begins with the protocol's version")
    if message[0] != VERSION:
        raise RemoteProtocolError(f"protocol version {message[0]}, this node speaks {VERSION}")
    if [type(each) for each in message] != [int, str]:
        raise RemoteProtocolError("a hello takes (int, str)")
    return cast("str", message[1])


def parse_welcome(message: list[Value]) -> str:
    """The lender's name, by its first message.

    Raises:
        RemoteProtocolError: It refuses us, or speaks another version.
    """
    match message:
        case [False, str(text)]:
            raise RemoteProtocolError(f"it refuses us: {text[:MAX_TEXT]}")
        case [True, int(version), str(node)]:
            if version != VERSION:
                raise RemoteProtocolError(f"it speaks version {version}, this node {VERSION}")
            return node
    raise RemoteProtocolError("its first message is no answer to a hello")


def parse_wanted(message: list[Value]) -> Wanted:
    """A request.

    Raises:
        RemoteProtocolError: A field is of another type, or out of its limits; the message names it.
    """
    match message:
        case [str(layout), bytes(raw), int(first), int(blocks), int(wait_ms)]:
            keys = local.unpack_keys(raw)
        case _:
            raise RemoteProtocolError("a request takes (str, bytes, int, int, int)")
    if not 0 <= first <= len(keys):
        raise RemoteProtocolError(f"first is {first}, there are {len(keys)} keys")
    if not 1 <= blocks <= MAX_BLOCKS:
        raise RemoteProtocolError(f"blocks is {blocks}, must be 1 to {MAX_BLOCKS}")
    if wait_ms < 0:
        raise RemoteProtocolError(f"wait is {wait_ms} ms, must be 0 or more")
    return Wanted(layout, keys[: first + blocks], first, blocks, wait_ms / 1000)
