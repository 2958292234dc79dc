"""Starts real vLLM engines with kvtier under them, and talks to them."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
READY_S = 560.0  # beside other work a start has taken a third of it
BLOCK = 32  # tokens
ROW = 30 * 2 * 3 * 64 * 2 * BLOCK  # bytes of a block of SmolLM2-135M in bfloat16


def transfer(socket: Path | str, *, cpu_blocks: int = 64, **kvtier: object) -> dict[str, object]:
    """What a user gives as --kv-transfer-config, with a small region of vLLM's own."""
    return {
        "kv_connector": "KvtierConnector",
        "kv_connector_module_path": "kvtier.engine.vllm.connector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "cpu_bytes_to_use": cpu_blocks * ROW,
            "kvtier": {"socket": str(socket), **kvtier},
        },
    }


def shared_memory(group: int) -> frozenset[Path]:
    """Files in /dev/shm that processes of a group have mapped."""
    found: set[str] = set()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if os.getpgid(int(entry.name)) == group:
                lines = (entry / "maps").read_text().splitlines()
                found |= {line.split()[5] for line in lines if " /dev/shm/" in line}
    return frozenset(map(Path, found))


class Engine:
    """One vLLM engine, in a process group of its own. A context manager."""

    def __init__(
        self, model: Path, folder: Path, config: dict[str, object] | None, *,
        python: str = sys.executable, environment: dict[str, str] | None = None, **more: object,
    ):  # fmt: skip
        self.log = folder / f"vllm-{time.monotonic_ns()}.log"
        settings: dict[str, object] = {
            "model": str(model), "enforce_eager": True, "block_size": BLOCK, "seed": 0,
            "max_model_len": 2048, "prefix_caching_hash_algo": "sha256_cbor",
            "disable_log_stats": False, **more,
        }  # fmt: skip
        if config is not None:
            settings["kv_transfer_config"] = config
        read, write = os.pipe()
        environment = {
            **os.environ,
            **(environment or {}),
            "PYTHONPATH": str(ROOT),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }
        # The answers' pipe becomes fd 3: vLLM itself writes to stdout.
        shell = f"exec 3>&{write}; exec {python} {Path(__file__).parent}/engine_main.py"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                ["bash", "-c", shell], stdin=subprocess.PIPE, stdout=log, stderr=log,
                pass_fds=(write,), text=True, env=environment, start_new_session=True,
            )  # fmt: skip
        os.close(write)
        self._answers = os.fdopen(read, "rb", buffering=0)
        self._rest = b""
        self._send(settings)
        try:
            assert self._answer(READY_S) == "ready"
        except BaseException:
            self.kill()
            raise

    def generate(
        self, prompts: list[list[int]], max_tokens: int = 16, *, salt: str = ""
    ) -> list[list[int]]:
        """The greedy answers, computed at the same time."""
        return [ids for ids, _ in self.answers(prompts, max_tokens, salt=salt)]

    def answers(
        self, prompts: list[list[int]], max_tokens: int = 16, *, salt: str = ""
    ) -> list[tuple[list[int], int]]:
        """The greedy answers, and of each prompt how many tokens were not computed."""
        self.begin(prompts, max_tokens, salt=salt)
        return self.end()

    def begin(self, prompts: list[list[int]], max_tokens: int = 16, *, salt: str = "") -> None:
        """Send a request; `end` gives its answers."""
        more = {"cache_salt": salt} if salt else {}
        self._send(["generate", [{"ids": ids, "more": more} for ids in prompts], max_tokens])

    def end(self, limit_s: float = READY_S) -> list[tuple[list[int], int]]:
        """The answers to what `begin` sent."""
        return [(ids, cached) for ids, cached in self._answer(limit_s)]

    def forget(self, *, all_of_vllm: bool = True) -> None:
        """Empty VRAM and, if asked, vLLM's own CPU region too."""
        deadline = time.monotonic() + READY_S
        while True:
            self._send(["reset", all_of_vllm])
            if self._answer(READY_S):
                return
            assert time.monotonic() < deadline, "vLLM does not forget"

    def metrics(self) -> dict[str, float]:
        """vLLM's counters of KV transfers; labels joined to the name."""
        self._send(["metrics"])
        found: dict[str, float] = {}
        for name, labels, value in self._answer(READY_S):
            words = [v for k, v in sorted(labels.items()) if k not in ("engine", "model_name")]
            found[" ".join([name, *words])] = value
        return found

    def core(self) -> int:
        """The process id of its EngineCore, where the scheduler and the tier live."""
        below = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        for pid in below.split():
            if b"EngineCore" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return int(pid)
        raise AssertionError(f"no EngineCore below {self.process.pid}")

    def _send(self, value: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(value) + "\n")
        self.process.stdin.flush()

    def _answer(self, limit_s: float):
        end = time.monotonic() + limit_s
        while b"\n" not in self._rest:
            left = end - time.monotonic()
            ready, _, _ = select.select([self._answers], [], [], max(0, left))
            assert ready, f"vLLM gave no answer in {limit_s:g} s:\n{self.tail()}"
            data = self._answers.read(65536)
            assert data, f"vLLM is dead:\n{self.tail()}"
            self._rest += data
        line, self._rest = self._rest.split(b"\n", 1)
        return json.loads(line)

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-6000:]

    def said(self, text: str) -> list[str]:
        """The lines of its log with `text`."""
        return [line for line in self.log.read_text(errors="replace").splitlines() if text in line]

    def close(self) -> None:
        """As a user would: let it save, and wait."""
        shared = shared_memory(self.process.pid)
        if self.process.poll() is None:
            assert self.process.stdin is not None
            self.process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(60)
        self.kill(shared)

    def kill(self, shared: frozenset[Path] = frozenset()) -> None:
        """SIGKILL for all of it; what its processes share memory by goes, too."""
        shared |= shared_memory(self.process.pid)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)
        for each in shared:
            each.unlink(missing_ok=True)
        with contextlib.suppress(BrokenPipeError, ValueError):
            self.process.stdin.close()
        self._answers.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
