"""Long saves and restores go in batches: each is asked for before the one before it is copied."""

import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from kvtier import metrics
from kvtier.core.tiers import Tier
from kvtier.engine.client import TierClient
from kvtier.engine.copier import BlockTensor
from kvtier.engine.paged import Done
from kvtier.engine.restoring import READ_BATCHES
from kvtier.engine.tier import WRITE_BATCHES, EngineTier
from kvtier.errors import ArenaLost
from tests.engine.test_tier import LAYOUT, NAMESPACE, clear_host, content, prompt
from tests.launching import Process, disk_toml, node_toml, wait_for
from tests.node.conftest import blocks, status

BATCH = 4
READ = READ_BATCHES * BATCH
WRITE = WRITE_BATCHES * BATCH  # but the first
POOL = 64
# An engine has the first block of a prompt itself, and the node does not: a match says nothing of
# what follows. It is leased where the arena's index says nothing of it either.
LEASED = 1


class Seen(BlockTensor):
    """A pool that calls `copying` with the number of each copy, from 0 on, before it is made."""

    def __init__(self, pool: torch.Tensor) -> None:
        super().__init__(LAYOUT, pool)
        self.copies = 0
        self.copying: Callable[[int], None] = lambda number: None

    def watch(self, copying: Callable[[int], None]) -> None:
        self.copies, self.copying = 0, copying

    def _seen(self) -> None:
        self.copies += 1
        self.copying(self.copies - 1)

    def gather(self, block_ids: Sequence[int], out: Sequence[torch.Tensor]) -> Done:
        self._seen()
        return super().gather(block_ids, out)

    def scatter(self, block_ids: Sequence[int], source: Sequence[torch.Tensor]) -> Done:
        self._seen()
        return super().scatter(block_ids, source)


class Engine:
    def __init__(self, folder: Path) -> None:
        self.pool = torch.zeros(POOL, LAYOUT.nbytes, dtype=torch.uint8)
        self.paged = Seen(self.pool)
        self.tier = EngineTier(
            f"{folder}/node.sock", NAMESPACE, self.paged, wait_s=60.0, batch=BATCH, credit=False
        )
        wait_for("the daemon to take it in", self._attached)

    def _attached(self) -> bool:
        tokens = prompt(0, 1)
        self.save(tokens)
        return self.tier.match(self.tier.keys(tokens)) == 1

    def save(self, tokens: Sequence[int], first: int = 0) -> int:
        keys = self.tier.keys(tokens)
        for block in range(len(keys)):
            self.pool[block] = content(tokens[: 16 * (block + 1)])
        return self.tier.save(keys, first, range(first, len(keys)))

    def restore(self, tokens: Sequence[int], first: int = 0) -> list[Tier]:
        """Restore into shuffled places and check every byte."""
        keys = self.tier.keys(tokens)
        if first == LEASED:
            self.lose_hints()
        places = random.Random(len(tokens)).sample(range(POOL), len(keys) - first)
        self.pool.zero_()
        restored = self.tier.restore(keys, first, places)
        for index, place in enumerate(places[: len(restored)], first):
            assert torch.equal(self.pool[place], content(tokens[: 16 * (index + 1)])), "wrong bytes"
        return restored

    def lose_hints(self) -> None:
        """As if each had been overwritten by another block's."""
        client = self.tier._client
        if client is not None:
            hints = client.arena.index._hints
            hints[:] = memoryview(bytes(hints.nbytes)).cast("I")


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Process]:
    with Process("node", node_toml(tmp_path), tmp_path) as process:
        yield process


@pytest.fixture
def engine(node: Process, tmp_path: Path) -> Iterator[Engine]:
    made = Engine(tmp_path)
    yield made
    made.tier.close()


def leases(node: Process) -> int:
    return status(node).layouts[0].leases


def failures() -> float:
    return sum(metrics.TIER_FAILURES.labels(each)._value.get() for each in ("save", "restore"))


def test_while_a_batch_is_copied_the_lease_of_the_next_is_there(
    node: Process, engine: Engine
) -> None:
    held: list[int] = []

    def copying(number: int) -> None:
        wait_for("the next lease", lambda: leases(node) == (2 if number < 2 else 1))
        held.append(leases(node))

    tokens = prompt(1, BATCH + 2 * WRITE)
    engine.paged.watch(copying)
    assert engine.save(tokens) == BATCH + 2 * WRITE
    assert held == [2, 2, 1]
    held.clear()
    more = prompt(2, LEASED + 3 * READ)
    engine.paged.watch(lambda number: None)
    assert engine.save(more, LEASED) == 3 * READ
    engine.paged.watch(copying)
    assert engine.restore(more, LEASED) == [Tier.HOST] * 3 * READ
    assert held == [2, 2, 1]
    assert leases(node) == 0


@pytest.mark.parametrize("count", [1, BATCH - 1, BATCH, BATCH + 1, 2 * BATCH, 5 * BATCH + 3])
def test_blocks_come_back_byte_for_byte_whatever_their_number(engine: Engine, count: int) -> None:
    tokens, more = prompt(2, count), prompt(3, BATCH + 1)
    assert engine.save(tokens) == count
    assert engine.restore([*tokens, *more]) == [Tier.HOST] * count
    assert engine.save([*tokens, *more]) == len(more) // 16, "only what is new"
    assert engine.restore([*tokens, *more]) == [Tier.HOST] * (count + BATCH + 1)


def test_batches_that_lie_in_a_lower_tier(tmp_path: Path) -> None:
    with Process("node", node_toml(tmp_path, more=disk_toml(tmp_path)), tmp_path) as node:
        engine = Engine(tmp_path)
        tokens = prompt(4, 5 * BATCH)
        assert engine.save(tokens) == 5 * BATCH
        clear_host_once_on_disk(node, 5 * BATCH + 1)
        assert engine.restore(tokens) == [Tier.DISK] * 5 * BATCH
        assert engine.restore(tokens) == [Tier.HOST] * 5 * BATCH
        assert leases(node) == 0
        engine.tier.close()


def clear_host_once_on_disk(node: Process, count: int) -> None:
    def cleared() -> bool:
        clear_host(node)
        return blocks(node)[Tier.HOST] == 0 and blocks(node)[Tier.DISK] == count

    wait_for("all to lie on disk only", cleared)


@pytest.mark.parametrize("first", [0, LEASED])
def test_a_copy_that_fails_costs_its_batch_and_those_after_it(
    node: Process, engine: Engine, first: int
) -> None:
    def copying(number: int) -> None:
        if number == 1:
            raise RuntimeError("the GPU is gone")

    tokens, before = prompt(5, first + 4 * READ), failures()
    engine.paged.watch(copying)
    assert engine.save(tokens, first) == BATCH
    assert failures() == before + 1
    engine.paged.watch(lambda number: None)
    wait_for("the leases to end", lambda: leases(node) == 0)
    wait_for("the engine to attach again", lambda: engine.save(tokens, first) == 4 * READ - BATCH)
    engine.paged.watch(copying)
    # Without a lease a copy is looked at while the next one is made: here it never was.
    assert engine.restore(tokens, first) == [Tier.HOST] * READ * bool(first)
    assert failures() == before + 2
    engine.paged.watch(lambda number: None)
    wait_for("the leases to end", lambda: leases(node) == 0)
    whole = [Tier.HOST] * 4 * READ
    wait_for("the engine to attach again", lambda: engine.restore(tokens, first) == whole)


def test_an_interrupted_call_leaves_no_answer_for_the_next_one(
    node: Process, engine: Engine
) -> None:
    def copying(number: int) -> None:
        raise KeyboardInterrupt

    tokens = prompt(6, 3 * BATCH)
    assert engine.save(tokens) == 3 * BATCH
    engine.paged.watch(copying)
    with pytest.raises(KeyboardInterrupt):
        engine.restore(tokens)
    engine.paged.watch(lambda number: None)
    whole = [Tier.HOST] * 3 * BATCH
    wait_for("all to be restored", lambda: engine.restore(tokens) == whole)
    wait_for("the leases to end", lambda: leases(node) == 0)


@pytest.mark.parametrize("first", [0, LEASED])
def test_a_daemon_killed_between_two_batches_costs_no_wrong_byte(
    node: Process, engine: Engine, tmp_path: Path, first: int
) -> None:
    def copying(number: int) -> None:
        if number == 1:
            node.kill()

    tokens = prompt(7, first + 6 * READ)
    engine.paged.watch(copying)
    assert engine.save(tokens, first) == BATCH, "what it had taken before"
    engine.paged.watch(lambda number: None)
    with Process("node", node_toml(tmp_path), tmp_path) as again:
        wait_for("the engine to attach again", lambda: engine.save(tokens, first) == 6 * READ)
        engine.paged.watch(lambda number: again.kill() if number == 1 else None)
        engine.tier.match(engine.tier.keys(tokens))
        # Those that it had told of are still in the mapping, and nobody writes there.
        expected = (2 * READ, 3 * READ) if first else (6 * READ,)
        assert len(engine.restore(tokens, first)) in expected


def test_a_daemon_killed_under_two_leases_is_said_to_be_gone(
    node: Process, engine: Engine, tmp_path: Path
) -> None:
    tokens = prompt(8, READ)
    assert engine.save(tokens) == READ
    keys = engine.tier.keys(tokens)
    client = TierClient(f"{tmp_path}/node.sock", LAYOUT)
    try:
        asked = client.read(keys[:BATCH])
        with asked:
            following = client.read(keys, BATCH)
            node.kill()
        with pytest.raises(ArenaLost, match=r"RELEASE: .*Broken pipe"), following:
            pytest.fail("nobody can have given it")
    finally:
        client.close()


@pytest.mark.parametrize("copy", ["gather", "scatter"])
def test_an_engine_killed_with_two_leases_leaves_none(
    node: Process, engine: Engine, tmp_path: Path, copy: str
) -> None:
    tokens = prompt(8, LEASED + 4 * READ)
    if copy == "scatter":
        assert engine.save(tokens, LEASED) == 4 * READ
    code = f"""
import os
from pathlib import Path
from tests.engine.test_batches import Engine, prompt
engine = Engine(Path({str(tmp_path)!r}))
engine.paged.watch(lambda number: os.kill(os.getpid(), 9) if number == 1 else None)
tokens = prompt(8, {LEASED + 4 * READ})
engine.save(tokens, {LEASED}) if {copy!r} == "gather" else engine.restore(tokens, {LEASED})
"""
    done = subprocess.run([sys.executable, "-c", code], timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    wait_for("its leases to end", lambda: leases(node) == 0)
    held = BATCH if copy == "gather" else 4 * READ
    restored = engine.restore(tokens, LEASED)
    assert restored == [Tier.HOST] * held, "what was committed, and nothing else"
    assert engine.save(tokens, LEASED) == 4 * READ - held
    assert engine.restore(tokens, LEASED) == [Tier.HOST] * 4 * READ
