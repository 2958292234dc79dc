"""The lz4 block format: for blocks that hold repeated bytes, such as integer or padded KV."""

from collections.abc import Sequence

import lz4.block

from kvtier.core.blocks import BlockLayout
from kvtier.errors import CorruptFrame


class LZ4:
    """One lz4 block (https://github.com/lz4/lz4/blob/dev/doc/lz4_Block_format.md). See `Codec`.

    The length of the decoded bytes is the layout's, so it is not stored. Both ways go through
    one fresh buffer; the GIL is released meanwhile.
    """

    id = 1
    name = "lz4"
    exact = True

    def encode(self, block: memoryview, layout: BlockLayout) -> Sequence[bytes | memoryview]:
        """The compressed block, which floating point KV makes slightly longer than `block`."""
        return (lz4.block.compress(block, store_size=False),)

    def decode(self, payload: memoryview, out: memoryview, layout: BlockLayout) -> None:
        """Decompress `payload` to `out`.

        Raises:
            CorruptFrame: `payload` is not lz4, or not of `layout.nbytes` bytes.
        """
        try:
            raw = lz4.block.decompress(payload, uncompressed_size=layout.nbytes)
        except lz4.block.LZ4BlockError as error:
            raise CorruptFrame(f"lz4 payload of {payload.nbytes} bytes: {error}") from None
        if len(raw) != layout.nbytes:
            raise CorruptFrame(f"lz4 payload holds {len(raw)} bytes, must be {layout.nbytes}")
        out[:] = raw
