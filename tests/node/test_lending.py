"""The stream between nodes' daemons, with one end that does what it likes."""

import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from contextlib import ExitStack
from pathlib import Path

import pytest

from kvtier import config
from kvtier.config import Config
from kvtier.core.blocks import Attention, BlockKey, BlockLayout, LayerGroup
from kvtier.core.fidelity import Fidelity
from kvtier.core.tiers import Tier
from kvtier.node.lender import MAX_STRANGERS
from kvtier.node.peer import Order, Peer, Result
from kvtier.node.stream import Stream
from kvtier.wire import lending, local
from kvtier.wire.access import Access
from kvtier.wire.lending import Kind
from tests.access.conftest import OTHER, TOKEN, Keys
from tests.launching import DEADLINE_S, disk_toml, node_toml, wait_for
from tests.node.conftest import BLOCK, LAYOUT, lends_at, new_keys, restore, save, status
from tests.node.lending import (
    END,
    WELCOME,
    Asker,
    HangUp,
    Rogue,
    Sends,
    honest,
    of_no_kind,
    sent,
    too_long,
    too_short,
    with_a_long_speech,
    with_another_key,
    with_header_bit_turned,
    with_payload_bit_turned,
)
from tests.node.nodes import (
    LARGE,
    WAIT_S,
    counter,
    engine,
    members,
    nothing_leased,
    pulled_all,
    started,
)


@pytest.fixture
def rogue() -> Iterator[Rogue]:
    rogue = Rogue()
    yield rogue
    rogue.close()


# --- a lender that sends what it likes ------------------------------------------------------


def test_nothing_of_a_frame_that_is_not_right_gets_in(
    tmp_path: Path, stack: ExitStack, rogue: Rogue
) -> None:
    b = stack.enter_context(started(tmp_path, "b", members(a=rogue.address)))
    at_b = stack.enter_context(engine(tmp_path, "b"))

    def of_another_layout(keys: list[BlockKey]) -> list[bytes]:
        other = BlockLayout((LayerGroup(Attention.FULL, 2, 4, 64),), 16, "float16")
        assert other.nbytes == BLOCK
        return [*honest(keys[:2])[:-1], *sent(keys[2], layout=other)]

    wrong: list[Sends] = [
        with_payload_bit_turned, with_header_bit_turned, with_another_key, of_another_layout,
        too_long, too_short, of_no_kind, with_a_long_speech,
    ]  # fmt: skip
    for number, sends in enumerate(wrong, 1):
        keys = new_keys(5)
        rogue.sends = sends
        assert at_b.pull(keys, 0, "a", wait_s=WAIT_S) == 2, sends
        assert restore(at_b, keys) == [Tier.HOST] * 2
        assert counter(b, "corrupt_frames_total_peer") == number, sends
        assert counter(b, "peer_pulls_total_failed") == number, sends
        rogue.sends = honest  # or it would be left alone
        assert at_b.pull(keys, 0, "a", wait_s=WAIT_S) == 3
        assert restore(at_b, keys) == [Tier.HOST] * 5
    keys = new_keys(3)
    rogue.sends = lambda wanted: honest([*wanted, *wanted])
    assert at_b.pull(keys, 0, "a", wait_s=WAIT_S) == 3, "more than was asked for"
    nothing_leased(b)


def test_a_lender_that_greets_wrongly_is_a_miss(
    tmp_path: Path, stack: ExitStack, rogue: Rogue
) -> None:
    greetings = [
        (local.encode(True, lending.VERSION + 1, "a"), f"it speaks version {lending.VERSION + 1}"),
        (local.encode(True, lending.VERSION, "z"), f"{rogue.address} is node z"),
        (local.encode(False, "no token"), "it refuses us: no token"),
        (local.encode("a"), "no answer to a hello"),
        (b"\xff" * 64, "limit 8192"),
        (b"\0\0\0\0", "not a msgpack message"),
    ]
    places = [memoryview(bytearray(BLOCK))]
    for welcome, said in greetings:
        rogue.welcome = welcome
        peer = Peer("a", rogue.address, Access(Config(), serving=False))
        fetched = peer.fetch(Order(LAYOUT, new_keys(1), 0, places, lossy=False), WAIT_S)
        peer.close()
        assert fetched.result is Result.FAILED
        assert said in fetched.why
    b = stack.enter_context(started(tmp_path, "b", members(a=rogue.address)))
    at_b = stack.enter_context(engine(tmp_path, "b"))
    assert at_b.pull(new_keys(2), 0, "a", wait_s=WAIT_S) == 0
    assert counter(b, "peer_pulls_total_failed") == 1
    assert "peer a: " in b.log.read_text()
    rogue.welcome = WELCOME
    assert at_b.pull(new_keys(2), 0, "a", wait_s=WAIT_S) == 2
    nothing_leased(b)


def test_a_frame_that_is_not_exact_is_for_those_who_have_asked_for_it(
    tmp_path: Path, stack: ExitStack, rogue: Rogue
) -> None:
    rogue.sends = lambda keys: [
        *(part for key in keys for part in sent(key, fidelity=Fidelity.DERIVED)), END
    ]  # fmt: skip
    lossy = disk_toml(tmp_path / "c") + 'codec = "fp8"\n'
    b = stack.enter_context(started(tmp_path, "b", members(a=rogue.address)))
    stack.enter_context(started(tmp_path, "c", members(a=rogue.address) + lossy))
    keys = new_keys(4)
    at_b, at_c = (stack.enter_context(engine(tmp_path, name)) for name in "bc")
    assert at_b.pull(keys, 0, "a", wait_s=WAIT_S) == 0
    assert counter(b, "inexact_frames_total_peer") == 1
    assert at_c.pull(keys, 0, "a", wait_s=WAIT_S) == 4
    assert restore(at_c, keys) == [Tier.HOST] * 4


def test_what_had_come_before_a_peer_broke_off_or_fell_silent_counts(
    tmp_path: Path, stack: ExitStack, rogue: Rogue
) -> None:
    def breaks(keys: list[BlockKey]) -> Iterator[bytes]:
        yield from honest(keys)[:5]
        raise HangUp

    b = stack.enter_context(started(tmp_path, "b", members(a=rogue.address)))
    at_b = stack.enter_context(engine(tmp_path, "b"))
    rogue.sends = breaks
    keys = new_keys(5)
    assert at_b.pull(keys, 0, "a", wait_s=WAIT_S) == 2
    assert restore(at_b, keys) == [Tier.HOST] * 2
    assert counter(b, "peer_pulls_total_failed") == 1
    rogue.sends = rogue.hangs
    keys = new_keys(5)
    came = at_b.pull(keys, 0, "a", wait_s=2.0)
    assert came <= 2, "no more was sent"
    assert restore(at_b, keys) == [Tier.HOST] * came
    nothing_leased(b)


def test_connections_are_kept_and_one_that_was_left_is_made_anew(
    tmp_path: Path, stack: ExitStack, rogue: Rogue
) -> None:
    b = stack.enter_context(started(tmp_path, "b", members(a=rogue.address)))
    at_b = stack.enter_context(engine(tmp_path, "b"))
    for _ in range(5):
        assert at_b.pull(new_keys(2), 0, "a", wait_s=WAIT_S) == 2
    assert rogue.connections == 1
    closes = threading.Event()

    def then_closes(keys: list[BlockKey]) -> Iterator[bytes]:
        yield from honest(keys)
        closes.set()
        raise HangUp

    rogue.sends = then_closes
    assert at_b.pull(new_keys(2), 0, "a", wait_s=WAIT_S) == 2
    assert closes.wait(WAIT_S)
    rogue.sends = honest
    # Whether its end has been heard by then or not: at the latest the second one is served.
    came = [at_b.pull(new_keys(2), 0, "a", wait_s=WAIT_S) for _ in range(2)]
    assert came[1] == 2
    assert rogue.connections == 2
    nothing_leased(b)


def test_a_pull_that_fails_cuts_no_other_from_the_same_peer(rogue: Rogue) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow_or_failing(keys: list[BlockKey]) -> Iterator[bytes]:
        if len(keys) == 1:
            raise HangUp
        yield from honest(keys)[:4]
        begun.set()
        go_on.wait(WAIT_S)
        yield from honest(keys)[4:]

    def order(count: int) -> Order:
        places = [memoryview(bytearray(BLOCK)) for _ in range(count)]
        return Order(LAYOUT, new_keys(count), 0, places, lossy=False)

    rogue.sends = slow_or_failing
    peer = Peer("a", rogue.address, Access(Config(), serving=False))
    with futures.ThreadPoolExecutor(1) as beside:
        long = beside.submit(peer.fetch, order(5), WAIT_S)
        assert begun.wait(WAIT_S)
        assert peer.fetch(order(1), WAIT_S).result is Result.FAILED
        go_on.set()
        fetched = long.result(WAIT_S)
    assert (len(fetched.fidelities), fetched.result) == (5, Result.OK), fetched.why
    rogue.sends = honest
    assert peer.fetch(order(3), WAIT_S).result is Result.OK
    peer.close()
    peer.close()
    assert peer.fetch(order(3), WAIT_S).result is Result.LATE


def test_who_wants_what_is_on_its_way_waits_for_it_in_its_own_time(
    tmp_path: Path, stack: ExitStack, rogue: Rogue
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow(keys: list[BlockKey]) -> Iterator[bytes]:
        yield from honest(keys)[:4]
        begun.set()
        go_on.wait(WAIT_S)
        yield from honest(keys)[4:]

    rogue.sends = slow
    b = stack.enter_context(started(tmp_path, "b", members(a=rogue.address)))
    ends = [stack.enter_context(engine(tmp_path, "b")) for _ in range(3)]
    keys = new_keys(6)
    beside = stack.enter_context(futures.ThreadPoolExecutor(2))
    first = beside.submit(ends[0].pull, keys[:5], 0, "a", wait_s=WAIT_S)
    try:
        assert begun.wait(WAIT_S)
        assert ends[2].pull(keys[:5], 0, "a", wait_s=0.05) == 0
        assert not first.done()
        before = counter(b, "peer_pulls_total_joined")
        second = beside.submit(ends[1].pull, keys, 0, "a", wait_s=WAIT_S)
        wait_for("it to wait", lambda: counter(b, "peer_pulls_total_joined") > before)
    finally:
        go_on.set()
    assert first.result(WAIT_S) == 5
    assert second.result(WAIT_S) == 6, "five that it has waited for, and one of its own"
    assert rogue.requests == 2
    assert counter(b, "pulled_blocks_total") == 6
    assert restore(ends[1], keys) == [Tier.HOST] * 6
    nothing_leased(b)


def test_who_waits_for_a_pull_that_fails_asks_itself(
    tmp_path: Path, stack: ExitStack, rogue: Rogue
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def fails(keys: list[BlockKey]) -> Iterator[bytes]:
        yield from honest(keys)[:4]
        rogue.sends = honest
        begun.set()
        go_on.wait(WAIT_S)
        raise HangUp

    rogue.sends = fails
    b = stack.enter_context(started(tmp_path, "b", members(a=rogue.address)))
    ends = [stack.enter_context(engine(tmp_path, "b")) for _ in range(2)]
    keys = new_keys(5)
    beside = stack.enter_context(futures.ThreadPoolExecutor(2))
    first = beside.submit(ends[0].pull, keys, 0, "a", wait_s=WAIT_S)
    try:
        assert begun.wait(WAIT_S)
        second = beside.submit(ends[1].pull, keys, 0, "a", wait_s=WAIT_S)
        wait_for("it to wait", lambda: counter(b, "peer_pulls_total_joined") == 1)
    finally:
        go_on.set()
    assert first.result(WAIT_S) == 2
    assert second.result(WAIT_S) == 5
    assert restore(ends[1], keys) == [Tier.HOST] * 5
    nothing_leased(b)


# --- an asker that does what it likes -------------------------------------------------------


def test_one_reader_too_many_is_refused_and_a_stalled_one_holds_nobody_up(
    tmp_path: Path, stack: ExitStack
) -> None:
    patient = f"from kvtier.node import lender; lender.STALL_S = {DEADLINE_S}"
    a = stack.enter_context(
        started(tmp_path, "a", "[peers]\nlends = 1\n", host="64MiB", setup=patient)
    )
    b = stack.enter_context(started(tmp_path, "b", members(a=lends_at(a)), host="64MiB"))
    at_a, at_b = (stack.enter_context(engine(tmp_path, name, LARGE)) for name in "ab")
    keys = new_keys(40)  # 55 MiB: more than lies between two ends of a connection
    with at_a.write(keys) as lease:
        lease.filled = len(lease.slots)
    assert lease.filled == 40
    slow, other = (stack.enter_context(Asker(lends_at(a))) for _ in range(2))
    slow.ask(keys, layout=LARGE.id)
    assert slow.head().kind is Kind.BLOCK
    for _ in range(2):
        other.ask(keys, layout=LARGE.id)
        assert other.answer() == (
            0, Kind.BUSY, "1 other nodes are being served, the limit peers.lends"
        )  # fmt: skip
    for _ in range(5):
        assert at_b.pull(keys, 0, "a", wait_s=WAIT_S) == 0, "a miss, as A is busy"
    assert counter(b, "peer_pulls_total_busy") == 5, "it is never left alone for that"
    assert counter(a, "lends_refused_total_busy") == 7
    assert at_a.match(keys).blocks == 40, "its engines are served"
    slow.socket.close()
    nothing_leased(a)
    wait_for("its turn", lambda: pulled_all(at_b, keys))
    nothing_leased(a, b)


def test_a_request_out_of_its_limits_is_the_last_one(tmp_path: Path, stack: ExitStack) -> None:
    a = stack.enter_context(started(tmp_path, "a", "[peers]"))
    at_a = stack.enter_context(engine(tmp_path, "a"))
    keys = new_keys(4)
    assert save(at_a, keys) == 4
    bad: list[tuple[str, dict[str, int]]] = [
        ("first is 5, there are 4 keys", {"first": 5}),
        ("blocks is 0", {"blocks": 0}),
        ("blocks is 257", {"blocks": 257}),
        ("wait is -1 ms", {"wait_ms": -1}),
    ]
    for said, fields in bad:
        with Asker(lends_at(a)) as asker:
            asker.ask(keys, **fields)
            count, kind, text = asker.answer()
            assert (count, kind) == (0, Kind.REFUSED), said
            assert said in text
            assert not asker.take(1), "it has hung up"
    messages = [
        ("a multiple of 16", local.encode(LAYOUT.id, b"x" * 17, 0, 1, 1000)),
        ("a request takes", local.encode(LAYOUT.id, b"", 0, 1)),
        ("limit 2097152", b"\xff" * 4),
        ("a second request", local.encode("", b"", 0, 1, 1) * 2),
    ]
    for said, message in messages:
        with Asker(lends_at(a)) as asker:
            asker.socket.sendall(message)
            assert said in asker.answer()[2]
    assert counter(a, "lends_refused_total_protocol") == len(bad) + len(messages)
    with Asker(lends_at(a)) as asker:
        for nothing in (
            (keys, {"layout": "00"}), (new_keys(1), {}), (keys[:1], {"first": 1}),
            (keys, {"first": 4}),
        ):  # fmt: skip
            asker.ask(nothing[0], **nothing[1])
            assert asker.answer() == (0, Kind.END, "")
        asker.ask(keys, first=1, blocks=2)
        assert asker.answer() == (2, Kind.END, "")
    nothing_leased(a)


def test_who_says_no_proper_hello_is_refused(tmp_path: Path, stack: ExitStack) -> None:
    a = stack.enter_context(started(tmp_path, "a", "[peers]"))
    hellos = [
        (local.encode(lending.VERSION + 1, ""), f"this node speaks {lending.VERSION}"),
        (local.encode(lending.VERSION, 7), "a hello takes (int, str)"),
        (local.encode("a"), "no hello"),
        (b"GET / HTTP/1.1\r\n\r\n", "limit 8192"),
    ]
    for hello, said in hellos:
        with Asker(lends_at(a), hello) as asker:
            assert asker.welcome is not None
            refused, text = asker.welcome
            assert refused is False
            assert said in str(text)
            assert not asker.take(1)
    assert counter(a, "lends_refused_total_protocol") == len(hellos)


def test_strangers_that_say_nothing_are_so_many_and_no_more(
    tmp_path: Path, stack: ExitStack
) -> None:
    a = stack.enter_context(started(tmp_path, "a", "[peers]"))
    with ExitStack() as silent:
        at = lends_at(a)
        while counter(a, "lends_refused_total_connections") == 0:
            for _ in range(MAX_STRANGERS + 1):  # all at once: none is hung up on before the last
                silent.enter_context(Asker(at, hello=None))

    with ExitStack() as known:  # who has said hello is no stranger

        def served() -> bool:
            asker = known.enter_context(Asker(at))
            return asker.welcome == [True, lending.VERSION, "a"]

        for _ in range(MAX_STRANGERS + 1):
            wait_for("a stranger's place to be free", served)


def test_a_flood_of_strangers_takes_the_places_of_its_own(tmp_path: Path, stack: ExitStack) -> None:
    a = stack.enter_context(started(tmp_path, "a", "[peers]"))
    at = lends_at(a)
    for _ in range(100):
        stack.enter_context(Asker(at, hello=None, source="127.0.0.2"))

    def welcome() -> bool:
        return stack.enter_context(Asker(at)).welcome == [True, lending.VERSION, "a"]

    assert any(welcome() for _ in range(5)), "a good peer is kept out"


def over_tls(keys: Keys) -> tuple[ssl.SSLSocket, ssl.SSLSocket]:
    """The two ends of a connection."""
    ours, theirs = socket.socketpair()
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(keys.path("server.pem"), keys.path("server.key"))
    asking = ssl.create_default_context(cafile=str(keys.path("ca.pem")))
    with futures.ThreadPoolExecutor(1) as beside:
        other = beside.submit(serving.wrap_socket, theirs, server_side=True)
        return asking.wrap_socket(ours, server_hostname="localhost"), other.result(WAIT_S)


@pytest.mark.parametrize("secure", [False, True])
def test_who_takes_nothing_of_what_it_is_sent_is_given_up(tmp_path: Path, *, secure: bool) -> None:
    ours, theirs = over_tls(Keys(tmp_path)) if secure else socket.socketpair()
    with ours, theirs:
        stream, far = Stream(ours), time.monotonic() + 3600
        with pytest.raises(TimeoutError):  # and not only after an hour
            stream.send([bytes(64 << 20)], far, 0.2)


def test_who_takes_a_large_block_slowly_over_tls_has_its_time_for_each_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int] = []
    send = ssl.SSLSocket.send

    def noted(sock: ssl.SSLSocket, data: memoryview) -> int:
        given.append(len(data))
        return send(sock, data)  # it returns when all is sent, or its time is over

    ours, theirs = over_tls(Keys(tmp_path))
    monkeypatch.setattr(ssl.SSLSocket, "send", noted)
    block, got = bytes(range(256)) * (16 << 10), bytearray(4 << 20)
    with ours, theirs, futures.ThreadPoolExecutor(1) as beside:
        far = time.monotonic() + 3600
        reading = beside.submit(Stream(theirs).receive, got, far)
        Stream(ours).send([block], far, 60.0)
        reading.result(WAIT_S)
    assert got == block
    assert max(given) <= 1 << 20


def test_a_port_that_is_taken_is_refused_or_replaced(tmp_path: Path, stack: ExitStack) -> None:
    taken = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    listen = f"127.0.0.1:{taken.getsockname()[1]}"
    path = tmp_path / "b.toml"
    # Said before any memory is taken, as for a layout that an earlier life left on the disk.
    left = tmp_path / "disk" / LAYOUT.id
    left.mkdir(parents=True)
    (left / "layout.json").write_text(LAYOUT.describe())
    more = f'[peers]\nlisten = "{listen}"\n' + disk_toml(tmp_path)
    path.write_text(node_toml(tmp_path, host="60TiB", more=more))
    command = [sys.executable, "-m", "kvtier.cli", "node", "--config", str(path)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert found.returncode
    assert f"peers.listen: cannot listen on {listen}" in found.stderr
    a = stack.enter_context(
        started(tmp_path, "a", f'[peers]\nlisten = "{listen}"\nany_port = true\n')
    )
    assert lends_at(a) != listen
    assert f"cannot listen on {listen}" in a.log.read_text()
    with Asker(lends_at(a)) as asker:
        assert asker.welcome == [True, lending.VERSION, "a"]


# --- an asker whose peer was away -------------------------------------------------------------


def order(count: int) -> Order:
    places = [memoryview(bytearray(BLOCK)) for _ in range(count)]
    return Order(LAYOUT, new_keys(count), 0, places, lossy=False)


def test_kept_connections_that_broke_say_nothing_of_a_peer_that_is_back(rogue: Rogue) -> None:
    """As after a loss of power: each of them is found broken by the request that takes it."""
    peer = Peer("a", rogue.address, Access(Config(), serving=False))
    everybody = threading.Barrier(3)

    def together(keys: list[BlockKey]) -> Iterator[bytes]:
        everybody.wait(WAIT_S)
        yield from honest(keys)

    rogue.sends = together
    with futures.ThreadPoolExecutor(3) as beside:
        began = [beside.submit(peer.fetch, order(1), WAIT_S) for _ in range(3)]
        assert [each.result(WAIT_S).result for each in began] == [Result.OK] * 3
    assert rogue.connections == 3
    broken = 0

    def broken_once(keys: list[BlockKey]) -> Iterator[bytes]:
        nonlocal broken
        broken += 1
        if broken == 1:
            raise HangUp
        yield from honest(keys)

    rogue.sends = broken_once
    found = peer.fetch(order(2), WAIT_S)
    assert (found.result, len(found.fidelities)) == (Result.OK, 2), found.why
    assert rogue.connections == 4, "the others are as old, and were let go"

    def broken_late(keys: list[BlockKey]) -> Iterator[bytes]:
        yield from honest(keys)[:2]
        raise HangUp

    rogue.sends = broken_late
    found = peer.fetch(order(2), WAIT_S)
    assert (found.result, len(found.fidelities)) == (Result.FAILED, 1)
    requests = rogue.requests

    def broken_always(_: list[BlockKey]) -> list[bytes]:
        raise HangUp

    rogue.sends = broken_always
    assert peer.fetch(order(2), WAIT_S).result is Result.FAILED
    assert rogue.requests == requests + 1, "a new connection is not tried twice"
    peer.close()


def test_pulls_that_fail_together_are_one_failure(
    tmp_path: Path, stack: ExitStack, rogue: Rogue
) -> None:
    listed = members(a=rogue.address).replace("retry_s = 0.1", "retry_s = 600.0")
    b = stack.enter_context(started(tmp_path, "b", listed))
    engines = [stack.enter_context(engine(tmp_path, "b")) for _ in range(4)]
    go_on = threading.Event()

    def broken(_: list[BlockKey]) -> list[bytes]:
        go_on.wait(WAIT_S)
        raise HangUp

    rogue.sends = broken
    with futures.ThreadPoolExecutor(4) as beside:
        began = [beside.submit(e.pull, new_keys(1), 0, "a", wait_s=WAIT_S) for e in engines]
        wait_for("four requests", lambda: rogue.requests == 4)
        go_on.set()
        assert [each.result(WAIT_S) for each in began] == [0] * 4
    assert counter(b, "peer_pulls_total_failed") == 4
    rogue.sends = honest
    assert engines[0].pull(new_keys(3), 0, "a", wait_s=WAIT_S) == 3, "left alone for one failure"


def test_no_slot_is_taken_for_a_peer_that_does_not_answer(
    tmp_path: Path, stack: ExitStack, rogue: Rogue
) -> None:
    b = stack.enter_context(started(tmp_path, "b", members(a=rogue.address)))
    at_b, other = (stack.enter_context(engine(tmp_path, "b")) for _ in range(2))
    rogue.greets.clear()
    keys = new_keys(8)
    with futures.ThreadPoolExecutor(1) as beside:
        pulling = beside.submit(at_b.pull, keys, 0, "a", wait_s=WAIT_S)
        wait_for("a connection", lambda: rogue.connections)
        assert status(b).layouts[0].leases == 0
        assert save(other, keys[:2]) == 2, "an engine has computed them meanwhile"
        rogue.greets.set()
        came = pulling.result(WAIT_S + 10)
    assert came in (0, 6), "it may have been given up on a slow machine"
    assert restore(other, keys) == [Tier.HOST] * (2 + came)


# --- who may ask ----------------------------------------------------------------------------


def fetched(address: str, keys: Keys, toml: str) -> tuple[Result, str]:
    path = keys.path("asker.toml")
    path.write_text(toml)
    peer = Peer("a", address, Access(config.load(path), serving=False))
    try:
        places = [memoryview(bytearray(BLOCK))]
        found = peer.fetch(Order(LAYOUT, new_keys(1), 0, places, lossy=False), WAIT_S)
    finally:
        peer.close()
    return found.result, found.why


def test_only_who_shows_a_certificate_and_the_token_is_served(
    tmp_path: Path, stack: ExitStack
) -> None:
    keys = Keys(tmp_path)
    more = "[peers]\n" + keys.tls("server", client_ca="ca") + keys.auth()
    a = stack.enter_context(started(tmp_path, "a", more))
    at, mine = a.lends_at(), keys.tls("client")
    assert fetched(at, keys, mine + keys.auth()) == (Result.LESS, "")
    for toml, said in (
        (mine, "no bearer token"),
        (mine + keys.auth("other"), "none that is accepted"),
        (keys.tls("client", ca="stranger") + keys.auth(), "is not accepted"),
    ):
        result, why = fetched(at, keys, toml)
        assert result is Result.FAILED
        assert said in why, why
    for toml in (keys.tls("strange") + keys.auth(), keys.tls("") + keys.auth(), keys.auth()):
        assert fetched(at, keys, toml)[0] is Result.FAILED
    log = a.log.read_text()
    assert TOKEN not in log
    assert OTHER not in log


def test_a_new_certificate_and_a_new_token_are_used_from_the_next_connection_on(
    tmp_path: Path, stack: ExitStack
) -> None:
    keys = Keys(tmp_path)
    more = "[peers]\n" + keys.tls("server") + keys.auth()
    at = stack.enter_context(started(tmp_path, "a", more)).lends_at()
    by_either = (
        keys.tls("", ca="ca") + keys.auth(),
        keys.tls("", ca="stranger") + keys.auth("other"),
    )
    assert [fetched(at, keys, toml)[0] for toml in by_either] == [Result.LESS, Result.FAILED]
    for kind in ("pem", "key"):
        new = keys.path(f"strange.{kind}").read_bytes()
        keys.path("new").write_bytes(new)
        keys.path("new").rename(keys.path(f"server.{kind}"))
    keys.path("new").write_text(f"{OTHER}\n")
    keys.path("new").rename(keys.path("token"))
    # The first one asks with the new token too: its file is the same.
    assert [fetched(at, keys, toml)[0] for toml in by_either] == [Result.FAILED, Result.LESS]


def test_who_has_shown_a_token_that_is_gone_is_hung_up_on_in_whatever_it_is_at(
    tmp_path: Path, stack: ExitStack
) -> None:
    keys = Keys(tmp_path)
    keys.path("token").write_text(f"{TOKEN}\n{OTHER}\n")
    patient = f"from kvtier.node import lender; lender.STALL_S = lender.MOST_S = {DEADLINE_S}"
    more = "[peers]\nlends = 1\n" + keys.auth()
    a = stack.enter_context(started(tmp_path, "a", more, host="64MiB", setup=patient))
    at, at_a = a.lends_at(), stack.enter_context(engine(tmp_path, "a", LARGE))
    wanted = new_keys(40)  # 55 MiB: more than lies between two ends of a connection
    with at_a.write(wanted) as lease:
        lease.filled = len(lease.slots)
    idle, slow, good = (
        stack.enter_context(Asker(at, local.encode(lending.VERSION, token)))
        for token in (TOKEN, TOKEN, OTHER)
    )
    slow.ask(wanted, layout=LARGE.id)
    assert slow.head().kind is Kind.BLOCK
    keys.path("new").write_text(f"{OTHER}\n")
    keys.path("new").rename(keys.path("token"))
    assert idle.message() is None, "what was idle"
    wait_for("the other", lambda: a.log.read_text().count("its token is gone") == 2)
    assert slow.take(40 * LARGE.nbytes) == b"", "it ends before the blocks do"

    def served() -> bool:
        good.ask(wanted[:1], layout=LARGE.id)
        return good.answer() == (1, Kind.END, "")

    wait_for("its place to be another's, who shows one that counts", served)
    nobodys = stack.enter_context(Asker(at, local.encode(lending.VERSION, TOKEN)))
    assert nobodys.welcome == [False, "the bearer token is none that is accepted here"]
