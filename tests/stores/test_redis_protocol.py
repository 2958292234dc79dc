"""What comes over the wire is not trusted: the parser, the parts, the URL, the breaker."""

import itertools
import tracemalloc
from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.errors import ConfigError, RemoteProtocolError
from kvtier.stores.redis.address import Address, Kind, parse
from kvtier.stores.redis.breaker import FAILURES, Breaker
from kvtier.stores.redis.parts import PART_NBYTES, Assembly, PartSink, part_name, split
from kvtier.stores.redis.resp import MAX_BULK, Reader, ReplyError, encode, room
from kvtier.stores.redis.servers import slot
from kvtier.testing.stores import content

TAG = b"12345678"


def receive(stream: bytes, step: int) -> Callable[[memoryview, bool], int]:
    """A stream that gives at most `step` bytes at a time and then ends."""
    at = 0

    def give(view: memoryview, whole: bool) -> int:
        nonlocal at
        part = stream[at : at + min(len(view), step)]
        view[: len(part)] = part
        at += len(part)
        return len(part)

    return give


def plain(reply: object) -> object:
    """A reply that can be compared."""
    if isinstance(reply, list):
        return [plain(each) for each in reply]
    return ("error", str(reply)) if isinstance(reply, ReplyError) else reply


REPLIES = (
    b"+OK\r\n-MOVED 5 h:1\r\n:-7\r\n$-1\r\n$0\r\n\r\n"
    b"$3\r\na\r\n\r\n*2\r\n*1\r\n:1\r\n$1\r\nx\r\n*-1\r\n"
)
READ = [b"OK", ("error", "MOVED 5 h:1"), -7, None, b"", b"a\r\n", [[1], b"x"], None]


@pytest.mark.parametrize("step", [1, 2, 3, 7, 1000])
def test_replies_are_read_however_they_come(step: int) -> None:
    reader = Reader(receive(REPLIES, step))
    assert [plain(reader.reply()) for _ in READ] == READ
    with pytest.raises(RemoteProtocolError, match="hung up"):
        reader.reply()


@pytest.mark.parametrize(
    "stream",
    [
        b"?\r\n", b"\r\n", b"$5000000000\r\n", b"$-2\r\n", b"$1x\r\n", b"$\r\n", b":--1\r\n",
        b"*9999999\r\n", b"*1\r\n" * 6 + b":1\r\n", b"$1\r\nabc", b"+" + b"x" * 5000 + b"\r\n",
        b":" + b"9" * 30 + b"\r\n", b"$4\r\nab", b"*2\r\n:1\r\n", b"+OK", b"%1\r\n",
    ],
)  # fmt: skip
def test_what_is_not_resp2_is_refused(stream: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        Reader(receive(stream, 1000)).reply()


TOKENS = st.sampled_from(
    [
        b"$",
        b"*",
        b":",
        b"+",
        b"-",
        b"\r\n",
        b"-1",
        b"3",
        b"40",
        b"4194304",
        b"131072",
        b"99999999999",
    ]
)
HOSTILE = st.lists(st.one_of(TOKENS, st.binary(max_size=50)), max_size=30).map(b"".join)
MUTATED = st.tuples(st.integers(0, len(REPLIES)), st.binary(max_size=4), st.integers(0, 8)).map(
    lambda cut: REPLIES[: cut[0]] + cut[1] + REPLIES[cut[0] + cut[2] :]
)


@settings(max_examples=300, deadline=None)
@given(stream=st.one_of(HOSTILE, MUTATED), step=st.integers(1, 64), sink=st.booleans())
def test_nothing_but_a_protocol_error_comes_of_hostile_replies(
    stream: bytes, step: int, sink: bool
) -> None:
    reader = Reader(receive(stream, step))
    with suppress(RemoteProtocolError):
        for _ in range(len(stream) + 1):
            reader.reply(PartSink(Assembly(), 0) if sink else None)


def test_no_memory_is_taken_for_what_a_server_only_says() -> None:
    room(0)  # what it loads is not what is measured
    for stream in (b"*131072\r\n", b"*131072\r\n" * 4, b"$99999999999\r\n", b"$%d\r\n" % MAX_BULK):
        tracemalloc.start()
        with pytest.raises(RemoteProtocolError):
            Reader(receive(stream, 1000)).reply()
        assert tracemalloc.get_traced_memory()[1] <= MAX_BULK + 2**17
        tracemalloc.stop()


def test_a_command_s_buffers_go_out_as_they_are() -> None:
    view = memoryview(bytearray(b"frame"))
    packed = encode([b"SET", b"k", [b"head", view], b"EX", b"9"])
    assert any(each is view for each in packed)
    assert b"".join(packed) == (
        b"*5\r\n$3\r\nSET\r\n$1\r\nk\r\n$9\r\nheadframe\r\n$2\r\nEX\r\n$1\r\n9\r\n"
    )


# Parts


@settings(max_examples=40, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 3 * PART_NBYTES), max_size=6),
    nbytes=st.sampled_from([0, 1, PART_NBYTES, PART_NBYTES + 1, 2 * PART_NBYTES + 5]),
    order=st.randoms(use_true_random=False),
)
def test_parts_make_the_frame_again(cuts: list[int], nbytes: int, order: object) -> None:
    data = memoryview(BLOCK)[:nbytes]
    marks = [0, *sorted(min(cut, nbytes) for cut in cuts), nbytes]
    frame = [data[a:b] for a, b in itertools.pairwise(marks)]
    parts = split(frame, TAG)
    assembly = Assembly()
    tail = [*range(1, len(parts))]
    order.shuffle(tail)
    for index in [0, *tail]:
        assert assembly.frame() is None
        value = b"".join(parts[index].value)
        assert len(value) == parts[index].nbytes
        read(value, PartSink(assembly, index))
    assert assembly.frame() == data
    assert assembly.count == len(parts)


BLOCK = content("block", 2 * PART_NBYTES + 5)


def read(value: bytes, sink: PartSink, *, left_out: int = 0) -> None:
    """A server's reply into a sink; it hangs up so many bytes before the end."""
    stream = b"$%d\r\n%b\r\n" % (len(value), value)
    Reader(receive(stream[: len(stream) - left_out], 2**16)).reply(sink)


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("left_out", [1, 2, 3, 4000])
def test_a_part_that_was_cut_off_is_missing_until_it_has_come_whole(
    index: int, left_out: int
) -> None:
    values = [b"".join(part.value) for part in split([memoryview(BLOCK)], TAG)]
    assembly = Assembly()
    for other in (0, 1, 2):
        if other != index or not index:  # without a head there is room for none
            read(values[other], PartSink(assembly, other))
    with pytest.raises(RemoteProtocolError):
        read(values[index], PartSink(assembly, index), left_out=left_out)
    assert index in assembly.missing()
    assert assembly.frame() is None
    for again in assembly.missing():
        read(values[again], PartSink(assembly, again))
    assert assembly.frame() == BLOCK


@settings(max_examples=100, deadline=None)
@given(envelope=st.binary(min_size=32, max_size=32), index=st.integers(0, 3), at=st.integers(0, 31))
def test_an_envelope_that_is_wrong_in_a_byte_is_nobody_s_part(
    envelope: bytes, index: int, at: int
) -> None:
    assert Assembly().place(index, envelope, 10) is None
    good = bytes(split([b"0123456789"], TAG)[0].value[0])
    changed = good[:at] + bytes([good[at] ^ (1 + envelope[0] % 255)]) + good[at + 1 :]
    if not (10 <= at < 24):  # not used, or the tag, which only parts of one frame compare
        assert Assembly().place(0, changed, 10) is None


def test_names_of_parts_share_a_slot() -> None:
    assert (
        len({slot(name) for name in (part_name(b"kvtier:3:main:x:{abc}", n) for n in range(9))})
        == 1
    )


@pytest.mark.parametrize(
    ("name", "number"),
    [(b"123456789", 0x31C3), (b"{123456789}x", 0x31C3), (b"x{123456789}{y}", 0x31C3)],
)
def test_slots_are_those_of_the_specification(name: bytes, number: int) -> None:
    assert slot(name) == number % 16384
    assert slot(b"{}" + name) != slot(name)


# The URL


@pytest.mark.parametrize(
    ("url", "kind", "seeds", "db", "tls", "service"),
    [
        ("redis://h", Kind.ALONE, [("h", 6379)], 0, False, ""),
        ("rediss://h:1/5", Kind.ALONE, [("h", 1)], 5, True, ""),
        ("redis://[::1]:7/", Kind.ALONE, [("::1", 7)], 0, False, ""),
        ("unix:///a/b?db=2", Kind.ALONE, [("/a/b", 0)], 2, False, ""),
        ("redis+cluster://a:1,b:2", Kind.CLUSTER, [("a", 1), ("b", 2)], 0, False, ""),
        ("rediss+sentinel://a,b:2/s/1", Kind.SENTINEL, [("a", 26379), ("b", 2)], 1, True, "s"),
    ],
)
def test_urls(
    url: str, kind: Kind, seeds: list[tuple[str, int]], db: int, tls: bool, service: str
) -> None:
    scheme, _, rest = url.partition("://")
    target = parse(f"{scheme}://us%40er:p%2Fw@{rest}")
    assert (target.kind, target.tls, target.service) == (kind, tls, service)
    assert [*target.seeds] == [Address(*each) for each in seeds]
    assert (target.login.user, target.login.password, target.login.db) == ("us@er", "p/w", db)
    assert "p/w" not in repr(target)


@pytest.mark.parametrize(
    "url",
    [
        "redis://", "redis://h:0", "redis://h:x", "redis://a,b", "redis+cluster://a/1", "redis://h/x",
        "redis+sentinel://a", "unix://h/a", "unix:", "redis://h/1/2", "redis://h#x", "redis://h?x=1",
        "redis+sentinel://a/s/1/2", "redis://[::1", "redis://u:p@h@i",
    ],
)  # fmt: skip
def test_what_is_no_url_of_a_server(url: str) -> None:
    with pytest.raises(ConfigError, match=r"redis.url is not redis://"):
        parse(url)


# The breaker


def test_a_breaker_lets_one_probe_through_and_waits_longer_each_time() -> None:
    breaker = Breaker(1.0, 4.0)
    for _ in range(FAILURES - 1):
        assert breaker.allow(0.0)
        assert not breaker.failed(0.0)
    assert breaker.allow(0.0)
    assert breaker.failed(0.0)
    now = 0.0
    for waits in (1.0, 2.0, 4.0, 4.0):
        assert not breaker.allow(now + waits - 0.1)
        now += waits
        assert breaker.allow(now)
        assert not breaker.allow(now)
        assert not breaker.failed(now)
    now += 4.0
    assert breaker.allow(now)
    breaker.succeeded()
    assert breaker.allow(now)
    assert breaker.allow(now)
    assert not breaker.failed(now)
    assert breaker.allow(now)
