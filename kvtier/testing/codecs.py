"""What every codec must do. Subclass `CodecTests` with a `codec` fixture to prove one's own."""

import random
from array import array
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import numpy as np
import pytest

from kvtier.codec.base import Codec
from kvtier.codec.frame import frame_nbytes
from kvtier.core.blocks import Attention, BlockLayout, LayerGroup
from kvtier.errors import CorruptFrame

DTYPES = (
    "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8", "uint8",
)  # fmt: skip
GROUPS = {
    "MHA": (LayerGroup(Attention.FULL, layers=2, kv_heads=4, head_dim=16),),
    "GQA": (LayerGroup(Attention.FULL, layers=3, kv_heads=1, head_dim=64),),
    "sliding": (LayerGroup(Attention.SLIDING, layers=2, kv_heads=2, head_dim=8, window=64),),
    "MLA": (LayerGroup(Attention.LATENT, layers=2, kv_heads=1, head_dim=72),),
    "hybrid": (
        LayerGroup(Attention.FULL, layers=1, kv_heads=2, head_dim=16),
        LayerGroup(Attention.SLIDING, layers=5, kv_heads=1, head_dim=24, window=32),
    ),
    "odd": (LayerGroup(Attention.FULL, layers=1, kv_heads=3, head_dim=7),),
}
LAYOUTS = [
    BlockLayout(groups, block_tokens, dtype)
    for groups in GROUPS.values()
    for block_tokens, dtype in [*((16, dtype) for dtype in DTYPES), (1, "bfloat16")]
]
CONTENTS = ("noise", "zeros", "ones", "every16", "steps", "normal")
_GUARD = b"\xa5" * 64


def block(layout: BlockLayout, kind: str, seed: int = 0) -> bytes:
    """A block's bytes: random, constant, all 16-bit patterns, slowly changing, or like KV."""
    if kind == "normal":
        return numbers(layout, seed)
    if kind == "noise":
        return random.Random(seed).randbytes(layout.nbytes)
    if kind in ("zeros", "ones"):
        return (b"\0" if kind == "zeros" else b"\xff") * layout.nbytes
    step = 1 if kind == "every16" else 257
    patterns = array("H", (n // step & 0xFFFF for n in range(layout.nbytes // 2 + 1)))
    return patterns.tobytes()[: layout.nbytes]


def numbers(layout: BlockLayout, seed: int = 0) -> bytes:
    """A block of normally distributed numbers, a few of them large, in the layout's dtype."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(layout.nbytes // layout.itemsize).astype(np.float32)
    x[::61] *= 16
    match layout.dtype:
        case "bfloat16":
            return (x.view(np.uint32) >> 16).astype(np.uint16).tobytes()
        case "float16" | "float32" | "float64":
            return x.astype(layout.dtype).tobytes()
        case _:
            return (x * 2).astype(np.int8).tobytes()


class CodecTests:
    """Conformance with `Codec`, for every kind of layout and dtype.

    A codec may pass on a block, except on normal bfloat16 numbers. Set `largest_error` for a lossy
    one: relative L2 error on such numbers; then bytes are not compared.
    """

    largest_error: ClassVar[float] = 0.0

    @pytest.fixture
    def codec(self) -> Codec:
        """The codec to be tried."""
        raise NotImplementedError("subclass CodecTests with a `codec` fixture")

    @pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.describe())
    @pytest.mark.parametrize("kind", CONTENTS)
    def test_a_block_comes_back(self, codec: Codec, layout: BlockLayout, kind: str) -> None:
        """Bit for bit, from a read-only block, and nothing is written outside of `out`."""
        before = block(layout, kind)
        payload = _encode(codec, before, layout)
        if payload is None:
            return
        after, around = _decode(codec, payload, layout)
        assert around == _GUARD * 2
        if codec.exact:
            assert after == before

    def test_numbers_like_those_of_kv_are_encoded(self, codec: Codec) -> None:
        """In the formats that engines use, and within the error that is allowed."""
        for groups in (GROUPS["GQA"], GROUPS["MHA"]):
            layout = BlockLayout(groups, 64, "bfloat16")
            before = block(layout, "normal")
            payload = _encode(codec, before, layout)
            assert payload is not None
            after, _ = _decode(codec, payload, layout)
            assert _relative_error(before, after) <= self.largest_error
            assert codec.exact == (self.largest_error == 0)

    def test_all_patterns_of_16_bits(self, codec: Codec) -> None:
        """Infinities, signed zeros, subnormals and every NaN keep their bits."""
        groups = (LayerGroup(Attention.FULL, layers=4, kv_heads=4, head_dim=128),)
        for dtype in ("bfloat16", "float16"):
            layout = BlockLayout(groups, 16, dtype)
            assert layout.nbytes >= 2 * 65536
            before = block(layout, "every16")
            payload = _encode(codec, before, layout)
            if payload is not None:
                after, _ = _decode(codec, payload, layout)
                assert not codec.exact or after == before

    def test_a_payload_cut_short_is_refused(self, codec: Codec) -> None:
        """At any length, with nothing written outside of `out`."""
        for layout, payload in _some(codec):
            for length in {0, 1, 2, len(payload) // 3, len(payload) // 2, len(payload) - 1}:
                with pytest.raises(CorruptFrame):
                    _decode(codec, payload[:length], layout)

    def test_a_payload_of_another_length_of_block_is_refused(self, codec: Codec) -> None:
        """A block of twice or half the tokens does not fit."""
        for layout, _ in _some(codec):
            for tokens in (layout.block_tokens * 2, layout.block_tokens // 2):
                other = BlockLayout(layout.groups, tokens, layout.dtype)
                for kind in ("normal", "zeros"):
                    payload = _encode(codec, block(other, kind), other)
                    if payload is not None:
                        with pytest.raises(CorruptFrame):
                            _decode(codec, payload, layout)

    def test_a_garbled_payload_never_escapes(self, codec: Codec) -> None:
        """It is refused or decodes to other bytes, inside `out`: the frame's checksum is before."""
        rng = random.Random(11)
        for layout, payload in _some(codec):
            for _ in range(100):
                garbled = bytearray(payload)
                for _ in range(rng.choice((1, 4, 64))):
                    garbled[rng.choice((rng.randrange(len(payload)), rng.randrange(12)))] = (
                        rng.randrange(256)
                    )
                try:
                    after, around = _decode(codec, bytes(garbled), layout)
                except CorruptFrame:
                    continue
                assert len(after) == layout.nbytes
                assert around == _GUARD * 2

    def test_threads_share_it(self, codec: Codec) -> None:
        """Every thread gets its own block's bytes."""
        layout = BlockLayout(GROUPS["GQA"], 64, "bfloat16")
        blocks = [block(layout, "normal", seed) for seed in range(8)]

        def both_ways(before: bytes) -> bytes:
            payload = _encode(codec, before, layout)
            assert payload is not None
            return _decode(codec, payload, layout)[0]

        alone = [both_ways(each) for each in blocks]
        with ThreadPoolExecutor(4) as pool:
            assert [*pool.map(both_ways, blocks * 4)] == alone * 4

    def test_noise_given_as_a_payload(self, codec: Codec) -> None:
        """Is refused or decoded, with no other error and no endless memory."""
        layout = LAYOUTS[3]
        rng = random.Random(12)
        for _ in range(200):
            try:
                after, around = _decode(codec, rng.randbytes(rng.randrange(2000)), layout)
            except CorruptFrame:
                continue
            assert (len(after), around) == (layout.nbytes, _GUARD * 2)


def _some(codec: Codec) -> list[tuple[BlockLayout, bytes]]:
    """Payloads of blocks of several kinds, with their layouts."""
    layouts = [BlockLayout(GROUPS[name], 16, "bfloat16") for name in ("MHA", "GQA")]
    layouts += [BlockLayout(GROUPS["MHA"], 16, dtype) for dtype in ("float16", "float32")]
    found = [
        (layout, payload)
        for layout in layouts
        for kind in ("normal", "noise")
        if (payload := _encode(codec, block(layout, kind), layout)) is not None
    ]
    assert found
    return found


def _relative_error(before: bytes, after: bytes) -> float:
    """|after - before| / |before| of bfloat16 numbers."""
    x, y = (
        (np.frombuffer(each, np.uint16).astype(np.uint32) << 16).view(np.float32)
        for each in (before, after)
    )
    return float(np.linalg.norm(y - x) / np.linalg.norm(x))


def _encode(codec: Codec, before: bytes, layout: BlockLayout) -> bytes | None:
    parts = codec.encode(memoryview(before), layout)
    if parts is None:
        return None
    payload = b"".join(parts)
    assert len(payload) == frame_nbytes(parts)
    return payload


def _decode(codec: Codec, payload: bytes, layout: BlockLayout) -> tuple[bytes, bytes]:
    """The decoded block, and the bytes that lie around it."""
    arena = bytearray(_GUARD + bytes(layout.nbytes) + _GUARD)
    end = len(_GUARD) + layout.nbytes
    try:
        codec.decode(memoryview(payload), memoryview(arena)[len(_GUARD) : end], layout)
    finally:
        assert arena[: len(_GUARD)] == arena[end:] == _GUARD
    return bytes(arena[len(_GUARD) : end]), bytes(arena[: len(_GUARD)] + arena[end:])
