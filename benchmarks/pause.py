"""The longest single call over a million blocks: of PHD, of a worker's pool, of a node's books.

A tier is filled and then used on. Each call's time is that of its thread, and the least of several
runs of the very same calls: what remains is what the call itself takes, not what the machine did
to it. Python's collector is off, as in a daemon (kvtier/node/garbage.py).
"""

import gc
import time
from array import array
from collections.abc import Callable, Iterator
from itertools import islice
from random import Random
from typing import TypeVar

from kvtier.core.blocks import BlockKey
from kvtier.core.ledger import Ledger, Move
from kvtier.core.phd import PHD
from kvtier.core.policy import Use
from kvtier.core.tiers import Tier, TierSpec
from kvtier.engine.pool import BlockPool

RUNS = 2
_PATH = 16  # blocks of a prompt, about
_LONGEST = 48  # of any: a call takes time for each of its own blocks
_OPEN = 30_000  # conversations that go on

T = TypeVar("T")


class _Watch:
    """Calls, and notes how long each took."""

    def __init__(self) -> None:
        self.ns = array("q")

    def __call__(self, call: Callable[..., T], *args: object, **more: object) -> T:
        start = time.thread_time_ns()
        answer = call(*args, **more)
        self.ns.append(time.thread_time_ns() - start)
        return answer


def longest(blocks: int) -> dict[str, float]:
    """Milliseconds of the longest call, by what is called, with `blocks` held."""
    plays = {"PHD": _policy, "worker's pool": _pool, "node's ledger": _ledger}
    return {name: _longest(play, blocks) for name, play in plays.items()}


def _longest(play: Callable[[_Watch, int], None], blocks: int) -> float:
    least: array[int] | None = None
    for _ in range(RUNS):
        gc.collect()
        gc.disable()
        try:
            watch = _Watch()
            play(watch, blocks)
        finally:
            gc.enable()
        least = array("q", map(min, least, watch.ns)) if least is not None else watch.ns
    assert least is not None
    return max(least) / 1e6


def _prompts(blocks: int) -> Iterator[tuple[float, int, list[BlockKey]]]:
    """Conversations that begin, go on and end, until 1.5 times `blocks` were asked for."""
    rng, going, asked, number = Random(1), [], 0, 0
    while asked < 1.5 * blocks:
        number += 1
        if going and rng.random() < 0.3:
            at = rng.randrange(len(going))
            keys = going[at] = (going[at] + _keys(rng, _PATH // 2))[:_LONGEST]
        else:
            keys = _keys(rng, 2 * _PATH)
            going.append(keys)
            if len(going) > _OPEN:
                del going[: _OPEN // 2]
        asked += len(keys)
        yield number / 20, number, keys


def _keys(rng: Random, most: int) -> list[BlockKey]:
    return [BlockKey(rng.randbytes(16)) for _ in range(rng.randint(1, most))]


def _policy(watch: _Watch, blocks: int) -> None:
    policy = PHD()
    for now, number, keys in _prompts(blocks):
        watch(policy.touch, keys, Use(now, number, 100))
        over = len(policy) - blocks
        if over > 0:
            for key in watch(list, islice(policy.coldest(), over)):
                watch(policy.remove, key)


def _pool(watch: _Watch, blocks: int) -> None:
    pool = BlockPool(blocks, PHD)
    for now, number, keys in _prompts(blocks):
        use = Use(now, number)
        found = len(watch(pool.match, keys))
        if found:
            watch(pool.pin, keys[:found], 0, use)
        ids, _ = watch(pool.allocate, len(keys) - found)
        path = keys[: found + len(ids)]
        if ids:
            watch(pool.insert, path, ids, use)
            watch(pool.pin, path, found, use)
        watch(pool.used, path, use._replace(output_tokens=100))
        watch(pool.unpin, path)
        watch(pool.take_changes)


def _ledger(watch: _Watch, blocks: int) -> None:
    """A third in host memory by PHD, all on disk by LRU."""
    host = blocks // 3
    ledger = Ledger(
        1,
        [
            TierSpec(tier=Tier.HOST, capacity=host, drain_at=host // 2, policy=PHD),
            TierSpec(tier=Tier.DISK, capacity=blocks, drain_at=blocks, queue=4096),
        ],
    )
    for now, number, keys in _prompts(blocks):
        use = Use(now, number)
        lease = watch(ledger.read, 1, keys, use=use)
        _settle(watch, ledger)
        watch(ledger.release, lease.id)
        lease = watch(ledger.write, 1, keys, use=use)
        watch(ledger.commit, lease.id)
        _settle(watch, ledger)


def _settle(watch: _Watch, ledger: Ledger) -> None:
    """Every move succeeds at once."""
    while effects := watch(ledger.take_effects):
        for effect in effects:
            if isinstance(effect, Move):
                watch(ledger.moved, effect, ok=True, nbytes=1)
