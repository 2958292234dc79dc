"""Saves that wait for nobody: an engine copies into slots that it has, and says so afterwards."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from kvtier.core.blocks import BlockKey
from kvtier.core.tiers import Tier
from kvtier.engine.client import TierClient
from kvtier.engine.copier import BlockTensor
from kvtier.engine.credit import MET, Met
from kvtier.engine.tier import EngineTier
from kvtier.node.credit import SHARE
from tests.engine.test_tier import LAYOUT, NAMESPACE, content, prompt
from tests.launching import Process, node_toml, wait_for
from tests.node.conftest import blocks, status

BATCH = 8
SLOTS = SHARE * BATCH
POOL = 64


class Engine:
    """One that saves and restores, and knows which of its batches were granted on credit."""

    def __init__(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, met: Met | None = None
    ) -> None:
        self.pool = torch.zeros(POOL, LAYOUT.nbytes, dtype=torch.uint8)
        self.tier = EngineTier(
            f"{folder}/node.sock",
            NAMESPACE,
            BlockTensor(LAYOUT, self.pool),
            wait_s=60.0,
            batch=BATCH,
            met=met,
        )
        self.asked = 0
        real = TierClient._writing

        def writing(client: TierClient, keys: Sequence[BlockKey]) -> object:
            self.asked += client is self.tier._client
            return real(client, keys)

        monkeypatch.setattr(TierClient, "_writing", writing)

    def save(self, tokens: Sequence[int], first: int = 0) -> int:
        keys = self.tier.keys(tokens)
        for block in range(len(keys)):
            self.pool[block] = content(tokens[: 16 * (block + 1)])
        return self.tier.save(keys, first, range(first, len(keys)))

    def found(self, tokens: Sequence[int]) -> int:
        """Blocks of a prompt that come back, byte for byte."""
        keys = self.tier.keys(tokens)
        places = random.Random(len(tokens)).sample(range(POOL), len(keys))
        self.pool.zero_()
        restored = self.tier.restore(keys, 0, places)
        for index, place in enumerate(places[: len(restored)]):
            assert torch.equal(self.pool[place], content(tokens[: 16 * (index + 1)])), "wrong bytes"
        assert {*restored} <= {Tier.HOST}
        return len(restored)


def on_credit(node: Process) -> float:
    return status(node).counters["kvtier_credit_slots"]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Process]:
    host = f"{SLOTS * LAYOUT.nbytes}"
    with Process("node", node_toml(tmp_path, host=host), tmp_path) as process:
        yield process


@pytest.fixture
def engines(
    node: Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[Engine]]:
    """Two, of which the first has credit."""
    made = [Engine(tmp_path, monkeypatch) for _ in range(2)]
    for number, each in enumerate(made):
        first = prompt(number, 1)
        wait_for("the daemon to take it in", lambda e=each, p=first: e.save(p) and e.found(p) == 1)
    made[0].asked = made[1].asked = 0
    yield made
    for each in made:
        each.tier.close()


def test_a_batch_is_saved_without_a_question(engines: list[Engine]) -> None:
    one, two = engines
    for seed in range(10, 30):
        tokens = prompt(seed, BATCH)
        assert one.save(tokens) == BATCH
        assert two.found(tokens) == BATCH
        assert one.found(tokens) == BATCH
    assert one.asked == 0
    assert two.save(prompt(30, BATCH)) == BATCH
    assert two.asked == 1, "there was credit for one engine"


def test_a_long_save_goes_on_with_leases(engines: list[Engine]) -> None:
    one, two = engines
    for seed in range(10, 20):
        tokens = prompt(seed, 5 * BATCH)
        assert one.save(tokens) == 5 * BATCH
        assert two.found(tokens) == 5 * BATCH
    assert one.asked <= 10 * 4, "the first batch of each was on credit"


def test_what_is_there_already_is_put_for_nothing(node: Process, engines: list[Engine]) -> None:
    one, two = engines
    tokens = prompt(10, BATCH)
    two.save(tokens)
    before = blocks(node)[Tier.HOST]
    assert one.save(tokens) == BATCH, "nobody knew"
    assert one.asked == 0
    for number in range(5):
        assert one.save([*tokens, *prompt(11 + number, 1)]) == 1, "only what is new"
        assert one.found(tokens) == BATCH
        assert two.found(tokens) == BATCH
    assert blocks(node)[Tier.HOST] == before + 5


def test_where_no_room_can_be_made_what_is_on_credit_is_kept(
    node: Process, engines: list[Engine], tmp_path: Path
) -> None:
    one, two = engines
    full = TierClient(f"{tmp_path}/node.sock", LAYOUT)
    with full.write(one.tier.keys(prompt(10, SLOTS))) as all_others:
        assert len(all_others.slots) == SLOTS - BATCH
        assert one.save(prompt(11, BATCH)) == BATCH, "on credit"
        with full.read(one.tier.keys(prompt(11, BATCH))) as lease:
            assert len(lease.slots) == BATCH
            assert one.save(prompt(12, BATCH)) == 0, "that was all of it"
        assert two.found(prompt(11, BATCH)) == BATCH
        all_others.filled = 0
    for seed in range(13, 100):  # it asks for credit again, if seldom
        assert one.save(prompt(seed, BATCH)) == BATCH
        assert two.found(prompt(seed, BATCH)) == BATCH
        assert one.found(prompt(seed, BATCH)) == BATCH
    one.asked = 0
    assert one.save(prompt(100, BATCH)) == BATCH
    assert one.asked == 0
    full.close()


def test_a_restarted_daemon_gives_credit_anew(node: Process, engines: list[Engine]) -> None:
    one, _ = engines
    node.kill()
    node.restart()
    wait_for(
        "it to attach again", lambda: one.save(prompt(10, 1)) == 1 and one.found(prompt(10, 1))
    )
    one.asked = 0
    for seed in range(11, 15):
        assert one.save(prompt(seed, BATCH)) == BATCH
        assert one.found(prompt(seed, BATCH)) == BATCH
    assert one.asked == 0
    one.tier.close()
    wait_for("it is gone", lambda: status(node).clients <= 1)


def test_what_one_connection_restored_the_other_does_not_copy_again(
    node: Process, engines: list[Engine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an engine that restores by one and saves by the other, what it evicts."""
    one, other = engines
    one.tier.close()  # there is credit for one engine
    wait_for("its credit to end", lambda: on_credit(node) == 0)
    met = Met()
    saves, restores = (Engine(tmp_path, monkeypatch, met) for _ in range(2))
    for number, each in enumerate((saves, restores)):
        first = prompt(40 + number, 1)
        wait_for("the daemon to take it in", lambda e=each, p=first: e.save(p) and e.found(p) == 1)
        wait_for("a batch", lambda: on_credit(node) == BATCH)
    tokens = prompt(10, BATCH)
    assert other.save(tokens) == BATCH
    assert restores.found(tokens) == BATCH
    assert saves.save(tokens) == 0, "it is there, and was asked for"
    restores.tier.close()
    saves.tier.close()


def test_no_more_keys_are_remembered_than_it_says() -> None:
    met = Met()
    met.wanted = True
    keys = [BlockKey(number.to_bytes(16, "big")) for number in range(5 * MET)]
    for at, count in ((0, MET - 1), (MET - 1, 2 * MET), (3 * MET - 1, 1), (3 * MET, MET + 7)):
        met.add(keys[at : at + count])
        end = at + count
        assert len(met) <= 2 * MET
        assert all(key in met for key in keys[max(0, end - MET) : end])


def test_slots_on_credit_are_in_the_metrics(node: Process, engines: list[Engine]) -> None:
    wait_for("a batch", lambda: on_credit(node) == BATCH)
    engines[0].tier.close()
    engines[1].tier.close()
    wait_for("none", lambda: on_credit(node) == 0)
