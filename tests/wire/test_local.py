import itertools
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.core.blocks import BlockKey
from kvtier.errors import LocalProtocolError, RemoteProtocolError
from kvtier.wire import local
from kvtier.wire.local import Decoder, Op, encode, parse_request


@given(
    st.lists(st.tuples(st.binary(max_size=200), st.integers(0, 2**40)), min_size=1, max_size=5),
    st.lists(st.integers(1, 400), min_size=1, max_size=6),
)
def test_messages_come_out_as_they_went_in_however_they_are_cut(
    messages: list[tuple[bytes, int]], cuts: list[int]
) -> None:
    """Through one buffer, as a socket's bytes come: what was read lies there no more."""
    wire = b"".join(encode(*each) for each in messages)
    decoder, buffer, got = Decoder(), bytearray(400), []
    for cut in itertools.cycle(cuts):
        piece, wire = wire[:cut], wire[cut:]
        buffer[: len(piece)] = piece
        got += decoder.feed(memoryview(buffer)[: len(piece)])
        buffer[:] = b"\xff" * len(buffer)
        if not wire:
            break
    assert got == [list(each) for each in messages]


def test_a_message_longer_than_the_limit_is_refused_before_it_is_buffered() -> None:
    with pytest.raises(RemoteProtocolError, match=f"limit {local.MAX_MESSAGE}"):
        Decoder().feed((local.MAX_MESSAGE + 1).to_bytes(4, "little"))
    late = Decoder()
    assert late.feed(encode(1) + b"\xff\xff") == [[1]]
    with pytest.raises(RemoteProtocolError, match=f"limit {local.MAX_MESSAGE}"):
        late.feed(b"\xff\xff")
    with pytest.raises(RemoteProtocolError, match=f"limit {local.MAX_MESSAGE}"):
        Decoder().feed(encode(1) + b"\xff\xff\xff\xff")
    with pytest.raises(LocalProtocolError, match=f"limit {local.MAX_MESSAGE}"):
        encode(bytes(local.MAX_MESSAGE + 1))


@given(st.binary(max_size=64))
def test_garbage_is_a_protocol_error_and_nothing_else(body: bytes) -> None:
    try:
        messages = Decoder().feed(len(body).to_bytes(4, "little") + body)
        for message in messages:
            parse_request(message)
    except RemoteProtocolError:
        pass


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ([99], "no operation 99"),
        (["x"], "no operation 'x'"),
        ([[1]], r"no operation \[1\]"),
        ([Op.MATCH], r"MATCH takes \(bytes\)"),
        ([Op.MATCH, "text"], r"MATCH takes \(bytes\)"),
        ([Op.READ, b"", 0], r"READ takes \(bytes(, int){7}\)"),
        ([Op.AWAIT, 1], r"AWAIT takes \(int, int\)"),
        ([Op.COMMIT, 1, True], r"COMMIT takes \(int, int\)"),
    ],
)
def test_a_request_with_wrong_arguments_is_named(message: list[local.Value], said: str) -> None:
    with pytest.raises(RemoteProtocolError, match=said):
        parse_request(message)


def test_keys_and_numbers_round_trip_and_odd_lengths_are_refused() -> None:
    keys = [BlockKey(os.urandom(16)) for _ in range(5)]
    assert local.unpack_keys(local.pack_keys(keys)) == keys
    assert local.unpack_keys(local.pack_keys(keys), 32) == keys[2:]
    assert local.unpack_numbers(local.pack_numbers([0, 7, 2**32 - 1])) == [0, 7, 2**32 - 1]
    with pytest.raises(RemoteProtocolError, match="multiple of 16"):
        local.unpack_keys(b"x" * 17)
    with pytest.raises(RemoteProtocolError, match="multiple of 4"):
        local.unpack_numbers(b"x" * 5)
    with pytest.raises(LocalProtocolError, match=f"limit {local.MAX_KEYS}"):
        local.pack_keys([keys[0]] * (local.MAX_KEYS + 1))
