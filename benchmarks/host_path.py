"""How near is the host tier to a plain copy?

Save and restore of blocks of 2 MiB through a real node daemon, in batches of 32 with all that an
engine's call does (its place, the copy, telling of it), in turn with `torch.Tensor.copy_` of the
same bytes between the same kinds of memory (private memory and a shared, prefaulted memfd). Before
each of them other memory is copied, so that all begin with the same caches: empty ones.

Twice: one batch alone, and the batches of a long prompt, one call of the engine's own code, which
asks for the next batch before it copies one. One batch is saved into slots that the engine has on
credit (docs/decisions/0036): it waits for no lease, and the daemon enters the blocks afterwards.
`restore` knows nothing of its blocks before: it looks where they lie, copies, looks whether they
stayed there meanwhile, and tells the daemon (docs/decisions/0043 and 0058). `restore, matched` is
one of an engine that has asked before what is held: what is left within the time is the copy, the
second look and the word.
Alone, the daemon has done its part before the plain copy begins, so that nothing of ours runs
beside it; in a row its work on all but the last is within the time.
`save, found` is how long it takes from the beginning of a save until another engine has found all
of it, which all that the daemon does for it is part of.
"""

import os
import time

import torch

from benchmarks.common import Bar, paired_ratio, scratch, server, summary, until
from kvtier import metrics
from kvtier.arena import Arena
from kvtier.core.blocks import Attention, BlockKey, BlockLayout, LayerGroup, Namespace
from kvtier.engine.copier import BlockTensor
from kvtier.engine.tier import EngineTier

LAYOUT = BlockLayout((LayerGroup(Attention.FULL, 32, 8, 64),), 32, "bfloat16")  # 2 MiB
BATCH = 32
ROW = 8  # batches of a prompt of 8,192 tokens
NAMES = (
    "save", "save, found", "restore", "restore, matched", "copy_in", "copy_out",
    "copy_out, matched",
)  # fmt: skip
BARS = ("save", "restore")


def run(*, tiny: bool) -> dict[str, object]:
    rounds, row, slots = (3, 3, 6 * BATCH) if tiny else (80, ROW, 2 * ROW * BATCH)
    with scratch() as folder:
        toml = f"""
            [node]
            socket = "{folder}/node.sock"
            listen = "127.0.0.1:0"
            [host]
            bytes = {slots * LAYOUT.nbytes}
        """
        with server("node", toml, folder):
            paths = Paths(f"{folder}/node.sock", row, slots)
            alone = paths.measure(rounds, 1)
            in_a_row = paths.measure(max(3, rounds // 2), row)
            paths.close()
    times = {name: summary(each) for name, each in alone.items()}
    times |= {f"{row} batches in a row: {name}": summary(each) for name, each in in_a_row.items()}
    speeds = {
        "one batch alone": _speeds(alone),
        f"{row} batches in a row": _speeds(in_a_row),
    }
    return {
        "bytes": BATCH * LAYOUT.nbytes,
        "times": times,
        "percent_of_copy_bound": {
            f"{what}, {how}": 100 * speed
            for how, speeds_ in speeds.items()
            for what, speed in speeds_.items()
        },
        "bars": [
            Bar(f"host_path {what}, {how}, speed of a plain copy", speed, at_least=0.85).as_dict()
            for how, speeds_ in speeds.items()
            for what, speed in speeds_.items()
            if what in BARS
        ],
    }


def _speeds(times: dict[str, list[float]]) -> dict[str, float]:
    return {
        "save": paired_ratio(times["save"], times["copy_in"]),
        "restore": paired_ratio(times["restore"], times["copy_out"]),
        "restore, matched": paired_ratio(times["restore, matched"], times["copy_out, matched"]),
    }


class Paths:
    """Two engines on one daemon, and plain memory of the same kinds."""

    def __init__(self, socket: str, row: int, slots: int) -> None:
        shape = (row * BATCH, LAYOUT.nbytes)
        self._storage = torch.randint(0, 255, shape, dtype=torch.uint8)
        self._back = torch.empty_like(self._storage)
        namespace = Namespace("bench", "1", LAYOUT)
        self._saver = EngineTier(socket, namespace, BlockTensor(LAYOUT, self._storage))
        self._loader = EngineTier(socket, namespace, BlockTensor(LAYOUT, self._back))
        self._plain = Arena.create(LAYOUT.nbytes, slots)
        flat = torch.frombuffer(self._plain.view, dtype=torch.uint8)
        self._rows = flat.view(slots, LAYOUT.nbytes)
        self._other = torch.ones((2, BATCH, LAYOUT.nbytes), dtype=torch.uint8)
        # Attaching goes on beside, and so does mapping the arena, for a second or two. With the
        # first save the daemon gives slots on credit.
        until(lambda: self._saver.save([BlockKey(os.urandom(16))], 0, [0]) == 1)
        assert self._loader.wait(30.0)
        for mapping in (*self._saver._mappers, *self._loader._mappers):
            mapping.join()

    def measure(self, rounds: int, batches: int) -> dict[str, list[float]]:
        """Seconds of each round's save, restore and plain copies of `batches` batches."""
        times: dict[str, list[float]] = {name: [] for name in NAMES}
        count, slots = batches * BATCH, len(self._rows)
        blocks = list(range(count))
        self._back.zero_()
        before = metrics.UNLEASED_BLOCKS._value.get()

        def timed(name: str, start: float) -> None:
            times[name].append(time.perf_counter() - start)

        keys = other = list[BlockKey]()
        for number in range(-2, rounds):
            other = keys  # of the prompt before
            keys = [BlockKey(os.urandom(16)) for _ in blocks]
            at = number * count % slots
            start = self._begin()
            saved = self._saver.save(keys, 0, blocks)
            timed("save", start)
            found = self._loader.match(keys)
            timed("save, found", start)
            start = self._begin()
            for first in range(0, count, BATCH):
                self._rows[at + first : at + first + BATCH].copy_(
                    self._storage[first : first + BATCH]
                )
            timed("copy_in", start)
            for how in ("", ", matched"):
                # The last answer was of these blocks, or of others: then nothing is known of them.
                self._loader.match(keys if how else other)
                start = self._begin()
                restored = self._loader.restore(keys, 0, blocks)
                timed(f"restore{how}", start)
                self._loader.match(keys[:1])
                start = self._begin()
                for first in range(0, count, BATCH):
                    self._back[first : first + BATCH].copy_(
                        self._rows[at + first : at + first + BATCH]
                    )
                timed(f"copy_out{how}", start)
                assert saved == found == len(restored) == count
            if number < 0:  # first touches of new memory
                for each in times.values():
                    each.clear()
        assert torch.equal(self._storage[:count], self._back[:count])
        unleased = metrics.UNLEASED_BLOCKS._value.get() - before
        assert unleased == 2 * (rounds + 2) * count, "a restore has leased"
        return times

    def _begin(self) -> float:
        """The time, right after caches were filled with something else."""
        self._other[0].copy_(self._other[1])
        return time.perf_counter()

    def close(self) -> None:
        self._saver.close()
        self._loader.close()
