"""How near is the host tier to a plain copy?

Save and restore of 32 blocks of 2 MiB through a real node daemon, all four steps each (lease,
copy, commit or release), in turn with one `torch.Tensor.copy_` of the same bytes between the same
kinds of memory (private memory and a shared, prefaulted memfd). The daemon has heard of the end of
each lease before the plain copy begins, so that nothing of ours runs beside it; `save, found` is
how long it takes from the beginning of a save until another engine has found all of it.
"""

import os
import time

import torch

from benchmarks.common import Bar, paired_ratio, scratch, server, summary, until
from kvtier.arena import Arena
from kvtier.core.blocks import Attention, BlockKey, BlockLayout, LayerGroup, Namespace
from kvtier.engine.copier import BlockTensor
from kvtier.engine.tier import EngineTier

LAYOUT = BlockLayout((LayerGroup(Attention.FULL, 32, 8, 64),), 32, "bfloat16")  # 2 MiB
BATCH = 32


def run(*, tiny: bool) -> dict[str, object]:
    rounds, slots = (3, 4 * BATCH) if tiny else (80, 16 * BATCH)
    with scratch() as folder:
        toml = f"""
            [node]
            socket = "{folder}/node.sock"
            listen = "127.0.0.1:0"
            [host]
            bytes = {slots * LAYOUT.nbytes}
        """
        with server("node", toml, folder):
            return _measure(f"{folder}/node.sock", rounds, slots)


def _measure(socket: str, rounds: int, slots: int) -> dict[str, object]:
    storage = torch.randint(0, 255, (BATCH, LAYOUT.nbytes), dtype=torch.uint8)
    back = torch.empty_like(storage)
    namespace = Namespace("bench", "1", LAYOUT)
    saver = EngineTier(socket, namespace, BlockTensor(LAYOUT, storage))
    loader = EngineTier(socket, namespace, BlockTensor(LAYOUT, back))
    plain = Arena.create(LAYOUT.nbytes, slots)
    rows = torch.frombuffer(plain.view, dtype=torch.uint8).view(slots, LAYOUT.nbytes)
    blocks = list(range(BATCH))
    for tier in (saver, loader):  # attaching goes on beside; the first calls may come too early
        until(lambda tier=tier: tier.save([BlockKey(os.urandom(16))], 0, [0]) == 1)
    names = ("save", "save, found", "restore", "copy_in", "copy_out")
    times: dict[str, list[float]] = {name: [] for name in names}

    def timed(name: str, start: float) -> None:
        times[name].append(time.perf_counter() - start)

    for number in range(-2, rounds):
        keys = [BlockKey(os.urandom(16)) for _ in blocks]
        at = (number % (slots // BATCH)) * BATCH
        start = time.perf_counter()
        saved = saver.save(keys, 0, blocks)
        timed("save", start)
        found = loader.match(keys)
        timed("save, found", start)
        start = time.perf_counter()
        rows[at : at + BATCH].copy_(storage)
        timed("copy_in", start)
        start = time.perf_counter()
        restored = loader.restore(keys, 0, blocks)
        timed("restore", start)
        loader.match(keys[:1])
        start = time.perf_counter()
        back.copy_(rows[at : at + BATCH])
        timed("copy_out", start)
        assert saved == found == len(restored) == BATCH
        if number < 0:  # first touches of new memory
            for each in times.values():
                each.clear()
    assert torch.equal(storage, back)
    saver.close()
    loader.close()
    save = paired_ratio(times["save"], times["copy_in"])
    restore = paired_ratio(times["restore"], times["copy_out"])
    return {
        "bytes": BATCH * LAYOUT.nbytes,
        "times": {name: summary(each) for name, each in times.items()},
        "percent_of_copy_bound": {"save": 100 * save, "restore": 100 * restore},
        "bars": [
            Bar("host_path save, speed of a plain copy", save, at_least=0.85).as_dict(),
            Bar("host_path restore, speed of a plain copy", restore, at_least=0.85).as_dict(),
        ],
    }
