"""bs-lz4: rotated byte planes, the exponents' distances as bit planes, and lz4 over these."""

from collections.abc import Sequence
from typing import Final

import lz4.block
import numpy as np

from kvtier.codec import planes
from kvtier.core.blocks import BlockLayout
from kvtier.errors import CorruptFrame

_HEADER: Final = 2  # u8 the largest top byte, u8 how many bit planes


class BitsLZ4:
    """Distances below the block's largest exponent, bit by bit, as one lz4 block. See `Codec`.

    Lossless, for every dtype of 32 bits or fewer. High bits of small distances are
    zeros, and in planes of their own they are runs, which lz4 finds (cf. the bitshuffle filter,
    https://github.com/kiyo-masui/bitshuffle). Payload: header; lz4 of the planes, lowest bit
    first; the other bytes as they are.
    """

    id = 4
    name = "bs-lz4"
    exact = True

    def encode(self, block: memoryview, layout: BlockLayout) -> Sequence[bytes | memoryview] | None:
        """See `Codec.encode`."""
        if not planes.splits(layout):
            return None
        top, rest = planes.split(block, layout)
        largest = top.max()
        distance = np.subtract(largest, top, out=top)
        depth = int(distance.max()).bit_length()
        shuffled = np.empty((depth, -(-top.size // 8)), np.uint8)
        one = np.empty_like(distance)
        for bit in range(depth):
            # Any number but 0 packs as 1.
            shuffled[bit] = np.packbits(np.bitwise_and(distance, np.uint8(1 << bit), out=one))
        coded = lz4.block.compress(shuffled.data.cast("B") if depth else b"", store_size=False)
        return (bytes((int(largest), depth)), coded, rest.data)

    def decode(self, payload: memoryview, out: memoryview, layout: BlockLayout) -> None:
        """See `Codec.decode`."""
        n = planes.count(layout) if planes.splits(layout) else 0
        coded = payload.nbytes - _HEADER - n * (layout.itemsize - 1)
        if not n or coded <= 0 or payload[1] > 8:
            raise CorruptFrame(f"bs-lz4 payload of {payload.nbytes} bytes is none of this layout")
        largest, depth = np.uint8(payload[0]), payload[1]
        shuffled = _decompress(payload[_HEADER : _HEADER + coded], depth * -(-n // 8))
        bit_planes = shuffled.reshape(depth, -(-n // 8))
        rest = np.frombuffer(payload[_HEADER + coded :], np.uint8)
        planes.merge(
            lambda start, end: largest - _distances(bit_planes, start, end), rest, out, layout
        )


def _distances(bit_planes: planes.U8, start: int, end: int) -> planes.U8:
    """The numbers from `start` up to `end` whose bits are in these planes."""
    first = start // 8
    distances = np.zeros(8 * (-(-end // 8) - first), np.uint8)
    for bit, plane in enumerate(bit_planes):
        packed = plane[first : -(-end // 8)]
        if packed.any():
            ones = np.unpackbits(packed)
            distances |= np.multiply(ones, np.uint8(1 << bit), out=ones)
    return distances[start - 8 * first : end - 8 * first]


def _decompress(coded: memoryview, nbytes: int) -> planes.U8:
    try:
        raw = lz4.block.decompress(coded, uncompressed_size=nbytes)
    except lz4.block.LZ4BlockError as error:
        raise CorruptFrame(f"bs-lz4 payload: {error}") from None
    if len(raw) != nbytes:
        raise CorruptFrame(f"bs-lz4 payload holds {len(raw)} bytes of planes, must be {nbytes}")
    return np.frombuffer(raw, np.uint8)
