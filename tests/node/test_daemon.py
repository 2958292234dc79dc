"""A real node daemon, real engines' connections, real stores, real kills."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import grpc
import pytest

from kvtier.core.blocks import Attention, BlockLayout, LayerGroup
from kvtier.core.tiers import Tier
from kvtier.engine.client import TierClient
from kvtier.errors import ArenaLost, ConfigError, RemoteProtocolError
from kvtier.stores.disk import DiskStore
from kvtier.stores.disk.check import slots
from kvtier.testing.valkey import ValkeyServer
from kvtier.wire import local
from kvtier.wire.pb import feed_pb2, feed_pb2_grpc, node_pb2, node_pb2_grpc
from tests.launching import Process, disk_toml, node_toml, redis_toml, wait_for
from tests.node.conftest import (
    LAYOUT,
    blocks,
    content,
    new_keys,
    restore,
    save,
    status,
    wait_for_blocks,
)
from tests.stores.disk_support import at, overwrite

FLOATS = LAYOUT.describe().replace("],16,", "],16.0,")  # block_tokens
_clients: list[TierClient] = []


def connect(folder: Path) -> TierClient:
    """An engine's connection; hung up at the end of the test."""
    _clients.append(TierClient(f"{folder}/node.sock", LAYOUT, "test"))
    return _clients[-1]


@pytest.fixture(autouse=True)
def hang_up() -> Iterator[None]:
    yield
    while _clients:
        _clients.pop().close()


def test_what_one_engine_saves_another_restores(tmp_path: Path) -> None:
    with Process("node", node_toml(tmp_path), tmp_path):
        one, two = connect(tmp_path), connect(tmp_path)
        keys = new_keys(10)
        assert save(one, keys) == 10
        assert two.match(keys)[:2] == (10, {Tier.HOST: 10})
        assert two.match([*keys[:4], *new_keys(1), *keys[5:]]).blocks == 4
        assert restore(two, keys) == [Tier.HOST] * 10
        assert save(two, keys) == 0, "what is held is not granted again"
        one.close()
        assert restore(two, keys) == [Tier.HOST] * 10


def test_blocks_cascade_to_disk_and_are_found_after_kill_9(tmp_path: Path) -> None:
    toml = node_toml(tmp_path, host="1MiB", more=disk_toml(tmp_path))
    with Process("node", toml, tmp_path) as node:
        client = connect(tmp_path)
        prompts = [new_keys(8) for _ in range(10)]  # 80 blocks; 32 fit in the host tier
        for number, keys in enumerate(prompts, 1):
            assert save(client, keys) == 8
            wait_for_blocks(node, Tier.DISK, 8 * number)
        sources = {tier for keys in prompts for tier in restore(client, keys)}
        assert sources == {Tier.DISK}, "the oldest first: host has just been overwritten each time"
        node.kill()
        with pytest.raises(ArenaLost):
            client.match(prompts[0])
        node.restart()
        client = connect(tmp_path)
        for keys in prompts:
            assert client.match(keys)[:2] == (8, {Tier.HOST: 0, Tier.DISK: 8})
            assert restore(client, keys) == [Tier.DISK] * 8


def test_another_node_restores_from_the_shared_tier(tmp_path: Path, valkey: ValkeyServer) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    tomls = [node_toml(folder, more=redis_toml(valkey.url)) for folder in folders]
    with Process("node", tomls[0], folders[0]) as a, Process("node", tomls[1], folders[1]):
        keys = new_keys(12)
        assert save(connect(folders[0]), keys) == 12
        wait_for_blocks(a, Tier.SHARED, 12)
        other = connect(folders[1])
        assert other.match(keys).blocks == 0, "the other node has not heard of them"
        assert restore(other, keys) == [Tier.SHARED] * 12
        assert restore(other, keys) == [Tier.HOST] * 12


def test_the_leases_of_an_engine_that_is_killed_are_given_back(tmp_path: Path) -> None:
    with Process("node", node_toml(tmp_path, host="1MiB"), tmp_path) as node:
        code = f"""
import sys
from kvtier.engine.client import TierClient
from tests.node.conftest import LAYOUT, new_keys
client = TierClient({str(tmp_path / "node.sock")!r}, LAYOUT)
with client.write(new_keys(1000)) as lease:
    print(len(lease.slots), flush=True)
    sys.stdin.read()
"""
        engine = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert engine.stdout is not None
        assert engine.stdin is not None
        assert engine.stdout.readline() == "32\n", "the whole arena is leased"
        client = connect(tmp_path)
        assert save(client, new_keys(1)) == 0, "full: refused at once, never waited for"
        assert status(node).counters["kvtier_refused_blocks_total"] == 1000 - 32 + 1
        engine.kill()
        engine.wait()
        engine.stdin.close()
        engine.stdout.close()
        wait_for("no lease left", lambda: status(node).layouts[0].leases == 0)
        assert save(client, new_keys(32)) == 32


def test_a_lease_is_given_at_once_and_its_blocks_as_they_come(tmp_path: Path) -> None:
    toml = node_toml(tmp_path, more=disk_toml(tmp_path))
    with Process("node", toml, tmp_path) as node:
        client = connect(tmp_path)
        keys = new_keys(40)
        assert save(client, keys) == 40
        wait_for_blocks(node, Tier.DISK, 40)
        node.kill()
        node.restart()
        client = connect(tmp_path)
        done = 0
        with client.read(keys, wait_s=30.0, wanted=0) as lease:
            while done < len(lease.slots):
                client.more(lease)
                assert lease.arrived > done
                for key, slot in zip(keys[done:], lease.slots[done : lease.arrived], strict=False):
                    assert bytes(client.arena.slot(slot)) == content(key), "a wrong block"
                done = lease.arrived
            assert lease.sources == [Tier.DISK] * 40
        with client.read(keys, wait_s=30.0, wanted=0) as lease:
            assert lease.arrived == 40, "from host memory all is there at once"


def test_a_lease_is_waited_for_in_steps(tmp_path: Path) -> None:
    toml = node_toml(tmp_path, more=disk_toml(tmp_path))
    with Process("node", toml, tmp_path) as node:
        client = connect(tmp_path)
        keys = new_keys(40)
        assert save(client, keys) == 40
        wait_for_blocks(node, Tier.DISK, 40)
        node.kill()
        node.restart()
        client = connect(tmp_path)
        with client.read(keys, wait_s=30.0, wanted=0) as lease:
            while (done := lease.arrived) < 40:
                client.more(lease, 12)
                assert lease.arrived >= min(done + 12, 40)
            for key, slot in zip(keys, lease.slots, strict=True):
                assert bytes(client.arena.slot(slot)) == content(key), "a wrong block"


def test_what_was_not_committed_is_never_served(tmp_path: Path) -> None:
    with Process("node", node_toml(tmp_path), tmp_path):
        client = connect(tmp_path)
        keys = new_keys(6)
        with client.write(keys) as lease:
            assert connect(tmp_path).match(keys).blocks == 0
            lease.filled = 0
        assert client.match(keys).blocks == 0
        with pytest.raises(RuntimeError, match="copy failed"), client.write(keys):
            raise RuntimeError("copy failed")
        assert client.match(keys).blocks == 0
        assert save(client, keys) == 6


def test_a_flipped_bit_on_disk_is_a_miss(tmp_path: Path) -> None:
    toml = node_toml(tmp_path, more=disk_toml(tmp_path))
    with Process("node", toml, tmp_path) as node:
        client = connect(tmp_path)
        keys = new_keys(8)
        save(client, keys)
        wait_for_blocks(node, Tier.DISK, 8)
        client.close()
        node.terminate()
        file, record = at(tmp_path / "disk" / LAYOUT.id, keys[5])
        overwrite(file, record + 5000, bytes([file.read_bytes()[record + 5000] ^ 1]))
        node.restart()
        client = connect(tmp_path)
        assert restore(client, keys) == [Tier.DISK] * 5, "up to the bad one, and no wrong byte"
        assert status(node).counters["kvtier_corrupt_frames_total_disk"] == 1
        wait_for("the bad copy is gone", lambda: blocks(node)[Tier.DISK] == 7)
        assert save(client, keys) == 1


def test_redis_that_dies_costs_misses_and_comes_back(tmp_path: Path, valkey: ValkeyServer) -> None:
    with Process("node", node_toml(tmp_path, more=redis_toml(valkey.url)), tmp_path) as node:
        client = connect(tmp_path)
        first = new_keys(4)
        save(client, first)
        wait_for_blocks(node, Tier.SHARED, 4)
        valkey.kill()
        second = new_keys(4)
        assert save(client, second) == 4, "the host tier goes on"
        assert restore(client, [*second, *new_keys(3)]) == [Tier.HOST] * 4

        def shared_available() -> bool:
            return status(node).layouts[0].tiers[1].available

        wait_for("the shared tier is off", lambda: not shared_available())
        assert status(node).counters["kvtier_store_errors_total_shared"] >= 1
        assert node.log.read_text().count("shared tier: no answer; going on without it") == 1
        valkey.restart()
        wait_for("the shared tier is on again", shared_available)
        save(client, new_keys(1))
        wait_for("what was waiting is copied", lambda: blocks(node)[Tier.SHARED] >= 9)


def test_redis_that_is_not_there_at_start_is_no_obstacle(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"redis://127.0.0.1:{free.getsockname()[1]}"
        with Process("node", node_toml(tmp_path, more=redis_toml(url)), tmp_path) as node:
            wait_for("a warning before any engine", lambda: "WARNING" in node.log.read_text())
            assert status(node).counters["kvtier_store_errors_total_shared"] == 1
            client = connect(tmp_path)
            said = "shared tier: "
            wait_for("one as its tiers are open", lambda: node.log.read_text().count(said) == 2)
            for warning in [each for each in node.log.read_text().splitlines() if "WARN" in each]:
                assert said in warning
                assert url.removeprefix("redis://") in warning
                assert warning.endswith("; going on without it")
            assert status(node).counters["kvtier_store_errors_total_shared"] == 2
            keys = new_keys(4)
            assert save(client, keys) == 4
            assert restore(client, keys) == [Tier.HOST] * 4
            assert restore(client, new_keys(4)) == []


def test_a_disk_smaller_than_host_memory_is_warned_of_in_one_line(tmp_path: Path) -> None:
    for host, warnings in ("4MiB", 1), ("1MiB", 0):
        with Process(
            "node", node_toml(tmp_path, host=host, more=disk_toml(tmp_path, "2MiB")), tmp_path
        ) as node:
            assert node.log.read_text().count("less than host.bytes") == warnings


def test_sigterm_saves_what_has_no_lower_copy_and_leaves_nothing(tmp_path: Path) -> None:
    toml = node_toml(tmp_path, more=disk_toml(tmp_path)).replace("drain_at = 0.0", "drain_at = 1.0")
    with Process("node", toml, tmp_path) as node:
        client = connect(tmp_path)
        keys = new_keys(20)
        save(client, keys)
        assert blocks(node)[Tier.DISK] == 0
        assert node.terminate() == 0
        assert not (tmp_path / "node.sock").exists()
        with pytest.raises(ArenaLost):
            client.match(keys)
        node.restart()
        assert restore(connect(tmp_path), keys) == [Tier.DISK] * 20


def refused(toml: str, folder: Path) -> str:
    """The last line of a daemon that does not start."""
    path = folder / "second.toml"
    path.write_text(toml)
    done = subprocess.run(
        [sys.executable, "-m", "kvtier.cli", "node", "--config", str(path), "--until-eof"],
        stdin=subprocess.DEVNULL,  # one that starts all the same ends, too
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    return done.stderr.strip().splitlines()[-1]


def test_a_second_daemon_is_refused_in_one_line(tmp_path: Path) -> None:
    toml = node_toml(tmp_path, more=disk_toml(tmp_path))

    def second(toml: str) -> str:
        return refused(toml, tmp_path)

    with Process("node", toml, tmp_path) as node:
        connect(tmp_path)
        assert second(node_toml(tmp_path)) == (
            f"kvtier: node.socket: another kvtier process (pid {node.pid}) has {tmp_path}/node.sock"
        )
        said = second(toml)  # of all that is taken, where engines attach comes first
        assert f"(pid {node.pid}) has {tmp_path}/node.sock" in said
        elsewhere = tmp_path / "elsewhere"
        taken = node_toml(elsewhere).replace("127.0.0.1:0", node.address)
        assert second(taken).startswith(f"kvtier: node.listen: cannot listen on {node.address}")
        in_use = (
            f"kvtier: disk.path {tmp_path}/disk: another kvtier process (pid {node.pid}) uses it"
        )
        assert second(node_toml(elsewhere, more=disk_toml(tmp_path))) == in_use
        # Before any memory is taken.
        assert second(node_toml(elsewhere, host="60TiB", more=disk_toml(tmp_path))) == in_use
        assert second(node_toml(elsewhere, host="100TiB")).startswith("kvtier: host.bytes")


def test_inspect_tells_a_person_what_a_block_is(tmp_path: Path) -> None:
    toml = node_toml(tmp_path, more=disk_toml(tmp_path)).replace(
        "[node]", "[node]\nmax_layouts = 2"
    )
    windowed = LayerGroup(Attention.SLIDING, 5, 2, 64, window=512)
    gemma = BlockLayout((LayerGroup(Attention.FULL, 1, 1, 64), windowed), 16, "bfloat16", 1, 2)
    shapes = {
        LAYOUT: "  a block: 16 tokens, 4 layers (2 KV heads x 64), float16, 32,768 bytes",
        gemma: (
            "  a block: 16 tokens, 1 layer (1 KV head x 64) + "
            "5 layers (2 KV heads x 64, the last 512 tokens), bfloat16, 45,056 bytes, rank 1 of 2"
        ),
    }

    def shown(what: str) -> list[str]:
        command = [sys.executable, "-m", "kvtier.cli", "inspect", what]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return done.stdout.splitlines()

    with Process("node", toml, tmp_path) as node, ExitStack() as stack:
        for layout in shapes:
            client = TierClient(f"{tmp_path}/node.sock", layout, "test")
            stack.callback(client.close)
        lines = shown(node.address)
        for layout, said in shapes.items():
            assert lines[lines.index(f"layout {layout.id}") + 1] == said
    lines = shown(f"{tmp_path}/disk")
    for layout, said in shapes.items():
        assert lines[lines.index(f"{tmp_path}/disk/{layout.id}") + 1] == said
    (tmp_path / "disk" / LAYOUT.id / "layout.json").write_text("[of another release]\n")
    assert "  [of another release]" in shown(f"{tmp_path}/disk")


def test_a_disk_folder_is_one_daemons_also_before_any_layout_is_opened(tmp_path: Path) -> None:
    """Each counts disk.bytes of its own: two, with other layouts, would write twice as much."""
    home = tmp_path / "b"
    home.mkdir()
    toml = node_toml(tmp_path, more=disk_toml(tmp_path))
    with Process("node", toml, tmp_path) as node:
        assert refused(node_toml(home, more=disk_toml(tmp_path)), home) == (
            f"kvtier: disk.path {tmp_path}/disk: another kvtier process (pid {node.pid}) uses it"
        )
        node.kill()
        with Process("node", node_toml(home, more=disk_toml(tmp_path)), home):
            save(connect(home), new_keys(2))


@pytest.mark.parametrize(("uids", "mode"), [("", 0o700), ("allow_uids = [4711]", 0o711)])
def test_the_sockets_folder_is_made_for_its_user_alone(
    tmp_path: Path, uids: str, mode: int
) -> None:
    folder = tmp_path / "run"
    path = f"{folder}/node.sock"
    toml = node_toml(tmp_path).replace(f"{tmp_path}/node.sock", path)
    with Process("node", toml.replace("[node]", f"[node]\n{uids}"), tmp_path):
        assert folder.stat().st_mode & 0o777 == mode
        client = TierClient(path, LAYOUT, "test")
        client.close()
        folder.chmod(0o750)  # what a person has set stays
    assert not (folder / "node.sock").exists()
    with Process("node", toml, tmp_path):
        assert folder.stat().st_mode & 0o777 == 0o750


def test_bad_bytes_end_that_engine_only(tmp_path: Path) -> None:
    with Process("node", node_toml(tmp_path), tmp_path) as node:
        good = connect(tmp_path)
        keys = new_keys(2)
        save(good, keys)
        for raw, said in [
            (b"\xff\xff\xff\xff", "limit"),
            (b"\x01\0\0\0\x01", "non-empty array"),
            (local.encode(99), "no operation 99"),
            (local.encode(local.Op.MATCH, b""), "MATCH before HELLO"),
            (local.encode(local.Op.HELLO, 9, LAYOUT.describe(), "x"), "version 9"),
            (local.encode(local.Op.HELLO, local.VERSION, "{}", "x"), "not a block layout"),
            (
                local.encode(local.Op.HELLO, local.VERSION, FLOATS, "x"),
                "block_tokens is 16.0, must be a whole number",
            ),
        ]:
            with socket.socket(socket.AF_UNIX) as bad:
                bad.connect(str(tmp_path / "node.sock"))
                bad.settimeout(30)
                bad.sendall(raw)
                ((ok, text),) = local.Decoder().feed(bad.recv(65536))
                assert not ok
                assert said in str(text)
                assert bad.recv(1) == b"", "hung up"
        assert restore(good, keys) == [Tier.HOST] * 2
        assert status(node).counters["kvtier_protocol_errors_total"] == 7


def test_leases_that_are_not_an_engines_own_are_refused(tmp_path: Path) -> None:
    with Process("node", node_toml(tmp_path), tmp_path):
        one, two = connect(tmp_path), connect(tmp_path)
        keys = new_keys(2)
        with one.write(keys) as lease:
            two._deliver(local.Op.COMMIT, local.encode(local.Op.COMMIT, lease.id, 2))
            with pytest.raises(RemoteProtocolError, match="COMMIT of lease"):
                two.match(keys)
            lease.filled = 0
        assert one.match(keys).blocks == 0


def test_a_second_layout_is_refused_while_the_first_is_in_use(tmp_path: Path) -> None:
    other = type(LAYOUT)(LAYOUT.groups, 32, LAYOUT.dtype)
    with Process("node", node_toml(tmp_path), tmp_path) as node:
        client = connect(tmp_path)
        with pytest.raises(ConfigError, match=r"one more than node\.max_layouts \(1\)"):
            TierClient(f"{tmp_path}/node.sock", other)
        client.close()
        wait_for("the engine is gone", lambda: status(node).clients == 0)
        second = TierClient(f"{tmp_path}/node.sock", other)
        assert second.match(new_keys(1)).blocks == 0
        second.close()


def test_too_many_engines_are_refused_in_one_line(tmp_path: Path) -> None:
    toml = node_toml(tmp_path).replace("[node]", "[node]\nmax_clients = 2")
    with Process("node", toml, tmp_path):
        held = [connect(tmp_path), connect(tmp_path)]
        with pytest.raises(ConfigError, match="2 engines are attached"):
            connect(tmp_path)
        held.pop().close()
        wait_for("a place", lambda: _connects(tmp_path))


def _connects(folder: Path) -> bool:
    try:
        connect(folder).close()
    except ConfigError:
        return False
    return True


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user reaches: pytest's own lie where only theirs do."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o777)
        yield Path(folder)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_may_not_attach_unless_allowed(open_folder: Path) -> None:
    tmp_path = open_folder

    def as_nobody() -> str:
        code = f"""
import os, socket
from kvtier.wire import local
os.setuid(65534)
s = socket.socket(socket.AF_UNIX)
try:
    s.connect({str(tmp_path / "node.sock")!r})
    s.sendall(local.encode(local.Op.HELLO, local.VERSION, {LAYOUT.describe()!r}, "nobody"))
    print(local.Decoder().feed(s.recv(65536))[0][:2])
except OSError as error:
    print(error)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        return done.stdout

    toml = node_toml(tmp_path)
    with Process("node", toml, tmp_path):
        assert "Permission denied" in as_nobody()
        (tmp_path / "node.sock").chmod(0o666)
        assert "user 65534 may not attach" in as_nobody()
    with Process("node", toml.replace("[node]", "[node]\nallow_uids = [65534]"), tmp_path):
        assert "True" in as_nobody()


def test_routers_hear_of_every_change_and_a_late_one_gets_it_all(tmp_path: Path) -> None:
    toml = node_toml(tmp_path, more=disk_toml(tmp_path))
    with Process("node", toml, tmp_path) as node, grpc.insecure_channel(node.address) as channel:
        client = connect(tmp_path)
        before = new_keys(3)
        save(client, before)
        wait_for_blocks(node, Tier.DISK, 3)
        stub = feed_pb2_grpc.FeedStub(channel)
        stream = stub.Watch(feed_pb2.WatchRequest(), timeout=60)
        held, last = _until(stream, {}, lambda held, message: message.snapshot.last)
        assert held == {feed_pb2.TIER_HOST: set(before), feed_pb2.TIER_DISK: set(before)}
        after = new_keys(2)
        save(client, after)
        both = {*before, *after}
        full = {feed_pb2.TIER_HOST: both, feed_pb2.TIER_DISK: both}
        held, last = _until(stream, held, lambda held, message: held == full, last)
        node_pb2_grpc.NodeStub(channel).Clear(
            node_pb2.NodeClearRequest(tiers=[feed_pb2.TIER_HOST]), timeout=60
        )
        gone = {feed_pb2.TIER_HOST: set(), feed_pb2.TIER_DISK: both}
        held, last = _until(stream, held, lambda held, message: held == gone, last)
        late = stub.Watch(feed_pb2.WatchRequest(), timeout=60)
        again, seq = _until(late, {}, lambda held, message: message.snapshot.last)
        assert again == {feed_pb2.TIER_DISK: both}
        assert seq == last


def test_routers_are_told_which_block_comes_before_which(tmp_path: Path) -> None:
    toml = node_toml(tmp_path, more=disk_toml(tmp_path))
    with Process("node", toml, tmp_path) as node, grpc.insecure_channel(node.address) as channel:
        client = connect(tmp_path)
        keys = new_keys(6)
        chain = dict(zip(keys[1:], keys, strict=False))
        stub = feed_pb2_grpc.FeedStub(channel)
        stream = stub.Watch(feed_pb2.WatchRequest(), timeout=60)
        links: dict[int, dict[bytes, bytes]] = {}

        def done(held, message):
            parts = [*message.snapshot.held, *message.delta.added]
            for part in parts:
                links.setdefault(part.tier, {}).update(_links(part))
            return all(links.get(t) == chain for t in (feed_pb2.TIER_HOST, feed_pb2.TIER_DISK))

        save(client, keys[:3])
        save(client, keys)
        _until(stream, {}, done)
        links.clear()
        _until(stub.Watch(feed_pb2.WatchRequest(), timeout=60), {}, done)


def test_a_daemon_that_was_restarted_still_tells_it_of_its_disk(tmp_path: Path) -> None:
    """Of prompts that share a beginning, written by two lives; also of what one found written."""
    toml = node_toml(tmp_path, more=disk_toml(tmp_path))
    prompt = new_keys(12)
    branch = [*prompt[:5], *new_keys(4)]
    told: dict[bytes, bytes] = {}

    def done(held, message):
        for part in [*message.snapshot.held, *message.delta.added]:
            if part.tier == feed_pb2.TIER_DISK:
                told.update(_links(part))
        return told == expected

    with Process("node", toml, tmp_path) as node:
        expected = dict(zip(prompt[1:], prompt, strict=False))
        for path, blocks_there in ((prompt, 12), (branch, 16), ([], 16)):
            if path:
                client = connect(tmp_path)
                save(client, path)
                expected |= dict(zip(path[1:], path, strict=False))
            wait_for_blocks(node, Tier.DISK, blocks_there)
            node.kill()
            node.restart()
            told.clear()
            with grpc.insecure_channel(node.address) as channel:
                stub = feed_pb2_grpc.FeedStub(channel)
                stream = stub.Watch(feed_pb2.WatchRequest(), timeout=120)
                held, _ = _until(stream, {}, done)
            assert {*held} == {feed_pb2.TIER_DISK}, "nothing else is held after a restart"


def test_frames_of_another_version_are_dropped_and_said_at_the_start(tmp_path: Path) -> None:
    """They are nobody's blocks any more; their room is used again, and the others are served."""
    toml = node_toml(tmp_path, more=disk_toml(tmp_path))
    folder = tmp_path / "disk" / LAYOUT.id
    keys, old = new_keys(4), new_keys(3)
    with Process("node", toml, tmp_path) as node:
        save(connect(tmp_path), keys)
        wait_for_blocks(node, Tier.DISK, len(keys))
        node.kill()
        header = b"KVTF\x01" + bytes(59)  # as long as it was then
        with closing(DiskStore(folder, 64 << 20)) as store:
            assert store.write([(key, [header, content(key)]) for key in old]) == [True] * 3
        node.restart()
        wait_for("the daemon to say so", lambda: "dropped 3 blocks" in node.log.read_text())
        assert status(node).counters["kvtier_strange_frames_total_disk"] == 3
        client = connect(tmp_path)
        assert client.match(old).blocks == 0
        assert restore(client, keys) == [Tier.DISK] * 4

        def held() -> set[bytes]:
            return {each.header.key for each in slots(folder, payloads=False) if each.header}

        wait_for("their room", lambda: held() == {*keys})


def _links(part: feed_pb2.TierKeys) -> dict[bytes, bytes]:
    """The block before each, but of those that begin a prompt."""
    keys, parents = local.unpack_keys(part.keys), local.unpack_keys(part.parents)
    assert list(part.starts[:1]) == [0] * bool(keys), "blocks that nothing is said of"
    before = dict(zip(keys[1:], keys, strict=False))
    before |= {keys[start]: parent for start, parent in zip(part.starts, parents, strict=True)}
    return {key: parent for key, parent in before.items() if any(parent)}


def _until(stream, held, done, seq=None):
    """Follow a feed until `done`; deltas must be numbered without a gap."""
    for message in stream:
        body = message.WhichOneof("body")
        if body == "snapshot":
            seq = message.seq
            for each in message.snapshot.held:
                held.setdefault(each.tier, set()).update(local.unpack_keys(each.keys))
        elif body == "delta":
            seq += 1
            assert message.seq == seq
            for each in message.delta.added:
                held.setdefault(each.tier, set()).update(local.unpack_keys(each.keys))
            for each in message.delta.removed:
                held[each.tier] -= set(local.unpack_keys(each.keys))
        if done(held, message):
            return held, seq
    raise AssertionError("the feed ended")


@pytest.mark.parametrize(
    ("process", "heavy"),
    [
        ("kvtier.node.daemon", ("torch", "ray", "transformers")),
        ("kvtier.router.server", ("torch", "ray", "transformers", "numpy")),
    ],
)
def test_a_server_never_loads_what_it_has_no_use_for(process: str, heavy: tuple[str, ...]) -> None:
    code = f"""
import sys
import {process}
print([name for name in {heavy} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_an_answer_that_was_not_waited_for_is_never_taken_for_another(tmp_path: Path) -> None:
    class Interrupted(BaseException):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupted

    with Process("node", node_toml(tmp_path), tmp_path) as node:
        client = connect(tmp_path)
        before = signal.signal(signal.SIGALRM, interrupt)
        os.kill(node.pid, signal.SIGSTOP)
        try:
            signal.setitimer(signal.ITIMER_REAL, 1.0)
            with pytest.raises(Interrupted):
                client.match(new_keys(1))
        finally:
            os.kill(node.pid, signal.SIGCONT)
            signal.signal(signal.SIGALRM, before)
        with pytest.raises(ArenaLost):
            client.match(new_keys(2))


def test_a_daemon_that_hangs_is_a_clear_error_and_not_a_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Process("node", node_toml(tmp_path), tmp_path) as node:
        client = connect(tmp_path)
        os.kill(node.pid, signal.SIGSTOP)
        try:
            monkeypatch.setattr("kvtier.engine.client.ANSWER_S", 0.5)
            with pytest.raises(ArenaLost, match="no answer to MATCH"):
                client.match(new_keys(1))
        finally:
            os.kill(node.pid, signal.SIGCONT)
            monkeypatch.undo()
        assert connect(tmp_path).match(new_keys(1)).blocks == 0
