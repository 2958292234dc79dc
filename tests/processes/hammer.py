"""An engine's process for the storm: restores and saves until its input ends, checks every byte.

Started with one argument of JSON: the daemon's socket and a seed. Writes a line of JSON now and
then, with all counts so far; the last one says so. Ends with status 1 at the first wrong byte.
A line of input makes it stop for ever in the middle of its next save, and say so.
"""

import json
import random
import select
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from kvtier import metrics
from kvtier.core.blocks import Attention, BlockKey, BlockLayout, LayerGroup, Namespace
from kvtier.engine import client
from kvtier.engine.copier import BlockTensor
from kvtier.engine.paged import Done
from kvtier.engine.tier import EngineTier

LAYOUT = BlockLayout((LayerGroup(Attention.FULL, 2, 4, 32),), 16, "float16")  # 16 KiB
NAMESPACE = Namespace("storm", "weights", LAYOUT)
CONVERSATIONS = 80
SYSTEM_PROMPTS, SYSTEM_BLOCKS = 4, 3  # what conversations share
DEEPEST = 24  # blocks of a prompt
BATCH = 4  # blocks of a lease, twice as many of a read: most prompts take several
REPORT_S = 0.1


def content(key: BlockKey) -> np.ndarray:
    """The bytes that belong to a key, other ones at each place; half as many once compressed."""
    draw = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
    pieces = draw.integers(0, 256, (LAYOUT.nbytes // 128, 1, 64), dtype=np.uint8)
    return pieces.repeat(2, axis=1).reshape(-1)


def prompt(rng: random.Random) -> list[int]:
    """A turn of some conversation, popular ones more often; earlier turns begin later ones."""
    conversation = int(CONVERSATIONS * rng.random() ** 2)
    system = conversation % SYSTEM_PROMPTS
    blocks = rng.randint(1, DEEPEST)
    starts = [system if i < SYSTEM_BLOCKS else 100 + conversation for i in range(blocks)]
    return [token for start in starts for token in range(start, start + LAYOUT.block_tokens)]


class SlowKV:
    """A pool that is copied in two parts with a pause: whoever gets at a leased slot is seen.

    With `hold` set the pause of the next copy into the arena calls it.
    """

    def __init__(self, pool: torch.Tensor, rng: random.Random) -> None:
        self.layout = LAYOUT
        self.hold: Callable[[], None] | None = None
        self._blocks = BlockTensor(LAYOUT, pool)
        self._rng = rng

    def gather(self, block_ids: Sequence[int], out: Sequence[torch.Tensor]) -> Done:
        return self._slowly(self._blocks.gather, block_ids, out, self.hold)

    def scatter(self, block_ids: Sequence[int], source: Sequence[torch.Tensor]) -> Done:
        return self._slowly(self._blocks.scatter, block_ids, source)

    def _slowly(
        self,
        copy: Callable[[Sequence[int], Sequence[torch.Tensor]], Done],
        block_ids: Sequence[int],
        rows: Sequence[torch.Tensor],
        hold: Callable[[], None] | None = None,
    ) -> Done:
        half = len(block_ids) // 2
        copy(block_ids[:half], rows[:half]).wait()
        if hold is not None:
            hold()
        time.sleep(0.1 * self._rng.random() ** 6)  # mostly short; now and then others get far
        return copy(block_ids[half:], rows[half:])


class Engine:
    """Prompts one after the other: restore what is held, check it, save the rest."""

    def __init__(self, socket: str, seed: int) -> None:
        self._rng = random.Random(seed)
        self._pool = torch.zeros(DEEPEST, LAYOUT.nbytes, dtype=torch.uint8)
        self._paged = SlowKV(self._pool, self._rng)
        self._socket = socket
        self.tier = self._attach()
        self.counts: Counter[str] = Counter()
        self.wrong = 0

    def _attach(self, *, credit: bool = True) -> EngineTier:
        return EngineTier(
            self._socket, NAMESPACE, self._paged, wait_s=1.0, batch=BATCH, credit=credit
        )

    def turn(self) -> None:
        keys = self.tier.keys(prompt(self._rng))
        places = self._rng.sample(range(DEEPEST), len(keys))
        self._pool.zero_()
        assert 0 <= self.tier.match(keys) <= len(keys)
        time.sleep(0.1 * self._rng.random() ** 6)  # what was seen may be gone by then
        sources = self.tier.restore(keys, 0, places)
        for key, place, source in zip(keys, places, sources, strict=False):
            self.wrong += not np.array_equal(self._pool[place].numpy(), content(key))
            self.counts[source.label] += 1
        held = len(sources)
        for key, place in zip(keys[held:], places[held:], strict=True):
            self._pool[place].copy_(torch.from_numpy(content(key)))
        if held < len(keys):
            self.counts["saved"] += self.tier.save(keys, held, places[held:])
        self.counts["turns"] += 1
        if self._rng.random() < 0.03:
            self.tier.close()  # the next turn attaches anew
            self.counts["hung up"] += 1

    def stop_in_a_save(self) -> None:
        def hold() -> None:
            self.counts["holding"] += 1
            self.report()
            signal.pause()

        self.tier.close()
        self.tier = self._attach(credit=False)  # a save from slots on credit holds no lease
        self._paged.hold = hold

    def report(self, *, last: bool = False) -> None:
        mine = {"fds": len([*Path("/proc/self/fd").iterdir()]), "wrong": self.wrong, "last": last}
        maps = Path("/proc/self/maps").read_text()
        mine["arenas"] = maps.count("kvtier-arena")
        mine["unleased"] = metrics.UNLEASED_BLOCKS._value.get()
        mine["overtaken"] = metrics.OVERTAKEN_BLOCKS._value.get()
        print(json.dumps({**self.counts, **mine}), flush=True)


def main() -> int:
    engine = Engine(**json.loads(sys.argv[1]))
    reported = 0.0
    while not engine.wrong:
        if select.select([sys.stdin], [], [], 0)[0]:
            if not sys.stdin.readline():
                break
            engine.stop_in_a_save()
        engine.turn()
        if time.monotonic() >= reported + REPORT_S:
            engine.report()
            reported = time.monotonic()
    engine.tier.close()
    engine.report(last=True)
    return 1 if engine.wrong else 0


if __name__ == "__main__":
    client.ANSWER_S = 60.0  # only a hang lasts so long
    torch.set_num_threads(1)
    raise SystemExit(main())
