"""Writes the seeds: real messages, frames and records, from which the fuzzer goes on.

`python -m tests.fuzz.seeds`
"""

import random
import struct
from pathlib import Path

from kvtier.codec import codecs, frame
from kvtier.core.blocks import BEGINS, BlockKey
from kvtier.core.tiers import Tier
from kvtier.stores.disk.record import Header
from kvtier.wire import chains, lending, local
from kvtier.wire.local import Op
from kvtier.wire.pb import feed_pb2
from tests.fuzz.targets import KEY, LAYOUT

CORPUS = Path(__file__).parent / "corpus"


def seeds() -> dict[str, list[bytes]]:
    """For each target a few inputs that are right."""
    draw = random.Random(1)
    numbers = struct.pack(f"<{LAYOUT.nbytes // 2}e", *(draw.gauss(0, 1) for _ in range(2048)))
    block = memoryview(numbers)
    frames = [b"".join(frame.encode(KEY, KEY, block, LAYOUT, each)) for each in codecs.CODECS]
    keys = local.pack_keys([KEY] * 3)
    messages = [
        local.encode(Op.HELLO, local.VERSION, LAYOUT.describe(), "engine"),
        local.encode(Op.MATCH, keys) + local.encode(Op.READ, keys, 1, 2, 2000, 0, 0, 9, 30),
        local.encode(Op.WRITE, keys, 0, 9, -1) + local.encode(Op.COMMIT, 7, 3),
        local.encode(Op.AWAIT, 7, 1) + local.encode(Op.RELEASE, 7),
        local.encode(Op.CREDIT, 32) + local.encode(Op.PUT, keys, bytes(8), 9, -1),
    ]
    record = Header(1, 2, 4032, 9, KEY, 4096, 0).pack()
    return {
        "wire": messages,
        "lent": [
            local.encode(lending.VERSION, "token"),
            local.encode(True, lending.VERSION, "node") + local.encode(False, "no"),
            lending.Wanted(LAYOUT.id, [KEY] * 3, 1, 2, 2.0).encode(),
            lending.pack_block(frames[0][: frame.HEADER_NBYTES], LAYOUT.nbytes),
            lending.pack_end(lending.Kind.BUSY, "busy"),
        ],
        "feed": _feed(),
        "frame": frames,
        # After the fields that the target makes itself: codec, fidelity, lies, a length, payload.
        "sealed_frame": [each[5:7] + bytes(10) + each[frame.HEADER_NBYTES :] for each in frames],
        "record": [record],
        "sealed_record": [record[:64]],
        "redis_reply": [b"*3\r\n$3\r\nabc\r\n:12\r\n$-1\r\n", b"+OK\r\n-MOVED 1 h:1\r\n"],
    }


def _feed() -> list[bytes]:
    keys = [BlockKey(bytes([n + 1]) * 16) for n in range(4)]
    before = dict(zip(keys, [BEGINS, *keys[:2], KEY], strict=True))
    part = chains.tell(Tier.HOST, keys, before.get)
    gone = chains.tell_gone(Tier.DISK, keys[:2])
    bodies = (
        {"snapshot": feed_pb2.Snapshot(held=[part], last=True)},
        {"delta": feed_pb2.Delta(added=[part], removed=[gone])},
    )
    messages = [feed_pb2.FeedMessage(epoch=1, seq=2, **body) for body in bodies]
    return [each.SerializeToString() for each in messages]


if __name__ == "__main__":
    for name, inputs in seeds().items():
        (CORPUS / name).mkdir(parents=True, exist_ok=True)
        for number, each in enumerate(inputs):
            (CORPUS / name / f"seed-{number}").write_bytes(each)
