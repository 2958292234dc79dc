"""Long work on the loop lets everything else have its turn."""

import asyncio
import time
from collections.abc import Iterator

import pytest

from kvtier.core.blocks import BlockKey
from kvtier.core.directory import Directory, Told
from kvtier.core.tiers import Tier
from kvtier.router.pace import SLICE_S, Pace
from tests.router.support import eventually


class Rounds:
    """Counts the rounds of the loop."""

    def __init__(self) -> None:
        self.now = 0
        self.task = asyncio.ensure_future(self._count())

    async def _count(self) -> None:
        while True:
            self.now += 1
            await asyncio.sleep(0)


@pytest.fixture
async def rounds():
    it = Rounds()
    yield it
    it.task.cancel()


def slow(rounds: Rounds, seen: list[int]) -> Iterator[None]:
    """Steps that each take more than a slice."""
    for _ in range(5):
        end = time.perf_counter() + 2 * SLICE_S
        while time.perf_counter() < end:
            pass
        seen.append(rounds.now)
        yield


async def test_at_most_one_slice_is_worked_in_a_round_whoever_has_work(rounds):
    pace, seen = Pace(), []
    await asyncio.gather(*(pace.through(slow(rounds, seen)) for _ in range(8)))
    assert len(seen) == 40
    assert len(set(seen)) == 40


async def test_work_that_fails_or_is_cut_off_leaves_the_turn_to_the_next(rounds):
    pace, seen = Pace(), []

    def bad() -> Iterator[None]:
        yield
        raise ValueError("bad")

    cut = asyncio.ensure_future(pace.through(iter(lambda: seen.append(0), 1)))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    cut.cancel()
    with pytest.raises(ValueError, match="bad"):
        await pace.through(bad())
    await pace.through(iter([1, 2, 3]))
    assert cut.cancelled()


async def test_a_directory_is_tidied_in_the_background():
    directory = Directory()
    pace = Pace()
    tidying = asyncio.ensure_future(pace.tidy(directory))
    keys = b"".join(BlockKey(n.to_bytes(1, "big") * 16) for n in range(200))
    directory.snapshot("node", 1, 0, [Told(Tier.HOST, keys)])
    directory.remove("node")
    assert directory.blocks == 200
    await eventually(lambda: not directory.blocks, "the room was given back")
    tidying.cancel()
