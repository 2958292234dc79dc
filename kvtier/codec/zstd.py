"""bp-zh: rotated byte planes, and Huffman codes for the plane that has few distinct bytes."""

import sys
from collections.abc import Sequence
from typing import Final

import numpy as np

from kvtier.codec import planes
from kvtier.core.blocks import BlockLayout
from kvtier.errors import CorruptFrame

if sys.version_info >= (3, 14):
    from compression.zstd import (
        CompressionParameter,
        DecompressionParameter,
        Strategy,
        ZstdCompressor,
        ZstdDecompressor,
        ZstdError,
    )
else:
    from backports.zstd import (
        CompressionParameter,
        DecompressionParameter,
        Strategy,
        ZstdCompressor,
        ZstdDecompressor,
        ZstdError,
    )

# A match finder that finds nothing: what stays of zstd is its Huffman coder, at over twice the
# speed of level 1 and with a better ratio. A target_length over 0 would turn even that off.
_HUFFMAN_ONLY: Final[dict[int, int]] = {
    CompressionParameter.compression_level: 1,
    CompressionParameter.strategy: Strategy.fast,
    CompressionParameter.hash_log: 6,
    CompressionParameter.min_match: 7,
    CompressionParameter.window_log: 17,
    CompressionParameter.target_length: 0,
}
_LEAST_WINDOW_LOG: Final = 17


class PlanesZstd:
    """The top bytes as one zstd frame (RFC 8878), then the other bytes as they are. See `Codec`.

    Lossless, for every dtype of 32 bits or fewer: near the entropy of KV, which is
    in the exponents. Any zstd decoder reads it. The GIL is released in the long steps.
    """

    id = 2
    name = "bp-zh"
    exact = True

    def encode(self, block: memoryview, layout: BlockLayout) -> Sequence[bytes | memoryview] | None:
        """See `Codec.encode`."""
        if not planes.splits(layout):
            return None
        top, rest = planes.split(block, layout)
        packer = ZstdCompressor(options=_HUFFMAN_ONLY)
        return (packer.compress(top.data, mode=ZstdCompressor.FLUSH_FRAME), rest.data)

    def decode(self, payload: memoryview, out: memoryview, layout: BlockLayout) -> None:
        """See `Codec.decode`."""
        n = planes.count(layout) if planes.splits(layout) else 0
        coded = payload.nbytes - n * (layout.itemsize - 1)
        if not n or coded <= 0:
            raise CorruptFrame(f"bp-zh payload of {payload.nbytes} bytes is none of this layout")
        top = np.frombuffer(_decompress(payload[:coded], n), np.uint8)
        rest = np.frombuffer(payload[coded:], np.uint8)
        planes.merge(lambda start, end: top[start:end], rest, out, layout)


def _decompress(coded: memoryview, nbytes: int) -> bytes:
    """The `nbytes` that the zstd frame `coded` holds, and no more whatever it says."""
    window_log = max(_LEAST_WINDOW_LOG, nbytes.bit_length())
    unpacker = ZstdDecompressor(options={DecompressionParameter.window_log_max: window_log})
    try:
        raw = unpacker.decompress(coded, max_length=nbytes)
    except ZstdError as error:
        raise CorruptFrame(f"bp-zh payload: {error}") from None
    if len(raw) != nbytes or not unpacker.eof or unpacker.unused_data:
        raise CorruptFrame(f"bp-zh payload is not one zstd frame of {nbytes} bytes")
    return raw
