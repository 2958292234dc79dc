"""LMCache's MP server with its fs L2, under vLLM, for the case that `vllm` compares with.

`--peers PYTHON` names one that has vLLM and LMCache; docs/benchmarks.md says how to make it.
"""

import contextlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.vllm.driver import Engine

CHUNK = 256  # tokens, as LMCache comes
START_S = 60.0
# Its keys hang on the seed, and it would tell its makers of each start.
ENVIRONMENT = {
    "PYTHONHASHSEED": "0", "LMCACHE_TRACK_USAGE": "false", "DO_NOT_TRACK": "1",
    "LMCACHE_DISABLE_BANNER": "1",
}  # fmt: skip


class Server:
    """`lmcache server`, one for the engines of this machine."""

    def __init__(self, python: str, folder: Path, l1_gb: float) -> None:
        self.files = folder / "lmcache"
        self.files.mkdir(exist_ok=True)
        self.port, http = _port(), _port()
        self.log = folder / f"lmcache-{time.monotonic_ns()}.log"
        command = [
            str(Path(python).parent / "lmcache"), "server", "--port", str(self.port),
            "--http-port", str(http), "--chunk-size", str(CHUNK), "--max-workers", "2",
            "--l1-size-gb", str(l1_gb), "--l1-init-size-gb", "1", "--eviction-policy", "LRU",
            "--supported-transfer-mode", "auto",
            "--l2-adapter", json.dumps({"type": "fs", "base_path": str(self.files)}),
        ]  # fmt: skip
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env={**os.environ, **ENVIRONMENT}
            )
        self._until_there()

    def _until_there(self) -> None:
        end = time.monotonic() + START_S
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            time.sleep(0.1)
        raise RuntimeError(f"lmcache did not start: {self.log.read_text()[-2000:]}")

    def stored(self) -> int:
        """Files of its L2."""
        return sum(each.is_file() for each in self.files.rglob("*.data"))

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def engine(
    python: str, model: Path, folder: Path, settings: dict[str, object], l1_gb: float
) -> Iterator[tuple[Engine, Server]]:
    """A vLLM engine with LMCache under it."""
    server = Server(python, folder, l1_gb)
    try:
        config: dict[str, object] = {
            "kv_connector": "LMCacheMPConnector", "kv_role": "kv_both",
            "kv_connector_extra_config": {
                "lmcache.mp.host": "tcp://localhost", "lmcache.mp.port": server.port,
            },
        }  # fmt: skip
        environment = {**settings["environment"], **ENVIRONMENT}  # type: ignore[dict-item]
        more = {**settings, "python": python, "environment": environment}
        with Engine(model, folder, config, **more) as started:  # type: ignore[arg-type]
            yield started, server
    finally:
        server.close()
