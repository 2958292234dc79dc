"""How long does `make demo` take once all is installed, and how much memory?

One run of `kvtier demo`, with all that its exit status stands for. Memory is what the machine has
less than at the beginning, at worst, as the kernel counts what is available: shared memory once,
files that it may drop not at all, and whatever else began meanwhile too. There is no tiny one:
tests/demo plays it whole.
"""

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from benchmarks.common import Bar, summary
from kvtier.config import memory_available

MOST_S = 240.0
MOST_NBYTES = 8 << 30
LOOK_S = 0.25


class Played(NamedTuple):
    done: subprocess.CompletedProcess[str]
    seconds: float
    nbytes: int  # of memory, at most
    result: dict  # of --json


def play(env: Mapping[str, str] | None = None, timeout_s: float = 800.0) -> Played:
    """Run the demo, and look how much memory is left meanwhile."""
    ended, before = threading.Event(), memory_available()
    least = before

    def look() -> None:
        nonlocal least
        while not ended.wait(LOOK_S):
            least = min(least, memory_available())

    watching = threading.Thread(target=look)
    watching.start()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "demo.json"
        try:
            done = subprocess.run(
                [sys.executable, "-m", "kvtier.cli", "demo", "--json", str(out)],
                capture_output=True,
                text=True,
                timeout=timeout_s,
                env=env,
            )
        finally:
            seconds = time.perf_counter() - start
            ended.set()
            watching.join()
        result = json.loads(out.read_text()) if out.exists() else {}
    return Played(done, seconds, before - least, result)


def run(*, tiny: bool) -> dict[str, object]:
    played = play()
    if played.done.returncode:
        raise RuntimeError(f"the demo failed: {played.done.stdout}{played.done.stderr}")
    requests = played.result["requests"]
    kinds = {kind: [each["ttft_s"] for each in requests if each["kind"] == kind and each["ids"]]
             for kind in played.result["by_kind"]}  # fmt: skip
    return {
        "bytes": played.nbytes,
        "times": {
            "kvtier demo": summary([played.seconds]),
            "first token": {kind: summary(times) for kind, times in kinds.items() if times},
        },
        "verdicts": played.result["verdicts"],
        "bars": [
            Bar("demo, seconds", played.seconds, at_most=MOST_S).as_dict(),
            Bar("demo, bytes of memory", played.nbytes, at_most=MOST_NBYTES).as_dict(),
        ],
    }
