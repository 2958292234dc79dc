"""`kvtier check DIR`: is every block of a disk tier whole?"""

import argparse
import os
from collections import Counter
from pathlib import Path

_TEXT = "read every block of a disk tier and verify it; the daemon must be stopped"


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the parser of `kvtier check`."""
    command = commands.add_parser("check", help=_TEXT, description=_TEXT)
    command.add_argument("folder", type=Path, metavar="DIR", help="disk.path, or a folder in it")
    command.add_argument("--blocks", action="store_true", help="name every block, not only the bad")
    command.set_defaults(run=_check)


def _check(options: argparse.Namespace) -> int:
    from kvtier.stores.disk.check import stores_below
    from kvtier.stores.disk.files import lock

    damaged = 0
    for folder in stores_below(options.folder):
        fd = lock(folder)
        try:
            damaged += _check_store(folder, blocks=options.blocks)
        finally:
            os.close(fd)
    return 1 if damaged else 0


def _check_store(folder: Path, *, blocks: bool) -> int:
    from kvtier.core.blocks import BEGINS
    from kvtier.stores.disk.check import State, slots

    counts: Counter[State] = Counter()
    nbytes = 0
    for each in slots(folder, payloads=True):
        counts[each.state] += 1
        if each.state is State.BLOCK and each.header:
            nbytes += each.header.nbytes
        if each.state is State.DAMAGED or (blocks and each.state is State.BLOCK):
            name = each.header.key.hex() if each.header else "no block that can be named"
            where = f"segments/{each.shape.name} slot {each.slot}"
            before = each.before or BEGINS
            whole = "ok, begins a prompt" if before == BEGINS else f"ok, behind {before.hex()}"
            result = f"damaged: {each.why}" if each.state is State.DAMAGED else whole
            print(f"  {name}  {where}  {result}")
    print(
        f"{folder}: {counts[State.BLOCK]} blocks whole ({nbytes / 2**20:.1f} MiB), "
        f"{counts[State.DAMAGED]} damaged, {counts[State.FREE]} slots free"
    )
    return counts[State.DAMAGED]
