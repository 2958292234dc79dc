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
    st.integers(1, 40),
)
def test_messages_come_out_as_they_went_in_however_they_are_cut(
    messages: list[tuple[bytes, int]], cut: int
) -> None:
    wire = b"".join(encode(*each) for each in messages)
    decoder = Decoder()
    got = [m for at in range(0, len(wire), cut) for m in decoder.feed(wire[at : at + cut])]
    assert got == [list(each) for each in messages]


def test_a_message_longer_than_the_limit_is_refused_before_it_is_buffered() -> None:
    with pytest.raises(RemoteProtocolError, match=f"limit {local.MAX_MESSAGE}"):
        Decoder().feed((local.MAX_MESSAGE + 1).to_bytes(4, "little"))
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
    assert local.unpack_numbers(local.pack_numbers([0, 7, 2**32 - 1])) == [0, 7, 2**32 - 1]
    with pytest.raises(RemoteProtocolError, match="multiple of 16"):
        local.unpack_keys(b"x" * 17)
    with pytest.raises(RemoteProtocolError, match="multiple of 4"):
        local.unpack_numbers(b"x" * 5)
    with pytest.raises(LocalProtocolError, match=f"limit {local.MAX_KEYS}"):
        local.pack_keys([keys[0]] * (local.MAX_KEYS + 1))
