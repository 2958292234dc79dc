"""Blocks that are found without a question, in memory that a writer changes meanwhile."""

from random import Random

import pytest

from kvtier.core.blocks import BlockKey, Slot
from kvtier.core.slot_index import RUN, SlotIndex

SLOTS = 512


def keys(seed: int, count: int) -> list[BlockKey]:
    rng = Random(seed)
    return [BlockKey(rng.randbytes(16)) for _ in range(count)]


def slots(first: int, count: int) -> list[Slot]:
    return [Slot(first + n) for n in range(count)]


@pytest.fixture
def shared() -> tuple[SlotIndex, SlotIndex]:
    """The ledger's, and an engine's of the same memory."""
    memory = memoryview(bytearray(SlotIndex.nbytes(SLOTS)))
    return SlotIndex(SLOTS, memory), SlotIndex(SLOTS, memory)


def test_what_came_together_is_found_from_wherever_one_begins(
    shared: tuple[SlotIndex, SlotIndex],
) -> None:
    ledger, engine = shared
    path = keys(1, 3 * RUN + 7)
    ledger.enter(path, slots(40, len(path)))
    for first in range(len(path)):
        assert engine.find(path[first:]) == (slots(40 + first, len(path) - first), 1)
    assert engine.find([*path[:7], *keys(2, 3)]) == (slots(40, 7), 1), "up to the first other one"
    assert engine.find(keys(2, 3)) == ([], 1)
    assert engine.find([]) == ([], 1)


def test_what_lies_anywhere_is_found_too(shared: tuple[SlotIndex, SlotIndex]) -> None:
    ledger, engine = shared
    path, rng = keys(3, 60), Random(3)
    places = [Slot(slot) for slot in rng.sample(range(SLOTS), len(path))]
    for key, slot in zip(path[:20], places, strict=False):  # as loads arrive
        ledger.enter([key], [slot])
    ledger.enter(path[20:], places[20:])
    assert engine.find(path)[0] == places


def test_most_of_a_full_arena_is_found_however_often_it_has_turned_over() -> None:
    """A hint that was overwritten is a question, and no more."""
    index, rng = SlotIndex(SLOTS), Random(5)
    held: dict[Slot, list[BlockKey]] = {}
    for seed in range(600):
        first = Slot(16 * rng.randrange(SLOTS // 16))
        if first in held:
            index.leave(slots(first, 16))
        held[first] = keys(seed, 16)
        index.enter(held[first], slots(first, 16))
    whole = [index.find(path)[0] == slots(first, 16) for first, path in held.items()]
    assert len(whole) == SLOTS // 16
    assert sum(whole) >= 0.9 * len(whole)


def test_what_left_is_found_no_more_and_known_to_have_left(
    shared: tuple[SlotIndex, SlotIndex],
) -> None:
    ledger, engine = shared
    path = keys(7, 12)
    ledger.enter(path, slots(0, 12))
    seen, turn = engine.find(path)
    ledger.leave([Slot(5)])
    assert engine.find(path) == (slots(0, 5), turn + 1)
    assert engine.unmoved(seen, turn) == 5
    assert engine.unmoved(seen[6:], turn) == 6
    ledger.enter([path[5]], [Slot(5)])  # the same block, in the same place
    assert engine.find(path) == (seen, turn + 1)
    assert engine.unmoved(seen, turn) == 5
    assert engine.unmoved(seen, turn + 1) == 12


def test_a_reader_beside_a_writer_is_never_sure_of_what_has_left() -> None:
    """In whatever order they get on: what it finds there it sees to have left."""
    memory = memoryview(bytearray(SlotIndex.nbytes(SLOTS)))
    engine, old, new = SlotIndex(SLOTS, memory), keys(8, 20), keys(9, 20)
    found = list[tuple[list[Slot], int]]()
    ledger = SlotIndex(SLOTS, memory, lambda: found.append(engine.find(old)))
    ledger.enter(old, slots(0, 20))
    found.clear()
    ledger.leave(slots(0, 20))  # found before the turn is told
    ledger.enter(new, slots(0, 20))
    assert len(found) == 1
    assert [engine.unmoved(seen, turn) for seen, turn in found] == [0]


@pytest.mark.parametrize("fence", [0, 1])
def test_a_writer_beside_a_reader_takes_nothing_from_it_unseen(fence: int) -> None:
    memory = memoryview(bytearray(SlotIndex.nbytes(SLOTS)))
    ledger, old, new, times = SlotIndex(SLOTS, memory), keys(8, 20), keys(9, 20), 0
    ledger.enter(old, slots(0, 20))

    def replace() -> None:
        nonlocal times
        if times == fence:
            ledger.leave(slots(0, 20))
            ledger.enter(new, slots(0, 20))
        times += 1

    engine = SlotIndex(SLOTS, memory, replace)
    seen, turn = engine.find(old)
    assert times > fence
    assert engine.unmoved(seen, turn) == 0
    assert engine.find(new) == (slots(0, 20), 2)


def test_nonsense_in_the_memory_is_a_miss(shared: tuple[SlotIndex, SlotIndex]) -> None:
    """Whoever maps an arena can write to it."""
    ledger, engine = shared
    path = keys(11, 8)
    ledger.enter(path, slots(SLOTS - 8, 8))
    for hint in (0, 1, SLOTS - 7, SLOTS, SLOTS + 1, 2**32 - 1):
        for number in range(len(engine._hints)):
            engine._hints[number] = hint
        found = engine.find(path)[0]
        assert found in ([], slots(SLOTS - 8, 8))
    assert engine.find(path)[0] == []
