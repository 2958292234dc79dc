"""Blocks that are found without a question, in memory that a writer changes meanwhile."""

import sys
from collections.abc import Callable
from random import Random
from types import FrameType

import pytest

from kvtier.core import slot_index
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
        for end in range(first, min(len(path), first + 5)):  # also a part that has no hint
            assert engine.find(path, first, end) == (slots(40 + first, end - first), 1)
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


def test_what_stays_is_found_again_once_it_is_hinted_at(
    shared: tuple[SlotIndex, SlotIndex],
) -> None:
    """A hot prompt stays while all around it turns over: its hints go one by one."""
    ledger, engine = shared
    hot = keys(1, 200)
    ledger.enter(hot, slots(0, 200))
    for seed in range(200):
        ledger.enter(keys(100 + seed, 300), slots(200, 300))
        ledger.leave(slots(200, 300))
    turn = 201
    assert engine.find(hot) == ([], turn)
    ledger.hint(hot, slots(0, 200))
    assert engine.find(hot) == (slots(0, 200), turn)


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


FEW = 3  # blocks of which every step is interrupted


def interrupted(call: Callable[[], object], at: int, act: Callable[[], None]) -> int:
    """Call `act` before step `at` of what `call` does in the index; how many steps there were."""
    steps = 0

    def trace(frame: FrameType, event: str, _: object) -> object:
        nonlocal steps
        if frame.f_code.co_filename != slot_index.__file__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            if steps == at:
                act()
            steps += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return steps


class Replaced:
    """Blocks that leave their slots while somebody looks, and others that come into these."""

    def __init__(self, fence: Callable[[], None] = lambda: None) -> None:
        memory = memoryview(bytearray(SlotIndex.nbytes(SLOTS)))
        self.ledger, self.engine = SlotIndex(SLOTS, memory), SlotIndex(SLOTS, memory, fence)
        self.old, self.new = keys(8, FEW), keys(9, FEW)
        self.ledger.enter(self.old, slots(0, FEW))
        self.seen, self.turn = list[Slot](), 0

    def replace(self) -> None:
        self.ledger.leave(slots(0, FEW))
        self.ledger.enter(self.new, slots(0, FEW))

    def look(self) -> None:
        self.seen, self.turn = self.engine.find(self.old)

    def right(self) -> int:
        """Of what was seen of the old ones, what an engine takes to have been there since."""
        return self.engine.unmoved(self.seen, self.turn)


@pytest.mark.parametrize("who", ["writer", "reader"])
def test_what_is_found_while_it_leaves_is_seen_to_have_left(who: str) -> None:
    """At whatever step of the one the other one goes on."""
    at, steps, found = 0, 1, 0
    while at < steps:
        it = Replaced()
        call, act = (it.replace, it.look) if who == "writer" else (it.look, it.replace)
        steps = interrupted(call, at, act)
        found += bool(it.seen)
        assert it.right() == 0, f"step {at}"
        at += 1
    assert 0 < found < steps


@pytest.mark.parametrize("fence", [0, 1])
def test_what_is_seen_is_put_in_order_between_the_turn_the_keys_and_the_copy(fence: int) -> None:
    times = 0

    def put_in_order() -> None:
        nonlocal times
        if times == fence:
            it.replace()
        times += 1

    it = Replaced(put_in_order)
    it.look()
    assert times == 2
    assert bool(it.seen) == bool(fence), "the keys were looked at behind the first"
    assert it.right() == 0


def test_what_was_copied_is_put_in_order_before_it_is_looked_at() -> None:
    it = Replaced(lambda: times.append(it.replace()) if len(times) == 2 else times.append(None))
    times = list[None]()
    it.look()
    assert it.right() == 0
    assert len(times) == 3


def test_keys_that_are_alike_in_part_are_not_taken_for_each_other(
    shared: tuple[SlotIndex, SlotIndex],
) -> None:
    ledger, engine = shared
    path = keys(10, 6)
    ledger.enter(path, slots(7, 6))
    for place in range(16):
        other = [BlockKey(bytes(b ^ (i == place) for i, b in enumerate(key))) for key in path]
        assert engine.find(other) == ([], 1)
        assert engine.find([*path[:3], *other[3:]]) == (slots(7, 3), 1)


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
