"""A frame: one encoded block behind a header that says whose it is and proves it whole.

    offset  bytes
         0      4  magic "KVTF"
         4      1  version of this header, 2
         5      1  codec id
         6      1  fidelity: see core/fidelity.py; 0 = the exact bytes that were computed
         7      1  0
         8      8  id of the block's layout
        16     16  block key
        32      8  bytes of the block
        40      8  bytes of the payload
        48      8  xxh3_64 of the payload
        56     16  key of the block before this one in its prompt; zeros: it begins one
        72      8  xxh3_64 of the 72 bytes before
        80         payload

The block before is named because a disk is, after a restart, all that knows how blocks follow each
other, and every feed has to say it (decision 0052).

Numbers are little-endian. The checksums find damage, not malice: whoever may write to a store
can write any KV there.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from xxhash import xxh3_64, xxh3_64_intdigest

from kvtier.codec.base import Codec
from kvtier.codec.codecs import PLANES_ZSTD, RAW, by_id
from kvtier.core.blocks import BlockKey, BlockLayout
from kvtier.core.fidelity import Fidelity
from kvtier.errors import CorruptFrame

MAGIC: Final = b"KVTF"
VERSION: Final = 2

_FIELDS: Final = struct.Struct("<4sBBBx8s16sQQQ16s")
_CHECK: Final = struct.Struct("<Q")
_CODEC_AT: Final = 5
HEADER_NBYTES: Final = _FIELDS.size + _CHECK.size

# A codec that saves less than 1/64 of a block costs more time than its bytes are worth.
LEAST_SAVED: Final = 64
_MOST_FIDELITY = Fidelity.CODED | Fidelity.DERIVED


@dataclass(frozen=True, slots=True)
class FrameInfo:
    """What a frame's header says; sizes in bytes."""

    codec_id: int
    fidelity: Fidelity
    layout_id: str
    raw_nbytes: int
    payload_nbytes: int


class _Header(NamedTuple):
    magic: bytes
    version: int
    codec_id: int
    fidelity: int
    layout: bytes
    key: bytes
    raw_nbytes: int
    payload_nbytes: int
    payload_check: int
    before: BlockKey


def encode(
    key: BlockKey,
    before: BlockKey,
    block: memoryview,
    layout: BlockLayout,
    codec: Codec,
    fidelity: Fidelity = Fidelity.EXACT,
) -> list[bytes | memoryview]:
    """The frame of `block` as the buffers that follow each other in it, header first.

    Falls back to the raw codec where `codec` saves less than 1/64, and to a lossless one where it
    is lossy and the block cannot or must not be coded so: what went through a lossy codec once
    keeps its bytes. The buffers may be views into `block`, which must stay unchanged as long as
    they are used. `before` is the key of the block before it in its prompt, or BEGINS, and
    `fidelity` what is known of this one.
    """
    block = block.cast("B")
    assert block.nbytes == layout.nbytes, (block.nbytes, layout.nbytes)
    codec, payload = _encode(block, layout, codec, fidelity)
    if not codec.exact:
        fidelity |= Fidelity.CODED
    nbytes = frame_nbytes(payload)
    check = xxh3_64()
    for part in payload:
        check.update(part)
    layout_id = bytes.fromhex(layout.id)
    header = _Header(
        MAGIC,
        VERSION,
        codec.id,
        int(fidelity),
        layout_id,
        key,
        layout.nbytes,
        nbytes,
        check.intdigest(),
        before,
    )
    fields = _FIELDS.pack(*header)
    return [fields + _CHECK.pack(xxh3_64_intdigest(fields)), *payload]


def before_of(key: BlockKey, frame: memoryview) -> BlockKey | None:
    """The block before `key`, by the header of its frame; None where that is no whole one of ours.

    It may be damaged, or of another version.
    """
    try:
        header = _read_header(frame[:HEADER_NBYTES])
    except CorruptFrame:
        return None
    return BlockKey(header.before) if header.key == key else None


def _encode(
    block: memoryview, layout: BlockLayout, codec: Codec, fidelity: Fidelity
) -> tuple[Codec, Sequence[bytes | memoryview]]:
    """The payload, and the codec that it is of."""
    tried = [codec] if codec.exact or Fidelity.CODED not in fidelity else []
    if not codec.exact:
        tried.append(PLANES_ZSTD)
    for each in tried:
        payload = each.encode(block, layout)
        if payload is None:
            continue
        saved = layout.nbytes - frame_nbytes(payload)
        if each is RAW or saved * LEAST_SAVED >= layout.nbytes:
            return each, payload
    return RAW, (block,)


def codec_of(parts: Sequence[bytes | memoryview]) -> Codec:
    """The codec of a frame that `encode` made: raw where the one asked for did not save enough."""
    return by_id(parts[0][_CODEC_AT])


def decode(
    key: BlockKey, frame: bytes | memoryview, out: memoryview, layout: BlockLayout
) -> FrameInfo:
    """Fill `out` (layout.nbytes bytes) with the block that `frame` holds.

    Everything is checked first; `out` is not touched unless the frame is whole and is `key`'s.
    What the frame is, is returned; a lossy codec gives bytes that are only near the saved ones.

    Raises:
        CorruptFrame: A check failed; the message names it.
    """
    out = out.cast("B")
    assert out.nbytes == layout.nbytes, (out.nbytes, layout.nbytes)
    info = verify(key, frame, layout.id)
    if info.raw_nbytes != layout.nbytes:
        raise CorruptFrame(
            f"frame check raw length: {info.raw_nbytes} bytes, the layout has {layout.nbytes}"
        )
    by_id(info.codec_id).decode(_split(frame)[1], out, layout)
    return info


def decode_in_place(
    key: BlockKey, head: bytes, block: memoryview, layout: BlockLayout
) -> FrameInfo:
    """As `decode`, of a raw frame whose payload lies in `block` already, behind `head`.

    Raises:
        CorruptFrame: A check failed; `block` is then of no use.
    """
    block = block.cast("B")
    assert block.nbytes == layout.nbytes, (block.nbytes, layout.nbytes)
    info = _proven(key, memoryview(head), block, layout.id)
    if info.codec_id != RAW.id or info.raw_nbytes != layout.nbytes:
        raise CorruptFrame(
            f"frame check raw length: {info.raw_nbytes} bytes of codec {info.codec_id} as they are"
        )
    return info


def verify(key: BlockKey, frame: bytes | memoryview, layout_id: str | None = None) -> FrameInfo:
    """What `frame` is, once all of it is proven whole and to be `key`'s.

    For copies from one store to another, which move frames as they are. `layout_id` None: of any
    layout.

    Raises:
        CorruptFrame: A check failed; the message names it.
    """
    return _proven(key, *_split(frame), layout_id)


def _split(frame: bytes | memoryview) -> tuple[memoryview, memoryview]:
    """Header and payload, of a frame that may be anything."""
    view = memoryview(frame).cast("B")
    return view[:HEADER_NBYTES], view[HEADER_NBYTES:]


def _proven(
    key: BlockKey, head: memoryview, payload: memoryview, layout_id: str | None
) -> FrameInfo:
    header = _read_header(head)
    if header.payload_nbytes != payload.nbytes:
        raise CorruptFrame(
            f"frame check length: a payload of {payload.nbytes} bytes, "
            f"the header says {header.payload_nbytes}"
        )
    if header.key != key:
        raise CorruptFrame(f"frame check key: {header.key.hex()}, asked for {key.hex()}")
    if layout_id is not None and header.layout.hex() != layout_id:
        raise CorruptFrame(f"frame check layout: {header.layout.hex()}, must be {layout_id}")
    if header.fidelity > _MOST_FIDELITY:
        raise CorruptFrame(f"frame check fidelity: {header.fidelity} is above {_MOST_FIDELITY:d}")
    if xxh3_64_intdigest(payload) != header.payload_check:
        raise CorruptFrame("frame check payload checksum: the payload was changed")
    return FrameInfo(
        header.codec_id,
        Fidelity(header.fidelity),
        header.layout.hex(),
        header.raw_nbytes,
        header.payload_nbytes,
    )


def frame_nbytes(parts: Sequence[bytes | memoryview]) -> int:
    """Bytes of all `parts` together."""
    return sum(part.nbytes if isinstance(part, memoryview) else len(part) for part in parts)


def max_frame_nbytes(layout: BlockLayout) -> int:
    """The most bytes that a frame of this layout takes, whatever the codec."""
    return HEADER_NBYTES + layout.nbytes


def _read_header(view: memoryview) -> _Header:
    if view.nbytes != HEADER_NBYTES:
        raise CorruptFrame(f"frame check length: {view.nbytes} bytes are no header")
    header = _Header(*_FIELDS.unpack_from(view))
    if header.magic != MAGIC:
        raise CorruptFrame(f"frame check magic: {header.magic!r}, must be {MAGIC!r}")
    if header.version != VERSION:
        raise CorruptFrame(f"frame check version: {header.version}, must be {VERSION}")
    fields = view[: _FIELDS.size]
    if _CHECK.unpack_from(view, fields.nbytes)[0] != xxh3_64_intdigest(fields):
        raise CorruptFrame("frame check header checksum: the header was changed")
    return header
