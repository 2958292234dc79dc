import random
import sys
from collections.abc import Sequence

import numpy as np
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


class LossyTests(CodecTests):
    name = ""

    @pytest.fixture
    def codec(self) -> Codec:
        return by_name(self.name)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
    @pytest.mark.parametrize("special", [float("nan"), float("inf"), float("-inf"), 6e4, 3e38])
    def test_a_number_that_has_no_scale_is_not_for_it(
        self, codec: Codec, dtype: str, special: float
    ) -> None:
        """Not one of its neighbours may be lost with it: the whole block stays exact."""
        layout = BlockLayout(LAYOUT.groups, 32, dtype)
        if (special, dtype) in ((6e4, "bfloat16"), (6e4, "float32"), (3e38, "float16")):
            return
        values = bytearray(numbers(layout))
        one = np.array([special], np.float32 if dtype != "float16" else np.float16).tobytes()
        one = one[2:] if dtype == "bfloat16" else one
        for place in (0, 999, layout.nbytes // layout.itemsize - 1):
            changed = bytearray(values)
            changed[place * layout.itemsize : (place + 1) * layout.itemsize] = one
            assert codec.encode(memoryview(changed), layout) is None

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
    def test_it_is_as_near_in_every_dtype(self, codec: Codec, dtype: str) -> None:
        layout = BlockLayout(LAYOUT.groups, 64, dtype)
        before = numbers(layout)
        out = bytearray(layout.nbytes)
        parts = encoded(codec, memoryview(before), layout)
        codec.decode(memoryview(b"".join(parts)), memoryview(out), layout)
        x, y = as_floats(before, dtype), as_floats(bytes(out), dtype)
        assert np.linalg.norm(y - x) <= self.largest_error * np.linalg.norm(x)

    def test_zeros_stay_zeros_beside_large_and_tiny_numbers(self, codec: Codec) -> None:
        layout = BlockLayout(LAYOUT.groups, 64, "float32")
        x = np.zeros((4, 4, 64, 64), np.float32)
        x[0], x[1, 0] = 1e36, 1e-44
        out = bytearray(layout.nbytes)
        parts = encoded(codec, memoryview(x.tobytes()), layout)
        codec.decode(memoryview(b"".join(parts)), memoryview(out), layout)
        y = np.frombuffer(out, np.float32).reshape(x.shape)
        assert np.isfinite(y).all()
        assert not y[2:].any()
        assert abs(y[0] - 1e36).max() < 0.3e36


class TestInt8PerToken(LossyTests):
    name = "int8-tok"
    largest_error = 0.03

    def test_every_number_is_within_half_a_step(self, codec: Codec) -> None:
        layout = BlockLayout(LAYOUT.groups, 64, "float32")
        before = numbers(layout)
        out = bytearray(layout.nbytes)
        parts = encoded(codec, memoryview(before), layout)
        codec.decode(memoryview(b"".join(parts)), memoryview(out), layout)
        x, y = (as_floats(bytes(each), "float32").reshape(-1, 64) for each in (before, out))
        step = np.abs(x).max(1, keepdims=True) / 127 * (1 + 2**-7)  # rounded up to bfloat16
        assert (np.abs(y - x) <= step * 0.501).all()


class TestK8V4(LossyTests):
    name = "k8v4"
    largest_error = 0.2


class TestFloat8(LossyTests):
    name = "fp8"
    largest_error = 0.04

    def test_what_float8_can_say_comes_back(self, codec: Codec) -> None:
        """The values of the OCP specification, as torch has them."""
        torch = pytest.importorskip("torch")
        codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        values = codes[torch.isfinite(codes)].repeat(8)
        layout = BlockLayout((LayerGroup(Attention.FULL, 1, 1, len(values)),), 1, "float32")
        x = torch.stack((values, values * 2.0**-20)).numpy()
        out = bytearray(layout.nbytes)
        parts = encoded(codec, memoryview(x.tobytes()), layout)
        codec.decode(memoryview(b"".join(parts)), memoryview(out), layout)
        assert np.array_equal(np.frombuffer(out, np.float32).reshape(x.shape), x)


class TestInt4Hadamard(LossyTests):
    name = "int4-had"
    largest_error = 0.2

    def test_heads_that_cannot_be_rotated_are_not_for_it(self, codec: Codec) -> None:
        layout = BlockLayout((LayerGroup(Attention.FULL, 1, 1, 72),), 16, "bfloat16")
        assert codec.encode(memoryview(numbers(layout)), layout) is None


def as_floats(raw: bytes, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(raw, dtype).astype(np.float32)


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
        "int8-tok": 16,
        "k8v4": 17,
        "fp8": 18,
        "int4-had": 19,
    }
    for codec in CODECS:
        assert by_id(codec.id) is by_name(codec.name) is codec


def test_a_name_or_an_id_that_is_none() -> None:
    with pytest.raises(ConfigError, match="'zip'; known are raw, lz4"):
        by_name("zip")
    with pytest.raises(CorruptFrame, match="codec: 99"):
        by_id(99)
