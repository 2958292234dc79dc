"""Restores without a lease: from where a match saw the blocks, if they have stayed there since."""

import os
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from kvtier import metrics
from kvtier.core.blocks import Attention, BlockKey, BlockLayout, LayerGroup
from kvtier.core.tiers import Tier
from kvtier.engine.client import TierClient
from kvtier.engine.copier import BlockTensor
from kvtier.engine.paged import Done
from kvtier.engine.seen import Seen as WhereSeen
from kvtier.engine.tier import EngineTier
from kvtier.errors import ConfigError
from kvtier.wire.local import pack_numbers
from tests.engine.test_tier import LAYOUT, NAMESPACE, clear_host, content, prompt
from tests.launching import Process, disk_toml, node_toml, wait_for
from tests.node.conftest import blocks, status

BATCH = 8
POOL = 160
COUNT = 5 * BATCH  # blocks of a prompt
SLOTS = 128  # three such prompts, and not four

OTHER = BlockLayout((LayerGroup(Attention.FULL, 4, 2, 32),), 16, "float16")

Hook = Callable[[], None]


def nothing() -> None:
    pass


class Watched(BlockTensor):
    """A pool that calls `before` and `after` each copy out of the arena."""

    def __init__(self, pool: torch.Tensor) -> None:
        super().__init__(LAYOUT, pool)
        self.before: Hook = nothing
        self.after: Hook = nothing

    def scatter(self, block_ids: Sequence[int], source: Sequence[torch.Tensor]) -> Done:
        before, self.before = self.before, nothing
        before()
        done = super().scatter(block_ids, source)
        done.wait()
        after, self.after = self.after, nothing
        after()
        return done


class Engine:
    def __init__(self, folder: Path) -> None:
        self.pool = torch.zeros(POOL, LAYOUT.nbytes, dtype=torch.uint8)
        self.paged = Watched(self.pool)
        self.tier = EngineTier(
            f"{folder}/node.sock", NAMESPACE, self.paged, wait_s=10.0, batch=BATCH, credit=False
        )
        wait_for("the daemon to take it in", lambda: self.save(prompt(0, 1)) or self.match(0, 1))

    def save(self, tokens: Sequence[int], first: int = 0) -> int:
        keys = self.tier.keys(tokens)
        for block in range(len(keys)):
            self.pool[block] = content(tokens[: 16 * (block + 1)])
        return self.tier.save(keys, first, range(first, len(keys)))

    def match(self, seed: int, count: int = COUNT) -> int:
        return self.tier.match(self.tier.keys(prompt(seed, count)))

    def restore(self, seed: int, count: int = COUNT, first: int = 0) -> list[Tier]:
        """Restore into shuffled places and check every byte."""
        tokens = prompt(seed, count)
        keys = self.tier.keys(tokens)
        places = random.Random(seed).sample(range(POOL), len(keys) - first)
        self.pool.zero_()
        restored = self.tier.restore(keys, first, places)
        for index, place in enumerate(places[: len(restored)], first):
            assert torch.equal(self.pool[place], content(tokens[: 16 * (index + 1)])), "wrong bytes"
        return restored


def start(folder: Path, more: str = "") -> Process:
    return Process("node", node_toml(folder, host=f"{SLOTS * LAYOUT.nbytes}", more=more), folder)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Process]:
    with start(tmp_path) as process:
        yield process


@pytest.fixture
def engines(node: Process, tmp_path: Path) -> Iterator[tuple[Engine, Engine]]:
    made = Engine(tmp_path), Engine(tmp_path)
    yield made
    for each in made:
        each.tier.close()


def counted() -> tuple[float, float]:
    return metrics.UNLEASED_BLOCKS._value.get(), metrics.OVERTAKEN_BLOCKS._value.get()


HELD = [Tier.HOST] * COUNT


def test_what_a_match_saw_is_restored_without_a_lease(
    node: Process, engines: tuple[Engine, Engine]
) -> None:
    one, two = engines
    one.save(prompt(1, COUNT))
    assert two.match(1) == COUNT
    leases: list[int] = []
    two.paged.before = lambda: leases.append(status(node).layouts[0].leases)
    before = counted()
    assert two.restore(1) == HELD
    assert two.restore(1, first=5) == HELD[5:], "and again, as long as all stays"
    assert leases == [0]
    assert counted() == (before[0] + 2 * COUNT - 5, before[1])


def test_a_restore_of_what_lies_in_host_memory_needs_nobody(
    node: Process, engines: tuple[Engine, Engine]
) -> None:
    """The arena itself says where it lies, also where the node lacks what comes before."""
    one, two = engines
    one.save(prompt(1, COUNT))
    one.save(prompt(2, COUNT), first=3)
    assert one.match(1) == COUNT, "the daemon has heard of all"
    before = counted()
    os.kill(node.pid, signal.SIGSTOP)
    try:
        assert two.restore(1) == HELD
        assert two.restore(1, first=COUNT - 1) == HELD[:1]
        assert two.restore(2, first=3) == HELD[3:]
        keys = two.tier.keys(prompt(1, COUNT))
        assert two.tier.restore(keys, 1, range(7)) == HELD[:7], "a part of a path"
        for index in range(7):
            assert torch.equal(two.pool[index], content(prompt(1, index + 2)))
    finally:
        os.kill(node.pid, signal.SIGCONT)
    assert counted() == (before[0] + 2 * COUNT + 5, before[1])


@pytest.mark.parametrize("known", [0, 20])
def test_what_the_arena_says_nothing_of_is_asked_for(
    engines: tuple[Engine, Engine], known: int
) -> None:
    """A hint is lost where that of another block falls on it: here those behind the first are."""
    one, two = engines
    one.save(prompt(1, 20))
    one.save(prompt(9, 1))  # or what follows would lie right behind, and be found by that
    one.save(prompt(1, COUNT))
    assert one.match(1) == COUNT
    client, keys = two.tier._client, two.tier.keys(prompt(1, COUNT))
    assert client is not None
    index = client.arena.index
    lost = {*index.find(keys)[0][known:]}
    assert len(lost) == COUNT - known
    for place, hint in enumerate(index._hints):
        if hint - 1 in lost:
            index._hints[place] = 0
    assert len(index.find(keys)[0]) == known
    before = counted()
    assert two.restore(1) == HELD
    assert counted() == (before[0] + COUNT, before[1])
    wait_for("them to be hinted at again", lambda: len(index.find(keys)[0]) == COUNT)


def test_a_restore_that_was_not_asked_for_before_asks_itself(
    node: Process, engines: tuple[Engine, Engine]
) -> None:
    one, two = engines
    one.save(prompt(1, COUNT))
    leases: list[int] = []
    before = counted()
    for asked in (lambda: None, lambda: two.match(2), lambda: two.match(1, 3)):
        asked()  # nothing, of something else, of the beginning only
        two.paged.before = lambda: leases.append(status(node).layouts[0].leases)
        assert two.restore(1) == HELD
    assert leases == [0, 0, 0]
    assert counted() == (before[0] + 3 * COUNT, before[1])


def test_what_is_known_of_a_path_is_known_of_one_that_parts_from_it_where_that_ends() -> None:
    keys = [BlockKey(bytes([n]) * 16) for n in range(8)]
    seen = WhereSeen(keys, pack_numbers(range(5)), 1, 1)
    other = [*keys[:5], *(BlockKey(bytes([100 + n]) * 16) for n in range(3))]
    assert seen.slots(keys, 0, 8) == seen.slots(other, 0, 8) == [0, 1, 2, 3, 4]
    assert seen.slots(other, 3, 8) == [3, 4]
    assert seen.tells_of(keys, 5)
    assert not seen.tells_of(other, 5), "what follows there was not looked for"
    assert not seen.tells_of(other[5:], 0)
    assert seen.slots(other[5:], 0, 3) == []


def test_what_a_restore_saw_itself_and_has_left_is_asked_for_again(
    node: Process, engines: tuple[Engine, Engine]
) -> None:
    one, two = engines
    one.save(prompt(1, COUNT))

    def lost() -> None:
        clear_host(node)
        one.save(prompt(1, COUNT))

    two.paged.before = lost
    assert two.restore(1) == HELD


def test_what_a_match_did_not_see_is_asked_for(engines: tuple[Engine, Engine]) -> None:
    one, two = engines
    one.save(prompt(1, COUNT - 6))
    assert two.match(1) == COUNT - 6
    one.save(prompt(1, COUNT))
    before = counted()
    assert two.restore(1) == HELD
    assert counted() == (before[0] + COUNT - 6, before[1])


def test_what_lies_lower_is_asked_for(tmp_path: Path) -> None:
    with start(tmp_path, disk_toml(tmp_path)) as node:
        one = Engine(tmp_path)
        one.save(prompt(1, COUNT - 5))
        wait_for("all to lie on disk", lambda: blocks(node)[Tier.DISK] == COUNT - 4)
        one.save(prompt(1, COUNT))
        wait_for("all to lie on disk", lambda: blocks(node)[Tier.DISK] == COUNT + 1)
        clear_host(node)
        assert one.restore(1, COUNT - 5) == [Tier.DISK] * (COUNT - 5)
        before = counted()
        assert one.match(1) == COUNT
        assert one.restore(1) == [Tier.HOST] * (COUNT - 5) + [Tier.DISK] * 5
        assert counted() == (before[0] + COUNT - 5, before[1])
        one.tier.close()


def test_what_has_left_since_the_match_is_a_miss(
    node: Process, engines: tuple[Engine, Engine]
) -> None:
    one, two = engines
    one.save(prompt(1, COUNT))
    assert two.match(1) == COUNT
    clear_host(node)
    assert two.restore(1) == []
    one.save(prompt(2, SLOTS))
    assert two.restore(1) == []


def take_all(engine: Engine, seed: int) -> None:
    """Fill the whole arena with a prompt, block i in slot i."""
    client, tokens = engine.tier._client, prompt(seed, SLOTS)
    assert client is not None
    with client.write(engine.tier.keys(tokens)) as lease:
        assert lease.slots == [*range(SLOTS)]
        for index, slot in enumerate(lease.slots):
            block = content(tokens[: 16 * (index + 1)])
            client.arena.slot(slot)[:] = block.numpy().tobytes()
        lease.filled = SLOTS
    assert engine.match(seed, SLOTS) == SLOTS


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("again", [False, True])
def test_slots_that_are_written_while_they_are_copied(
    node: Process, engines: tuple[Engine, Engine], again: bool, asked: bool
) -> None:
    """What is copied is another prompt's; with `again` the right one is back by the look at it."""
    one, two = engines
    clear_host(node)
    take_all(one, 1)
    assert two.match(1, SLOTS) == SLOTS if asked else not two.match(3, 1)
    came: list[bool] = []

    def before() -> None:
        clear_host(node)
        take_all(one, 2)

    def after() -> None:
        wrong = content(prompt(2, 1))
        came.append(any(torch.equal(row, wrong) for row in two.pool))
        if again:
            clear_host(node)
            take_all(one, 1)

    two.paged.before, two.paged.after = before, after
    counts = counted()
    assert two.restore(1, SLOTS) == ([Tier.HOST] * SLOTS if again else [])
    assert came == [True], "the copy was wrong"
    assert counted() == (counts[0], counts[1] + BATCH)


def test_a_long_restore_goes_on_with_leases_where_something_has_left(
    node: Process, engines: tuple[Engine, Engine]
) -> None:
    one, two = engines
    one.save(prompt(1, COUNT))
    assert two.match(1) == COUNT

    def third() -> None:
        clear_host(node)
        assert one.save(prompt(1, COUNT)) == COUNT

    def second() -> None:
        two.paged.before = third

    two.paged.before = second
    unleased, _ = counted()
    assert two.restore(1) == HELD
    assert counted()[0] in (unleased, unleased + BATCH), "its first batch at most"


@pytest.mark.parametrize("asked", [False, True])
def test_a_daemon_killed_during_the_copy_costs_nothing(
    node: Process, engines: tuple[Engine, Engine], asked: bool
) -> None:
    """Nobody writes to the arena any more, and the mapping outlives the daemon."""
    one, two = engines
    one.save(prompt(1, COUNT))
    assert one.match(1) == COUNT, "the daemon has heard of it"
    assert not asked or two.match(1) == COUNT
    two.paged.before = node.kill
    assert two.restore(1) == HELD
    assert two.restore(1) == []


def test_what_one_daemon_said_is_nothing_to_the_next(
    node: Process, engines: tuple[Engine, Engine]
) -> None:
    """The next one's arena is empty, and says of no slot that anything has left it."""
    one, two = engines
    one.save(prompt(1, COUNT))
    assert two.match(1) == COUNT
    node.kill()
    node.restart()
    wait_for("the engine to attach again", lambda: two.save(prompt(3, 1)) == 1)
    assert two.restore(1) == []


def test_what_was_said_of_a_layout_is_nothing_to_the_next_arena_of_it(
    node: Process, engines: tuple[Engine, Engine], tmp_path: Path
) -> None:
    """The same daemon gave another layout the room meanwhile, and began anew with this one."""
    one, two = engines
    clear_host(node)
    one.save(prompt(1, COUNT))
    assert two.match(1) == COUNT
    one.tier.close()
    with two.tier._turn:  # it is away until it may attach again
        two.tier._hang_up()

        def has_the_room() -> bool:
            try:
                TierClient(f"{tmp_path}/node.sock", OTHER).close()
            except ConfigError:  # they are still attached
                return False
            return True

        wait_for("room for another layout", has_the_room)
    wait_for("the engine to attach again", lambda: two.save(prompt(2, COUNT)) == COUNT)
    assert two.restore(1) == []
    assert two.match(2) == COUNT
    assert two.restore(2) == HELD


@pytest.mark.parametrize("asked", [False, True])
def test_a_use_without_a_lease_keeps_blocks_as_one_with_it(
    engines: tuple[Engine, Engine], asked: bool
) -> None:
    one, two = engines
    for seed in (1, 2, 3):
        one.save(prompt(seed, COUNT))
    assert one.match(3) == COUNT, "the daemon has heard of all"
    assert not asked or two.match(1) == COUNT
    before = counted()
    assert two.restore(1) == HELD
    assert counted() == (before[0] + COUNT, before[1])
    one.save(prompt(4, COUNT))
    assert [one.match(seed) == COUNT for seed in (1, 2, 3, 4)] == [True, False, True, True]


def test_a_path_that_fits_in_no_pipe_is_told_by_the_socket(engines: tuple[Engine, Engine]) -> None:
    one, _ = engines
    client = one.tier._client
    assert client is not None
    for _ in range(3):
        client.used(one.tier.keys(prompt(5, 3000)))
    assert one.save(prompt(6, COUNT)) == COUNT
    assert one.match(6) == COUNT
