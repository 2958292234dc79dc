"""KV as a model computes on it, and KV as the pool keeps it; copies between the two.

The pool keeps a block as `BlockLayout` says: [layers, 2, kv_heads, block_tokens, head_dim],
contiguous, so that a block moves to another tier in one piece. Attention wants one layer's keys
of all tokens side by side. A request therefore computes on buffers of its own.
"""

from collections.abc import Sequence

import torch
from transformers.cache_utils import Cache, DynamicLayer

from kvtier.core.blocks import BlockLayout
from kvtier.errors import ConfigError


def allocate_storage(layout: BlockLayout, blocks: int, device: torch.device) -> torch.Tensor:
    """The pool's memory: uint8 [blocks, layout.nbytes], not initialised.

    Raises:
        ConfigError: The device has no room for it.
    """
    try:
        return torch.empty((blocks, layout.nbytes), dtype=torch.uint8, device=device)
    except RuntimeError as error:  # torch's own text goes on for lines
        wanted = f"worker.vram_bytes: {blocks * layout.nbytes} bytes wanted on {device}"
        raise ConfigError(f"{wanted}: {str(error).splitlines()[0]}") from None


def as_blocks(storage: torch.Tensor, layout: BlockLayout) -> torch.Tensor:
    """The pool's memory seen as [blocks, layers, 2, kv_heads, block_tokens, head_dim]."""
    (group,) = layout.groups
    shape = (-1, group.layers, 2, group.kv_heads, layout.block_tokens, group.head_dim)
    return storage.view(getattr(torch, layout.dtype)).view(shape)


class _WorkingLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """One layer's KV in buffers of a fixed size that fill up in place."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._room = keys, values  # [1, kv_heads, capacity, head_dim] each
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True
        self.set_length(0)

    def set_length(self, tokens: int) -> None:
        """The first `tokens` tokens are there."""
        keys, values = self._room
        self._filled = keys[:, :, :tokens], values[:, :, :tokens]
        self.keys, self.values = self._filled

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `CacheLayerMixin.update`; returns views, copies only what is new."""
        start, new = self.get_seq_length(), key_states.shape[-2]
        for room, states in zip(self._room, (key_states, value_states), strict=True):
            room.narrow(2, start, new).copy_(states)  # raises where there is no room
        self.set_length(start + new)
        return self._filled

    def get_seq_length(self) -> int:
        """See `CacheLayerMixin.get_seq_length`."""
        return self._filled[0].shape[2]


class WorkingKV(Cache):
    """The KV of one request while it runs, as the `past_key_values` of a Transformers model.

    Args:
        layout: One group of full attention layers.
        capacity: Tokens that it can hold at most; the memory is taken at once.
        device: Where the model computes.
    """

    def __init__(self, layout: BlockLayout, capacity: int, device: torch.device) -> None:
        (group,) = layout.groups
        self._layout = layout
        self._buffer = torch.empty(
            (group.layers, 2, group.kv_heads, capacity, group.head_dim),
            dtype=getattr(torch, layout.dtype),
            device=device,
        )
        self._rows = [_WorkingLayer(*layer.unsqueeze(1)) for layer in self._buffer]
        super().__init__(layers=list(self._rows))

    @property
    def length(self) -> int:
        """Tokens that are there."""
        return self._rows[0].get_seq_length()

    def load_blocks(
        self, storage: torch.Tensor, first_block: int, block_ids: Sequence[int]
    ) -> None:
        """Copy pool blocks in as this request's blocks `first_block` and on; length ends there.

        All tokens before `first_block` must be there; what came after is forgotten.
        """
        assert first_block * self._layout.block_tokens <= self.length, "a gap before the blocks"
        blocks, mine = as_blocks(storage, self._layout), self._blocks(first_block, len(block_ids))
        # One strided copy a block: gathering all first would move every byte twice and needs
        # scratch memory of their size (measured on CPU: 20 times slower).
        for i, block_id in enumerate(block_ids):
            mine[:, :, :, i].copy_(blocks[block_id])
        length = (first_block + len(block_ids)) * self._layout.block_tokens
        for row in self._rows:
            row.set_length(length)

    def store_blocks(
        self, storage: torch.Tensor, first_block: int, block_ids: Sequence[int]
    ) -> None:
        """Copy this request's blocks `first_block` and on, all complete, to pool blocks."""
        end = (first_block + len(block_ids)) * self._layout.block_tokens
        assert end <= self.length, "blocks that are not complete"
        blocks, mine = as_blocks(storage, self._layout), self._blocks(first_block, len(block_ids))
        for i, block_id in enumerate(block_ids):
            blocks[block_id].copy_(mine[:, :, :, i])

    def _blocks(self, first: int, count: int) -> torch.Tensor:
        """A view [layers, 2, kv_heads, count, block_tokens, head_dim] of the buffer."""
        tokens = self._layout.block_tokens
        part = self._buffer.narrow(3, first * tokens, count * tokens)
        view: torch.Tensor = part.unflatten(3, (count, tokens))  # type: ignore[no-untyped-call]
        return view
