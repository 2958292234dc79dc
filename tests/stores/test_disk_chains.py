"""What comes before a block is found again with it."""

from contextlib import closing
from pathlib import Path

from kvtier.codec.codecs import CODECS, RAW
from kvtier.codec.frame import HEADER_NBYTES, encode
from kvtier.core.blocks import BEGINS, BlockKey
from kvtier.node.tuner import Tuner
from kvtier.stores.base import ChainedStore
from kvtier.stores.disk import DiskStore
from kvtier.stores.memory import MemoryStore
from kvtier.testing.codecs import numbers
from kvtier.testing.stores import content, key
from tests.stores.disk_support import (
    LAYOUT,
    ROOM,
    at,
    decoded,
    loaded,
    opened,
    overwrite,
    slot_of_arena,
)

PATH = [key(n) for n in range(10)]
CHAIN = dict(zip(PATH, [BEGINS, *PATH], strict=False))


def linked(name: int, before: BlockKey) -> tuple[BlockKey, list[bytes | memoryview]]:
    slot = slot_of_arena(content(name, LAYOUT.nbytes))
    return key(name), encode(key(name), before, slot, LAYOUT, RAW)


def test_what_an_earlier_life_wrote_names_the_block_before(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        assert isinstance(store, ChainedStore)
        wanted = [linked(n, CHAIN[key(n)]) for n in range(10)]
        assert store.write(wanted[::-1]) == [True] * 10
        assert store.take_before() == {}, "who writes a block knows it already"
    for _ in range(2):
        with opened(tmp_path) as store:
            assert len([*store.scan()]) == 10
            before = store.take_before()
            assert before == CHAIN
            held = {each for each, _ in store.scan()}
            assert {id(each) for each in before.values()} <= {id(each) for each in (BEGINS, *held)}
            assert store.take_before() == {}, "told once: it takes memory"
            assert loaded(store, range(10)) == [content(n, LAYOUT.nbytes) for n in range(10)]


def test_what_is_no_frame_of_this_version_names_nothing(tmp_path: Path) -> None:
    """It lies there until whoever asks for the names deletes it."""
    with opened(tmp_path) as store:
        assert store.write([linked(n, CHAIN[key(n)]) for n in range(2)]) == [True] * 2
        assert store.write([(key(2), [b"KVTF\x01" + bytes(59), bytes(4096)])]) == [True]
    with opened(tmp_path) as store:
        assert store.take_before() == {key(n): CHAIN[key(n)] for n in range(2)}
        assert {each for each, _ in store.scan()} == {key(n) for n in range(3)}
        store.delete([key(2)])
    with opened(tmp_path) as store:
        assert {each for each, _ in store.scan()} == {key(n) for n in range(2)}


def test_frames_of_every_codec_name_it(tmp_path: Path) -> None:
    """Also those that are not written as they lie in the arena."""
    block = memoryview(numbers(LAYOUT))
    names = [key(codec.name) for codec in CODECS]
    frames = [
        encode(name, key("before"), block, LAYOUT, codec)
        for name, codec in zip(names, CODECS, strict=True)
    ]
    with opened(tmp_path) as store:
        assert store.write([*zip(names, frames, strict=True)]) == [True] * len(names)
    with opened(tmp_path) as store:
        assert store.take_before() == dict.fromkeys(names, key("before"))
        assert store.read(names) == [b"".join(each) for each in frames]


def test_a_damaged_word_for_it_is_none(tmp_path: Path) -> None:
    """And costs the block, whose frame proves all of its header, when that is read."""
    with opened(tmp_path) as store:
        store.write([linked(n, CHAIN[key(n)]) for n in (4, 5)])
    file, record = at(tmp_path, key(5))
    overwrite(file, record + 4096 - HEADER_NBYTES + 60, b"wrong")
    with opened(tmp_path) as store:
        assert store.take_before() == {key(4): key(3)}
        assert loaded(store, [4, 5]) == [content(4, LAYOUT.nbytes), None]


def test_a_metered_store_tells_it_too(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.write([linked(4, key(3))])
    tuner = Tuner("disk", LAYOUT, 1, 1)
    with closing(tuner.metered(DiskStore(tmp_path, ROOM))) as store:
        assert isinstance(store, ChainedStore)
        assert store.take_before() == {key(4): key(3)}
        assert decoded(4, store.read([key(4)])[0]) == content(4, LAYOUT.nbytes)
    with closing(tuner.metered(MemoryStore(ROOM))) as other:
        assert isinstance(other, ChainedStore)
        assert other.take_before() == {}
