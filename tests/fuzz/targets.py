"""Every decoder of bytes that come from outside. A new format adds a function here.

A target gets any bytes and returns; the only exceptions it lets out are CorruptFrame and
ProtocolError, and it takes no more memory than its entry says.
"""

import contextlib
import struct
from collections.abc import Callable
from dataclasses import dataclass

from google.protobuf.message import DecodeError
from xxhash import xxh3_64_intdigest

from kvtier.codec import frame
from kvtier.core.blocks import BEGINS, Attention, BlockKey, BlockLayout, LayerGroup
from kvtier.core.tiers import Tier
from kvtier.errors import CorruptFrame, ProtocolError
from kvtier.stores.disk import record
from kvtier.stores.redis.resp import Reader
from kvtier.wire import chains, lending, local
from kvtier.wire.pb import feed_pb2

LAYOUT = BlockLayout((LayerGroup(Attention.FULL, 2, 2, 16),), 16, "bfloat16")  # 4 KiB
KEY = BlockKey(bytes(range(16)))
ALLOWED = (CorruptFrame, ProtocolError)


def wire(data: bytes) -> None:
    """A stream of messages on the node's socket, in two pieces."""
    decoder = local.Decoder()
    half = len(data) // 2
    for piece in (data[:half], data[half:]):
        for message in decoder.feed(piece):
            _, arguments = local.parse_request(message)
            for each in arguments:
                if isinstance(each, bytes):
                    local.unpack_keys(each)
                    local.unpack_numbers(each)


def lent(data: bytes) -> None:
    """What either end of the stream between nodes' daemons says, and its first message."""
    with contextlib.suppress(ProtocolError):
        lending.parse_head(bytearray(data[: lending.HEAD_NBYTES].ljust(lending.HEAD_NBYTES)))
    for message in local.Decoder(lending.MAX_HELLO).feed(data):
        for parse in (lending.parse_hello, lending.parse_welcome, lending.parse_wanted):
            with contextlib.suppress(ProtocolError):
                parse(message)


def any_frame(data: bytes) -> None:
    """A frame as a store returns it, and as a start looks at it."""
    with contextlib.suppress(CorruptFrame):
        frame.verify(KEY, data)
    before = frame.before_of(KEY, memoryview(data))
    assert before is None or len(before) == len(KEY)
    frame.decode(KEY, data, memoryview(bytearray(LAYOUT.nbytes)), LAYOUT)


def sealed_frame(data: bytes) -> None:
    """A frame whose checksums are right and whose fields and payload are anything."""
    data = data.ljust(12, b"\0")
    codec_id, fidelity, lie = data[0], data[1], data[2]
    payload = data[12:]
    raw_nbytes = int.from_bytes(data[4:12], "little") if lie & 1 else LAYOUT.nbytes
    payload_nbytes = int.from_bytes(data[4:12], "little") if lie & 2 else len(payload)
    fields = struct.pack(
        "<4sBBBx8s16sQQQ16s", frame.MAGIC, frame.VERSION, codec_id, fidelity,
        bytes.fromhex(LAYOUT.id), KEY, raw_nbytes, payload_nbytes, xxh3_64_intdigest(payload),
        BEGINS,
    )  # fmt: skip
    any_frame(fields + struct.pack("<Q", xxh3_64_intdigest(fields)) + payload)


def feed(data: bytes) -> None:
    """A message of a source's feed."""
    try:
        message = feed_pb2.FeedMessage.FromString(data)
    except DecodeError:
        return
    delta = message.delta
    for part in (*message.snapshot.held, *delta.added, *delta.removed):
        for gone in (False, True):
            with contextlib.suppress(ProtocolError):
                for told in chains.hear(part, list(Tier), gone=gone):
                    assert len(told.packed) % 16 == 0


def any_record(data: bytes) -> None:
    """A page of a segment file."""
    header = record.unpack(memoryview(data), 1, 2, 1 << 20)
    assert header is None or header.start + header.nbytes <= 1 << 20


def sealed_record(data: bytes) -> None:
    """A record's header with a right checksum and anything in its fields."""
    fields = data[:64].ljust(64, b"\0")
    any_record(fields + struct.pack("<Q", xxh3_64_intdigest(fields)) + data[64:])


def redis_reply(data: bytes) -> None:
    """What a server that is called Redis sends."""
    left = memoryview(data)

    def receive(view: memoryview, whole: bool) -> int:
        nonlocal left
        count = min(len(view), len(left))
        view[:count] = left[:count]
        left = left[count:]
        return count

    reader = Reader(receive)
    while left:
        reader.reply()


@dataclass(frozen=True)
class Target:
    """`run` with the most bytes of Python and numpy memory that one input may take."""

    run: Callable[[bytes], None]
    most: int = 1 << 20


TARGETS = {
    "wire": Target(wire, 4 << 20),
    "lent": Target(lent),
    "feed": Target(feed, 4 << 20),
    "frame": Target(any_frame),
    "sealed_frame": Target(sealed_frame),
    "record": Target(any_record),
    "sealed_record": Target(sealed_record),
    "redis_reply": Target(redis_reply, 10 << 20),
}


def once(target: Target, data: bytes) -> None:
    """One input; what may come out does not."""
    with contextlib.suppress(ALLOWED):
        target.run(data)
