"""What only a GPU can show: page-locked arenas, and copies at the speed of pinned memory."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from kvtier.arena import Arena
from kvtier.core.blocks import Attention, BlockLayout, LayerGroup, Namespace, Slot
from kvtier.core.tiers import Tier
from kvtier.engine.copier import ArenaTensor, BlockTensor
from kvtier.engine.paged import PagedKV
from kvtier.engine.tier import EngineTier
from kvtier.testing.paged import BLOCKS as SUITE_BLOCKS
from kvtier.testing.paged import PagedKVTests
from tests.launching import Process, node_toml

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
LAYOUT = BlockLayout((LayerGroup(Attention.FULL, 32, 8, 64),), 32, "bfloat16")  # 2 MiB
BLOCKS = 64


class TestBlocksInVRAM(PagedKVTests):
    @pytest.fixture
    def paged(self) -> PagedKV:
        storage = torch.zeros(SUITE_BLOCKS, LAYOUT.nbytes, dtype=torch.uint8, device="cuda")
        return BlockTensor(LAYOUT, storage)


def test_two_processes_lock_the_pages_of_one_arena() -> None:
    arena = Arena.create(LAYOUT.nbytes, BLOCKS)
    ours = ArenaTensor(arena, pin=True)
    assert ours.pinned
    code = f"""
from kvtier.arena import Arena
from kvtier.engine.copier import ArenaTensor
import os
theirs = ArenaTensor(Arena.attach(os.dup({arena.fd}), {LAYOUT.nbytes}, {BLOCKS}), pin=True)
print(theirs.pinned)
theirs.close()
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        pass_fds=[arena.fd],
        check=True,
    )
    assert done.stdout == "True\n"
    ours.close()


def test_copies_run_at_the_speed_of_pinned_memory() -> None:
    arena = ArenaTensor(Arena.create(LAYOUT.nbytes, BLOCKS), pin=True)
    storage = torch.randint(0, 255, (BLOCKS, LAYOUT.nbytes), dtype=torch.uint8, device="cuda")
    paged = BlockTensor(LAYOUT, storage)
    rows = arena.rows([Slot(slot) for slot in range(BLOCKS)])
    pinned = torch.empty_like(storage, device="cpu", pin_memory=True)
    ours, theirs = [], []
    for _ in range(20):
        start = time.perf_counter()
        paged.gather(range(BLOCKS), rows).wait()
        ours.append(time.perf_counter() - start)
        start = time.perf_counter()
        pinned.copy_(storage, non_blocking=True)
        torch.cuda.synchronize()
        theirs.append(time.perf_counter() - start)
    assert torch.equal(torch.stack([*rows]), pinned)
    print(f"{min(theirs) / min(ours):.2f} of the speed of pinned memory")
    arena.close()


def test_blocks_in_vram_come_back_byte_for_byte(tmp_path: Path) -> None:
    with Process("node", node_toml(tmp_path, host="256MiB"), tmp_path):
        storage = torch.randint(0, 255, (BLOCKS, LAYOUT.nbytes), dtype=torch.uint8, device="cuda")
        before = storage.clone()
        namespace = Namespace("model", "weights", LAYOUT)
        paged = BlockTensor(LAYOUT, storage)
        tier = EngineTier(f"{tmp_path}/node.sock", namespace, paged, pin=True)
        keys = tier.keys(range(BLOCKS * 32))
        assert tier.save(keys, 0, range(BLOCKS)) == BLOCKS
        storage.zero_()
        assert tier.restore(keys, 0, range(BLOCKS)) == [Tier.HOST] * BLOCKS
        assert torch.equal(storage, before)
        tier.close()
