"""vLLM with kvtier under it, beside vLLM alone and vLLM's own tiers: real engines, on the CPU.

Same prompts, same settings, all engines alive at once and measured in turn. CPU seconds are those
of the engine's processes and of the node daemon (or LMCache's server) together. `vram` is the floor
of `host`: vLLM's own prefix cache has the same part of the prompt. Run it with .venv-vllm's Python.
"""

import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import lmcache_peer
from benchmarks.common import Bar, scratch, summary
from kvtier.config import cache_dir
from tests.launching import Process, disk_toml, node_toml
from tests.vllm.driver import BLOCK, ROW, Engine, transfer

# vLLM's processes spin for a second after each message (SpinCondition in its shm_broadcast.py), so
# the engine that was measured before would take the cores from this one.
SPIN_S = 1.2
SETTLE_S = 5.0  # for servers that were started to have taken their memory
# On few cores vLLM gives an engine with a connector another number of threads than one without.
ALIKE = {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
LMCACHE_GB = 1.5  # of its L1: all prompts fit
# Without any tier, with kvtier, with kvtier that saves at the second use, with vLLM's own tiers.
UNIQUE = ("off", "on", "on, second-use", "own tiers")


@dataclass(frozen=True)
class Size:
    prompt: int  # tokens
    repeats: int
    unique: int  # prompts of a round without a hit
    unique_tokens: int
    rounds: int  # in each of two lives of the engines

    @property
    def blocks(self) -> int:
        """What the tiers must hold: each prompt of each case, with room."""
        return self.repeats * (self.prompt // BLOCK + 2) + 32


FULL = Size(prompt=3000, repeats=7, unique=6, unique_tokens=640, rounds=6)
TINY = Size(prompt=200, repeats=1, unique=2, unique_tokens=100, rounds=1)


@dataclass
class Sample:
    """Seconds of one case, repeat by repeat."""

    name: str
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    cached: list[int] = field(default_factory=list)


def run(*, tiny: bool, peers: str = "") -> dict[str, object]:
    size = TINY if tiny else FULL
    model = cache_dir() / "smollm2-135m-instruct"
    with scratch() as folder:
        found = measure(model, folder, size, peers)
    times = {
        name: {"wall": summary(each.wall), "cpu": summary(each.cpu)} for name, each in found.items()
    }
    return {
        "times": times,
        "prompt_tokens": size.prompt,
        "block_bytes": ROW,
        "cached_tokens": {name: each.cached for name, each in found.items()},
        "lmcache": "run" if peers else "not run: no --peers PYTHON that has it",
        "bars": [bar.as_dict() for bar in bars(found)],
    }


def bars(found: dict[str, Sample]) -> list[Bar]:
    def ratio(one: str, other: str, what: str = "cpu") -> float:
        pairs = zip(getattr(found[one], what), getattr(found[other], what), strict=True)
        return statistics.median(a / b for a, b in pairs)

    found_bars = [
        Bar("restored from host / cold, wall", ratio("host", "cold", "wall"), at_most=1 / 12),
        Bar("restored from host / vLLM's CPU tier, CPU s", ratio("host", "own cpu"), at_most=1.3),
        Bar("restored from disk / vLLM's fs, after a restart, CPU s", ratio("disk", "own fs"),
            at_most=1.0),
        Bar("restored from disk / vLLM's fs, after a restart, wall",
            ratio("disk", "own fs", "wall"), at_most=1.0),
        Bar("throughput on / off, unique prompts, wall", ratio("off", "on", "wall"), at_least=0.97),
        Bar("throughput on / off, unique prompts, CPU s", ratio("off", "on"), at_least=0.97),
        Bar("throughput on, second-use / off, unique prompts, wall",
            ratio("off", "on, second-use", "wall"), at_least=0.97),
        Bar("throughput on / vLLM's CPU and fs tiers, unique prompts, wall",
            ratio("own tiers", "on", "wall"), at_least=0.97),
    ]  # fmt: skip
    if "lmcache" in found:
        found_bars += [
            Bar("restored from disk / LMCache's fs, after a restart, CPU s",
                ratio("disk", "lmcache"), at_most=1.0),
            Bar("restored from disk / LMCache's fs, after a restart, wall",
                ratio("disk", "lmcache", "wall"), at_most=1.0),
        ]  # fmt: skip
    return found_bars


def measure(model: Path, folder: Path, size: Size, peers: str) -> dict[str, Sample]:
    found = {
        name: Sample(name)
        for name in ("cold", "vram", "host", "own cpu", "disk", "own fs", *UNIQUE)
    }
    rng = random.Random(1)

    def prompt(tokens: int) -> list[int]:
        return [rng.randrange(1000, 40000) for _ in range(tokens)]

    prompts = [prompt(size.prompt) for _ in range(size.repeats)]
    nbytes = size.blocks * ROW * 2
    toml = node_toml(folder, host=f"{nbytes}", more=disk_toml(folder, f"{nbytes * 3}"))
    # As a user has it: half of the host tier fills before copies go down; the rest when it ends.
    node = Process("node", toml.replace("drain_at = 0.0\n", ""), folder)
    fs = {
        "kv_connector": "OffloadingConnector", "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "cpu_bytes_to_use": nbytes, "spec_name": "KvtierSpec",
            "spec_module_path": "kvtier.engine.vllm.spec", "offload_prompt_only": False,
            "secondary_tiers": [{"type": "fs", "root_dir": str(folder / "fs")}],
        },
    }  # fmt: skip
    ours = transfer(folder / "node.sock", cpu_blocks=size.blocks * 2, lookup_s=10, load_s=20)
    second_use = transfer(folder / "node.sock", cpu_blocks=size.blocks * 2, save="second-use")
    settings: dict[str, object] = {
        "max_model_len": 4096, "max_num_batched_tokens": 4096, "environment": ALIKE,
    }  # fmt: skip

    def start(config: dict[str, object] | None) -> Engine:
        return Engine(model, folder, config, **settings)

    with ExitStack() as stack:
        stack.callback(lambda: node.process.poll() is None and node.terminate())
        off, on, own = (stack.enter_context(start(each)) for each in (None, ours, fs))
        for engine in (off, on, own):  # first uses pay for much
            engine.generate([prompt(size.unique_tokens)], 1)
        with start(second_use) as second:
            compare_unique(found, (off, on, second, own), node, size, prompt)
        for each in prompts:
            timed(found["cold"], off, node.pid, each)
            for engine in (on, own):
                engine.generate([each], 1)
        for each in prompts:
            on.forget()
            timed(found["host"], on, node.pid, each)
            timed(found["vram"], on, node.pid, each)
            own.forget(all_of_vllm=False)
            timed(found["own cpu"], own, node.pid, each)
        for engine in (off, on, own):
            engine.close()
        node.terminate()
        if peers:
            found["lmcache"] = Sample("lmcache")
            fill_lmcache(peers, model, folder, settings, prompts)
        node.restart()
        on, own = (stack.enter_context(start(each)) for each in (ours, fs))
        rows = [("disk", on, node.pid), ("own fs", own, node.pid)]
        with ExitStack() as peer:
            if peers:
                started = lmcache_peer.engine(peers, model, folder, settings, LMCACHE_GB)
                engine, server = peer.enter_context(started)
                rows.append(("lmcache", engine, server.process.pid))
            for _, engine, _ in rows:
                engine.generate([prompt(size.unique_tokens)], 1)
            time.sleep(SETTLE_S)
            for number, each in enumerate(prompts):
                first = number % len(rows)
                for name, engine, pid in rows[first:] + rows[:first]:
                    timed(found[name], engine, pid, each)
        # One life of an engine computes faster than the next, and who started first has it best.
        with start(second_use) as second, start(None) as off:
            compare_unique(found, (off, on, second, own), node, size, prompt, backwards=True)
    return found


def fill_lmcache(
    peers: str, model: Path, folder: Path, settings: dict[str, object], prompts: list[list[int]]
) -> None:
    """Have LMCache store the prompts; it and its engine end."""
    with lmcache_peer.engine(peers, model, folder, settings, LMCACHE_GB) as (engine, server):
        for each in prompts:
            engine.generate([each], 1)
        files = sum(len(each) // lmcache_peer.CHUNK for each in prompts)
        end = time.monotonic() + 60
        while server.stored() < files and time.monotonic() < end:
            time.sleep(0.2)


def compare_unique(
    found: dict[str, Sample], engines: Sequence[Engine], node: Process, size: Size,
    prompt: Callable[[int], list[int]], *, backwards: bool = False,
) -> None:  # fmt: skip
    """Rounds of prompts that nobody has seen, by each of the engines that `UNIQUE` names.

    Another engine begins each round. `backwards`: who was before another comes after it.
    """
    rows = list(zip(UNIQUE, engines, strict=True))[:: -1 if backwards else 1]
    for _, engine in rows:  # as many as in a round: first uses pay for much
        engine.generate([prompt(size.unique_tokens) for _ in range(size.unique)], 4)
    for number in range(size.rounds):
        first = number % len(rows)
        for name, engine in rows[first:] + rows[:first]:
            some = [prompt(size.unique_tokens) for _ in range(size.unique)]
            with taken(found[name], engine, node.pid):
                engine.generate(some, 4)


def timed(sample: Sample, engine: Engine, pid: int, prompt: list[int]) -> None:
    with taken(sample, engine, pid):
        ((_, cached),) = engine.answers([prompt], 1)
    sample.cached.append(cached)


@contextmanager
def taken(sample: Sample, engine: Engine, pid: int) -> Iterator[None]:
    """Adds the wall and CPU seconds of its context; `pid` is of what serves the engine."""
    time.sleep(SPIN_S)
    pids = [*tree(engine.process.pid), *tree(pid)]
    cpu, start = cpu_s(pids), time.perf_counter()
    yield
    sample.wall.append(time.perf_counter() - start)
    sample.cpu.append(cpu_s(pids) - cpu)
    print(f"{sample.name}: {sample.wall[-1]:.3f} s, {sample.cpu[-1]:.3f} CPU s", file=sys.stderr)


def tree(pid: int) -> list[int]:
    """A process and all below it."""
    children = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        children += (task / "children").read_text().split()
    return [pid, *(each for child in children for each in tree(int(child)))]


def cpu_s(pids: list[int]) -> float:
    """User and system seconds of these processes, to the nanosecond: ticks are of 10 ms."""
    # The clock of another process, as clock_getcpuclockid(3) gives it.
    return sum(time.clock_gettime_ns((~pid << 3) | 2) for pid in pids) / 1e9


if __name__ == "__main__":
    sys.exit("run it with benchmarks/run.py vllm")
