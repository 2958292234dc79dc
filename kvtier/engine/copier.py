"""Copies between VRAM and the arena: on a side stream where VRAM is a GPU's."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Final

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


class BlockTensor:
    """A `PagedKV` over one uint8 tensor of shape [blocks, layout.nbytes], on any device."""

    def __init__(self, layout: BlockLayout, storage: torch.Tensor) -> None:
        if storage.dtype != torch.uint8 or storage.dim() != 2 or not storage.is_contiguous():
            raise ValueError("storage must be a contiguous uint8 tensor of two dimensions")
        if storage.shape[1] != layout.nbytes:
            raise ValueError(f"storage rows have {storage.shape[1]} bytes, blocks {layout.nbytes}")
        self.layout = layout
        # Copies of wide numbers are half as fast again as copies of bytes (torch 2.13, CPU).
        self._unit = torch.int64 if layout.nbytes % 8 == 0 else torch.uint8
        self._storage = storage.view(self._unit)
        self._stream = _side_stream(storage.device)

    def gather(self, block_ids: Sequence[int], out: Sequence[torch.Tensor]) -> _Now | _OnStream:
        """See `PagedKV.gather`."""
        return self._copy(*_merged(self._rows(block_ids), [each.view(self._unit) for each in out]))

    def scatter(self, block_ids: Sequence[int], source: Sequence[torch.Tensor]) -> _Now | _OnStream:
        """See `PagedKV.scatter`."""
        wide = [each.view(self._unit) for each in source]
        return self._copy(*_merged(wide, self._rows(block_ids)))

    def _rows(self, block_ids: Sequence[int]) -> list[torch.Tensor]:
        return [self._storage[block] for block in block_ids]

    def _copy(
        self, source: Sequence[torch.Tensor], target: Sequence[torch.Tensor]
    ) -> _Now | _OnStream:
        if self._stream is None:
            for there, here in zip(target, source, strict=True):
                there.copy_(here)
            return _Now()
        # The engine's own stream may still be writing the blocks.
        self._stream.wait_stream(torch.cuda.current_stream(self._storage.device))
        with torch.cuda.stream(self._stream):
            for there, here in zip(target, source, strict=True):
                there.copy_(here, non_blocking=True)
        return _OnStream(self._stream)


def _merged(
    source: Sequence[torch.Tensor], target: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The same copies with neighbours on both sides taken together: fewer, larger ones."""
    starts: list[int] = []  # of runs: positions in `source`
    ends = (0, 0)
    for at, (here, there) in enumerate(zip(source, target, strict=True)):
        begins = here.data_ptr(), there.data_ptr()
        if begins != ends:
            starts.append(at)
        ends = begins[0] + here.nbytes, begins[1] + there.nbytes
    runs = list(pairwise([*starts, len(source)]))
    return (
        [_run(source[start], end - start) for start, end in runs],
        [_run(target[start], end - start) for start, end in runs],
    )


def _run(first: torch.Tensor, count: int) -> torch.Tensor:
    """A view of `count` neighbours of one size in the same memory, from `first` on."""
    if count == 1:
        return first
    return first.as_strided((first.numel() * count,), (1,), first.storage_offset())


class ArenaTensor:
    """An arena as one tensor, its slots as rows; page-locked for CUDA where there is a GPU.

    Without page locks copies still work, only slower; `pinned` says which it is.
    """

    def __init__(self, arena: Arena, *, pin: bool) -> None:
        flat = torch.frombuffer(arena.view, dtype=torch.uint8)
        self._rows = flat.view(arena.slots, stride(arena.slot_nbytes))[:, : arena.slot_nbytes]
        self._flat = flat
        self.pinned = pin and self._register()

    def rows(self, slots: Sequence[Slot]) -> list[torch.Tensor]:
        """One uint8 tensor of the block's bytes for each slot; views of the arena."""
        return [self._rows[slot] for slot in slots]

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
