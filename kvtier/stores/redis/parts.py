"""A frame as the values that it is kept in. Pure.

A value is an envelope and a part of the frame:

    offset  bytes
         0      4  magic "KVTP"
         4      2  version, 2
         6      2  number of this part, 0 for the head
         8      2  how many parts there are
        10      6  0
        16      8  tag: random, the same in all parts of one write
        24      8  bytes of the whole frame
        32         this part of it

Numbers are little-endian. All parts but the last have the same length. Parts of different writes
of a key are never put together: their tags differ.
"""

import struct
from typing import Final, NamedTuple

from kvtier.stores.base import Parts
from kvtier.stores.redis.resp import ENVELOPE_NBYTES, room

MAGIC: Final = b"KVTP"
VERSION: Final = 2
TAG_NBYTES: Final = 8
# A server copies a value in one go and serves nobody meanwhile: 2 MiB take it about 0.5 ms.
PART_NBYTES: Final = 2 * 2**20 + 4096
MAX_FRAME_NBYTES: Final = 512 * 2**20

_ENVELOPE: Final = struct.Struct("<4sHHH6x8sQ")
assert _ENVELOPE.size == ENVELOPE_NBYTES


class Part(NamedTuple):
    """One value: its envelope and the views of the frame that follow it, `nbytes` in all."""

    value: list[bytes | memoryview]
    nbytes: int


def count_of(frame_nbytes: int) -> int:
    """How many parts a frame has."""
    return max(1, -(-frame_nbytes // PART_NBYTES))


def split(frame: Parts, tag: bytes) -> list[Part]:
    """The values of `frame`, head first; its buffers are not copied."""
    views = [memoryview(each).cast("B") for each in frame]
    nbytes = sum(view.nbytes for view in views)
    count = count_of(nbytes)
    size = -(-nbytes // count)
    parts: list[Part] = []
    for index in range(count):
        wanted = min(size, nbytes - index * size)
        value: list[bytes | memoryview] = [
            _ENVELOPE.pack(MAGIC, VERSION, index, count, tag, nbytes)
        ]
        left = wanted
        while left:
            taken = views[0][:left]
            value.append(taken)
            left -= taken.nbytes
            views[0] = views[0][taken.nbytes :]
            if not views[0].nbytes:
                views.pop(0)
        parts.append(Part(value, wanted + ENVELOPE_NBYTES))
    return parts


class Assembly:
    """A frame that is being put together from its parts, the head first.

    `count` is how many parts it has, 0 until the head has come.
    """

    def __init__(self) -> None:
        self.count = 0
        self.nbytes = 0
        self._size = 0
        self._tag = b""
        self._frame: memoryview | None = None
        self._whole: set[int] = set()

    def place(self, index: int, envelope: bytes, nbytes: int) -> memoryview | None:
        """Room for part `index`; None where it does not belong to this frame."""
        magic, version, number, count, tag, total = _ENVELOPE.unpack(envelope)
        if (magic, version, number) != (MAGIC, VERSION, index):
            return None
        if not index:
            if total > MAX_FRAME_NBYTES or count != count_of(total):
                return None
            self.count, self.nbytes, self._tag = count, total, tag
            self._size = -(-total // count)
            self._frame = room(total)
            self._whole.clear()
        if self._frame is None or (count, tag, total) != (self.count, self._tag, self.nbytes):
            return None
        start = index * self._size
        if index >= count or nbytes != min(self._size, total - start):
            return None
        self._whole.discard(index)
        return self._frame[start : start + nbytes]

    def came(self, index: int) -> None:
        """All bytes of part `index` are where `place` wanted them."""
        self._whole.add(index)

    def missing(self) -> list[int]:
        """The parts that have not come, as far as a head has said how many there are."""
        return [index for index in range(self.count) if index not in self._whole]

    def frame(self) -> memoryview | None:
        """The whole frame; None while a part is missing, also one that was cut off half way."""
        return self._frame if not self.missing() else None


class PartSink:
    """Takes the reply for one part. See `resp.Sink`."""

    def __init__(self, assembly: Assembly, index: int) -> None:
        self._assembly = assembly
        self._index = index

    def place(self, envelope: bytes, nbytes: int) -> memoryview | None:
        """See `Sink.place`."""
        return self._assembly.place(self._index, envelope, nbytes)

    def came(self) -> None:
        """See `Sink.came`."""
        self._assembly.came(self._index)


def part_name(head: bytes, index: int) -> bytes:
    """The key of part `index`, whose head is at `head`; in the same slot of a cluster."""
    return b"%b:%d" % (head, index) if index else head
