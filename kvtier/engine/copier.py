"""Copies between VRAM and the arena: on a side stream where VRAM is a GPU's."""

from collections.abc import Sequence
from typing import Final, overload

import torch

from kvtier.arena import Arena, stride
from kvtier.core.blocks import BlockLayout, Slot

# cudaHostRegister of a very large range in one call stalls the driver for seconds; in pieces
# other work gets through between them.
REGISTER_NBYTES: Final = 256 << 20


class _Now:
    """A copy that has ended already."""

    def wait(self) -> None:
        """Nothing to wait for."""


_NOW: Final = _Now()


class _OnStream:
    """Copies queued on a CUDA stream."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record(stream)

    def wait(self) -> None:
        """Return once the copies queued up to here have ended."""
        self._event.synchronize()


def _side_stream(device: torch.device) -> torch.cuda.Stream | None:
    if device.type != "cuda":
        return None
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _unit(nbytes: int) -> torch.dtype:
    # Copies of wide numbers are half as fast again as copies of bytes (torch 2.13, CPU).
    return torch.int64 if nbytes % 8 == 0 else torch.uint8


class BlockTensor:
    """A `PagedKV` over one uint8 tensor of shape [blocks, layout.nbytes], on any device."""

    def __init__(self, layout: BlockLayout, storage: torch.Tensor) -> None:
        if storage.dtype != torch.uint8 or storage.dim() != 2 or not storage.is_contiguous():
            raise ValueError("storage must be a contiguous uint8 tensor of two dimensions")
        if storage.shape[1] != layout.nbytes:
            raise ValueError(f"storage rows have {storage.shape[1]} bytes, blocks {layout.nbytes}")
        self.layout = layout
        self._unit = _unit(layout.nbytes)
        self._storage = storage.view(self._unit)
        self._stream = _side_stream(storage.device)

    def gather(self, block_ids: Sequence[int], out: Sequence[torch.Tensor]) -> _Now | _OnStream:
        """See `PagedKV.gather`."""
        return self._copy([(there, here) for here, there in self._pairs(block_ids, out)])

    def scatter(self, block_ids: Sequence[int], source: Sequence[torch.Tensor]) -> _Now | _OnStream:
        """See `PagedKV.scatter`."""
        return self._copy(self._pairs(block_ids, source))

    def _pairs(
        self, block_ids: Sequence[int], host: Sequence[torch.Tensor]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Views of blocks, and of where they lie in host memory; neighbours on both sides as one.

        Fewer and larger copies, and found by number: a view of each row costs more than the rest
        of a save does.
        """
        if not isinstance(host, ArenaRows):
            rows = zip(block_ids, host, strict=True)
            return [(self._storage[block], row.view(self._unit)) for block, row in rows]
        if host.words is None:
            there = (row.view(self._unit) for row in host)
            return [(self._storage[b], row) for b, row in zip(block_ids, there, strict=True)]
        arena, pool = host.words, self._storage
        return [
            (pool.narrow(0, block, count), arena.narrow(0, slot, count))
            for block, slot, count in _runs(block_ids, host.slots)
        ]

    def _copy(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> _Now | _OnStream:
        """Fill the first of each pair with the second."""
        if self._stream is None:
            for target, source in pairs:
                target.copy_(source)
            return _NOW
        # The engine's own stream may still be writing the blocks.
        self._stream.wait_stream(torch.cuda.current_stream(self._storage.device))
        with torch.cuda.stream(self._stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
        return _OnStream(self._stream)


def _runs(blocks: Sequence[int], slots: Sequence[int]) -> list[tuple[int, int, int]]:
    """First block, first slot and length of each run that goes up by one on both sides."""
    if _neighbours(slots) and _neighbours(blocks) and len(blocks) == len(slots):
        return [(blocks[0], slots[0], len(slots))]  # the common case, in a tenth of the time
    runs: list[tuple[int, int, int]] = []
    first_block = first_slot = length = 0
    for block, slot in zip(blocks, slots, strict=True):
        if length and block == first_block + length and slot == first_slot + length:
            length += 1
            continue
        if length:
            runs.append((first_block, first_slot, length))
        first_block, first_slot, length = block, slot, 1
    if length:
        runs.append((first_block, first_slot, length))
    return runs


def _neighbours(numbers: Sequence[int]) -> bool:
    return bool(numbers) and [*numbers] == [*range(numbers[0], numbers[0] + len(numbers))]


class ArenaRows(Sequence[torch.Tensor]):
    """Some slots of an arena: uint8 tensors of the blocks' bytes, made when they are asked for.

    `table` has all slots of the arena as its rows; `words` is the same in the unit that copies are
    made of, None where there are gaps between slots.
    """

    __slots__ = ("slots", "table", "words")

    def __init__(
        self, table: torch.Tensor, words: torch.Tensor | None, slots: Sequence[Slot]
    ) -> None:
        self.table = table
        self.words = words
        self.slots = slots

    def __len__(self) -> int:
        return len(self.slots)

    @overload
    def __getitem__(self, index: int) -> torch.Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> "ArenaRows": ...
    def __getitem__(self, index: int | slice) -> "torch.Tensor | ArenaRows":
        if isinstance(index, slice):
            return ArenaRows(self.table, self.words, self.slots[index])
        return self.table[self.slots[index]]


class ArenaTensor:
    """An arena as one tensor, its slots as rows; page-locked for CUDA where there is a GPU.

    Without page locks copies still work, only slower; `pinned` says which it is.
    """

    def __init__(self, arena: Arena, *, pin: bool) -> None:
        flat = torch.frombuffer(arena.view, dtype=torch.uint8)
        self._rows = flat.view(arena.slots, stride(arena.slot_nbytes))[:, : arena.slot_nbytes]
        dense = self._rows.is_contiguous()
        self._words = self._rows.view(_unit(arena.slot_nbytes)) if dense else None
        self._flat = flat
        self.pinned = pin and self._register()

    def rows(self, slots: Sequence[Slot]) -> ArenaRows:
        """One uint8 tensor of the block's bytes for each slot; views of the arena."""
        return ArenaRows(self._rows, self._words, slots)

    def close(self) -> None:
        """Unlock the pages. Idempotent."""
        if self.pinned:
            cuda = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            for start in range(0, self._flat.numel(), REGISTER_NBYTES):
                cuda.cudaHostUnregister(self._flat.data_ptr() + start)
            self.pinned = False

    def _register(self) -> bool:
        cuda = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        total, base = self._flat.numel(), self._flat.data_ptr()
        done: list[int] = []
        for start in range(0, total, REGISTER_NBYTES):
            size = min(REGISTER_NBYTES, total - start)
            if int(cuda.cudaHostRegister(base + start, size, 0)) != 0:
                for each in done:
                    cuda.cudaHostUnregister(base + each)
                return False
            done.append(start)
        return True
