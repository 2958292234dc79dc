import pytest

from kvtier.stores.base import Store
from kvtier.stores.memory import MemoryStore
from kvtier.testing.stores import StoreTests, frames, key


class TestMemoryStore(StoreTests):
    @pytest.fixture
    def store(self) -> Store:
        return MemoryStore(64 * 2**20)


def test_the_capacity_is_kept_to_the_byte() -> None:
    store = MemoryStore(2000)
    assert store.write([*frames(["a"], 1500), *frames(["b"], 501), *frames(["c"], 500)]) == [
        True,
        False,
        True,
    ]
    assert store.count([key("a"), key("b")]) == 1
    assert store.write(frames(["a"], 1501)) == [False]
    assert [*store.scan()] == [(key("a"), 1500), (key("c"), 500)]
    store.delete([key("a")])
    assert store.write(frames(["b"], 1500)) == [True]
