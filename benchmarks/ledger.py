"""Does the ledger slow down as it fills? read, write and commit at 1k and at 64k blocks."""

import gc
import os
import time

from benchmarks.common import Bar, summary
from kvtier.core.blocks import BlockKey
from kvtier.core.ledger import Ledger, Move
from kvtier.core.tiers import Tier, TierSpec

CALLS = ("read", "write", "commit", "release")  # nobody waits for the last: it has no bar
PATH = 64  # blocks of one prompt
NBYTES = 1 << 20


class _Node:
    """A ledger that is kept full, whose moves all succeed at once."""

    def __init__(self, blocks: int) -> None:
        room = blocks * NBYTES
        self.ledger = Ledger(
            NBYTES,
            [
                TierSpec(tier=Tier.HOST, capacity=room, drain_at=room // 2, queue=4096),
                TierSpec(tier=Tier.DISK, capacity=4 * room, drain_at=4 * room, queue=4096),
            ],
        )
        self.held: list[list[BlockKey]] = []
        for _ in range(blocks // PATH + 2):
            self.step({name: [] for name in CALLS})

    def step(self, times: dict[str, list[float]]) -> None:
        """One new prompt, and one from the middle of what is held."""
        keys = [BlockKey(os.urandom(16)) for _ in range(PATH)]
        start = time.perf_counter()
        lease = self.ledger.write(1, keys)
        times["write"].append(time.perf_counter() - start)
        start = time.perf_counter()
        self.ledger.commit(lease.id)
        times["commit"].append(time.perf_counter() - start)
        self._moves()
        self.held.append(keys)
        start = time.perf_counter()
        lease = self.ledger.read(1, self.held[-min(len(self.held), 8)])
        times["read"].append(time.perf_counter() - start)
        self._moves()
        start = time.perf_counter()
        self.ledger.release(lease.id)
        times["release"].append(time.perf_counter() - start)

    def _moves(self) -> None:
        while effects := self.ledger.take_effects():
            for effect in effects:
                if isinstance(effect, Move):
                    self.ledger.moved(effect, ok=True, nbytes=NBYTES)


def run(*, tiny: bool) -> dict[str, object]:
    sizes = (256, 512) if tiny else (1024, 65536)
    rounds = 5 if tiny else 400
    nodes = [_Node(size) for size in sizes]
    times = [{name: [] for name in CALLS} for _ in nodes]
    gc.collect()
    for _ in range(rounds):
        for node, each in zip(nodes, times, strict=True):
            node.step(each)
    results = [{name: summary(each) for name, each in part.items()} for part in times]
    return {
        "bytes": PATH * NBYTES,  # of the blocks that a call is about: numbers, nothing is copied
        "blocks": list(sizes),
        "blocks_of_a_call": PATH,
        "times": {str(size): result for size, result in zip(sizes, results, strict=True)},
        "bars": [
            Bar(
                f"ledger {name} at {sizes[1]} blocks, in units of {sizes[0]}",
                results[1][name]["median_s"] / results[0][name]["median_s"],
                at_most=2.0,
            ).as_dict()
            for name in CALLS[:3]
        ],
    }
