"""All that an engine must show of its VRAM: blocks that can be copied out and in."""

from collections.abc import Sequence
from typing import Protocol

import torch

from kvtier.core.blocks import BlockLayout


class Done(Protocol):
    """A copy under way."""

    def wait(self) -> None:
        """Return once the bytes have arrived; no limit is needed, a copy always ends."""
        ...


class PagedKV(Protocol):
    """An engine's KV blocks by number. Blocks handed in must stay allocated until `Done.wait`.

    The host tensors are uint8 of shape [layout.nbytes], contiguous, one for each block; they may
    be views of a shared arena and are not kept beyond `Done.wait`.
    """

    layout: BlockLayout

    def gather(self, block_ids: Sequence[int], out: Sequence[torch.Tensor]) -> Done:
        """Copy each block to its host tensor."""
        ...

    def scatter(self, block_ids: Sequence[int], source: Sequence[torch.Tensor]) -> Done:
        """Copy each host tensor into its block, whatever bytes are there: they may be changing.

        What was copied from one that others write to is copied again, or is never used.
        """
        ...
