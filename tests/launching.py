"""Real kvtier processes for tests: started by the command line, killed as a user would."""

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

DEADLINE_S = 120.0  # generous: only a hang lasts so long


def wait_for(what: str, condition: Callable[[], object], deadline_s: float = DEADLINE_S) -> None:
    """Return once `condition()` is true; fail, naming `what`, if it never is."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"waited {deadline_s:g} s in vain for: {what}"
        time.sleep(0.02)


def fixed_ports(count: int) -> list[int]:
    """Free ports for servers that are to come back at the same place.

    They lie below those that the kernel gives to outgoing connections: while such a server is
    dead, nobody's connection can take its port by chance. And no other test process gets them as
    long as this one lives, also those of another checkout.
    """
    text = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text()
    lowest = int(text.split()[0])
    found: list[int] = []
    for port in random.SystemRandom().sample(range(lowest // 2, lowest), 200):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if not _taken(port):
            continue
        found.append(port)
        if len(found) == count:
            return found
    raise AssertionError(f"no {count} free ports below {lowest}")


_held: list[socket.socket] = []  # closed by the end of this process: what says it is taken


def _taken(port: int) -> bool:
    """Whether a port is ours now: of a name in the abstract namespace there is one."""
    name = socket.socket(socket.AF_UNIX)
    try:
        name.bind(f"\0kvtier tests: port {port}")
    except OSError:
        name.close()
        return False
    _held.append(name)
    return True


class Process:
    """`kvtier NAME --config ...` in a process of its own; `address` is where it listens.

    `setup` is Python that runs before it, to make limits longer or shorter. It fails where the
    process is not ready in `ready_s`.
    """

    def __init__(
        self, name: str, toml: str, folder: Path, setup: str = "", *, ready_s: float = DEADLINE_S
    ) -> None:
        self.name = name
        self._ready_s = ready_s
        program = f"import sys\n{setup}\nfrom kvtier.cli import main\nsys.exit(main())"
        self._program = ("-c", program) if setup else ("-m", "kvtier.cli")
        self.config = folder / f"{name}-{time.monotonic_ns()}.toml"
        self.config.write_text(toml)
        self.log = self.config.with_suffix(".log")
        self.address = ""
        self._start()

    def _start(self) -> None:
        command = [sys.executable, *self._program, self.name, "--config", str(self.config)]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, env={**os.environ}
            )
        assert self.process.stdout is not None
        watchdog = threading.Timer(self._ready_s, self.process.kill)
        watchdog.start()
        line = self.process.stdout.readline()
        watchdog.cancel()
        if "ready at" not in line:
            self.process.wait(DEADLINE_S)
            raise AssertionError(f"kvtier {self.name} did not start:\n{self.log.read_text()}")
        self.address = line.rsplit(" ", 1)[1].strip()

    @property
    def pid(self) -> int:
        return self.process.pid

    def lends_at(self) -> str:
        """Where a node lends blocks, by the line after the first; to be asked once."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert "lends blocks at" in line, line
        return line.rsplit(" ", 1)[1].strip()

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.process.kill()
        self._ended()

    def restart(self) -> None:
        """Start it again with the same configuration."""
        assert self.process.poll() is not None, "still running"
        self._start()

    def terminate(self) -> int:
        """SIGTERM, as an operator would; the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self._ended()

    def _ended(self) -> int:
        status = self.process.wait(DEADLINE_S)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return status

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.terminate()


def node_toml(folder: Path, *, host: str = "4MiB", more: str = "") -> str:
    """A node daemon that keeps everything below `folder`."""
    return f"""
[node]
name = "n"
socket = "{folder}/node.sock"
listen = "127.0.0.1:0"
[host]
bytes = "{host}"
drain_at = 0.0
{more}
"""


def disk_toml(folder: Path, size: str = "64MiB") -> str:
    return f"""
[disk]
path = "{folder}/disk"
bytes = "{size}"
drain_at = 0.0
"""


def redis_toml(url: str, timeout_s: float = 5.0) -> str:
    """A shared tier; only a server that hangs takes so long as `timeout_s`."""
    return f"""
[redis]
url = "{url}"
timeout_s = {timeout_s}
retry_s = 0.2
"""
