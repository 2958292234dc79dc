"""vLLM's KV events in both forms of the wire, as captured from a real engine's structure."""

import itertools

import msgpack
import pytest

from kvtier.core.blocks import BEGINS
from kvtier.core.vllm_keys import block_hashes, keys_of, none_hash
from kvtier.engine.vllm.events import Residency, decode
from kvtier.errors import RemoteProtocolError

BLOCK = 4
ROOT = b"root"
TOKENS = list(range(100, 112))
NONE = none_hash()


def short(whole: bytes) -> int:
    return int.from_bytes(whole[-8:], "big")


def stored(hashes, tokens, parent=None, extras=None, **more):
    return {
        "type": "BlockStored", "block_hashes": hashes, "parent_block_hash": parent,
        "token_ids": tokens, "block_size": BLOCK, "lora_id": None, "medium": "GPU",
        "lora_name": None, "extra_keys": extras, "group_idx": 0, **more,
    }  # fmt: skip


def removed(hashes, **more):
    return {"type": "BlockRemoved", "block_hashes": hashes, "medium": "GPU", "group_idx": 0, **more}


def as_array(event):
    return [event["type"], *itertools.islice((v for k, v in event.items() if k != "type"), 9)]


def batch(*events):
    return decode(msgpack.packb([1.5, list(events), 0]))


@pytest.fixture
def residency() -> Residency:
    return Residency(NONE, ROOT, BLOCK)


def plain():
    hashes = block_hashes(NONE, TOKENS, BLOCK)
    return hashes, [short(each) for each in hashes], keys_of(ROOT, hashes)


@pytest.mark.parametrize("form", [dict, as_array])
@pytest.mark.parametrize("whole", [True, False])
def test_blocks_come_and_go(residency, form, whole):
    hashes, shorts, keys = plain()
    names = hashes if whole else shorts
    assert residency.apply(batch(form(stored(names, TOKENS)))) == [(key, True) for key in keys]
    assert residency.apply(batch(form(removed(names[2:])))) == [(keys[2], False)]
    assert residency.keys() == keys[:2]


def test_a_later_block_is_chained_to_its_parent(residency):
    _, shorts, keys = plain()
    residency.apply(batch(stored(shorts[:1], TOKENS[:4])))
    changes = residency.apply(batch(stored(shorts[1:], TOKENS[4:], parent=shorts[0])))
    assert changes == [(keys[1], True), (keys[2], True)]


def test_the_block_before_each_is_known_for_as_long_as_it_is_held(residency):
    _, shorts, keys = plain()
    residency.apply(batch(stored(shorts[:2], TOKENS[:8])))
    residency.apply(batch(stored(shorts[2:], TOKENS[8:], parent=shorts[1])))
    assert residency.before == {keys[0]: BEGINS, keys[1]: keys[0], keys[2]: keys[1]}
    residency.apply(batch(removed(shorts[1:2])))
    assert residency.before == {keys[0]: BEGINS, keys[2]: keys[1]}
    residency.clear()
    assert not residency.before


def test_a_salt_is_found_out_and_proved(residency):
    salted = block_hashes(NONE, TOKENS, BLOCK, salt="tenant")
    names = [short(each) for each in salted]
    changes = residency.apply(batch(stored(names, TOKENS, extras=[["tenant"], None, None])))
    assert changes == [(key, True) for key in keys_of(ROOT, salted)]


def test_what_cannot_be_proved_is_not_taken(residency):
    _, shorts, _ = plain()
    assert residency.apply(batch(stored(shorts[1:], TOKENS[4:], parent=12345))) == []
    assert residency.apply(batch(stored(shorts, [7, *TOKENS[1:]]))) == []
    lora = stored(shorts, TOKENS, extras=[["a"]] * 3, lora_name="a")
    assert residency.apply(batch(lora)) == []
    assert residency.unknown == 8


def test_an_adapters_blocks_are_named_where_its_path_is_known():
    residency = Residency(NONE, ROOT, BLOCK, {"a": "/adapters/a"})
    for salt in ("", "tenant"):
        whole = block_hashes(NONE, TOKENS, BLOCK, adapter=("a", "/adapters/a"), salt=salt)
        extras = [["a", *([salt] if salt else [])], ["a"], ["a"]]
        event = stored([short(each) for each in whole], TOKENS, extras=extras, lora_name="a")
        assert residency.apply(batch(event)) == [(key, True) for key in keys_of(ROOT, whole)]
    other = stored([1, 2, 3], TOKENS, extras=[["b"]] * 3, lora_name="b")
    assert residency.apply(batch(other)) == []


def test_all_cleared_means_vram_only(residency):
    _, shorts, keys = plain()
    residency.apply(batch(stored(shorts, TOKENS)))
    lower = [stored(shorts, TOKENS, medium="CPU"), removed(shorts, medium="STORAGE")]
    assert residency.apply(batch(*lower)) == []
    changes = residency.apply(batch({"type": "AllBlocksCleared"}))
    assert changes == [(key, False) for key in keys]
    assert residency.keys() == []


def test_a_block_told_twice_is_held_once(residency):
    _, shorts, keys = plain()
    residency.apply(batch(stored(shorts, TOKENS), stored(shorts, TOKENS)))
    assert residency.keys() == keys
    residency.apply(batch(removed(shorts), removed(shorts)))
    assert residency.keys() == []


@pytest.mark.parametrize(
    "payload",
    [
        b"", b"\xc1", msgpack.packb(3), msgpack.packb([1.0]), msgpack.packb([1.0, 3]),
        msgpack.packb([1.0, [3]]), msgpack.packb([1.0, [{"no": "type"}]]),
    ],
)  # fmt: skip
def test_what_is_no_batch_is_refused(payload):
    with pytest.raises(RemoteProtocolError):
        decode(payload)


@pytest.mark.parametrize(
    "event",
    [
        stored([1], [1, 2, 3]), stored("x", TOKENS), stored([1.5], TOKENS[:4]),
        stored([b"short"], TOKENS[:4]), removed(3), stored([1], TOKENS[:4], block_size=0),
        stored([1], None),
    ],
)  # fmt: skip
def test_an_event_that_makes_no_sense_is_refused(residency, event):
    with pytest.raises(RemoteProtocolError):
        residency.apply(batch(event))
