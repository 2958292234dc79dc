import random
import sys
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.codec.base import Codec
from kvtier.codec.codecs import CODECS, by_id, by_name
from kvtier.codec.frame import frame_nbytes
from kvtier.core.blocks import Attention, BlockLayout, LayerGroup
from kvtier.errors import ConfigError, CorruptFrame
from kvtier.testing.codecs import DTYPES, CodecTests, numbers

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

LAYOUT = BlockLayout((LayerGroup(Attention.FULL, 2, 4, 64),), 32, "bfloat16")


def encoded(
    codec: Codec, block: memoryview, layout: BlockLayout = LAYOUT
) -> Sequence[bytes | memoryview]:
    parts = codec.encode(block, layout)
    assert parts is not None
    return parts


class TestRaw(CodecTests):
    @pytest.fixture
    def codec(self) -> Codec:
        return by_name("raw")

    def test_the_payload_is_the_block_itself(self, codec: Codec) -> None:
        block = bytearray(LAYOUT.nbytes)
        (payload,) = encoded(codec, memoryview(block))
        block[7] = 1
        assert payload[7] == 1


class TestLZ4(CodecTests):
    @pytest.fixture
    def codec(self) -> Codec:
        return by_name("lz4")

    def test_what_repeats_gets_small(self, codec: Codec) -> None:
        block = memoryview(b"kv" * (LAYOUT.nbytes // 2))
        assert frame_nbytes(encoded(codec, block)) < LAYOUT.nbytes / 50

    def test_a_payload_that_would_decode_to_more_is_refused(self, codec: Codec) -> None:
        larger = BlockLayout(LAYOUT.groups, 4096, LAYOUT.dtype)
        bomb = b"".join(encoded(codec, memoryview(bytes(larger.nbytes)), larger))
        out = bytearray(LAYOUT.nbytes)
        with pytest.raises(CorruptFrame, match="lz4"):
            codec.decode(memoryview(bomb), memoryview(out), LAYOUT)
        assert not any(out)


class TestPlanesZstd(CodecTests):
    @pytest.fixture
    def codec(self) -> Codec:
        return by_name("bp-zh")

    def test_a_zstd_frame_that_holds_more_is_refused(self, codec: Codec) -> None:
        """Also in a second frame behind the right one, and with a header that lies."""
        rest = bytes(LAYOUT.nbytes // 2)
        n = LAYOUT.nbytes // 2
        honest = zstd.compress(bytes(n))
        for coded in (zstd.compress(bytes(1 << 28)), honest + honest, honest + b"x", honest[:-1]):
            out = bytearray(LAYOUT.nbytes)
            with pytest.raises(CorruptFrame, match="bp-zh"):
                codec.decode(memoryview(coded + rest), memoryview(out), LAYOUT)
        codec.decode(memoryview(honest + rest), memoryview(bytearray(LAYOUT.nbytes)), LAYOUT)

    @pytest.mark.parametrize(
        ("dtype", "ratio"),
        [("bfloat16", 1.4), ("float16", 1.12), ("float32", 1.15), ("float8_e4m3fn", 1.1)],
    )
    def test_what_it_saves_of_normal_numbers(self, codec: Codec, dtype: str, ratio: float) -> None:
        layout = BlockLayout(LAYOUT.groups, 64, dtype)
        before = memoryview(numbers(layout))
        assert frame_nbytes(encoded(codec, before, layout)) * ratio <= layout.nbytes


class TestNibbles(CodecTests):
    @pytest.fixture
    def codec(self) -> Codec:
        return by_name("bp4")

    def test_escapes_elsewhere_are_refused(self, codec: Codec) -> None:
        values = bytearray(numbers(LAYOUT))
        values[1000:1004] = b"\x00\x00\x7f\x7f"  # zero and the largest number
        payload = bytearray(b"".join(encoded(codec, memoryview(values))))
        assert int.from_bytes(payload[4:8], "little") >= 1
        payload[8:12] = (LAYOUT.nbytes // 2).to_bytes(4, "little")
        with pytest.raises(CorruptFrame, match="escape"):
            codec.decode(memoryview(payload), memoryview(bytearray(LAYOUT.nbytes)), LAYOUT)
        payload[4:8] = b"\xff" * 4
        with pytest.raises(CorruptFrame, match="4294967295 escapes"):
            codec.decode(memoryview(payload), memoryview(bytearray(LAYOUT.nbytes)), LAYOUT)

    def test_exponents_all_over_are_not_for_it(self, codec: Codec) -> None:
        noise = random.Random(3).randbytes(LAYOUT.nbytes)
        assert codec.encode(memoryview(noise), LAYOUT) is None
        half = BlockLayout(LAYOUT.groups, 32, "float16")  # 3 mantissa bits in its top byte
        assert codec.encode(memoryview(numbers(half)), half) is None


class TestBitsLZ4(CodecTests):
    @pytest.fixture
    def codec(self) -> Codec:
        return by_name("bs-lz4")

    def test_too_many_planes_are_refused(self, codec: Codec) -> None:
        payload = bytearray(b"".join(encoded(codec, memoryview(numbers(LAYOUT)))))
        for depth in (9, 255, payload[1] - 1, payload[1] + 1):
            payload[1] = depth
            with pytest.raises(CorruptFrame, match="bs-lz4"):
                codec.decode(memoryview(payload), memoryview(bytearray(LAYOUT.nbytes)), LAYOUT)


LOSSLESS = [codec for codec in CODECS if codec.exact]


@pytest.mark.parametrize("codec", LOSSLESS, ids=lambda codec: codec.name)
@given(data=st.data())
def test_whatever_the_layout_and_the_bytes(codec: Codec, data: st.DataObject) -> None:
    groups = st.builds(
        LayerGroup,
        st.just(Attention.FULL),
        st.integers(1, 4),
        st.integers(1, 3),
        st.integers(1, 40),
    )
    layout = BlockLayout(
        tuple(data.draw(st.lists(groups, min_size=1, max_size=2))),
        data.draw(st.integers(1, 9)),
        data.draw(st.sampled_from(DTYPES)),
    )
    # Few distinct bytes, so that every codec finds something to do.
    pattern = data.draw(st.binary(min_size=1, max_size=64))
    block = (pattern * (layout.nbytes // len(pattern) + 1))[: layout.nbytes]
    parts = codec.encode(memoryview(block), layout)
    if parts is not None:
        out = bytearray(layout.nbytes)
        codec.decode(memoryview(b"".join(parts)), memoryview(out), layout)
        assert out == block


@pytest.mark.parametrize("codec", LOSSLESS, ids=lambda codec: codec.name)
def test_a_block_in_several_pieces(codec: Codec) -> None:
    """Larger than what is cut at once, in runs that do and do not divide it."""
    for groups in (
        (LayerGroup(Attention.FULL, 3, 5, 129),),
        (LayerGroup(Attention.LATENT, 61, 1, 576), LayerGroup(Attention.SLIDING, 2, 8, 128, 32)),
    ):
        for dtype in ("bfloat16", "float32", "float8_e5m2"):
            layout = BlockLayout(groups, 112, dtype)
            before = numbers(layout)
            parts = codec.encode(memoryview(before), layout)
            if parts is not None:
                out = bytearray(layout.nbytes)
                codec.decode(memoryview(b"".join(parts)), memoryview(out), layout)
                assert out == before


def test_ids_and_names_are_stable() -> None:
    assert {codec.name: codec.id for codec in CODECS} == {
        "raw": 0,
        "lz4": 1,
        "bp-zh": 2,
        "bp4": 3,
        "bs-lz4": 4,
    }
    for codec in CODECS:
        assert by_id(codec.id) is by_name(codec.name) is codec


def test_a_name_or_an_id_that_is_none() -> None:
    with pytest.raises(ConfigError, match="'zip'; known are raw, lz4"):
        by_name("zip")
    with pytest.raises(CorruptFrame, match="codec: 99"):
        by_id(99)
