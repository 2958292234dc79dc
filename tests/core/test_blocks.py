"""Keys, shapes and namespaces: what makes two blocks the same block."""

import hashlib
import hmac
import struct
from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import given

from kvtier.core.blocks import (
    MAX_BLOCK_NBYTES,
    MAX_BLOCK_TOKENS,
    Attention,
    BlockLayout,
    LayerGroup,
    Namespace,
    block_keys,
)

FULL = LayerGroup(Attention.FULL, layers=2, kv_heads=4, head_dim=16)
LAYOUT = BlockLayout((FULL,), block_tokens=2, dtype="float16")
NAMESPACE = Namespace("m", "r", LAYOUT)
TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=40)


# --- keys ---------------------------------------------------------------------------------


def test_keys_are_those_that_sha256sum_gives():
    """Made with printf, sha256sum and xxd: the 32 zero bytes of the root, then each block."""
    keys = block_keys(bytes(32), [1, 2, 3, 0xFFFFFFFF, 5], block_tokens=2)
    assert [key.hex() for key in keys] == [
        "e7ca17d6581d126af7e0c8574cdd8987",
        "dba34cfa9c84669c55cd3285d05a7bec",
    ]


@given(tokens=TOKENS, block_tokens=st.integers(1, 7), root=st.binary(min_size=32, max_size=32))
def test_keys_follow_the_written_definition(tokens, block_tokens, root):
    expected, parent = [], root
    for n in range(len(tokens) // block_tokens):
        block = tokens[n * block_tokens : (n + 1) * block_tokens]
        parent = hashlib.sha256(parent + struct.pack(f"<{len(block)}I", *block)).digest()[:16]
        expected.append(parent)
    assert block_keys(root, tokens, block_tokens) == expected


@given(tokens=TOKENS, more=TOKENS)
def test_a_longer_prompt_keeps_the_keys_of_its_beginning(tokens, more):
    short = block_keys(bytes(32), tokens, 4)
    assert block_keys(bytes(32), tokens + more, 4)[: len(short)] == short


@given(tokens=TOKENS.filter(len), at=st.integers(0, 1000), flip=st.integers(1, 2**32 - 1))
def test_another_token_changes_the_key_of_its_block_and_of_all_after_it(tokens, at, flip):
    at %= len(tokens)
    changed = [*tokens]
    changed[at] ^= flip
    old, new = block_keys(bytes(32), tokens, 4), block_keys(bytes(32), changed, 4)
    first = at // 4
    assert old[:first] == new[:first]
    assert not set(old[first:]) & set(new[first:])


@pytest.mark.parametrize("token", [-1, 2**32])
def test_a_token_id_that_is_none_is_refused(token):
    with pytest.raises(ValueError, match="token ids must be 0 to 4294967295"):
        block_keys(bytes(32), [1, token], 1)


# --- namespaces ---------------------------------------------------------------------------


def test_the_root_is_the_hmac_that_openssl_gives():
    """Made with openssl dgst -sha256 -hmac over the namespace's line of JSON."""
    root = replace(NAMESPACE, tenant_secret=b"s3cret").root()
    assert root.hex() == "f5e786e3a8f62381f8cb557fa49315a3088c914f146732f9db76d728037ccf2a"


def test_the_root_covers_every_field_of_the_namespace():
    layout = r"[[[\"full\",2,4,16,0]],2,\"float16\",0,1]"
    line = f'["kvtier-sha256-1","m","r","{layout}",1,"lora","acme"]'
    namespace = replace(NAMESPACE, adapter="lora", tenant="acme", tenant_secret=b"key")
    assert namespace.root() == hmac.new(b"key", line.encode(), "sha256").digest()


@pytest.mark.parametrize(
    "other",
    [
        replace(NAMESPACE, model="n"),
        replace(NAMESPACE, revision="q"),
        replace(NAMESPACE, scheme="kvtier-sha256-2"),
        replace(NAMESPACE, adapter="lora"),
        replace(NAMESPACE, tenant="acme"),
        replace(NAMESPACE, tenant_secret=b"secret"),
        replace(NAMESPACE, layout=replace(LAYOUT, dtype="bfloat16")),
        replace(NAMESPACE, layout=replace(LAYOUT, block_tokens=4)),
        replace(NAMESPACE, layout=replace(LAYOUT, ranks=2)),
        replace(NAMESPACE, layout=replace(LAYOUT, groups=(replace(FULL, kv_heads=2),))),
    ],
    ids=lambda other: next(
        name
        for name in ("model", "revision", "scheme", "adapter", "tenant", "tenant_secret", "layout")
        if getattr(other, name) != getattr(NAMESPACE, name)
    ),
)
def test_whatever_makes_equal_tokens_unequal_kv_makes_other_keys(other):
    tokens = [*range(8)]
    mine = block_keys(NAMESPACE.root(), tokens, 2)
    assert not set(mine) & set(block_keys(other.root(), tokens, 2))


def test_fields_do_not_run_into_each_other():
    assert (
        Namespace("a", "bc", LAYOUT).root() != Namespace("ab", "c", LAYOUT).root()
    )  # as they would if they were only written one after the other


def test_the_ranks_of_one_engine_name_a_block_alike_and_keep_its_bytes_apart():
    ranks = [replace(LAYOUT, rank=rank, ranks=2) for rank in range(2)]
    roots = {Namespace("m", "r", layout).root() for layout in ranks}
    assert len(roots) == 1
    assert len({layout.id for layout in ranks}) == 2


# --- layouts ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("groups", "dtype", "nbytes_per_token"),
    [
        # MHA, as GPT-2 small: 12 layers, 12 heads of 64, K and V
        ((LayerGroup(Attention.FULL, 12, 12, 64),), "float32", 12 * 2 * 12 * 64 * 4),
        # GQA, as Llama 3 8B: 32 layers, 8 KV heads of 128: 128 KiB a token
        ((LayerGroup(Attention.FULL, 32, 8, 128),), "bfloat16", 131_072),
        # MQA, as Falcon 7B: 32 layers, one KV head of 64
        ((LayerGroup(Attention.FULL, 32, 1, 64),), "float16", 8_192),
        # MLA, as DeepSeek V3: 61 layers, 512 latent + 64 rotary values, one plane
        ((LayerGroup(Attention.LATENT, 61, 1, 576),), "bfloat16", 70_272),
        # MLA in one byte a value
        ((LayerGroup(Attention.LATENT, 61, 1, 576),), "float8_e4m3fn", 35_136),
        # sliding and full layers side by side, as Gemma 3 4B: 29 + 5 layers, 4 KV heads of 256
        (
            (
                LayerGroup(Attention.SLIDING, 29, 4, 256, window=1024),
                LayerGroup(Attention.FULL, 5, 4, 256),
            ),
            "bfloat16",
            139_264,
        ),
    ],
    ids=["MHA", "GQA", "MQA", "MLA", "MLA-fp8", "sliding"],
)
def test_bytes_of_known_models(groups, dtype, nbytes_per_token):
    layout = BlockLayout(groups, block_tokens=16, dtype=dtype)
    assert layout.nbytes_per_token == nbytes_per_token
    assert layout.nbytes == 16 * nbytes_per_token


def groups() -> st.SearchStrategy[LayerGroup]:
    sizes = st.integers(1, 64)
    return st.one_of(
        st.builds(LayerGroup, st.just(Attention.FULL), sizes, sizes, sizes),
        st.builds(LayerGroup, st.just(Attention.LATENT), sizes, st.just(1), sizes),
        st.builds(
            LayerGroup, st.just(Attention.SLIDING), sizes, sizes, sizes, st.integers(1, 4096)
        ),
    )


LAYOUTS = st.builds(
    BlockLayout,
    st.lists(groups(), min_size=1, max_size=3).map(tuple),
    st.integers(1, 64),
    st.sampled_from(["float32", "bfloat16", "int8"]),
    st.integers(0, 3),
    st.integers(4, 8),
)


@given(LAYOUTS)
def test_a_described_layout_parses_back(layout):
    assert BlockLayout.parse(layout.describe()) == layout
    assert BlockLayout.parse(layout.describe()).id == layout.id


@given(LAYOUTS, LAYOUTS)
def test_layouts_are_told_apart_by_what_describes_them(one, other):
    assert (one == other) == (one.describe() == other.describe()) == (one.id == other.id)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "null",
        "[1,2,3]",
        '[[["full",2,4,16,0]],2,"float16",0]',
        '[[["fuller",2,4,16,0]],2,"float16",0,1]',
        '[[["full",2,4]],2,"float16",0,1]',
        '[[["full","2",4,16,0]],2,"float16",0,1]',
        '[[],2,"float16",0,1]',
        '[[["full",2.0,4,16,0]],2,"float16",0,1]',
        '[[["full",2,4,16,0.0]],2,"float16",0,1]',
        '[[["full",2,4,16,false]],2,"float16",0,1]',
        '[[["full",2,4,16,0]],2.5,"float16",0,1]',
        '[[["full",2,4,16,0]],true,"float16",0,1]',
        '[[["full",2,4,16,0]],2,"float16",0.0,1]',
        '[[["full",2,4,16,0]],2,"float16",0,1.5]',
        '[[["full",2,4,16,0]],2,"float16",0,NaN]',
        "[" * 100_000,
    ],
)
def test_what_is_no_layout_is_refused_in_one_line(text):
    with pytest.raises(ValueError, match="not a block layout"):
        BlockLayout.parse(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": ()}, "no layer groups"),
        ({"block_tokens": 0}, f"block_tokens is 0, must be 1 to {MAX_BLOCK_TOKENS}"),
        ({"block_tokens": MAX_BLOCK_TOKENS + 1}, "block_tokens is 4097"),
        ({"dtype": "float12"}, "dtype is 'float12'"),
        ({"rank": 1}, "rank is 1, must be 0 to 0"),
        ({"rank": -1}, "rank is -1"),
        ({"rank": 0.0}, "rank is 0.0, must be a whole number"),
        ({"ranks": 1.5}, "ranks is 1.5, must be a whole number"),
        ({"block_tokens": 16.0}, "block_tokens is 16.0, must be a whole number"),
        ({"block_tokens": True}, "block_tokens is True, must be a whole number"),
        (
            {"groups": (LayerGroup(Attention.FULL, 4096, 4096, 64),)},
            f"bytes a block, limit {MAX_BLOCK_NBYTES}",
        ),
    ],
)
def test_a_layout_out_of_range_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        replace(LAYOUT, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0}, "layers is 0"),
        ({"kv_heads": 65537}, "kv_heads is 65537"),
        ({"head_dim": -1}, "head_dim is -1"),
        ({"head_dim": 16.0}, "head_dim is 16.0, must be a whole number"),
        ({"window": 0.0}, "window is 0.0, must be a whole number"),
        ({"window": 8}, "window is 8 for full attention"),
        ({"attention": Attention.SLIDING}, "window is 0 for sliding attention"),
        ({"attention": Attention.LATENT}, "latent attention has 1 KV head, not 4"),
    ],
)
def test_a_group_out_of_range_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        replace(FULL, **change)
