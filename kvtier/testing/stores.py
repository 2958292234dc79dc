"""What every store must do. Subclass `StoreTests` with a `store` fixture to prove one's own."""

import hashlib
import itertools
import mmap
import threading
from collections.abc import Sequence
from typing import ClassVar

import pytest

from kvtier.core.blocks import KEY_NBYTES, BlockKey
from kvtier.stores.base import Parts, Placed, PlacingStore, Store

_BIG_NBYTES = 9 * 2**20  # more than one round trip, socket buffer or read takes at once
_THREADS = 8
_DEADLINE_S = 60


def key(name: object) -> BlockKey:
    """A block key that depends on nothing but `name`."""
    return BlockKey(hashlib.sha256(repr(name).encode()).digest()[:KEY_NBYTES])


def content(name: object, nbytes: int) -> bytes:
    """`nbytes` bytes that depend on nothing but `name` and look like noise."""
    return hashlib.shake_128(repr(name).encode()).digest(nbytes)


def frames(names: Sequence[object], nbytes: int = 1000) -> list[tuple[BlockKey, Parts]]:
    """One frame a name, each of two buffers: bytes and a view into something larger."""
    made: list[tuple[BlockKey, Parts]] = []
    for name in names:
        data = content(name, nbytes)
        around = memoryview(b"before" + data + b"after")
        made.append((key(name), [data[:64], around[70 : 6 + nbytes]]))
    return made


class StoreTests:
    """Conformance with `Store`, sentence by sentence.

    The `store` fixture must give an empty store with room for 64 MiB, and may close it.
    """

    shared: ClassVar[bool] = False  # True: others use it too, so nothing is told or deleted

    @pytest.fixture
    def store(self) -> Store:
        """The store to be tried."""
        raise NotImplementedError("subclass StoreTests with a `store` fixture")

    def test_what_was_written_is_read_back(self, store: Store) -> None:
        """The bytes of all parts, in order."""
        assert store.write(frames(["a"])) == [True]
        assert _read(store, ["a"]) == [content("a", 1000)]

    def test_a_batch_answers_in_its_own_order(self, store: Store) -> None:
        """Whatever the order of writing."""
        names = [*range(20)]
        assert store.write(frames(names)) == [True] * 20
        asked = [13, 2, 2, 19, 0]
        assert _read(store, asked) == [content(name, 1000) for name in asked]

    def test_what_was_never_written_is_none(self, store: Store) -> None:
        """A miss is a value, and costs the others of its batch nothing."""
        store.write(frames(["there"]))
        assert _read(store, ["missing", "there", "gone"]) == [None, content("there", 1000), None]

    def test_count_ends_at_the_first_gap(self, store: Store) -> None:
        """Keys after a gap don't count."""
        store.write(frames([0, 1, 2, 4, 5]))
        assert store.count([key(n) for n in range(6)]) == 3
        assert store.count([key(n) for n in (4, 5)]) == 2
        assert store.count([key(3)]) == 0

    @pytest.mark.parametrize("there", [0, 1, 15, 16, 17, 79, 80, 299, 300])
    def test_count_is_exact_at_any_length(self, store: Store, there: int) -> None:
        """However the store cuts a long list of keys."""
        store.write(frames(range(there), 64))
        assert store.count([key(n) for n in range(300)]) == there

    def test_empty_batches(self, store: Store) -> None:
        """Nothing asked, nothing answered."""
        assert store.write([]) == []
        assert store.read([]) == []
        assert store.count([]) == 0
        store.delete([])

    def test_the_last_write_of_a_key_wins(self, store: Store) -> None:
        """Also where the frame's length changes, and within one batch."""
        for nbytes in (5000, 100, 9000):
            assert store.write(frames(["a", "b"], nbytes)) == [True, True]
            assert _read(store, ["a", "b"]) == [content("a", nbytes), content("b", nbytes)]
        assert store.write([*frames(["a"], 10), *frames(["a"], 20)]) == [True, True]
        assert _read(store, ["a"]) == [content("a", 20)]
        assert store.count([key("a"), key("b")]) == 2

    def test_a_deleted_frame_is_gone(self, store: Store) -> None:
        """And its neighbours are not; it may be written again. A shared store deletes nothing."""
        store.write(frames(["a", "b", "c"]))
        store.delete([key("b"), key("never there")])
        b = content("b", 1000) if self.shared else None
        assert _read(store, ["a", "b", "c"]) == [content("a", 1000), b, content("c", 1000)]
        assert store.count([key("a"), key("b")]) == (2 if self.shared else 1)
        store.delete([key("b")])
        assert store.write(frames(["b"], 77)) == [True]
        assert _read(store, ["b"]) == [content("b", 77)]

    @pytest.mark.parametrize("nbytes", [65, 4095, 4096, 4097, _BIG_NBYTES])
    def test_frames_of_any_size(self, store: Store, nbytes: int) -> None:
        """Also some that are larger than what one round trip carries."""
        names = ["x", "y", "z"]
        assert store.write(frames(names, nbytes)) == [True] * 3
        assert _read(store, names) == [content(name, nbytes) for name in names]

    def test_a_frame_of_many_parts(self, store: Store) -> None:
        """More buffers than one system call takes, empty ones among them."""
        data = content("many", 3000)
        parts = [data[n : n + 1] for n in range(3000)]
        parts[1500:1500] = [b"", b""]
        assert store.write([(key("many"), parts)]) == [True]
        assert _read(store, ["many"]) == [data]

    def test_parts_may_change_once_write_has_returned(self, store: Store) -> None:
        """The arena's slot behind a view belongs to somebody else by then."""
        slot = bytearray(content("a", 500))
        assert store.write([(key("a"), [memoryview(slot)])]) == [True]
        slot[:] = bytes(500)
        assert _read(store, ["a"]) == [content("a", 500)]

    def test_what_is_read_into_a_place_is_the_frame(self, store: Store) -> None:
        """Of a `PlacingStore`: the head and the place together, or the frame as `read` gives it."""
        if not isinstance(store, PlacingStore):
            return
        block, *places = (memoryview(mmap.mmap(-1, 2**16)) for _ in range(4))
        block[:] = content("block", 2**16)
        assert store.write([(key("a"), [b"h" * 64, block])]) == [True]
        assert store.write(frames(["b"])) == [True]
        found = store.read_into([key("a"), key("none"), key("b")], places)
        whole = [
            each.head + bytes(place) if isinstance(each, Placed) else each
            for each, place in zip(found, places, strict=True)
        ]
        assert whole == [b"h" * 64 + bytes(block), None, content("b", 1000)]

    def test_a_buffer_that_was_read_outlives_its_frame(self, store: Store) -> None:
        """It belongs to the caller."""
        store.write(frames(["a"], 100_000))
        buffer = store.read([key("a")])[0]
        assert buffer is not None
        store.write(frames(["b"], 100_000))
        store.delete([key("a")])
        store.write(frames(["a"], 100))
        assert bytes(buffer) == content("a", 100_000)

    def test_scan_tells_what_is_held_oldest_first(self, store: Store) -> None:
        """With the bytes of each frame; a shared store tells nothing."""
        store.write([*frames(["a"], 100), *frames(["b"], 200), *frames(["c"], 300)])
        store.delete([key("b")])
        store.write([*frames(["d"], 400), *frames(["a"], 500)])
        held = [(key("c"), 300), (key("d"), 400), (key("a"), 500)]
        assert [*store.scan()] == ([] if self.shared else held)

    def test_scan_goes_on_while_the_store_changes(self, store: Store) -> None:
        """What is held all along is told."""
        store.write(frames(range(10)))
        scan = store.scan()
        told = [*itertools.islice(scan, 3)]
        store.delete([key(0), key(9)])
        store.write(frames(["new"]))
        told.extend(scan)
        expected = set() if self.shared else {key(n) for n in range(1, 9)}
        assert expected <= {each for each, _ in told}

    def test_many_threads_at_once(self, store: Store) -> None:
        """Each reads only what was written for the key, whole, or nothing."""
        failures: list[str] = []

        def work(thread: int) -> None:
            try:
                for turn in range(15):
                    names = [(thread, turn, n) for n in range(3)]
                    if store.write(frames(names, 20_000)) != [True] * 3:
                        failures.append(f"{names}: refused")
                    if _read(store, names) != [content(name, 20_000) for name in names]:
                        failures.append(f"{names}: other bytes")
                    common = ("common", turn % 4)
                    store.write(frames([common], 30_000))
                    if _read(store, [common])[0] not in (None, content(common, 30_000)):
                        failures.append(f"{common}: other bytes")
                    store.delete([key(common), *(key(name) for name in names[1:])])
                    if store.count([key(name) for name in names]) != (3 if self.shared else 1):
                        failures.append(f"{names}: miscounted")
            except BaseException as error:
                failures.append(repr(error))
                raise

        threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(_THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(_DEADLINE_S)
        assert not any(thread.is_alive() for thread in threads)
        assert failures == []

    def test_close_twice(self, store: Store) -> None:
        """The second time does nothing."""
        store.write(frames(["a"]))
        store.close()
        store.close()


def _read(store: Store, names: Sequence[object]) -> list[bytes | None]:
    found = store.read([key(name) for name in names])
    return [None if frame is None else bytes(frame) for frame in found]
