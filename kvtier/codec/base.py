"""The seam between a block's bytes and the bytes that are stored for it."""

from collections.abc import Sequence
from typing import Protocol

from kvtier.core.blocks import BlockLayout


class Codec(Protocol):
    """A lossless or lossy code for blocks of any layout. Thread-safe, keeps no state.

    `id` is written into every frame and never reused for another format. `exact`: `decode` gives
    the very bytes that `encode` was given.
    """

    id: int
    name: str
    exact: bool

    def encode(self, block: memoryview, layout: BlockLayout) -> Sequence[bytes | memoryview] | None:
        """The payload for `block` (layout.nbytes bytes), as buffers that follow each other.

        None where this code does not suit the layout or the block's numbers. Views into `block`
        may be returned; they live as long as the caller's lease on it.
        """
        ...

    def decode(self, payload: memoryview, out: memoryview, layout: BlockLayout) -> None:
        """Fill `out` (layout.nbytes bytes) from what `encode` returned.

        Takes memory in proportion to `layout`, whatever `payload` says.

        Raises:
            CorruptFrame: `payload` is not of this code or of another length.
        """
        ...
