"""A record: one frame in one slot of a segment file, behind a header that says whose it is.

    offset  bytes
         0      4  magic "KVTR"
         4      1  version of this format, 1
         8      8  number of the segment file
        16      4  slot in it
        20      4  where the frame starts in the record: 72 to 4096
        24      8  sequence: the order of writing, over restarts
        32     16  block key
        48      8  bytes of the frame
        56      8  xxh3_64 of the frame's bytes on the first page
        64      8  xxh3_64 of the 64 bytes before
     start         frame

Numbers are little-endian; the rest of the first page is zero. A frame whose first part is small,
as a frame's own header is, starts so that the second part lies on the second page: a block goes
from the arena to the disk without a copy, and comes back in one piece. Segment and slot are in
the header because a write or a file may end up in another place than it was meant for.

A record proves its first page. The frame's own header lies there, with the checksum of the rest,
which whoever decodes or passes on a frame verifies: so all is proven, and no byte is read twice.
"""

import struct
from typing import Final, NamedTuple

from xxhash import xxh3_64_intdigest

from kvtier.core.blocks import BlockKey

PAGE: Final = 4096  # what O_DIRECT wants on every disk that is sold
MAGIC: Final = b"KVTR"
VERSION: Final = 1

_FIELDS = struct.Struct("<4sB3xQIIQ16sQQ")
_CHECK = struct.Struct("<Q")
HEADER_NBYTES: Final = _FIELDS.size + _CHECK.size


class Header(NamedTuple):
    """What the first bytes of a record say."""

    segment: int
    slot: int
    start: int
    sequence: int
    key: BlockKey
    nbytes: int
    check: int

    def pack(self) -> bytes:
        """The header's bytes."""
        fields = _FIELDS.pack(
            MAGIC, VERSION, self.segment, self.slot, self.start, self.sequence, self.key,
            self.nbytes, self.check,
        )  # fmt: skip
        return fields + _CHECK.pack(xxh3_64_intdigest(fields))


def unpack(page: memoryview, segment: int, slot: int, slot_nbytes: int) -> Header | None:
    """The header of a record in this very slot; None where there is none that is whole."""
    if page.nbytes < HEADER_NBYTES or bytes(page[:4]) != MAGIC:
        return None
    if _CHECK.unpack_from(page, _FIELDS.size)[0] != xxh3_64_intdigest(page[: _FIELDS.size]):
        return None
    _, version, *fields = _FIELDS.unpack_from(page)
    header = Header(*fields)
    if version != VERSION or (header.segment, header.slot) != (segment, slot):
        return None
    if not HEADER_NBYTES <= header.start <= PAGE or header.start + header.nbytes > slot_nbytes:
        return None
    return header


def pages(nbytes: int) -> int:
    """`nbytes` rounded up to whole pages, in bytes."""
    return -(-nbytes // PAGE) * PAGE


def head_check(head: bytes | memoryview) -> int:
    """The checksum of a frame's bytes on the first page."""
    return xxh3_64_intdigest(head)


def record_nbytes(frame_nbytes: int) -> int:
    """Bytes of the record of a frame, whichever way it is laid out."""
    return pages(HEADER_NBYTES + frame_nbytes)
