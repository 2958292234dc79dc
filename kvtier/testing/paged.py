"""What every engine's paged KV must do. Subclass `PagedKVTests` with a `paged` fixture."""

from collections.abc import Iterator, Sequence
from typing import Final

import pytest
import torch

from kvtier.arena import Arena
from kvtier.core.blocks import Slot
from kvtier.engine.copier import ArenaTensor
from kvtier.engine.paged import PagedKV

BLOCKS: Final = 8
_ROWS: Final = 2 * BLOCKS  # of host memory


def noise(count: int, nbytes: int, seed: int) -> torch.Tensor:
    """`count` rows that depend on nothing but `seed`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, nbytes), dtype=torch.uint8, generator=generator)


class PagedKVTests:
    """Conformance with `PagedKV`, sentence by sentence.

    The `paged` fixture must give one whose blocks 0 to BLOCKS - 1 may be written. All is tried with
    rows of an arena, as a daemon's engine gets them, and with plain tensors.
    """

    @pytest.fixture
    def paged(self) -> PagedKV:
        """The blocks to be tried."""
        raise NotImplementedError("subclass PagedKVTests with a `paged` fixture")

    @pytest.fixture(params=["arena", "tensors"])
    def host(
        self, request: pytest.FixtureRequest, paged: PagedKV
    ) -> Iterator[Sequence[torch.Tensor]]:
        """Host memory of _ROWS blocks, a row each."""
        nbytes = paged.layout.nbytes
        if request.param == "tensors":
            yield [torch.zeros(nbytes, dtype=torch.uint8) for _ in range(_ROWS)]
            return
        arena = Arena.create(nbytes, _ROWS, prefault=False)
        tensor = ArenaTensor(arena, pin=False)
        yield tensor.rows([Slot(number) for number in range(_ROWS)])
        tensor.close()
        arena.close()

    def filled(self, paged: PagedKV, seed: int = 1) -> torch.Tensor:
        """Noise in every block; what they hold now."""
        rows = noise(BLOCKS, paged.layout.nbytes, seed)
        paged.scatter(range(BLOCKS), list(rows.clone())).wait()
        return rows

    def held(self, paged: PagedKV) -> torch.Tensor:
        """What the blocks hold."""
        out = [torch.zeros(paged.layout.nbytes, dtype=torch.uint8) for _ in range(BLOCKS)]
        paged.gather(range(BLOCKS), out).wait()
        return torch.stack(out)

    def test_gather_copies_each_block_to_its_own_row(
        self, paged: PagedKV, host: Sequence[torch.Tensor]
    ) -> None:
        """In any order, neighbours or not; rows that were not named stay as they were."""
        rows = self.filled(paged)
        blocks = [5, 6, 7, 0, 3, 2]
        paged.gather(blocks, host[2 : 2 + len(blocks)]).wait()
        for row, block in zip(host[2:], blocks, strict=False):
            assert torch.equal(row, rows[block])
        for row in (*host[:2], *host[2 + len(blocks) :]):
            assert not row.any()
        assert torch.equal(self.held(paged), rows), "a copy changes nothing"

    def test_scatter_copies_each_row_into_its_block_and_no_other(
        self, paged: PagedKV, host: Sequence[torch.Tensor]
    ) -> None:
        """Blocks that were not named stay as they were."""
        expected = self.filled(paged)
        blocks = [1, 2, 6, 4]
        fresh = noise(len(blocks), paged.layout.nbytes, 2)
        for row, value in zip(host, fresh, strict=False):
            row.copy_(value)
        paged.scatter(blocks, host[: len(blocks)]).wait()
        expected[blocks] = fresh
        assert torch.equal(self.held(paged), expected)

    def test_copies_under_way_at_once_are_each_done_once_waited_for(
        self, paged: PagedKV, host: Sequence[torch.Tensor]
    ) -> None:
        """Waiting for one of them twice, and in any order, is no harm."""
        rows = self.filled(paged)
        copies = [paged.gather([block], host[block : block + 1]) for block in range(BLOCKS)]
        for copy in (*reversed(copies), copies[0]):
            copy.wait()
        assert torch.equal(torch.stack(list(host[:BLOCKS])), rows)

    def test_no_blocks_are_no_copy(self, paged: PagedKV, host: Sequence[torch.Tensor]) -> None:
        """An empty batch ends at once and changes nothing."""
        rows = self.filled(paged)
        paged.gather([], host[:0]).wait()
        paged.scatter([], host[:0]).wait()
        assert torch.equal(self.held(paged), rows)
