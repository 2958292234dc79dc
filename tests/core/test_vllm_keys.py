"""vLLM's chain of hashes, against values that vLLM 0.32.0 itself computed."""

import pytest

from kvtier.core import vllm_keys
from kvtier.core.vllm_keys import (
    Media,
    block_hashes,
    extra_keys,
    keys_of,
    none_hash,
    prompt_keys,
    space_root,
)

NONE = "9bd96a485ad84efdafb72ee48a1d7a69bcead0f8f0433173941b276b9581eef0"
NONE_0 = "4e1195df020de59e0d65a33a4279f1183e7ae4e5d980e309f8b55adff2e61c3e"
TOKENS = [0, 23, 24, 255, 256, 65535, 65536, 4294967295, 1, 2, 3, 4]  # every width of CBOR
PLAIN = [
    "dc7fbfd287fac7b6243222eb8a406c3a145df86542e11806ae74c52db0f7a8e2",
    "1574b893f40f230a5e277f8b86c4ed770e35331efd2a8a6e2e01c476a1e11e0a",
    "d19e78b122fb06d6eb32afe224edc8353e31346db5ba7a739b1e4bc53329e010",
]
WITH_EXTRAS = [
    "9fa011d16422807d40b33522add0aefcd052c16a3c914afb1a4cb0619c27ccef",
    "6c10b2c2faff07a74b990197f7afb98089af275ca13ee6c7ddb9fc2c92f23bc0",
    "cf22583378746dc97a7ae4f98c8a6bf57311e6c43f91956fafb0ddf1fa0756e3",
]


def test_the_first_parent_hangs_on_the_seed():
    assert none_hash().hex() == NONE
    assert none_hash("0").hex() == NONE_0


def test_plain_blocks():
    assert [each.hex() for each in block_hashes(none_hash(), TOKENS, 4)] == PLAIN


def test_a_partial_block_has_no_hash():
    assert [each.hex() for each in block_hashes(none_hash(), TOKENS[:11], 4)] == PLAIN[:2]
    assert block_hashes(none_hash(), TOKENS[:3], 4) == []


def test_adapter_media_and_salt_in_their_order():
    found = block_hashes(
        none_hash(), TOKENS, 4, adapter=("a", "/b"), media=[Media("pic", 1, 5)], salt="s\u00e4lt"
    )
    assert [each.hex() for each in found] == WITH_EXTRAS


@pytest.mark.parametrize(
    "space",
    [{}, {"salt": "s\u00e4lt"}, {"adapter": ("a", "/b")}, {"adapter": ("a", "/b"), "salt": "s"}],
)
def test_a_router_names_the_blocks_of_a_space_from_tokens_alone(space):
    given = space_root(none_hash(), b"r" * 32, **space)
    hashes = block_hashes(none_hash(), TOKENS, 4, **space)
    assert prompt_keys(given, TOKENS, 4) == keys_of(b"r" * 32, hashes)


@pytest.mark.parametrize("more", [b"x", b"{}", b'["a","b"]', b"[null]", b"[[1,2],3]", b"\xff"])
def test_a_root_that_is_none_is_refused(more):
    with pytest.raises(ValueError):
        prompt_keys(bytes(64) + more, TOKENS, 4)


def test_a_medium_counts_where_it_overlaps():
    media = [Media("late", 8, 4), Media("early", 2, 3)]
    assert extra_keys(0, 4, media=media) == [("mm", "early", 2)]
    assert extra_keys(4, 8, media=media) == [("mm", "early", -2)]
    assert extra_keys(5, 8, media=media) == []
    assert extra_keys(8, 12, media=media) == [("mm", "late", 0)]


def test_a_salt_is_in_the_first_block_only():
    assert extra_keys(0, 4, salt="s") == [("cache_salt", "s")]
    assert extra_keys(4, 8, salt="s") == []


def test_keys_are_apart_by_namespace_and_group():
    hashes = block_hashes(none_hash(), TOKENS, 4)
    found = [*keys_of(b"a", hashes), *keys_of(b"b", hashes), *keys_of(b"a", hashes, group=1)]
    assert len(set(found)) == 9
    assert {len(each) for each in found} == {16}


def test_a_number_beyond_64_bits_is_refused():
    with pytest.raises(ValueError, match="64 bits"):
        vllm_keys.block_hash(b"", [1 << 64], None)
