import random
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from kvtier.codec.base import Codec
from kvtier.codec.codecs import CODECS, by_name
from kvtier.codec.frame import (
    HEADER_NBYTES,
    FrameInfo,
    before_of,
    decode,
    decode_in_place,
    encode,
    frame_nbytes,
    max_frame_nbytes,
    verify,
)
from kvtier.core.blocks import BEGINS, Attention, BlockKey, BlockLayout, LayerGroup
from kvtier.core.fidelity import Fidelity
from kvtier.errors import CorruptFrame
from kvtier.testing.codecs import numbers
from kvtier.testing.stores import key

LAYOUT = BlockLayout((LayerGroup(Attention.FULL, 2, 2, 16),), 16, "bfloat16")
OTHER = BlockLayout((LayerGroup(Attention.FULL, 2, 2, 16),), 16, "float16")  # as many bytes
KEY = key("mine")
RAW, LZ4 = by_name("raw"), by_name("lz4")
INT8 = by_name("int8-tok")
EXACT = [codec for codec in CODECS if codec.exact]
NOISE = random.Random(1).randbytes(LAYOUT.nbytes)
RUNS = b"".join(bytes([n]) * 16 for n in range(LAYOUT.nbytes // 16))


BEFORE = key("before")
LINKS = pytest.mark.parametrize("before", [BEGINS, BEFORE], ids=["begins", "follows"])


def frame_of(
    block: bytes, codec: Codec, layout: BlockLayout = LAYOUT, before: BlockKey = BEFORE
) -> bytes:
    return b"".join(encode(KEY, before, memoryview(block), layout, codec))


def decoded(frame: bytes, of: BlockKey = KEY, layout: BlockLayout = LAYOUT) -> bytes:
    out = bytearray(layout.nbytes)
    info = decode(of, frame, memoryview(out), layout)
    if info.codec_id == RAW.id:  # the same, where the payload was read to where it belongs
        in_place = memoryview(bytearray(frame[HEADER_NBYTES:]))
        assert decode_in_place(of, frame[:HEADER_NBYTES], in_place, layout) == info
        assert in_place == out
    return bytes(out)


def refused(frame: bytes, of: BlockKey = KEY, layout: BlockLayout = LAYOUT) -> str:
    """What the refusal says; the room for the block must be as it was."""
    out = bytearray(b"\x5a" * layout.nbytes)
    with pytest.raises(CorruptFrame) as caught:
        decode(of, frame, memoryview(out), layout)
    assert out == b"\x5a" * layout.nbytes
    if len(frame) == HEADER_NBYTES + layout.nbytes:
        in_place = memoryview(bytearray(frame[HEADER_NBYTES:]))
        with pytest.raises(CorruptFrame):
            decode_in_place(of, frame[:HEADER_NBYTES], in_place, layout)
    return str(caught.value)


def sealed(frame: bytes, offset: int, value: bytes) -> bytes:
    """`frame` with a header field changed and the header's checksum made to fit."""
    changed = bytearray(frame)
    changed[offset : offset + len(value)] = value
    changed[72:80] = struct.pack("<Q", xxh3_64_intdigest(bytes(changed[:72])))
    return bytes(changed)


@LINKS
@pytest.mark.parametrize("codec", EXACT, ids=lambda codec: codec.name)
@pytest.mark.parametrize("block", [NOISE, RUNS], ids=["noise", "runs"])
def test_a_block_comes_back(block: bytes, codec: Codec, before: BlockKey) -> None:
    assert decoded(frame_of(block, codec, before=before)) == block


@LINKS
@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_a_frame_names_the_block_before(codec: Codec, before: BlockKey) -> None:
    frame = frame_of(numbers(LAYOUT), codec, before=before)
    assert before_of(KEY, memoryview(frame)) == before
    assert before_of(KEY, memoryview(frame)[:HEADER_NBYTES]) == before


def test_the_block_before_is_named_by_a_whole_header_of_this_block_only() -> None:
    frame = frame_of(NOISE, RAW)
    assert before_of(key("other"), memoryview(frame)) is None
    for length in range(HEADER_NBYTES):
        assert before_of(KEY, memoryview(frame)[:length]) is None
    for bit in range(8 * HEADER_NBYTES):
        changed = bytearray(frame)
        changed[bit // 8] ^= 1 << bit % 8
        assert before_of(KEY, memoryview(changed)) is None


def test_a_frame_of_the_version_before_is_none_of_ours() -> None:
    """It named no block before: a miss, that says why."""
    payload = NOISE
    fields = struct.pack(
        "<4sBBBx8s16sQQQ", b"KVTF", 1, RAW.id, 0, bytes.fromhex(LAYOUT.id), KEY, LAYOUT.nbytes,
        len(payload), xxh3_64_intdigest(payload),
    )  # fmt: skip
    old = fields + struct.pack("<Q", xxh3_64_intdigest(fields)) + payload
    assert "version: 1, must be 2" in refused(old)
    assert before_of(KEY, memoryview(old)) is None


def test_the_header_tells_what_is_inside() -> None:
    frame = frame_of(RUNS, LZ4)
    assert verify(KEY, frame, LAYOUT.id) == verify(KEY, frame)
    assert verify(KEY, frame) == FrameInfo(
        1, Fidelity.EXACT, LAYOUT.id, LAYOUT.nbytes, len(frame) - HEADER_NBYTES
    )
    assert len(frame) < LAYOUT.nbytes


def test_the_format_is_stable() -> None:
    """Frames in a shared store outlive a release: these very bytes must decode for good."""
    layout = BlockLayout((LayerGroup(Attention.FULL, 1, 1, 1),), 1, "bfloat16")
    frame = bytes.fromhex(
        "4b56544602000000d04512716f0dd900000102030405060708090a0b0c0d0e0f"
        "040000000000000004000000000000002246ac33907b8b98"
        "101112131415161718191a1b1c1d1e1fd07c0f454d2f0b62"
        "01020304"
    )
    name, before = BlockKey(bytes(range(16))), BlockKey(bytes(range(16, 32)))
    block = b"\x01\x02\x03\x04"
    assert b"".join(encode(name, before, memoryview(block), layout, RAW)) == frame
    assert decoded(frame, name, layout) == block
    assert frame[8:16].hex() == layout.id
    assert frame[48:56] == struct.pack("<Q", xxh3_64_intdigest(block))
    assert frame[72:80] == struct.pack("<Q", xxh3_64_intdigest(frame[:72]))


def test_a_raw_frame_copies_nothing() -> None:
    arena = bytearray(NOISE)
    header, payload = encode(KEY, BEFORE, memoryview(arena), LAYOUT, RAW)
    assert len(header) == HEADER_NBYTES
    arena[3] ^= 1
    assert payload[3] == arena[3]


@pytest.mark.parametrize(
    ("saved", "codec_id"), [(LAYOUT.nbytes // 64, 1), (LAYOUT.nbytes // 64 - 1, 0), (-9, 0)]
)
def test_a_codec_that_saves_less_than_a_64th_gives_way_to_raw(saved: int, codec_id: int) -> None:
    class Saves:
        id = 1
        name = "saves"
        exact = True

        def encode(self, block: memoryview, layout: BlockLayout) -> list[bytes | memoryview]:
            return [bytes(10), bytes(layout.nbytes - saved - 10)]

        def decode(self, payload: memoryview, out: memoryview, layout: BlockLayout) -> None:
            raise NotImplementedError

    parts = encode(KEY, BEFORE, memoryview(NOISE), LAYOUT, Saves())
    assert verify(KEY, b"".join(parts)).codec_id == codec_id
    assert frame_nbytes(parts) == len(b"".join(parts)) <= max_frame_nbytes(LAYOUT)
    if codec_id == 0:
        assert decoded(b"".join(parts)) == NOISE


def test_noise_is_never_larger_than_raw() -> None:
    parts = encode(KEY, BEFORE, memoryview(NOISE), LAYOUT, LZ4)
    assert frame_nbytes(parts) == max_frame_nbytes(LAYOUT) == HEADER_NBYTES + LAYOUT.nbytes


@LINKS
@pytest.mark.parametrize("codec", EXACT, ids=lambda codec: codec.name)
def test_any_flipped_bit_is_found(codec: Codec, before: BlockKey) -> None:
    frame = frame_of(RUNS, codec, before=before)
    places = [*range(8 * HEADER_NBYTES), *range(8 * HEADER_NBYTES, 8 * len(frame), 97)]
    for bit in places:
        changed = bytearray(frame)
        changed[bit // 8] ^= 1 << bit % 8
        message = refused(bytes(changed))
        assert message.startswith("frame check "), message
        with pytest.raises(CorruptFrame):
            verify(KEY, bytes(changed))


@LINKS
def test_any_length_but_its_own_is_found(before: BlockKey) -> None:
    frame = frame_of(NOISE, RAW, before=before)
    for length in [*range(HEADER_NBYTES + 2), len(frame) - 1]:
        assert "length" in refused(frame[:length])
    assert "length" in refused(frame + b"\0")


@given(st.binary(max_size=300))
def test_anything_else_is_refused(noise: bytes) -> None:
    refused(noise)
    refused(frame_of(NOISE, RAW)[:HEADER_NBYTES] + noise)
    assert before_of(KEY, memoryview(noise)) is None


def test_what_the_refusal_names() -> None:
    frame = frame_of(NOISE, RAW)
    assert "magic" in refused(b"KVTX" + frame[4:])
    assert "version: 3" in refused(sealed(frame, 4, b"\x03"))
    assert "codec: 77" in refused(sealed(frame, 5, b"\x4d"))
    assert "fidelity: 4" in refused(sealed(frame, 6, b"\x04"))
    assert "header checksum" in refused(frame[:40] + b"\x01" + frame[41:])
    assert "payload checksum" in refused(frame[:-1] + bytes([frame[-1] ^ 1]))
    assert "raw length" in refused(sealed(frame, 32, struct.pack("<Q", LAYOUT.nbytes + 1)))
    assert "length" in refused(sealed(frame, 40, struct.pack("<Q", 1 << 63)))


def test_another_key_s_frame_is_refused() -> None:
    other = key("other")
    message = refused(frame_of(NOISE, RAW), of=other)
    assert "key" in message
    assert KEY.hex() in message
    assert other.hex() in message


def test_another_layout_s_frame_is_refused_although_it_has_as_many_bytes() -> None:
    assert OTHER.nbytes == LAYOUT.nbytes
    assert "layout" in refused(frame_of(NOISE, RAW, OTHER))
    with pytest.raises(CorruptFrame, match="layout"):
        verify(KEY, frame_of(NOISE, RAW, OTHER), LAYOUT.id)
    assert verify(KEY, frame_of(NOISE, RAW, OTHER)).layout_id == OTHER.id


def test_a_payload_that_is_whole_but_not_of_its_codec() -> None:
    """Only a bug or malice makes one; the codec itself refuses it."""
    assert "lz4" in refused(sealed(frame_of(NOISE, RAW), 5, b"\x01"))


def test_views_of_other_formats_are_taken() -> None:
    block = memoryview(bytearray(RUNS)).cast("B", shape=[LAYOUT.nbytes // 4, 4])
    frame = b"".join(encode(KEY, BEFORE, block, LAYOUT, RAW))
    out = bytearray(LAYOUT.nbytes)
    decode(KEY, memoryview(frame), memoryview(out).cast("H"), LAYOUT)
    assert out == RUNS


def test_a_lossy_frame_says_so() -> None:
    block = numbers(LAYOUT)
    frame = frame_of(block, INT8)
    assert verify(KEY, frame).fidelity == Fidelity.CODED
    out = bytearray(LAYOUT.nbytes)
    assert decode(KEY, frame, memoryview(out), LAYOUT) == verify(KEY, frame)
    assert out != block


def test_what_was_lossy_once_keeps_its_bytes() -> None:
    """On its way through any tier, whatever its codec; and the frame still says what it is."""
    once = decoded(frame_of(numbers(LAYOUT), INT8))
    for codec in CODECS:
        parts = encode(KEY, BEFORE, memoryview(once), LAYOUT, codec, Fidelity.CODED)
        frame = b"".join(parts)
        assert decoded(frame) == once
        assert verify(KEY, frame).fidelity == Fidelity.CODED


def test_what_follows_from_a_lossy_prefix_stays_marked() -> None:
    frame = b"".join(encode(KEY, BEFORE, memoryview(RUNS), LAYOUT, RAW, Fidelity.DERIVED))
    assert verify(KEY, frame).fidelity == Fidelity.DERIVED
    frame = b"".join(
        encode(KEY, BEFORE, memoryview(numbers(LAYOUT)), LAYOUT, INT8, Fidelity.DERIVED)
    )
    assert verify(KEY, frame).fidelity == Fidelity.DERIVED | Fidelity.CODED


def test_where_a_lossy_codec_passes_the_block_stays_exact() -> None:
    block = bytearray(numbers(LAYOUT))
    block[2:4] = b"\x80\x7f"  # infinity
    frame = frame_of(bytes(block), INT8)
    assert decoded(frame) == block
    assert verify(KEY, frame).fidelity == Fidelity.EXACT
    assert len(frame) < LAYOUT.nbytes  # by a lossless codec
