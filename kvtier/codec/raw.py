"""The code that changes nothing."""

from collections.abc import Sequence

from kvtier.core.blocks import BlockLayout
from kvtier.errors import CorruptFrame


class Raw:
    """The block's own bytes: one copy each way, none at `encode`. See `Codec`."""

    id = 0
    name = "raw"
    exact = True

    def encode(self, block: memoryview, layout: BlockLayout) -> Sequence[bytes | memoryview]:
        """A view of `block` itself."""
        return (block,)

    def decode(self, payload: memoryview, out: memoryview, layout: BlockLayout) -> None:
        """Copy `payload` to `out`.

        Raises:
            CorruptFrame: `payload` is not `layout.nbytes` long.
        """
        if payload.nbytes != layout.nbytes:
            raise CorruptFrame(f"raw payload of {payload.nbytes} bytes, must be {layout.nbytes}")
        out[:] = payload
