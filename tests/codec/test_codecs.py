import pytest

from kvtier.codec.base import Codec
from kvtier.codec.codecs import CODECS, by_id, by_name
from kvtier.codec.frame import frame_nbytes
from kvtier.core.blocks import Attention, BlockLayout, LayerGroup
from kvtier.errors import ConfigError, CorruptFrame
from kvtier.testing.codecs import CodecTests

LAYOUT = BlockLayout((LayerGroup(Attention.FULL, 2, 4, 64),), 32, "bfloat16")


class TestRaw(CodecTests):
    @pytest.fixture
    def codec(self) -> Codec:
        return by_name("raw")

    def test_the_payload_is_the_block_itself(self, codec: Codec) -> None:
        block = bytearray(LAYOUT.nbytes)
        (payload,) = codec.encode(memoryview(block), LAYOUT)
        block[7] = 1
        assert payload[7] == 1


class TestLZ4(CodecTests):
    @pytest.fixture
    def codec(self) -> Codec:
        return by_name("lz4")

    def test_what_repeats_gets_small(self, codec: Codec) -> None:
        block = memoryview(b"kv" * (LAYOUT.nbytes // 2))
        assert frame_nbytes(codec.encode(block, LAYOUT)) < LAYOUT.nbytes / 50

    def test_a_payload_that_would_decode_to_more_is_refused(self, codec: Codec) -> None:
        larger = BlockLayout(LAYOUT.groups, 4096, LAYOUT.dtype)
        bomb = b"".join(codec.encode(memoryview(bytes(larger.nbytes)), larger))
        out = bytearray(LAYOUT.nbytes)
        with pytest.raises(CorruptFrame, match="lz4"):
            codec.decode(memoryview(bomb), memoryview(out), LAYOUT)
        assert not any(out)


def test_ids_and_names_are_stable() -> None:
    assert [(codec.id, codec.name) for codec in CODECS] == [(0, "raw"), (1, "lz4")]
    for codec in CODECS:
        assert by_id(codec.id) is by_name(codec.name) is codec


def test_a_name_or_an_id_that_is_none() -> None:
    with pytest.raises(ConfigError, match="'zip'; known are raw, lz4"):
        by_name("zip")
    with pytest.raises(CorruptFrame, match="codec: 99"):
        by_id(99)
