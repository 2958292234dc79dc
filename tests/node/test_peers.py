"""Two real daemons, one of which loads blocks from the other."""

import os
import signal
from concurrent import futures
from contextlib import ExitStack, suppress
from pathlib import Path

import grpc

from kvtier.config import PeerConfig, write_peers
from kvtier.core.breakeven import ComputeCost
from kvtier.core.tiers import Tier
from kvtier.engine.client import TierClient
from kvtier.errors import ConfigError
from kvtier.testing.valkey import ValkeyServer
from kvtier.wire.lending import Kind
from kvtier.wire.pb import feed_pb2, node_pb2, node_pb2_grpc
from tests.launching import DEADLINE_S, disk_toml, redis_toml, wait_for
from tests.node.conftest import lends_at, new_keys, restore, save, status, wait_for_blocks
from tests.node.lending import END, Asker, Rogue
from tests.node.nodes import (
    LARGE,
    WAIT_S,
    asking,
    counter,
    engine,
    members,
    nothing_leased,
    pulled_all,
    started,
)


def test_what_another_node_holds_is_pulled_and_restored(tmp_path: Path, stack: ExitStack) -> None:
    a = stack.enter_context(started(tmp_path, "a", "[peers]"))
    b = stack.enter_context(started(tmp_path, "b", members(a=lends_at(a), b="127.0.0.1:1")))
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
    b = stack.enter_context(started(tmp_path, "b", members(a=lends_at(a))))
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


def test_a_prompt_that_names_a_block_twice_harms_no_later_one(
    tmp_path: Path, stack: ExitStack
) -> None:
    a = stack.enter_context(started(tmp_path, "a", "[peers]"))
    b = stack.enter_context(started(tmp_path, "b", members(a=lends_at(a))))
    at_a, at_b = (stack.enter_context(engine(tmp_path, name)) for name in "ab")
    keys = new_keys(6)
    assert save(at_a, keys) == 6
    assert at_b.pull([*keys[:3], keys[0], *keys[3:]], 0, "a", wait_s=WAIT_S) == 3
    assert at_b.pull(keys, 0, "a", wait_s=WAIT_S) == 3, "and not waited for as on its way"
    assert restore(at_b, keys) == [Tier.HOST] * 6
    nothing_leased(a, b)


def test_blocks_come_from_the_others_disk_too(tmp_path: Path, stack: ExitStack) -> None:
    more = "[peers]\n" + disk_toml(tmp_path / "a")
    a = stack.enter_context(started(tmp_path, "a", more, host="1MiB"))
    stack.enter_context(started(tmp_path, "b", members(a=lends_at(a))))
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
    with Asker(lends_at(a)) as asker:
        for first, lent in ((0, 3), (2, 1), (3, 0), (5, 4)):
            asker.ask(keys, first=first, blocks=9)
            assert asker.answer() == (lent, Kind.END, ""), first
    assert at_a.match(keys).by_tier[Tier.SHARED] == 2, "nothing was loaded for it"
    nothing_leased(a)


def test_blocks_of_more_than_a_mebibyte_come_whole(tmp_path: Path, stack: ExitStack) -> None:
    a = stack.enter_context(started(tmp_path, "a", "[peers]", host="16MiB"))
    stack.enter_context(started(tmp_path, "b", members(a=lends_at(a)), host="16MiB"))
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
    c = stack.enter_context(started(tmp_path, "c", "[peers]"))
    b = stack.enter_context(started(tmp_path, "b", members(c=lends_at(c))))
    at_c, at_b = (stack.enter_context(engine(tmp_path, name)) for name in "cb")
    keys = new_keys(4)
    save(at_c, keys)
    for node in ("a", c.address, "x" * 10_000, "a"):
        assert at_b.pull(keys, 0, node, wait_s=WAIT_S) == 0
    assert counter(b, "peer_pulls_total_unknown") == 4
    assert at_b.match(keys).blocks == 0
    said = [line for line in b.log.read_text().splitlines() if "none of [peers]" in line]
    assert len(said) == 3, said
    assert all(len(line) < 400 for line in said)
    assert at_b.pull(keys, 0, "c", wait_s=WAIT_S) == 4, "the engine has its connection yet"


def test_a_node_without_peers_gives_nothing(tmp_path: Path, stack: ExitStack) -> None:
    a = stack.enter_context(started(tmp_path, "a"))
    b = stack.enter_context(started(tmp_path, "b", members(a="127.0.0.1:1")))
    assert not lends_at(a)
    at_a, at_b = (stack.enter_context(engine(tmp_path, name)) for name in "ab")
    keys = new_keys(4)
    save(at_a, keys)
    for _ in range(2):
        assert at_b.pull(keys, 0, "a", wait_s=WAIT_S) == 0
    said = [line for line in b.log.read_text().splitlines() if "peer a" in line]
    assert len(said) == 1
    assert "refused" in said[0]
    assert at_a.pull(keys, 0, "b", wait_s=WAIT_S) == 0, "A knows nobody"
    nothing_leased(a, b)


def test_a_peer_that_hangs_costs_the_deadline_and_one_that_is_killed_a_miss(
    tmp_path: Path, stack: ExitStack
) -> None:
    a = stack.enter_context(started(tmp_path, "a", "[peers]"))
    b = stack.enter_context(started(tmp_path, "b", members(a=lends_at(a))))
    at_a, at_b = (stack.enter_context(engine(tmp_path, name)) for name in "ab")
    keys, one = new_keys(10), new_keys(1)
    save(at_a, keys)
    save(at_a, one)
    assert at_b.pull(one, 0, "a", wait_s=WAIT_S) == 1  # from now on a connection is kept
    os.kill(a.pid, signal.SIGSTOP)
    try:
        with asking(tmp_path / "b" / "node.sock", keys, wait_s=10):
            wait_for("a pull", lambda: status(b).layouts[0].leases)
        nothing_leased(b)
        assert at_b.pull(keys, 0, "a", wait_s=0.2) == 0
    finally:
        os.kill(a.pid, signal.SIGCONT)
    wait_for("A to be asked again", lambda: pulled_all(at_b, keys))
    assert "peer a answers again" in b.log.read_text()
    more = new_keys(10)
    a.kill()

    def left_alone() -> bool:
        assert at_b.pull(more, 0, "a", wait_s=WAIT_S) == 0
        return counter(b, "peer_pulls_total_left_alone") > 0

    wait_for("B to leave it alone", left_alone)
    assert restore(at_b, keys) == [Tier.HOST] * 10
    nothing_leased(b)


def test_a_daemon_that_is_told_to_stop_waits_for_no_peer(tmp_path: Path, stack: ExitStack) -> None:
    a = stack.enter_context(started(tmp_path, "a", "[peers]"))
    b = stack.enter_context(started(tmp_path, "b", members(a=lends_at(a))))
    at_a, at_b = (stack.enter_context(engine(tmp_path, name)) for name in "ab")
    one = new_keys(1)
    save(at_a, one)
    assert at_b.pull(one, 0, "a", wait_s=WAIT_S) == 1  # from now on a connection is kept
    os.kill(a.pid, signal.SIGSTOP)
    try:
        with asking(tmp_path / "b" / "node.sock", new_keys(10), wait_s=60):
            wait_for("a pull", lambda: status(b).layouts[0].leases)
            assert b.terminate() == 0
    finally:
        os.kill(a.pid, signal.SIGCONT)
    assert "Traceback" not in b.log.read_text()


def test_a_node_killed_in_the_middle_leaves_no_wrong_byte(tmp_path: Path, stack: ExitStack) -> None:
    a = stack.enter_context(started(tmp_path, "a", "[peers]", host="64MiB"))
    at = lends_at(a)
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


def test_the_file_of_peers_counts_as_it_is_now(tmp_path: Path, stack: ExitStack) -> None:
    a, c = (stack.enter_context(started(tmp_path, name, "[peers]")) for name in "ac")
    path = tmp_path / "peers.json"
    b = stack.enter_context(started(tmp_path, "b", f'[peers]\nfile = "{path}"\n'))
    at_a, at_b, at_c = (stack.enter_context(engine(tmp_path, name)) for name in "abc")
    keys = new_keys(4)
    assert save(at_a, keys) == 4
    assert save(at_c, keys) == 4

    def listed(**nodes: str) -> None:
        write_peers(str(path), [PeerConfig(node=n, address=at) for n, at in nodes.items()])

    def pulled(first: int, node: str) -> int:
        return at_b.pull(keys[: first + 1], first, node, wait_s=WAIT_S)

    assert pulled(0, "a") == 0, "it is not there yet"
    listed(a=lends_at(a), b="127.0.0.1:1")
    assert path.stat().st_mode & 0o777 == 0o600
    assert pulled(0, "a") == 1
    path.write_text("[{}]")
    assert pulled(1, "a") == 1, "what it said before"
    assert "peers.file" in b.log.read_text()
    listed(a=lends_at(c), c=lends_at(c))
    assert pulled(2, "a") == 0, "C says that it is not A"
    assert f"{lends_at(c)} is node c" in b.log.read_text()
    assert pulled(2, "c") == 1
    path.unlink()
    assert pulled(3, "c") == 0
    assert counter(b, "peer_pulls_total_unknown") == 2
    assert restore(at_b, keys) == [Tier.HOST] * 3
    nothing_leased(a, b, c)


def test_a_pull_whose_layout_gives_way_says_nothing_of_the_peer(
    tmp_path: Path, stack: ExitStack
) -> None:
    rogue = Rogue()
    stack.callback(rogue.close)
    rogue.greets.clear()
    patient = f"from kvtier.node import peer; peer.CONNECT_S = {DEADLINE_S}"
    b = stack.enter_context(started(tmp_path, "b", members(a=rogue.address), setup=patient))
    keys = new_keys(2)
    with asking(tmp_path / "b" / "node.sock", keys, wait_s=int(WAIT_S)):
        wait_for("the pull to connect", lambda: rogue.connections)
    clients: list[TierClient] = []

    def attached() -> bool:
        with suppress(ConfigError):  # the one that has left still counts
            clients.append(stack.enter_context(engine(tmp_path, "b", LARGE)))
        return bool(clients)

    wait_for("another layout in its place", attached)
    rogue.greets.set()
    wait_for("the pull to end", lambda: counter(b, "peer_pulls_total_gave_way"))
    assert rogue.requests == 0, "nobody could have used it"
    rogue.sends = lambda keys: [END]
    assert clients[0].pull(new_keys(2), 0, "a", wait_s=WAIT_S) == 0
    assert rogue.requests == 1, "it is asked, by the connection that there is"
    assert rogue.connections == 1
    assert counter(b, "peer_pulls_total_failed") == 0
    log = b.log.read_text()
    assert "Traceback" not in log
    assert "exception was never retrieved" not in log
