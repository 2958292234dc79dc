"""What every benchmark shares: statistics, bars, the machine, processes that end."""

import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

READY_S = 120.0


@dataclass(frozen=True)
class Bar:
    """A promise with a number; exactly one of the limits is set."""

    name: str
    value: float
    at_least: float | None = None
    at_most: float | None = None

    def as_dict(self) -> dict[str, object]:
        limit = (
            {"at_least": self.at_least} if self.at_least is not None else {"at_most": self.at_most}
        )
        return {"name": self.name, "value": self.value, **limit, "holds": self.holds}

    @property
    def holds(self) -> bool:
        low = self.at_least if self.at_least is not None else float("-inf")
        high = self.at_most if self.at_most is not None else float("inf")
        return low <= self.value <= high


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """min, median and p99 of some durations, in seconds."""
    ordered = sorted(seconds)
    return {
        "min_s": ordered[0],
        "median_s": statistics.median(ordered),
        "p99_s": ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))],
        "n": len(ordered),
    }


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median of theirs/ours, pair by pair: our speed in units of theirs, measured in turn."""
    return statistics.median(b / a for a, b in zip(ours, theirs, strict=True))


def machine() -> dict[str, object]:
    """What the numbers were measured on."""
    cpu = next(
        (line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
         if line.startswith("model name")), platform.processor(),
    )  # fmt: skip
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load_1min": os.getloadavg()[0],
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


@contextmanager
def server(
    name: str, toml: str, folder: Path, end: signal.Signals = signal.SIGTERM
) -> Iterator[str]:
    """`kvtier NAME` with this configuration in a process of its own; gives its gRPC address."""
    path = folder / f"{name}-{time.monotonic_ns()}.toml"
    path.write_text(toml)
    log = path.with_suffix(".log")
    with log.open("w") as err:
        process = subprocess.Popen(
            [sys.executable, "-m", "kvtier.cli", name, "--config", str(path)],
            stdout=subprocess.PIPE,
            stderr=err,
            text=True,
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if "ready at" not in line:
            raise RuntimeError(f"kvtier {name} did not start: {log.read_text()[-2000:]}")
        yield line.rsplit(" ", 1)[1].strip()
    finally:
        process.send_signal(end)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def until(condition: Callable[[], bool]) -> None:
    """Return once `condition()` holds."""
    end = time.monotonic() + READY_S
    while not condition():
        if time.monotonic() > end:
            raise RuntimeError("waited in vain")
        time.sleep(0.01)


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for sockets, disks and logs that goes away."""
    with tempfile.TemporaryDirectory(prefix="kvtier-bench-") as folder:
        yield Path(folder)


def write_json(path: Path, result: dict[str, object]) -> None:
    path.write_text(json.dumps(result, indent=1) + "\n")
