import random
from pathlib import Path

import pytest

from kvtier.codec.codecs import by_name
from kvtier.codec.frame import decode, encode
from kvtier.core.blocks import BEGINS, Attention, BlockLayout, LayerGroup
from kvtier.errors import CorruptFrame, StoreUnavailable
from kvtier.stores.base import Placed, Store
from kvtier.stores.faulty import Fault, FaultyStore
from kvtier.stores.memory import MemoryStore
from kvtier.testing.stores import StoreTests, content, frames, key
from tests.stores.disk_support import LAYOUT as DISK
from tests.stores.disk_support import blocks, loaded, opened, slot_of_arena

LAYOUT = BlockLayout((LayerGroup(Attention.FULL, 2, 2, 16),), 16, "bfloat16")


def faulty(*faults: Fault | None, **options: object) -> FaultyStore:
    """A store whose next operations have these faults; none come after."""
    plan = iter(faults)
    return FaultyStore(MemoryStore(2**26), lambda operation: next(plan, None), **options)


class TestWithoutFaults(StoreTests):
    @pytest.fixture
    def store(self) -> Store:
        return faulty()


def test_no_answer_leaves_what_came_before() -> None:
    store = faulty(None, Fault.UNAVAILABLE)
    with pytest.raises(StoreUnavailable):
        store.write(frames(["a", "b", "c"]))
    assert store.count([key("a"), key("b")]) == 1


@pytest.mark.parametrize("operation", ["write", "read", "count", "delete", "scan"])
def test_any_operation_can_get_no_answer(operation: str) -> None:
    store = FaultyStore(
        MemoryStore(2**20), lambda asked: Fault.UNAVAILABLE if asked == operation else None
    )
    operations = {
        "write": lambda: store.write(frames(["a"])),
        "read": lambda: store.read([key("a")]),
        "count": lambda: store.count([key("a")]),
        "scan": lambda: store.scan(),
        "delete": lambda: store.delete([key("a")]),
    }
    for name, ask in operations.items():
        if name == operation:
            with pytest.raises(StoreUnavailable, match=name):
                ask()
        else:
            ask()
    store.close()


def test_a_refused_frame_is_not_there() -> None:
    store = faulty(None, Fault.REFUSE)
    assert store.write(frames(["a", "b", "c"])) == [True, False, True]
    assert store.read([key("b"), key("c")]) == [None, content("c", 1000)]


def test_a_lost_frame_stays_lost() -> None:
    store = faulty(None, Fault.LOSE)
    store.write(frames(["a"]))
    assert store.read([key("a")]) == [None]
    assert store.read([key("a")]) == [None]
    assert store.count([key("a")]) == 0


def test_slow_waits_and_then_does_it() -> None:
    waited: list[str] = []
    store = faulty(Fault.SLOW, Fault.SLOW, wait=lambda: waited.append("waited"))
    assert store.write(frames(["a"])) == [True]
    assert store.read([key("a")]) == [content("a", 1000)]
    assert waited == ["waited"] * 2


def test_damage_is_what_the_frame_check_finds_wherever_it_is() -> None:
    pick = random.Random(5).randrange
    block = memoryview(random.Random(6).randbytes(LAYOUT.nbytes))
    inner = MemoryStore(2**20)
    inner.write([(key("a"), encode(key("a"), BEGINS, block, LAYOUT, by_name("raw")))])
    whole = inner.read([key("a")])[0]
    for fault in (Fault.CORRUPT, Fault.TORN):
        store = FaultyStore(inner, lambda _, fault=fault: fault, pick=pick)
        seen = set()
        for _ in range(100):
            (frame,) = store.read([key("a")])
            assert frame is not None
            seen.add(bytes(frame))
            with pytest.raises(CorruptFrame):
                decode(key("a"), frame, memoryview(bytearray(LAYOUT.nbytes)), LAYOUT)
        assert len(seen) > 50
        assert whole not in seen
    assert inner.read([key("a")]) == [whole]


def test_damage_in_the_place_that_was_read_into_is_found_too(tmp_path: Path) -> None:
    pick = random.Random(7).randrange
    with opened(tmp_path) as inner:
        inner.write(blocks(["a"]))
        assert loaded(FaultyStore(inner, lambda _: None), ["a"]) == [content("a", DISK.nbytes)]
        for fault in (Fault.CORRUPT, Fault.TORN):
            store = FaultyStore(inner, lambda _, fault=fault: fault, pick=pick)
            for _ in range(100):
                slot = slot_of_arena(bytes(DISK.nbytes))
                assert isinstance(store.read_into([key("a")], [slot])[0], Placed)
                assert loaded(store, ["a"]) == [None]
        assert loaded(FaultyStore(inner, lambda _: Fault.LOSE), ["a"]) == [None]
        assert inner.read([key("a")]) == [None]
