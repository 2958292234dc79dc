"""Copies between a pool of blocks and host memory, whatever lies beside what."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.arena import Arena
from kvtier.core.blocks import Attention, BlockLayout, LayerGroup, Slot
from kvtier.engine.copier import ArenaTensor, BlockTensor
from kvtier.engine.paged import PagedKV
from kvtier.testing.paged import BLOCKS, PagedKVTests

POOL = 12
PAGES = BlockLayout((LayerGroup(Attention.FULL, 1, 1, 64),), 32, "uint8")  # slots without gaps
GAPS = BlockLayout((LayerGroup(Attention.FULL, 1, 1, 3),), 5, "uint8")  # gaps, and odd sizes


class TestBlockTensor(PagedKVTests):
    @pytest.fixture(params=[PAGES, GAPS], ids=["pages", "gaps"])
    def paged(self, request: pytest.FixtureRequest) -> PagedKV:
        storage = torch.zeros(BLOCKS, request.param.nbytes, dtype=torch.uint8)
        return BlockTensor(request.param, storage)


orders = st.lists(st.integers(0, POOL - 1), unique=True, max_size=POOL)


@pytest.mark.parametrize("layout", [PAGES, GAPS], ids=["pages", "gaps"])
@settings(deadline=None)
@given(blocks=orders, slots=orders)
def test_every_block_goes_to_its_own_place(
    layout: BlockLayout, blocks: list[int], slots: list[int]
) -> None:
    count = min(len(blocks), len(slots))
    blocks, slots = blocks[:count], slots[:count]
    pool = torch.randint(0, 256, (POOL, layout.nbytes), dtype=torch.uint8)
    arena = Arena.create(layout.nbytes, POOL, prefault=False)
    rows = ArenaTensor(arena, pin=False).rows([Slot(slot) for slot in slots])
    BlockTensor(layout, pool).gather(blocks, rows).wait()
    for slot in range(POOL):
        expected = bytes(layout.nbytes)
        if slot in slots:
            expected = pool[blocks[slots.index(slot)]].numpy().tobytes()
        assert bytes(arena.slot(Slot(slot))) == expected
    back = torch.zeros_like(pool)
    BlockTensor(layout, back).scatter(blocks, rows).wait()
    for block in range(POOL):
        assert torch.equal(
            back[block], pool[block] if block in blocks else torch.zeros_like(back[0])
        )
    arena.close()


def test_host_memory_need_not_be_an_arena() -> None:
    pool = torch.randint(0, 256, (3, PAGES.nbytes), dtype=torch.uint8)
    rows = [torch.zeros(PAGES.nbytes, dtype=torch.uint8) for _ in range(2)]
    BlockTensor(PAGES, pool).gather([2, 0], rows).wait()
    assert torch.equal(torch.stack(rows), pool[[2, 0]])
    back = torch.zeros_like(pool)
    BlockTensor(PAGES, back).scatter([1, 2], rows).wait()
    assert torch.equal(back, torch.stack([torch.zeros_like(rows[0]), *rows]))


def test_some_rows_of_an_arena_are_rows_of_it() -> None:
    arena = Arena.create(PAGES.nbytes, 3, prefault=False)
    arena.slot(Slot(2))[:] = bytes([7]) * PAGES.nbytes
    rows = ArenaTensor(arena, pin=False).rows([Slot(0), Slot(2), Slot(1)])
    assert len(rows) == 3
    assert [int(row[0]) for row in rows[1:]] == [7, 0]
    arena.close()
