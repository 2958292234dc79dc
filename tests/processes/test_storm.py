"""Two nodes, one shared store and four engines under load, while everything is killed in turn.

Engines check every byte that they get back. Whatever dies, nobody may get a wrong one, hang, or
see an exception.
"""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import redis

from kvtier.engine.client import TierClient
from kvtier.testing.valkey import ValkeyServer
from kvtier.wire.pb import feed_pb2, node_pb2, node_pb2_grpc
from tests.launching import DEADLINE_S, Process, disk_toml, node_toml, redis_toml, wait_for
from tests.processes.conftest import fds
from tests.processes.hammer import LAYOUT

SEED = 20
FD_SLACK = 8  # descriptors that come and go: connections to Valkey, of gRPC, files being read
# What an engine may say of kvtier: that a daemon died, at whatever moment, and that it is back.
EXPECTED = re.compile(
    r"kvtier is back|kvtier is away \(\w+: (the node daemon (hung up|is gone: )|no node daemon at|"
    r"the node daemon gives no answer to \w+: \[Errno \d+\] (Connection reset|Broken pipe))"
)

Blow = Callable[[], None]


class Engine:
    """A process of hammer.py; `counts` are its latest."""

    def __init__(self, socket: Path, seed: int) -> None:
        arguments = json.dumps({"socket": str(socket), "seed": seed})
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.processes.hammer", arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.first: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.complaints: list[str] = []
        self._readers = [threading.Thread(target=each) for each in (self._follow, self._listen)]
        for each in self._readers:
            each.start()

    def _follow(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with contextlib.suppress(ValueError):  # killed in the middle of a line
                self.counts = Counter(json.loads(line))
                self.first = self.first or self.counts

    def _listen(self) -> None:
        assert self.process.stderr is not None
        self.complaints += self.process.stderr

    def check(self) -> None:
        """It runs, and nothing was wrong so far but that daemons died."""
        assert not self.counts["wrong"], f"wrong bytes: {self.counts}"
        assert self.process.poll() is None, f"an engine ended: {self.complaints}"
        assert all(map(EXPECTED.match, self.complaints)), self.complaints

    def stop_in_a_save(self) -> None:
        """From its next save on it holds a lease on blocks of which it has written half."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.kill()
        self._ended()

    def end(self) -> int:
        """Let it come to its end; its exit status."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        return self._ended()

    def _ended(self) -> int:
        status = self.process.wait(DEADLINE_S)
        for each in self._readers:
            each.join(DEADLINE_S)
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()
        return status


class Node:
    """A daemon with all tiers, too small for the load, and two engines at it."""

    def __init__(self, folder: Path, more: str, seed: int) -> None:
        self.folder = folder
        folder.mkdir()
        self.daemon = Process("node", node_toml(folder, host="1MiB", more=more), folder)
        self._seeds = iter(range(seed, seed + 100))
        self.fds = self._quiet_fds()
        self.engines = [self._engine(), self._engine()]

    def _engine(self) -> Engine:
        return Engine(self.folder / "node.sock", next(self._seeds))

    def _quiet_fds(self) -> int:
        """Descriptors of the daemon with its tiers open."""
        TierClient(f"{self.folder}/node.sock", LAYOUT).close()
        return fds(self.daemon.pid)

    def status(self) -> node_pb2.NodeStatus:
        with grpc.insecure_channel(self.daemon.address) as channel:
            request = node_pb2.NodeStatusRequest()
            return node_pb2_grpc.NodeStub(channel).Status(request, timeout=30)

    def available(self) -> bool:
        """Whether the shared tier answers."""
        tiers = self.status().layouts[0].tiers
        return all(each.available for each in tiers if each.tier == feed_pb2.TIER_SHARED)

    def counter(self, name: str) -> float:
        return self.status().counters[f"kvtier_{name}"]

    def restart(self) -> None:
        self.daemon.restart()
        self.fds = self._quiet_fds()

    def restart_engine(self, which: int) -> None:
        self.engines[which].kill()
        self.engines[which] = self._engine()


class Storm:
    """The whole, and each way to hit it; every blow ends when the load has got over it."""

    def __init__(self, folder: Path, valkey: ValkeyServer, rng: random.Random) -> None:
        self.valkey = valkey
        self.rng = rng
        shared = redis_toml(valkey.url, 0.5)
        raw = "".join((disk_toml(folder / "a", "3MiB"), shared))
        lz4 = raw.replace(f"{folder}/a", f"{folder}/b").replace("bytes", 'codec = "lz4"\nbytes')
        self.nodes: list[Node] = []
        for name, more in (("a", raw), ("b", lz4)):
            self.nodes.append(Node(folder / name, more, 100 * len(self.nodes)))

    @property
    def engines(self) -> list[Engine]:
        return [engine for node in self.nodes for engine in node.engines]

    def wait_for(self, what: str, condition: Callable[[], bool]) -> None:
        def checked() -> bool:
            for engine in self.engines:
                engine.check()
            return condition()

        wait_for(what, checked)

    def wait_for_more(self, engines: list[Engine], what: str, count: int = 1) -> None:
        """Until each of `engines` has counted that much more."""
        before = [engine.counts[what] for engine in engines]

        def more() -> bool:
            pairs = zip(engines, before, strict=True)
            return all(engine.counts[what] >= had + count for engine, had in pairs)

        self.wait_for(f"more {what}", more)

    def blows(self) -> list[Blow]:
        """Each at least once, in random order."""
        listed: list[Blow] = [
            *[lambda node=node: self.kill_daemon(node) for node in self.nodes],
            *[lambda node=node: self.kill_engine(node) for node in self.nodes],
            self.halt_engine, self.kill_valkey, self.halt_valkey, self.rot, self.rot,
            lambda: self.kill_daemon(self.rng.choice(self.nodes)),
        ]  # fmt: skip
        self.rng.shuffle(listed)
        return listed

    def kill_daemon(self, node: Node) -> None:
        node.daemon.kill()
        self.wait_for_more(node.engines, "turns", 2)
        node.restart()
        self.wait_for_more(node.engines, "host")

    def kill_engine(self, node: Node) -> None:
        which = self.rng.randrange(2)
        node.engines[which].stop_in_a_save()
        self.wait_for_more([node.engines[which]], "holding")
        before = node.counter("leases_lost_total")
        node.restart_engine(which)
        self.wait_for("its lease to end", lambda: node.counter("leases_lost_total") > before)
        self.wait_for_more([node.engines[which]], "host")

    def halt_engine(self) -> None:
        """However long an engine does nothing, what it leases stays its own."""
        node = self.rng.choice(self.nodes)
        one, other = self.rng.sample(node.engines, 2)
        for _ in range(5):
            os.kill(one.process.pid, signal.SIGSTOP)
            self.wait_for_more([other], "turns", 10)
            os.kill(one.process.pid, signal.SIGCONT)
            self.wait_for_more([one], "turns")

    def kill_valkey(self) -> None:
        self.valkey.kill()
        self.wait_for("the loss to be noticed", lambda: not self.nodes[0].available())
        self.wait_for_more(self.engines, "turns", 2)
        self.valkey.start()
        self.shared_again()

    def halt_valkey(self) -> None:
        self.valkey.pause()
        self.wait_for("the silence to be noticed", lambda: not self.nodes[1].available())
        self.valkey.resume()
        self.shared_again()

    def shared_again(self) -> None:
        self.wait_for(
            "both daemons to use the shared tier again",
            lambda: all(node.available() for node in self.nodes),
        )
        self.wait_for_more([self.rng.choice(self.engines)], "shared")

    def rot(self) -> None:
        """Bits flip in most of what lies on the disks and in Valkey."""
        names = ("corrupt_frames_total_disk", "corrupt_frames_total_shared")
        before = [[node.counter(name) for node in self.nodes] for name in names]
        for node in self.nodes:
            for path in (node.folder / "disk").rglob("*.seg"):
                flip_file(path, self.rng)
        with redis.Redis.from_url(self.valkey.url) as client:
            for name in client.scan_iter(count=1000):
                at = self.rng.randrange(LAYOUT.nbytes // 2)
                client.setrange(name, at, self.rng.randbytes(4))

        def seen() -> bool:
            now = [[node.counter(name) for node in self.nodes] for name in names]
            return all(sum(new) > sum(old) for new, old in zip(now, before, strict=True))

        self.wait_for("bad frames on disk and in Valkey to be found", seen)


def flip_file(path: Path, rng: random.Random) -> None:
    """Invert one byte in each block's length of a file, unless it goes away meanwhile."""
    with contextlib.suppress(FileNotFoundError), path.open("r+b") as file:
        for start in range(0, path.stat().st_size, LAYOUT.nbytes):
            at = start + rng.randrange(LAYOUT.nbytes)
            file.seek(at)
            byte = file.read(1)
            file.seek(at)
            file.write(bytes(255 - each for each in byte))


@contextmanager
def storm(folder: Path, valkey: ValkeyServer, rng: random.Random) -> Iterator[Storm]:
    made = Storm(folder, valkey, rng)
    with ExitStack() as stack:
        for node in made.nodes:
            stack.enter_context(node.daemon)
        try:
            yield made
        finally:
            for engine in made.engines:
                engine.kill()


def test_no_byte_is_wrong_whatever_dies(tmp_path: Path, valkey: ValkeyServer) -> None:
    rng = random.Random(SEED)
    with storm(tmp_path, valkey, rng) as made:
        made.wait_for_more(made.engines, "host")
        for tier in ("disk", "shared"):
            made.wait_for_more(made.engines, tier)
        made.wait_for_more(made.engines, "unleased")
        for blow in made.blows():
            blow()
        made.wait_for_more(made.engines, "hung up")
        statuses = [engine.end() for engine in made.engines]
        total = sum((engine.counts for engine in made.engines), Counter())
        assert statuses == [0] * 4, [engine.complaints for engine in made.engines]
        assert total["last"] == 4
        assert total["wrong"] == 0
        assert min(total[tier] for tier in ("host", "disk", "shared")) > 0
        for engine in made.engines:
            assert engine.counts["arenas"] == 0, "an arena is still mapped"
            assert engine.counts["fds"] <= engine.first["fds"]
        for node in made.nodes:
            check_quiet(node)
            assert node.daemon.terminate() == 0
            log = node.daemon.log.read_text()
            assert "Traceback" not in log
            assert "internal error" not in log
            assert not (node.folder / "node.sock").exists()


def check_quiet(node: Node) -> None:
    """Nothing of the engines is left in the daemon."""
    wait_for("no engine", lambda: node.status().clients == 0)
    (layout,) = node.status().layouts
    assert layout.leases == 0
    wait_for("the last copies", lambda: node.status().layouts[0].moves == 0)
    assert fds(node.daemon.pid) <= node.fds + FD_SLACK
