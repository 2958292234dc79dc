"""What does the router's index cost? Look-ups, ingest, memory, and a whole decision.

Beside it Dynamo's `RadixTree` and `SelectionService` (packages ai-dynamo-runtime and pyzmq), where
`--peers PYTHON` names a Python that has them; their dependencies conflict with ours, so they run in
a process of their own, on prompts of the same kind, right after ours.
"""

import asyncio
import gc
import json
import os
import subprocess
import time
from array import array
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import cycle
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import NamedTuple

from benchmarks.common import Bar, summary
from benchmarks.restarted import TIERS, restarted
from kvtier.core.audience import Warmth
from kvtier.core.blocks import BEGINS, BlockKey, block_keys
from kvtier.core.directory import Directory
from kvtier.core.score import DEFAULT_RATES, Candidate, rank
from kvtier.core.tiers import Tier
from kvtier.router.feed import FeedReader
from kvtier.router.pace import Pace
from kvtier.wire.chains import hear, tell
from kvtier.wire.pb import feed_pb2

NODES = 64
MESSAGE = 4096  # blocks of one message of a feed
PATH = 512  # blocks of a prompt: 8k tokens
SYSTEM = 32  # of them: one of 16 system prompts
BLOCK_TOKENS = 16
SCATTERED = 0  # in place of a piece's size: a node's blocks in random order, as after a restart
RESTARTED = 64  # prompts on the disk of a real daemon that is killed and started again
JOINER = 256  # prompts of the node that joins and leaves while the loop is watched: 131,072 blocks
AFTER = "after a daemon's restart"
PEER = Path(__file__).parent / "index_peer.py"


class Case(NamedTuple):
    """How the blocks are told, each piece with the block before it."""

    name: str
    piece: int  # blocks told together
    holders: int = 1  # of a block
    some: int = 0  # of them so many hold every other piece only, and as many others the rest
    holed: bool = False  # the last holder of each prompt has lost every 20th block of it
    last_first: bool = False


CASES = (
    Case("whole prompts, 1 holder", PATH),
    Case("whole prompts, 8 holders", PATH, holders=8),
    Case("pieces of 16, 1 holder", 16),
    Case("pieces of 16, 8 holders", 16, holders=8),
    Case("pieces of 16, last first, 1 holder", 16, last_first=True),
    Case("pieces of 16 with other holders in turn", 16, holders=4, some=3),
    Case("every 20th block missing at 1 of 2 holders", PATH, holders=2, holed=True),
    Case("scattered, 1 holder", SCATTERED),
)


def run(*, tiny: bool, peers: str = "") -> dict[str, object]:
    chains, rounds = (40, 20) if tiny else (2000, 400)
    times: dict[str, object] = {}
    figures: dict[str, object] = {}
    bars: list[Bar] = []
    for case in CASES:
        # Each in a process of its own: memory that another one gave back would hide what it takes.
        with ProcessPoolExecutor(1, get_context("spawn")) as alone:
            measured = alone.submit(_measure, case, chains, rounds).result()
        times[case.name], figures[case.name], of_this = measured
        bars += [bar for bar in of_this if not (tiny and "bytes" in bar.name)]
    with ProcessPoolExecutor(1, get_context("spawn")) as alone:
        times[AFTER], figures[AFTER], bar = alone.submit(_after_restart, chains, tiny).result()
    bars.append(bar)
    return {
        "nodes": NODES,
        "bytes": figures["whole prompts, 1 holder"]["bytes_per_block"],
        "figures": figures,
        "peer": peer(peers, chains, rounds),
        "times": times,
        "bars": [bar.as_dict() for bar in bars],
    }


def _measure(
    case: Case, chains: int, rounds: int
) -> tuple[dict[str, object], dict[str, float], list[Bar]]:
    index = Index(case, chains)
    figures = {
        "blocks": float(index.directory.blocks),
        "bytes_per_block": index.bytes_per_block,
        "blocks_per_s": index.blocks_per_s,
    }
    found = {
        f"{when}, {100 * depth // PATH}% held": index.look_up(depth, rounds)
        for when in ("first", "again")
        for depth in (PATH, PATH // 2, SYSTEM, 0)
    }
    found["with holes"] = index.look_up(PATH, rounds, hole=PATH // 3)
    worst = max(summary(each)["median_s"] for each in found.values()) * 1e6
    name = case.name
    bars = [
        Bar(f"{name}: slowest p50 of a look-up in us", worst, at_most=40),
        Bar(f"{name}: bytes a block", index.bytes_per_block, at_most=120 + 8 * case.holders),
    ]
    found["a step of taking in (CPU)"] = index.steps
    if case == CASES[0]:
        found["token ids to decision"] = [index.decide(number) for number in range(rounds)]
        middle = summary(found["token ids to decision"])["median_s"] * 1e3
        bars.append(Bar("8k token ids to decision, p50 in ms", middle, at_most=0.4))
    held, found["while a node joins"] = asyncio.run(index.watched())
    middle = summary(found["while a node joins"])["median_s"] * 1e6
    bars.append(Bar(f"{name}: p50 of a look-up while a node joins in us", middle, at_most=40))
    for what, seconds in held.items():
        found[f"the loop held, {what} (CPU)"] = seconds
        bars.append(
            Bar(f"{name}: longest the loop is held, {what}, in ms", 1e3 * max(seconds), at_most=1)
        )
    found["drop of a node"] = [index.drop()]
    longest = {f"longest, {what}": max(each) for what, each in found.items() if "CPU" in what}
    return {each: summary(s) for each, s in found.items()}, {**figures, **longest}, bars


def _after_restart(chains: int, tiny: bool) -> tuple[dict[str, object], dict[str, float], Bar]:
    """A real daemon that was killed is one more source: its first look-ups, and how long it took.

    Pieces of 16 blocks were saved in turn, and its disk was read from the start.
    """
    index = Index(CASES[0], chains)
    starts = [os.urandom(16 * SYSTEM) for _ in range(16)]
    packed = [
        starts[n % 16] + os.urandom(16 * (PATH - SYSTEM)) for n in range(4 if tiny else RESTARTED)
    ]
    told = restarted([_unpack(each) for each in packed], 16)
    taken_in = asyncio.run(index.hear("restarted", told.messages))
    depths = {f"{100 * depth // PATH}% held": depth for depth in (PATH, PATH // 2)}
    half = len(packed) // 2
    found = {
        f"{when}, {name}": [index.ask(each, depth) for each in part]
        for when in ("first", "again")
        for (name, depth), part in zip(depths.items(), (packed[:half], packed[half:]), strict=True)
    }
    times = {
        **found, "started, disk read": [told.ready_s], "snapshot told": [told.told_s],
        "snapshot taken in": [taken_in],
    }  # fmt: skip
    worst = max(summary(each)["median_s"] for each in found.values()) * 1e6
    bar = Bar(f"{AFTER}: slowest p50 of a look-up in us", worst, at_most=40)
    return {name: summary(each) for name, each in times.items()}, {"blocks": told.blocks}, bar


class Index:
    """A directory of `chains` prompts, told as `case` says, 16 prompts in turn."""

    def __init__(self, case: Case, chains: int) -> None:
        self._rng = Random(1)
        self.steps: list[float] = []  # CPU seconds of each step of taking in
        self._root = os.urandom(32)
        starts = [array("I", self._tokens(SYSTEM)) for _ in range(16)]
        self._ids = [
            starts[n % 16] + array("I", self._tokens(PATH - SYSTEM)) for n in range(chains)
        ]
        packed = [b"".join(block_keys(self._root, ids, BLOCK_TOKENS)) for ids in self._ids]
        self._packed = packed
        names = [f"node {n}" for n in range(NODES)]
        self._candidates = {name: [name, f"daemon of {name}"] for name in names}
        messages = self._messages(case, names)
        seq = dict.fromkeys(names, 0)
        steps = array("d", bytes(8 * sum(len(part.keys) // 16 for _, part in messages)))
        gc.collect()
        gc.freeze()  # so that what the benchmark made beforehand holds nobody up
        before = _resident()
        self.directory = Directory()
        for name in names:
            self.directory.snapshot(name, 1, 0, [])
        begun, taken = time.perf_counter(), 0
        for name, part in messages:
            seq[name] += 1
            told = hear(part, (Tier.VRAM,))
            delta = self.directory.delta(name, 1, seq[name], told, [])
            assert delta is not None
            for seconds in _timed(delta):
                steps[taken] = seconds
                taken += 1
        self.blocks_per_s = len(steps) / (time.perf_counter() - begun)
        gc.collect()
        self.bytes_per_block = (_resident() - before) / self.directory.blocks
        self.steps = steps[:taken].tolist()

    def _messages(self, case: Case, names: list[str]) -> list[tuple[str, feed_pb2.TierKeys]]:
        """Who tells which blocks, in order."""
        packed = self._packed
        held = [
            (n, name, spans)
            for n in range(len(packed))
            for name, spans in zip(
                self._rng.sample(names, case.holders + case.some), _spans(case), strict=True
            )
        ]
        if case.piece != SCATTERED:
            turn = -1 if case.last_first else 1
            pieces = [(n // 16, turn * s[0], s, n, name) for n, name, spans in held for s in spans]
            pieces.sort(key=lambda each: each[:2])
            return [(name, _piece(packed[n], *s)) for _, _, s, n, name in pieces]
        told = []
        for holder in names:
            own = [(n, i) for n, name, _ in held if name == holder for i in range(PATH)]
            self._rng.shuffle(own)
            for start in range(0, len(own), MESSAGE):
                keys = {}
                for n, i in own[start : start + MESSAGE]:
                    keys[_key(packed[n], i)] = _key(packed[n], i - 1) if i else BEGINS
                told.append((holder, tell(Tier.VRAM, list(keys), keys.get)))
        return told

    def look_up(self, depth: int, rounds: int, hole: int | None = None) -> list[float]:
        """Seconds of look-ups of prompts of which `depth` blocks are held, or all but one."""
        picks = Random(depth).sample(range(len(self._packed)), min(rounds, len(self._packed)))
        return [self.ask(self._packed[number], depth, hole) for number in picks]

    def ask(self, packed: bytes, depth: int, hole: int | None = None) -> float:
        """Seconds of a look-up of that prompt, cut off at `depth` and without block `hole`."""
        keys = _unpack(packed)
        keys[depth:] = [BlockKey(os.urandom(16)) for _ in range(PATH - depth)]
        if hole is not None:
            keys[hole] = BlockKey(os.urandom(16))
        start = time.perf_counter()
        warmth = self.directory.warmth(keys, self._candidates)
        took = time.perf_counter() - start
        best = max(each.blocks for each in warmth.values())
        assert best == (depth if hole is None else hole), (best, depth)
        return took

    async def hear(self, source: str, messages: list[bytes]) -> float:
        """Seconds until the snapshot of one more daemon is taken in, as a router does it."""
        reader, pace = FeedReader(self.directory, source, TIERS), Pace()
        start = time.perf_counter()
        for message in messages:
            await pace.through(reader.take(feed_pb2.FeedMessage.FromString(message)))
        assert reader.ready
        self._candidates[source] = [source]
        return time.perf_counter() - start

    async def watched(self) -> tuple[dict[str, list[float]], list[float]]:
        """CPU seconds of each round of a loop on which a node joins and leaves, fed as a router is.

        It holds prompts that others have as well, and as many that nobody has. And seconds of
        look-ups of the former, one after each round in which it joins.
        """
        count = min(JOINER, len(self._packed))
        paths = [*self._packed[: count // 2], *(os.urandom(16 * PATH) for _ in range(count // 2))]
        parts = [_piece(path, 0, PATH) for path in paths]
        snapshots = [feed_pb2.Snapshot(held=parts[i : i + 4]) for i in range(0, count, 4)]
        snapshots.append(feed_pb2.Snapshot(last=True))
        messages = [
            feed_pb2.FeedMessage(epoch=1, seq=1, snapshot=each).SerializeToString()
            for each in snapshots
        ]
        pace = Pace()

        async def join() -> None:
            reader = FeedReader(self.directory, "joiner", (Tier.VRAM,))
            for message in messages:
                await pace.through(reader.take(feed_pb2.FeedMessage.FromString(message)))
            held = self.directory.counts("joiner")[Tier.VRAM]
            assert held >= (count - count // 2) * (PATH - SYSTEM)  # they share system prompts

        async def leave() -> None:
            self.directory.remove("joiner")
            await pace.through(iter(self.directory.tidy, False))

        blocks, asked = f"{count * PATH:,} blocks", cycle(paths[: count // 2])
        looks: list[float] = []
        return {
            f"a node with {blocks} joins": await _rounds(
                join(), lambda: looks.append(self.ask(next(asked), PATH))
            ),
            f"a node with {blocks} leaves": await _rounds(leave()),
        }, looks

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
        while self.directory.tidy():
            pass
        return time.perf_counter() - start

    def _tokens(self, blocks: int) -> list[int]:
        return array("H", self._rng.randbytes(2 * blocks * BLOCK_TOKENS)).tolist()


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


async def _rounds(
    work: Coroutine[None, None, None], between: Callable[[], None] = lambda: None
) -> list[float]:
    """CPU seconds of each round of the loop until `work` is done, without those of `between`."""
    task = asyncio.ensure_future(work)
    seconds = []
    while not task.done():
        start = time.thread_time()
        await asyncio.sleep(0)
        seconds.append(time.thread_time() - start)
        between()
    await task
    return seconds


def _timed(steps: Iterator[object]) -> Iterator[float]:
    """CPU seconds of each step: what others do on the machine is none of its length."""
    start = time.thread_time()
    for _ in steps:
        end = time.thread_time()
        yield end - start
        start = time.thread_time()


def _spans(case: Case) -> list[list[tuple[int, int]]]:
    """Of each of a prompt's holders the pieces that it tells of."""
    size = case.piece or PATH
    whole = [(start, min(start + size, PATH)) for start in range(0, PATH, size)]
    holed = [(start, min(start + 19, PATH)) for start in range(0, PATH, 20)]
    count = case.holders - case.some - case.holed
    return [whole] * count + [whole[::2], whole[1::2]] * case.some + [holed] * case.holed


def _piece(packed: bytes, start: int, stop: int) -> feed_pb2.TierKeys:
    """A piece of a prompt as a feed tells it."""
    keys = packed[16 * start : 16 * stop]
    parent = packed[16 * (start - 1) : 16 * start] if start else BEGINS
    return feed_pb2.TierKeys(tier=feed_pb2.TIER_VRAM, keys=keys, starts=[0], parents=parent)


def _key(packed: bytes, i: int) -> BlockKey:
    return BlockKey(packed[16 * i : 16 * (i + 1)])


def _unpack(packed: bytes) -> list[BlockKey]:
    return [BlockKey(packed[i : i + 16]) for i in range(0, len(packed), 16)]


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
