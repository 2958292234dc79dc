"""vLLM's tiering with kvtier under it, also on the platform where vLLM has none: the CPU."""

import time
from collections.abc import Collection
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from vllm.platforms import current_platform
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    LookupResult,
    OffloadingManager,
    OffloadingWorker,
    OffloadKey,
    PrepareStoreOutput,
    ReqContext,
    TransferResult,
)
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.manager import TieringOffloadingManager
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from kvtier.engine.vllm.settings import SECOND_USE
from kvtier.engine.vllm.sightings import Sightings

Bytes = npt.NDArray[np.int8]


class KvtierSpec(TieringOffloadingSpec):
    """vLLM's tiering; on CUDA and XPU with vLLM's own worker, on the CPU with `CpuWorker`."""

    _cpu_worker: "CpuWorker | None" = None

    def get_manager(self) -> OffloadingManager:
        """See `OffloadingSpec`."""
        manager = super().get_manager()
        asked = any(tier.get("save") == SECOND_USE for tier in self.secondary_tier_configs)
        if asked and not isinstance(manager, SecondUseManager):
            assert isinstance(manager, TieringOffloadingManager)
            manager = SecondUseManager(manager.primary_tier, manager.secondary_tiers)
            self._manager = manager
        return cast("OffloadingManager", manager)

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        """See `OffloadingSpec`."""
        if current_platform.is_cuda_alike() or current_platform.is_xpu():
            return cast("OffloadingWorker", super().get_worker(kv_caches))
        if self._cpu_worker is None:
            region = SharedOffloadRegion(
                engine_id=self._engine_id,
                num_chunks=self.num_chunks,
                rank=self.config.parallel.rank,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk,
                cpu_page_size=self.cpu_page_size_per_worker,
            )
            self._cpu_worker = CpuWorker(kv_caches, self.blocks_per_chunk, region)
        return self._cpu_worker


class SecondUseManager(TieringOffloadingManager):
    """vLLM's manager that copies a block out of VRAM only when a second request has it.

    vLLM's own `store_threshold` does not go with tiers: it would hold back what they load, too.
    """

    _sightings: Sightings | None = None

    def prepare_store(
        self, keys: Collection[OffloadKey], req_context: ReqContext
    ) -> PrepareStoreOutput | None:
        """See `OffloadingManager`."""
        if self._sightings is None:
            self._sightings = Sightings()
        offered = list(keys)
        wanted = [
            key for key, again in zip(offered, self._sightings.again(offered), strict=True)
            if again or self.primary_tier.lookup(key, req_context) is not LookupResult.MISS
        ]  # fmt: skip
        return cast("PrepareStoreOutput | None", super().prepare_store(wanted, req_context))


class CpuWorker(OffloadingWorker):
    """Copies between vLLM's KV cache and its CPU region where both are host memory.

    A copy has ended when `submit_...` returns: so no block can be reused under it.
    """

    def __init__(
        self, kv_caches: CanonicalKVCaches, blocks_per_chunk: int, region: SharedOffloadRegion
    ) -> None:
        self._region: SharedOffloadRegion | None = region
        self._factor = blocks_per_chunk
        self._refs = kv_caches.group_data_refs
        self._device: list[Bytes] = []  # of each tensor: [blocks, bytes of a page]
        self._host: list[Bytes] = []  # of each tensor: [chunks, blocks of a chunk, bytes of a page]
        for each in kv_caches.tensors:
            page = each.page_size_bytes
            blocks = each.tensor.view(torch.int8)
            self._device.append(blocks.reshape(blocks.shape[0], -1).numpy())
            host = region.create_next_worker_view(page * blocks_per_chunk).numpy()
            self._host.append(host.reshape(len(host), blocks_per_chunk, page))
            assert self._device[-1].shape[1] >= page
            assert np.shares_memory(self._host[-1], host)
        self._finished: list[TransferResult] = []

    def submit_store(
        self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec
    ) -> bool:
        """See `OffloadingWorker`."""
        return self._copy(job_id, src_spec, dst_spec, storing=True)

    def submit_load(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        """See `OffloadingWorker`."""
        return self._copy(job_id, dst_spec, src_spec, storing=False)

    def get_finished(self) -> list[TransferResult]:
        """See `OffloadingWorker`."""
        finished, self._finished = self._finished, []
        return finished

    def wait(self, job_ids: set[int]) -> None:
        """Every copy has ended already."""

    def shutdown(self) -> None:
        """See `OffloadingWorker`."""
        self._device, self._host = [], []
        if self._region is not None:
            self._region.cleanup()
            self._region = None

    def _copy(
        self, job_id: int, blocks: GPULoadStoreSpec, chunks: LoadStoreSpec, *, storing: bool
    ) -> bool:
        assert isinstance(chunks, CPULoadStoreSpec)
        start = time.perf_counter()
        nbytes = first_block = first_chunk = 0
        for group, count in enumerate(blocks.group_sizes):
            skip = blocks.block_indices[group] % self._factor  # of a chunk that is half there
            places = []
            for index in range(count):
                at, sub = divmod(skip + index, self._factor)
                block = int(blocks.block_ids[first_block + index])
                places.append((block, int(chunks.chunk_ids[first_chunk + at]), sub))
            for run in _runs(places):
                nbytes += self._copy_run(group, *run, storing=storing)
            first_block += count
            first_chunk += -(-(count + skip) // self._factor) if count else 0
        seconds = time.perf_counter() - start
        self._finished.append(TransferResult(job_id, True, nbytes, seconds))
        return True

    def _copy_run(
        self, group: int, block: int, chunk: int, sub: int, count: int, *, storing: bool
    ) -> int:
        nbytes = 0
        # numpy, not torch: its small copies cost a fraction, and wait for no thread pool.
        for ref in self._refs[group]:
            size = ref.page_size_bytes
            device = self._device[ref.tensor_idx][block : block + count, :size]
            host = self._host[ref.tensor_idx][chunk : chunk + count, sub, :size]
            if storing:
                host[:] = device
            else:
                device[:] = host
            nbytes += size * count
        return nbytes


def _runs(places: list[tuple[int, int, int]]) -> list[tuple[int, int, int, int]]:
    """Block, chunk, place in the chunk, and length of each run of neighbours on both sides."""
    runs: list[tuple[int, int, int, int]] = []
    for block, chunk, sub in places:
        if runs:
            first_block, first_chunk, first_sub, count = runs[-1]
            if (block, chunk, sub) == (first_block + count, first_chunk + count, first_sub):
                runs[-1] = (first_block, first_chunk, first_sub, count + 1)
                continue
        runs.append((block, chunk, sub, 1))
    return runs
