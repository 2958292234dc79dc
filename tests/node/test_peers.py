"""Two real daemons, one of which loads blocks from the other; and peers that do what they like."""

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import pytest

from kvtier.codec import frame
from kvtier.codec.codecs import RAW
from kvtier.config import Config
from kvtier.core.blocks import Attention, BlockKey, BlockLayout, LayerGroup
from kvtier.core.breakeven import ComputeCost
from kvtier.core.fidelity import Fidelity
from kvtier.core.tiers import Tier
from kvtier.engine.client import TierClient
from kvtier.node.peer import Order, Peer, Result
from kvtier.testing.valkey import ValkeyServer
from kvtier.wire import local
from kvtier.wire.access import Access
from kvtier.wire.local import Op
from kvtier.wire.pb import feed_pb2, node_pb2, node_pb2_grpc
from tests.launching import Process, disk_toml, node_toml, redis_toml, wait_for
from tests.node.conftest import (
    BLOCK,
    LAYOUT,
    content,
    new_keys,
    restore,
    save,
    status,
    wait_for_blocks,
)

WAIT_S = 60.0  # for a pull that is to end by itself
LARGE = BlockLayout((LayerGroup(Attention.FULL, 11, 8, 256),), 16, "float16")  # 1.4 MiB


def members(**nodes: str) -> str:
    listed = ", ".join(f'{{ node = "{node}", daemon = "{at}" }}' for node, at in nodes.items())
    return f"[peers]\nretry_s = 0.1\nmembers = [{listed}]\n"


@contextmanager
def started(folder: Path, name: str, more: str = "", host: str = "4MiB") -> Iterator[Process]:
    home = folder / name
    home.mkdir()
    toml = node_toml(home, host=host, more=more).replace('name = "n"', f'name = "{name}"')
    with Process("node", toml, home) as process:
        yield process


@contextmanager
def engine(folder: Path, name: str, layout: BlockLayout = LAYOUT) -> Iterator[TierClient]:
    client = TierClient(f"{folder}/{name}/node.sock", layout, "test")
    try:
        yield client
    finally:
        client.close()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def counter(node: Process, name: str) -> float:
    return status(node).counters.get(f"kvtier_{name}", 0.0)


def nothing_leased(*nodes: Process) -> None:
    for node in nodes:
        wait_for("no lease", lambda node=node: not any(e.leases for e in status(node).layouts))


def test_what_another_node_holds_is_pulled_and_restored(tmp_path: Path, stack: ExitStack) -> None:
    a = stack.enter_context(started(tmp_path, "a", "[peers]"))
    b = stack.enter_context(started(tmp_path, "b", members(a=a.address, b="127.0.0.1:1")))
    at_a, at_b = (stack.enter_context(engine(tmp_path, name)) for name in "ab")
    keys = new_keys(10)
    assert save(at_a, keys) == 10
    assert at_b.match(keys).blocks == 0
    assert at_b.pull(keys, 0, "a", wait_s=WAIT_S) == 10
    assert restore(at_b, keys) == [Tier.HOST] * 10
    assert at_b.pull(keys, 0, "a", wait_s=WAIT_S) == 0, "it is all there"
    assert counter(b, "peer_pulls_total_ok") == 1
    assert counter(b, "pulled_blocks_total") == 10
    wait_for("A to have counted", lambda: counter(a, "lent_blocks_total") == 10)
    nothing_leased(a, b)


def test_only_what_is_missing_comes_and_only_as_far_as_there_is_no_gap(
    tmp_path: Path, stack: ExitStack
) -> None:
    a = stack.enter_context(started(tmp_path, "a", "[peers]"))
    b = stack.enter_context(started(tmp_path, "b", members(a=a.address)))
    at_a, at_b = (stack.enter_context(engine(tmp_path, name)) for name in "ab")
    keys = new_keys(12)
    assert save(at_a, keys[:8]) == 8
    assert save(at_b, keys[:3]) == 3
    assert save(at_b, [*keys[:3], keys[5]]) == 1
    assert at_b.pull(keys, 0, "a", wait_s=WAIT_S) == 2, "3 and 4; 5 is there"
    assert at_b.match(keys).blocks == 6
    assert at_b.pull(keys, 6, "a", wait_s=WAIT_S) == 2, "6 and 7; A has no more"
    assert restore(at_b, keys) == [Tier.HOST] * 8
    assert counter(b, "peer_pulls_total_less") == 1
    cheap = ComputeCost(1e-9)  # faster than any pull that was measured
    assert save(at_a, keys) == 4
    assert at_b.pull(keys, 8, "a", wait_s=WAIT_S, compute=cheap) == 0
    assert at_b.pull(keys, 8, "a", wait_s=WAIT_S, compute=ComputeCost(1e3)) == 4
    nothing_leased(a, b)


def test_blocks_come_from_the_others_disk_too(tmp_path: Path, stack: ExitStack) -> None:
    more = "[peers]\n" + disk_toml(tmp_path / "a")
    a = stack.enter_context(started(tmp_path, "a", more, host="1MiB"))
    stack.enter_context(started(tmp_path, "b", members(a=a.address)))
    at_a, at_b = (stack.enter_context(engine(tmp_path, name)) for name in "ab")
    prompts = [new_keys(8) for _ in range(6)]  # 48 blocks; 32 fit in A's host tier
    for number, keys in enumerate(prompts, 1):
        assert save(at_a, keys) == 8
        wait_for_blocks(a, Tier.DISK, 8 * number)
    assert at_a.match(prompts[0]).by_tier[Tier.DISK] == 8
    for keys in prompts:
        assert at_b.pull(keys, 0, "a", wait_s=WAIT_S) == 8
        assert restore(at_b, keys) == [Tier.HOST] * 8


def test_blocks_of_the_shared_store_are_for_everybody_to_ask_there(
    tmp_path: Path, stack: ExitStack, valkey: ValkeyServer
) -> None:
    more = "[peers]\n" + redis_toml(valkey.url, 60.0)
    a = stack.enter_context(started(tmp_path, "a", more))
    at_a = stack.enter_context(engine(tmp_path, "a"))
    keys = new_keys(9)
    assert save(at_a, keys[:5]) == 5
    wait_for_blocks(a, Tier.SHARED, 5)
    with grpc.insecure_channel(a.address) as channel:
        stub = node_pb2_grpc.NodeStub(channel)
        host = node_pb2.NodeClearRequest(tiers=[feed_pb2.TIER_HOST])
        assert stub.Clear(host, timeout=WAIT_S).blocks == 5
        assert restore(at_a, keys[:3], wait_s=WAIT_S) == [Tier.SHARED] * 3
        assert save(at_a, keys) == 4, "in host memory are 0 to 2, and 5 to 8"
        for first, lent in ((0, 3), (2, 1), (3, 0), (5, 4)):
            asked = node_pb2.FetchRequest(
                layout=LAYOUT.id, keys=b"".join(keys), first=first, blocks=9
            )
            assert len(list(stub.Fetch(asked, timeout=WAIT_S))) == lent, first
    assert at_a.match(keys).by_tier[Tier.SHARED] == 2, "nothing was loaded for it"
    nothing_leased(a)


def test_a_block_larger_than_a_message_comes_in_parts(tmp_path: Path, stack: ExitStack) -> None:
    a = stack.enter_context(started(tmp_path, "a", "[peers]", host="16MiB"))
    stack.enter_context(started(tmp_path, "b", members(a=a.address), host="16MiB"))
    at_a, at_b = (stack.enter_context(engine(tmp_path, name, LARGE)) for name in "ab")
    keys = new_keys(3)
    saved = {key: os.urandom(LARGE.nbytes) for key in keys}
    with at_a.write(keys) as lease:
        for index, slot in zip(lease.indexes, lease.slots, strict=True):
            at_a.arena.slot(slot)[:] = saved[keys[index]]
        lease.filled = 3
    assert at_b.pull(keys, 0, "a", wait_s=WAIT_S) == 3
    with at_b.read(keys) as read:
        assert [bytes(at_b.arena.slot(slot)) for slot in read.slots] == [*saved.values()]


def test_only_peers_of_the_settings_are_asked(tmp_path: Path, stack: ExitStack) -> None:
    a = stack.enter_context(started(tmp_path, "a", "[peers]"))
    b = stack.enter_context(started(tmp_path, "b", members(c=a.address)))
    at_a, at_b = (stack.enter_context(engine(tmp_path, name)) for name in "ab")
    keys = new_keys(4)
    save(at_a, keys)
    for node in ("a", a.address, "x" * 10_000, "a"):
        assert at_b.pull(keys, 0, node, wait_s=WAIT_S) == 0
    assert counter(b, "peer_pulls_total_unknown") == 4
    assert at_b.match(keys).blocks == 0
    said = [line for line in b.log.read_text().splitlines() if "none of peers.members" in line]
    assert len(said) == 3, said
    assert all(len(line) < 400 for line in said)
    assert at_b.pull(keys, 0, "c", wait_s=WAIT_S) == 4, "the engine has its connection yet"


def test_a_node_without_peers_gives_nothing(tmp_path: Path, stack: ExitStack) -> None:
    a = stack.enter_context(started(tmp_path, "a"))
    b = stack.enter_context(started(tmp_path, "b", members(a=a.address)))
    at_a, at_b = (stack.enter_context(engine(tmp_path, name)) for name in "ab")
    keys = new_keys(4)
    save(at_a, keys)
    for _ in range(2):
        assert at_b.pull(keys, 0, "a", wait_s=WAIT_S) == 0
    said = [line for line in b.log.read_text().splitlines() if "peer a" in line]
    assert len(said) == 1
    assert "this node lends no blocks; see [peers]" in said[0]
    assert at_a.pull(keys, 0, "b", wait_s=WAIT_S) == 0, "A knows nobody"
    nothing_leased(a, b)


def test_a_peer_that_hangs_costs_the_deadline_and_one_that_is_killed_a_miss(
    tmp_path: Path, stack: ExitStack
) -> None:
    a = stack.enter_context(started(tmp_path, "a", "[peers]"))
    b = stack.enter_context(started(tmp_path, "b", members(a=a.address)))
    at_a, at_b = (stack.enter_context(engine(tmp_path, name)) for name in "ab")
    keys = new_keys(10)
    save(at_a, keys)
    os.kill(a.pid, signal.SIGSTOP)
    try:
        assert at_b.pull(keys, 0, "a", wait_s=0.2) == 0
        with asking(tmp_path / "b" / "node.sock", keys):
            wait_for("a pull", lambda: status(b).layouts[0].leases)
        nothing_leased(b)
    finally:
        os.kill(a.pid, signal.SIGCONT)
    wait_for("A to be asked again", lambda: pulled_all(at_b, keys))
    assert "peer a answers again" in b.log.read_text()
    more = new_keys(10)
    a.kill()
    for _ in range(6):
        assert at_b.pull(more, 0, "a", wait_s=WAIT_S) == 0
    assert counter(b, "peer_pulls_total_left_alone") > 0
    assert restore(at_b, keys) == [Tier.HOST] * 10
    nothing_leased(b)


@contextmanager
def asking(socket_path: Path, keys: Sequence[BlockKey], wait_s: int = 2) -> Iterator[None]:
    """An engine that goes away with its pull unanswered."""
    with socket.socket(socket.AF_UNIX) as raw:
        raw.connect(str(socket_path))
        raw.sendall(local.encode(Op.HELLO, local.VERSION, LAYOUT.describe(), "leaving"))
        _, fds, _, _ = socket.recv_fds(raw, 65536, 2)
        for fd in fds:
            os.close(fd)
        raw.sendall(local.encode(Op.PULL, b"".join(keys), "a", 0, wait_s * 1000, 0, 0, 0, -1))
        yield


def test_a_daemon_that_is_told_to_stop_waits_for_no_peer(tmp_path: Path, stack: ExitStack) -> None:
    a = stack.enter_context(started(tmp_path, "a", "[peers]"))
    b = stack.enter_context(started(tmp_path, "b", members(a=a.address)))
    os.kill(a.pid, signal.SIGSTOP)
    try:
        with asking(tmp_path / "b" / "node.sock", new_keys(10), wait_s=60):
            wait_for("a pull", lambda: status(b).layouts[0].leases)
            assert b.terminate() == 0
    finally:
        os.kill(a.pid, signal.SIGCONT)
    assert "Traceback" not in b.log.read_text()


def pulled_all(client: TierClient, keys: Sequence[BlockKey]) -> bool:
    client.pull(keys, 0, "a", wait_s=WAIT_S)
    return client.match(keys).blocks == len(keys)


# --- a peer that sends what it likes ------------------------------------------------------

Parts = list[node_pb2.FetchPart]
Sends = Callable[[list[BlockKey]], Iterable[node_pb2.FetchPart]]


class Rogue(node_pb2_grpc.NodeServicer):
    """Answers each Fetch with what `sends` makes of the wanted keys."""

    def __init__(self) -> None:
        self.sends: Sends = honest
        self.over = threading.Event()

    def Fetch(
        self, request: node_pb2.FetchRequest, context: grpc.ServicerContext
    ) -> Iterator[node_pb2.FetchPart]:
        keys = local.unpack_keys(request.keys)[request.first :]
        yield from self.sends(keys)

    def hangs(self, keys: list[BlockKey]) -> Iterator[node_pb2.FetchPart]:
        yield from honest(keys)[:5]
        self.over.wait()


def sent(key: BlockKey, block: bytes | None = None, layout: BlockLayout = LAYOUT) -> Parts:
    """A block in two parts."""
    block = content(key) if block is None else block
    header, _ = frame.encode(key, memoryview(block), layout, RAW)
    half = len(block) // 2
    first = node_pb2.FetchPart(header=bytes(header), payload=block[:half])
    return [first, node_pb2.FetchPart(payload=block[half:])]


def breaks(keys: list[BlockKey]) -> Iterator[node_pb2.FetchPart]:
    yield from honest(keys)[:5]
    raise ConnectionError("on purpose")


def honest(keys: list[BlockKey]) -> Parts:
    return [part for key in keys for part in sent(key)]


def turned(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def with_payload_bit_turned(keys: list[BlockKey]) -> Parts:
    parts = honest(keys)
    parts[5].payload = turned(parts[5].payload, BLOCK // 2 - 1)
    return parts


def with_header_bit_turned(keys: list[BlockKey]) -> Parts:
    parts = honest(keys)
    parts[4].header = turned(parts[4].header, 20)
    return parts


def with_another_key(keys: list[BlockKey]) -> Parts:
    return [*honest(keys[:2]), *sent(keys[3]), *honest(keys[3:])]


def of_another_layout(keys: list[BlockKey]) -> Parts:
    other = BlockLayout((LayerGroup(Attention.FULL, 2, 4, 64),), 16, "float16")
    assert other.nbytes == BLOCK
    return [*honest(keys[:2]), *sent(keys[2], layout=other)]


def too_long(keys: list[BlockKey]) -> Parts:
    parts = honest(keys)
    parts[5].payload += b"x"
    return parts


def without_an_end(keys: list[BlockKey]) -> Parts:
    return honest(keys)[:5]


def with_an_empty_part(keys: list[BlockKey]) -> Parts:
    return [*honest(keys[:2]), node_pb2.FetchPart(header=bytes(64))]


def without_a_header(keys: list[BlockKey]) -> Parts:
    return [*honest(keys[:2]), *honest(keys[2:])[1:]]


def with_a_short_header(keys: list[BlockKey]) -> Parts:
    parts = honest(keys)
    parts[4].header = parts[4].header[:-1]
    return parts


def with_a_second_header(keys: list[BlockKey]) -> Parts:
    parts = honest(keys)
    parts[5].header = parts[4].header
    return parts


@pytest.fixture
def rogue() -> Iterator[tuple[Rogue, str]]:
    servicer = Rogue()
    server = grpc.server(futures.ThreadPoolExecutor(4))
    node_pb2_grpc.add_NodeServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield servicer, f"127.0.0.1:{port}"
    servicer.over.set()
    server.stop(0).wait()


def test_nothing_of_a_frame_that_is_not_right_gets_in(
    tmp_path: Path, stack: ExitStack, rogue: tuple[Rogue, str]
) -> None:
    servicer, address = rogue
    b = stack.enter_context(started(tmp_path, "b", members(a=address)))
    at_b = stack.enter_context(engine(tmp_path, "b"))
    wrong: list[Sends] = [
        with_payload_bit_turned, with_header_bit_turned, with_another_key, of_another_layout,
        too_long, without_an_end, with_an_empty_part, without_a_header, with_a_short_header,
        with_a_second_header,
    ]  # fmt: skip
    for number, sends in enumerate(wrong, 1):
        keys = new_keys(5)
        servicer.sends = sends
        assert at_b.pull(keys, 0, "a", wait_s=WAIT_S) == 2, sends.__name__
        assert restore(at_b, keys) == [Tier.HOST] * 2
        assert counter(b, "corrupt_frames_total_peer") == number, sends.__name__
        servicer.sends = honest  # or it would be left alone
        assert at_b.pull(keys, 0, "a", wait_s=WAIT_S) == 3
        assert restore(at_b, keys) == [Tier.HOST] * 5
    keys = new_keys(3)
    servicer.sends = lambda wanted: honest([*wanted, *wanted])
    assert at_b.pull(keys, 0, "a", wait_s=WAIT_S) == 3, "more than was asked for"
    nothing_leased(b)


def test_a_frame_that_is_not_exact_is_for_those_who_have_asked_for_it(
    tmp_path: Path, stack: ExitStack, rogue: tuple[Rogue, str]
) -> None:
    servicer, address = rogue

    def inexact(keys: list[BlockKey]) -> Parts:
        parts: Parts = []
        for key in keys:
            block = memoryview(content(key))
            header, _ = frame.encode(key, block, LAYOUT, RAW, Fidelity.DERIVED)
            parts.append(node_pb2.FetchPart(header=bytes(header), payload=bytes(block)))
        return parts

    servicer.sends = inexact
    lossy = disk_toml(tmp_path / "c") + 'codec = "fp8"\n'
    b = stack.enter_context(started(tmp_path, "b", members(a=address)))
    stack.enter_context(started(tmp_path, "c", members(a=address) + lossy))
    keys = new_keys(4)
    at_b, at_c = (stack.enter_context(engine(tmp_path, name)) for name in "bc")
    assert at_b.pull(keys, 0, "a", wait_s=WAIT_S) == 0
    assert counter(b, "inexact_frames_total_peer") == 1
    assert at_c.pull(keys, 0, "a", wait_s=WAIT_S) == 4
    assert restore(at_c, keys) == [Tier.HOST] * 4


def test_what_had_come_before_a_peer_broke_off_or_fell_silent_counts(
    tmp_path: Path, stack: ExitStack, rogue: tuple[Rogue, str]
) -> None:
    servicer, address = rogue
    b = stack.enter_context(started(tmp_path, "b", members(a=address)))
    at_b = stack.enter_context(engine(tmp_path, "b"))
    servicer.sends = breaks
    keys = new_keys(5)
    assert at_b.pull(keys, 0, "a", wait_s=WAIT_S) == 2
    assert restore(at_b, keys) == [Tier.HOST] * 2
    servicer.sends = servicer.hangs
    keys = new_keys(5)
    assert counter(b, "peer_pulls_total_failed") == 1
    came = at_b.pull(keys, 0, "a", wait_s=2.0)
    assert came <= 2, "no more was sent"
    assert restore(at_b, keys) == [Tier.HOST] * came
    nothing_leased(b)


def test_a_pull_that_fails_cuts_no_other_from_the_same_peer(rogue: tuple[Rogue, str]) -> None:
    servicer, address = rogue
    begun, go_on = threading.Event(), threading.Event()

    def slow_or_failing(keys: list[BlockKey]) -> Iterator[node_pb2.FetchPart]:
        if len(keys) == 1:
            raise ConnectionError("on purpose")
        yield from honest(keys)[:4]
        begun.set()
        go_on.wait(WAIT_S)
        yield from honest(keys)[4:]

    def order(count: int) -> Order:
        places = [memoryview(bytearray(BLOCK)) for _ in range(count)]
        return Order(LAYOUT, new_keys(count), 0, places, lossy=False)

    servicer.sends = slow_or_failing
    peer = Peer("a", address, Access(Config(), serving=False))
    with futures.ThreadPoolExecutor(1) as beside:
        long = beside.submit(peer.fetch, order(5), WAIT_S)
        assert begun.wait(WAIT_S)
        assert peer.fetch(order(1), WAIT_S).result is Result.FAILED
        go_on.set()
        fetched = long.result(WAIT_S)
    assert (len(fetched.fidelities), fetched.result) == (5, Result.OK), fetched.why
    servicer.sends = honest
    assert peer.fetch(order(3), WAIT_S).result is Result.OK
    peer.close()
    peer.close()
    assert peer.fetch(order(3), WAIT_S).result is Result.LATE


def test_a_node_killed_in_the_middle_leaves_no_wrong_byte(tmp_path: Path, stack: ExitStack) -> None:
    a = stack.enter_context(started(tmp_path, "a", "[peers]", host="64MiB"))
    at = a.address
    b = stack.enter_context(started(tmp_path, "b", members(a=at), host="64MiB"))
    at_b = stack.enter_context(engine(tmp_path, "b"))
    with engine(tmp_path, "a") as at_a, futures.ThreadPoolExecutor(1) as beside:
        keys = new_keys(250)
        assert save(at_a, keys) == 250
        pulling = beside.submit(at_b.pull, keys, 0, "a", wait_s=WAIT_S)
        wait_for(
            "the pull to be under way, or over",  # wherever it is: all is right at each moment
            lambda: pulling.done() or any(e.leases for e in status(b).layouts),
        )
        a.kill()
        came = pulling.result(WAIT_S + 10)
    assert at_b.match(keys).blocks == came
    assert restore(at_b, keys) == [Tier.HOST] * came
    nothing_leased(b)


# --- what a node gives ----------------------------------------------------------------------


def test_one_reader_too_many_is_refused_and_bad_requests_are(
    tmp_path: Path, stack: ExitStack
) -> None:
    a = stack.enter_context(started(tmp_path, "a", "[peers]\nlends = 1\n", host="64MiB"))
    b = stack.enter_context(started(tmp_path, "b", members(a=a.address), host="64MiB"))
    at_a, at_b = (stack.enter_context(engine(tmp_path, name, LARGE)) for name in "ab")
    keys = new_keys(40)  # 55 MiB: more than lies between two ends of a connection
    with at_a.write(keys) as lease:
        lease.filled = len(lease.slots)
    assert lease.filled == 40
    with grpc.insecure_channel(a.address) as channel:
        stub = node_pb2_grpc.NodeStub(channel)
        asked = node_pb2.FetchRequest(layout=LARGE.id, keys=b"".join(keys), blocks=40)
        slow = stub.Fetch(asked, timeout=WAIT_S)
        assert next(slow).header
        with pytest.raises(grpc.RpcError, match=r"peers\.lends") as refused:
            list(stub.Fetch(asked, timeout=WAIT_S))
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        for _ in range(5):
            assert at_b.pull(keys, 0, "a", wait_s=WAIT_S) == 0, "a miss, as A is busy"
        assert counter(b, "peer_pulls_total_busy") == 5, "it is never left alone for that"
        slow.cancel()
        nothing_leased(a)
        wait_for("its turn", lambda: pulled_all(at_b, keys))
        for field, bad in (
            ("first", {"first": 41, "blocks": 1}),
            ("blocks", {"blocks": 0}),
            ("blocks", {"blocks": 257}),
            ("bytes of keys", {"keys": b"x" * 17, "blocks": 1}),
        ):
            request = node_pb2.FetchRequest(layout=LARGE.id, keys=b"".join(keys))
            for name, value in bad.items():
                setattr(request, name, value)
            with pytest.raises(grpc.RpcError, match=field) as told:
                list(stub.Fetch(request, timeout=WAIT_S))
            assert told.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        for nothing in (
            node_pb2.FetchRequest(layout="00", keys=keys[0], blocks=1),
            node_pb2.FetchRequest(layout=LARGE.id, keys=new_keys(1)[0], blocks=1),
            node_pb2.FetchRequest(layout=LARGE.id, keys=keys[0], first=1, blocks=1),
        ):
            assert not list(stub.Fetch(nothing, timeout=WAIT_S))
    nothing_leased(a, b)
