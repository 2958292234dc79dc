"""Bugs to be planted in the ledger, and a loader that plants them in memory."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import kvtier.core
from kvtier.core.ledger import Ledger

MODULES = (
    "slot_index",
    "slots",
    "copies",
    "lease",
    "residency",
    "cascade",
    "leases",
    "ledger",
)  # in the order in which they import each other


@dataclass(frozen=True)
class Bug:
    """Source text to be replaced wherever it stands in one of `MODULES`."""

    name: str
    edits: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return self.name


def bug(name: str, *edits: str) -> Bug:
    return Bug(name, tuple(zip(edits[::2], edits[1::2], strict=True)))


BUGS = [
    bug("a loading block is not pinned", "slot, Phase.LOADING, 1", "slot, Phase.LOADING, 0"),
    bug(
        "leases are not cut when a load fails",
        "self._cut(lease, lease.keys.index(move.key))",
        "pass",
    ),
    bug(
        "a slot that a load may still write is free",
        "self._abandoned.add(move)",
        "self._abandoned.add(move); self._free.append(block.slot)",
    ),
    bug(
        "what was put beside a writer is lost with it",
        "(aside := self._aside.pop(key, None)) is None",
        "(aside := None) is None",
    ),
    bug("the slot of what was put for nothing is lost", "self._free.append(aside.slot)", "pass"),
    bug("leases wait for a load that hangs", "self._cut(lease, at)", "pass"),
    bug("the slot of a load that came late is lost", "self._free.append(move.slot)", "pass"),
    bug(
        "blocks are told of twice at once",
        "self._effects.append(Held(keys, HOST))",
        "self._effects.append(Held([*keys, *keys], HOST))",
    ),
    bug("the only copy is dropped", "below is None or below.paused", "True"),
    bug(
        "leased blocks are dropped",
        "return tier != HOST or self._pins[self._in_host.of[key]] == 0",
        "return True",
    ),
    bug(
        "moving blocks are dropped",
        "if block.move is not None or block.phase is Phase.LOADING:",
        "if block.phase is Phase.LOADING:",
    ),
    bug(
        "loading blocks are dropped",
        "if block.move is not None or block.phase is Phase.LOADING:",
        "if block.move is not None:",
    ),
    bug(
        "slots of abandoned writes leak",
        "self._pins[block.slot] -= 1\n            self._free_slot(block)",
        "self._pins[block.slot] -= 1",
    ),
    bug(
        "moving host blocks are dropped",
        "if block.phase is Phase.LOADING or block.move is not None:",
        "if block.phase is Phase.LOADING:",
    ),
    bug(
        "the slot of a load that nobody waits for is taken",
        "if block.phase is Phase.LOADING or block.move is not None:",
        "if block.move is not None:",
    ),
    bug(
        "leased host blocks make room",
        "if block.slot is not None and self._pins[block.slot]:",
        "if False:",
    ),
    bug("a paused tier is read", "if held and not copies.paused and", "if held and"),
    bug("a paused tier is written", "return not self.paused and", "return"),
    bug("the queue has no limit", "and self.coming < self.spec.queue", ""),
    bug("capacity is not respected", "while not copies.fits(nbytes)", "while False"),
    bug(
        "failed copies keep their room",
        "target.coming -= 1\n",
        "target.coming -= ok\n",
    ),
    bug(
        "a copy starts during a load",
        "if block.phase is Phase.LOADING or source",
        "if source",
    ),
    bug("a copy down cuts a read", "if block.slot is None:", "if not (block.slot or block.move):"),
    bug(
        "a load that fails takes its copy from under a copy down",
        "if block.move is not None and block.move.source == move.source:",
        "if False:",
    ),
    bug("what was found bad is read again", "and key not in copies.leaving", ""),
    bug("what was found bad is kept", "if move.key in source.leaving:", "if False:"),
    bug(
        "what was found bad stays in the store",
        "forget=not source.spec.shared, gone=True)\n\n    def _assert_lower",
        "forget=False, gone=True)\n\n    def _assert_lower",
    ),
    bug(
        "what a copy down reads is not known to be read",
        "reading = (self._blocks[key].move, self._loads.get(key))",
        "reading = (self._loads.get(key),)",
    ),
    bug(
        "blocks are readable while filling",
        "block is None or block.phase is Phase.FILLING",
        "block is None",
    ),
    bug(
        "loads come from the coldest copy",
        "for tier in range(start, len(tiers)):",
        "for tier in reversed(range(start, len(tiers))):",
    ),
    bug(
        "copies go in a circle",
        "for shards in held[:tier]:",
        "for shards in ():",
    ),
    bug(
        "larger frames are dropped again and again",
        "target.frame_nbytes = max(target.frame_nbytes, nbytes)",
        "pass",
    ),
    bug(
        "a failure leads to the next try",
        "self._source_leaves(move)\n            return",
        "self._source_leaves(move)\n            self._drain()\n            return",
    ),
    bug("no answer counts as not there", "if not source.paused:", "if True:"),
    bug(
        "a copy is lost while it is read",
        "reading = (self._blocks[key].move, self._loads.get(key))",
        "reading = (self._blocks[key].move,)",
    ),
    bug(
        "settle tells nobody",
        "in lease.loading))\n            self._touch(lease)\n            self._settled(lease)",
        "in lease.loading))\n            self._touch(lease)",
    ),
    bug(
        "all blocks of a commit count as filled",
        "filled = granted if filled is None else filled",
        "filled = granted",
    ),
    bug(
        "two writers get one block",
        "if block is not None and (block.slot is not None or self",
        "if block is not None and (block.phase is Phase.STABLE and block.slot is not None or self",
    ),
    bug(
        "only one lease ends with its client",
        "leases = [*self._of_client.get(client, ())]",
        "leases = [*self._of_client.get(client, ())][:1]",
    ),
    bug("drops are not announced", "gone=owned)", "gone=False)"),
    bug("forgotten hints are announced as gone", "gone=owned)", "gone=True)"),
    bug("dropped copies stay in the store", "forget=owned and tier != HOST", "forget=False"),
    bug("resume forgets what waited", "paused = False\n        self._drain()", "paused = False"),
    bug(
        "a commit starts no copies",
        "self._undo(lease.keys[filled:])\n        self._touch(lease)\n        self._drain()",
        "self._undo(lease.keys[filled:])\n        self._touch(lease)",
    ),
    bug(
        "a lease tells the wrong source",
        "lease.sources.append(self._loads[key].source)",
        "lease.sources.append(HOST)",
    ),
    bug("a failed load frees no slot", "self._free_slot(block)\n            source", "source"),
    bug(
        "what still loads counts as arrived",
        "while self.keys[self._arrived] not in self.loading:",
        "while self._arrived < len(self.keys) - 1:",
    ),
    bug(
        "neighbouring slots are believed to be neighbouring blocks",
        "end += same.index(False) if False in same else len(same)",
        "end += len(same)",
    ),
    bug(
        "a slot is remembered beyond its block",
        "            key_at[slot] = None\n        self.index",
        "            pass\n        self.index",
    ),
    bug(
        "a tier that takes nothing stops the host tier",
        "spare = refused and self._idle",
        "spare = False and self._idle",
    ),
    bug(
        "blocks that were filled stay pinned",
        "            pins[slot] -= 1\n",
        "",
    ),
    bug("leased blocks go along with others", "if pinned or not", "if not"),
    bug(
        "what is spared goes along with others",
        "if pinned or not self._spared.isdisjoint(keys):",
        "if pinned:",
    ),
    bug(
        "moving blocks go along with others",
        "if block.move is not None or (block.undrained",
        "if (block.undrained",
    ),
    bug(
        "only copies go along with others",
        "or (block.undrained_in == HOST and not below.paused)",
        "",
    ),
    bug("the slots of victims are lost", "self._free += slots", "pass"),
    bug(
        "what a tier refused once counts for ever",
        "target.refusing = not ok",
        "target.refusing |= not ok",
    ),
    bug(
        "what a read loaded can never be dropped",
        "self._cut(lease, 0)\n            self._touch(lease)",
        "self._cut(lease, 0)",
    ),
    bug(
        "room for a block is made by losing the one before",
        "self._spared = {*path}  # or",
        "self._spared = frozenset()  # or",
    ),
    bug(
        "what was put lies in the new slots",
        "self._lay(kept, filled, ",
        "self._lay(kept, (fresh or filled)[:1] * len(kept), ",
    ),
    bug(
        "the slots of what is there already are taken away",
        "sorted({*slots}.difference(filled, aside).union(fresh))",
        "sorted(fresh)",
    ),
    bug("slots that were filled stay on credit", "mine.difference_update(filled, aside)", "pass"),
    bug("new slots are given to nobody", "self._on_credit(mine, fresh)", "self._free += fresh"),
    bug(
        "slots on credit are given away again",
        "self._on_credit(self._credits.setdefault(client, set()), slots)",
        "self._free += slots",
    ),
    bug("credit outlives its client", "self._credits.pop(client, ()):", "():"),
    bug("what is put is not pinned", "self._on_credit(mine, fresh)", "mine.update(fresh)"),
    bug(
        "what is there is put again",
        "absent = self._absent(keys, first)\n        aside",
        "absent = {key: n for n, key in enumerate(keys) if n >= first}\n        aside",
    ),
    bug(
        "a put starts no copies",
        "self._used(keys, use)\n        self._drain()\n        taken",
        "self._used(keys, use)\n        taken",
    ),
    bug("no word of a block that left its slot", "left[slot] = turn", "pass"),
    bug(
        "word of one block of many that left their slots",
        "left[slot] = turn",
        "left[slots[0]] = turn",
    ),
    bug("a turn that is not counted", "self.turn + 1", "self.turn"),
    bug("a match of tomorrow", "slots, self.index.turn)", "slots, self.index.turn + 1)"),
    bug("a match of yesterday", "slots, self.index.turn)", "slots, self.index.turn - 1)"),
    bug(
        "a slot that loads is as it was seen",
        "in slots:\n            halves",
        "in slots[1:]:\n            halves",
    ),
    bug("what has left is found", "halves[2 * slot] = halves[2 * slot + 1] = 0", "pass"),
    bug("what is found was seen tomorrow", "slots), turn", "slots), turn + 1"),
    bug(
        "a neighbour is taken for the next block",
        "return at // KEY_NBYTES",
        "return at // KEY_NBYTES + 1",
    ),
    bug("a hint is believed", "if found == raw:", "if True:"),
    bug("a failed load keeps its copy", "if not source.paused:", "if False:"),
]


@contextmanager
def planted(bug: Bug) -> Iterator[type[Ledger]]:
    """The ledger with one bug; the real modules stay as they are.

    Raises:
        LookupError: The text to be replaced is not there, or more than once.
    """
    sources = {name: (Path(kvtier.core.__path__[0]) / f"{name}.py").read_text() for name in MODULES}
    for old, new in bug.edits:
        hits = [name for name in MODULES if sources[name].count(old) == 1]
        if len(hits) != 1:
            raise LookupError(f"{bug}: {old!r} must stand in one place")
        sources[hits[0]] = sources[hits[0]].replace(old, new)
    names = {name: f"planted_{name}" for name in MODULES}
    try:
        for name in MODULES:
            source = sources[name]
            for other in MODULES:
                source = source.replace(f"from kvtier.core.{other} ", f"from {names[other]} ")
            module = ModuleType(names[name])
            sys.modules[names[name]] = module
            exec(compile(source, f"<{bug}: {name}>", "exec"), module.__dict__)
        yield sys.modules[names["ledger"]].Ledger
    finally:
        for name in names.values():
            sys.modules.pop(name, None)
