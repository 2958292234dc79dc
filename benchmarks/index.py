"""What does the router's index cost? Look-ups, ingest, memory, and a whole decision.

Beside it Dynamo's `RadixTree` and `SelectionService` (packages ai-dynamo-runtime and pyzmq), where
`--peers PYTHON` names a Python that has them; their dependencies conflict with ours, so they run in
a process of their own, on prompts of the same kind, right after ours.
"""

import gc
import json
import os
import subprocess
import time
from array import array
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from random import Random

from benchmarks.common import Bar, summary
from kvtier.core.audience import Warmth
from kvtier.core.blocks import BlockKey, block_keys
from kvtier.core.directory import Directory
from kvtier.core.score import DEFAULT_RATES, Candidate, rank
from kvtier.core.tiers import Tier

NODES = 64
MESSAGE = 4096  # blocks of one message of a feed
PATH = 512  # blocks of a prompt: 8k tokens
SYSTEM = 32  # of them: one of 16 system prompts
BLOCK_TOKENS = 16
SCATTERED = 0  # in place of a piece's size: a node's blocks in random order, as after a restart
PEER = Path(__file__).parent / "index_peer.py"


def run(*, tiny: bool, peers: str = "") -> dict[str, object]:
    chains, rounds = (40, 20) if tiny else (2000, 400)
    times: dict[str, object] = {}
    figures: dict[str, object] = {}
    bars: list[Bar] = []
    for name, piece, holders in (
        ("whole prompts, 1 holder", PATH, 1),
        ("whole prompts, 8 holders", PATH, 8),
        ("pieces of 16, 1 holder", 16, 1),
        ("scattered, 1 holder", SCATTERED, 1),
    ):
        # Each in a process of its own: memory that another one gave back would hide what it takes.
        with ProcessPoolExecutor(1, get_context("spawn")) as alone:
            measured = alone.submit(_measure, name, piece, holders, chains, rounds).result()
        times[name], figures[name], of_this = measured
        bars += [bar for bar in of_this if not (tiny and "bytes" in bar.name)]
    return {
        "nodes": NODES,
        "bytes": figures["whole prompts, 1 holder"]["bytes_per_block"],
        "figures": figures,
        "peer": peer(peers, chains, rounds),
        "times": times,
        "bars": [bar.as_dict() for bar in bars],
    }


def _measure(
    name: str, piece: int, holders: int, chains: int, rounds: int
) -> tuple[dict[str, object], dict[str, float], list[Bar]]:
    index = Index(chains, piece, holders)
    found = {
        f"{when}, {100 * depth // PATH}% held": index.look_up(depth, rounds)
        for when in ("first", "again")
        for depth in (PATH, PATH // 2, SYSTEM, 0)
    }
    found["gather after the first look-up"] = index.gathers[:rounds]
    found["with holes"] = index.look_up(PATH, rounds, hole=PATH // 3)
    looks = (each for what, each in found.items() if not what.startswith("gather"))
    worst = max(summary(each)["median_s"] for each in looks) * 1e6
    bars = [
        Bar(f"{name}: slowest p50 of a look-up in us", worst, at_most=40),
        Bar(f"{name}: bytes a block", index.bytes_per_block, at_most=120 + 8 * holders),
    ]
    if holders == 1 and piece == PATH:
        found["token ids to decision"] = [index.decide(number) for number in range(rounds)]
        middle = summary(found["token ids to decision"])["median_s"] * 1e3
        bars.append(Bar("8k token ids to decision, p50 in ms", middle, at_most=0.4))
    found["drop of a node"] = [index.drop()]
    figures = {
        "blocks": float(index.directory.blocks),
        "bytes_per_block": index.bytes_per_block,
        "blocks_per_s": index.blocks_per_s,
    }
    return {each: summary(seconds) for each, seconds in found.items()}, figures, bars


class Index:
    """A directory of `chains` prompts, told in pieces of so many blocks, 16 prompts in turn."""

    def __init__(self, chains: int, piece: int, holders: int) -> None:
        self._rng = Random(1)
        self.gathers: list[float] = []  # seconds of tidying up after a look-up
        self._root = os.urandom(32)
        starts = [array("I", self._tokens(SYSTEM)) for _ in range(16)]
        self._ids = [
            starts[n % 16] + array("I", self._tokens(PATH - SYSTEM)) for n in range(chains)
        ]
        packed = [b"".join(block_keys(self._root, ids, BLOCK_TOKENS)) for ids in self._ids]
        self._packed = packed
        names = [f"node {n}" for n in range(NODES)]
        self._candidates = {name: [name, f"daemon of {name}"] for name in names}
        told = self._told(packed, names, piece, holders)
        seq = dict.fromkeys(names, 0)
        gc.collect()
        before = _resident()
        self.directory = Directory()
        for name in names:
            self.directory.snapshot(name, 1, 0, [])
        begun = time.perf_counter()
        for name, part in told:
            seq[name] += 1
            assert self.directory.apply(name, 1, seq[name], [(Tier.VRAM, _unpack(part))], [])
        blocks = sum(len(part) for _, part in told) // 16
        self.blocks_per_s = blocks / (time.perf_counter() - begun)
        gc.collect()
        self.bytes_per_block = (_resident() - before) / self.directory.blocks

    def _told(
        self, packed: list[bytes], names: list[str], piece: int, holders: int
    ) -> list[tuple[str, bytes]]:
        """Who tells which blocks, in order."""
        held = [(n, name) for n in range(len(packed)) for name in self._rng.sample(names, holders)]
        if piece != SCATTERED:
            pieces = [(n // 16, s, n, name) for n, name in held for s in range(0, PATH, piece)]
            pieces.sort(key=lambda each: each[:2])
            return [(name, packed[n][16 * s : 16 * (s + piece)]) for _, s, n, name in pieces]
        told = []
        for holder in names:
            own = [key for n, name in held if name == holder for key in _unpack(packed[n])]
            self._rng.shuffle(own)
            told += [(holder, b"".join(own[s : s + MESSAGE])) for s in range(0, len(own), MESSAGE)]
        return told

    def look_up(self, depth: int, rounds: int, hole: int | None = None) -> list[float]:
        """Seconds of look-ups of prompts of which `depth` blocks are held, or all but one."""
        seconds = []
        picks = Random(depth).sample(range(len(self._packed)), min(rounds, len(self._packed)))
        for number in picks:
            keys = _unpack(self._packed[number])
            keys[depth:] = [BlockKey(os.urandom(16)) for _ in range(PATH - depth)]
            if hole is not None:
                keys[hole] = BlockKey(os.urandom(16))
            start = time.perf_counter()
            warmth = self.directory.warmth(keys, self._candidates)
            seconds.append(time.perf_counter() - start)
            best = max(each.blocks for each in warmth.values())
            assert best == (depth if hole is None else hole), (best, depth)
            start = time.perf_counter()
            self.directory.gather()
            self.gathers.append(time.perf_counter() - start)
        return seconds

    def decide(self, number: int) -> float:
        """Seconds from a list of token ids to the best of the nodes and three fallbacks."""
        ids = list(self._ids[number % len(self._ids)])
        start = time.perf_counter()
        keys = block_keys(self._root, ids, BLOCK_TOKENS)
        warmth = self.directory.warmth(keys, self._candidates)
        candidates = [Candidate(name, each, 0, DEFAULT_RATES) for name, each in warmth.items()]
        best = rank(
            candidates, prompt_tokens=len(ids), block_tokens=BLOCK_TOKENS, block_nbytes=1 << 20,
            behind=2.0, tie=self._rng.random, most=4,
        )  # fmt: skip
        took = time.perf_counter() - start
        assert best[0].warmth == Warmth(vram=PATH)
        return took

    def drop(self) -> float:
        """Seconds to forget one node."""
        start = time.perf_counter()
        self.directory.remove("node 7")
        return time.perf_counter() - start

    def _tokens(self, blocks: int) -> list[int]:
        return [self._rng.randrange(128_000) for _ in range(blocks * BLOCK_TOKENS)]


def peer(python: str, chains: int, rounds: int) -> dict[str, object]:
    """Dynamo's figures in its own process; says so where it is not there."""
    if not python:
        return {"ai-dynamo-runtime": "not installed"}
    done = subprocess.run(
        [python, str(PEER), str(chains), str(rounds)], capture_output=True, text=True, timeout=600
    )
    if done.returncode:
        return {"ai-dynamo-runtime": f"failed: {done.stderr[-300:]}"}
    return json.loads(done.stdout)


def _unpack(packed: bytes) -> list[BlockKey]:
    return [BlockKey(packed[i : i + 16]) for i in range(0, len(packed), 16)]


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
