"""The engine's side of a real node daemon: what it saves comes back, and failures are misses."""

import os
import random
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc
import pytest
import torch

from kvtier import metrics
from kvtier.core.blocks import Attention, BlockLayout, LayerGroup, Namespace
from kvtier.core.breakeven import ComputeCost
from kvtier.core.tiers import Tier
from kvtier.engine.copier import BlockTensor
from kvtier.engine.tier import EngineTier
from kvtier.wire.chains import TO_WIRE
from kvtier.wire.pb import node_pb2, node_pb2_grpc
from tests.launching import Process, disk_toml, node_toml, wait_for
from tests.node.conftest import status, wait_for_blocks

LAYOUT = BlockLayout((LayerGroup(Attention.FULL, 2, 2, 32),), 16, "float16")  # 8 KiB
NAMESPACE = Namespace("model", "weights", LAYOUT)
POOL = 400


class Engine:
    """A pool of blocks with known content, and the tiers under it."""

    def __init__(self, folder: Path, namespace: Namespace = NAMESPACE) -> None:
        self.pool = torch.zeros(POOL, LAYOUT.nbytes, dtype=torch.uint8)
        paged = BlockTensor(LAYOUT, self.pool)
        self.tier = EngineTier(f"{folder}/node.sock", namespace, paged, wait_s=60.0)

    def fill(self, tokens: Sequence[int]) -> int:
        """Compute a prompt, so to speak: block i holds numbers made from the tokens up to it."""
        blocks = len(tokens) // 16
        for block in range(blocks):
            self.pool[block] = content(tokens[: 16 * (block + 1)])
        return blocks

    def save(self, tokens: Sequence[int]) -> int:
        blocks = self.fill(tokens)
        return self.tier.save(self.tier.keys(tokens), 0, range(blocks))

    def restore(
        self, tokens: Sequence[int], first: int = 0, compute: ComputeCost | None = None
    ) -> list[Tier]:
        """Restore into shuffled places and check every byte."""
        keys = self.tier.keys(tokens)
        places = random.Random(len(tokens)).sample(range(POOL), len(keys) - first)
        self.pool.zero_()
        restored = self.tier.restore(keys, first, places, compute)
        for index, place in enumerate(places[: len(restored)], first):
            assert torch.equal(self.pool[place], content(tokens[: 16 * (index + 1)])), "wrong bytes"
        return restored


def content(prefix: Sequence[int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(hash(tuple(prefix)))
    return torch.randint(0, 256, (LAYOUT.nbytes,), dtype=torch.uint8, generator=generator)


def prompt(seed: int, blocks: int) -> list[int]:
    return [random.Random(seed).randrange(50_000) for _ in range(16 * blocks)]


def clear_host(node: Process) -> None:
    with grpc.insecure_channel(node.address) as channel:
        request = node_pb2.NodeClearRequest(tiers=[TO_WIRE[Tier.HOST]])
        node_pb2_grpc.NodeStub(channel).Clear(request, timeout=60)


_engines: list[Engine] = []


def attach(folder: Path, namespace: Namespace = NAMESPACE) -> Engine:
    """An engine that hangs up at the end of the test."""
    _engines.append(Engine(folder, namespace))
    return _engines[-1]


@pytest.fixture(autouse=True)
def hang_up() -> Iterator[None]:
    yield
    while _engines:
        _engines.pop().tier.close()


def failures(operation: str) -> float:
    return metrics.TIER_FAILURES.labels(operation)._value.get()


def test_blocks_come_back_byte_for_byte(tmp_path: Path) -> None:
    with Process("node", node_toml(tmp_path), tmp_path):
        engine = attach(tmp_path)
        tokens = prompt(1, 20)
        assert engine.save(tokens) == 20
        assert engine.tier.match(engine.tier.keys(tokens)) == 20
        assert engine.restore(tokens) == [Tier.HOST] * 20
        assert engine.restore(tokens, first=7) == [Tier.HOST] * 13
        longer = [*tokens, *prompt(2, 3)]
        assert engine.restore(longer) == [Tier.HOST] * 20
        assert engine.save(longer) == 3, "only what is new"
        assert engine.tier.bytes_per_s()[Tier.HOST] > 0


def test_a_prompt_larger_than_the_arena_is_served_in_pieces(tmp_path: Path) -> None:
    toml = node_toml(tmp_path, host="1MiB", more=disk_toml(tmp_path))  # 128 blocks
    with Process("node", toml, tmp_path):
        engine = attach(tmp_path)
        tokens = prompt(3, 300)
        saved = 0
        while saved < 300:  # a full arena refuses at once; the disk takes some time
            saved += engine.save(tokens)
        wait_for("what is still on its way down", lambda: len(engine.restore(tokens)) == 300)


def test_other_namespaces_never_see_each_others_blocks(tmp_path: Path) -> None:
    with Process("node", node_toml(tmp_path), tmp_path):
        engine = attach(tmp_path)
        tokens = prompt(4, 5)
        engine.save(tokens)
        for other in (
            Namespace("model-2", "weights", LAYOUT),
            Namespace("model", "weights-2", LAYOUT),
            Namespace("model", "weights", LAYOUT, adapter="lora"),
            Namespace("model", "weights", LAYOUT, tenant="t", tenant_secret=b"s"),
        ):
            assert attach(tmp_path, other).restore(tokens) == []


def test_no_daemon_is_a_miss_with_a_counter_and_it_is_found_when_it_comes(tmp_path: Path) -> None:
    before = failures("restore")
    engine = attach(tmp_path)
    tokens = prompt(5, 4)
    assert engine.save(tokens) == 0
    assert engine.tier.match(engine.tier.keys(tokens)) == 0
    with Process("node", node_toml(tmp_path), tmp_path):
        wait_for("the engine to attach", lambda: engine.save(tokens) == 4)
        assert engine.restore(tokens) == [Tier.HOST] * 4
    assert engine.restore(tokens) == []
    assert failures("restore") == before + 1


def test_a_program_may_wait_for_the_daemon_instead_of_missing(tmp_path: Path) -> None:
    engine = Engine(tmp_path)
    try:
        assert not engine.tier.wait(0.0)
        with Process("node", node_toml(tmp_path), tmp_path):
            assert engine.tier.wait(60.0)
            assert engine.save(range(64)) == 4
    finally:
        engine.tier.close()


def test_a_restarted_daemon_is_found_again_without_a_failure(tmp_path: Path) -> None:
    toml = node_toml(tmp_path, more=disk_toml(tmp_path))
    with Process("node", toml, tmp_path) as node:
        engine = attach(tmp_path)
        tokens = prompt(6, 8)
        assert engine.save(tokens) == 8
        assert node.terminate() == 0
        node.restart()
        before = failures("restore")
        wait_for("the disk tier", lambda: engine.restore(tokens) == [Tier.DISK] * 8)
        assert failures("restore") == before


def test_a_daemon_that_is_back_is_attached_to_before_any_call(tmp_path: Path) -> None:
    with Process("node", node_toml(tmp_path), tmp_path) as node:
        engine = attach(tmp_path)
        for end in (node.terminate, node.kill):
            wait_for("the tier", lambda: engine.save(prompt(9, 2)) == 2)
            mapped = arenas()
            end()
            wait_for("the old arena to be given back", lambda mapped=mapped: arenas() < mapped)
            node.restart()
            wait_for("the engine, unasked", lambda: status(node).clients == 1)
        before = failures("match")
        assert engine.tier.match(engine.tier.keys(prompt(9, 2))) == 0, "a new arena"
        assert failures("match") == before


def test_what_is_closed_leaves_no_thread_and_no_mapping(tmp_path: Path) -> None:
    with Process("node", node_toml(tmp_path), tmp_path) as node:
        engine = attach(tmp_path)
        assert engine.save(prompt(10, 2)) == 2
        mapped = arenas()
        engine.tier.close()
        wait_for("the mapping", lambda: arenas() < mapped)
        wait_for("the threads", lambda: not threads())
        wait_for("the daemon to see it", lambda: status(node).clients == 0)
    late = attach(tmp_path)  # nobody is there, and nobody comes
    assert late.save(prompt(10, 2)) == 0
    late.tier.close()
    wait_for("the threads", lambda: not threads())


def arenas() -> set[str]:
    """The arenas that this process has mapped."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line for line in lines if "memfd:kvtier-arena" in line}


def threads() -> list[str]:
    return [each.name for each in threading.enumerate() if each.name.startswith("kvtier-")]


def test_a_load_that_is_slower_than_computing_is_declined(tmp_path: Path) -> None:
    toml = node_toml(tmp_path, more=disk_toml(tmp_path))
    with Process("node", toml, tmp_path) as node:
        engine = attach(tmp_path)
        tokens = prompt(8, 8)
        assert engine.save(tokens) == 8
        wait_for_blocks(node, Tier.DISK, 8)

        def from_disk(compute: ComputeCost | None) -> list[Tier]:
            clear_host(node)
            return engine.restore(tokens, compute=compute)

        fast, slow = ComputeCost(1e-6), ComputeCost(1000.0, 1.0)
        assert from_disk(fast) == [Tier.DISK] * 8, "no load was measured yet, so it is tried"
        # What was measured long ago is tried again, too: on a machine that stood still meanwhile.
        wait_for("a load that is declined", lambda: from_disk(fast) == [])
        assert status(node).counters["kvtier_declined_blocks_total"] >= 8
        # Each block costs more than the one before: where the first piece alone does not pay, all
        # together do, and where nobody knows of more, it does not.
        rising = ComputeCost(0.0, 1000.0)
        assert from_disk(rising) == [Tier.DISK] * 8
        keys = engine.tier.keys(tokens)

        def first_block(held: int) -> list[Tier]:
            clear_host(node)
            return engine.tier.restore(keys[:held], 0, [0], rising)

        assert first_block(8) == [Tier.DISK]
        wait_for("one that is declined", lambda: first_block(1) == [])
        assert from_disk(slow) == [Tier.DISK] * 8
        assert engine.restore(tokens, compute=fast) == [Tier.HOST] * 8, "nothing to load"


def test_a_daemon_that_is_killed_during_a_lease_costs_no_wrong_byte(tmp_path: Path) -> None:
    with Process("node", node_toml(tmp_path), tmp_path) as node:
        engine = attach(tmp_path)
        tokens = prompt(7, 8)
        engine.save(tokens)
        client = engine.tier._client
        assert client is not None
        keys = engine.tier.keys(tokens)
        with client.read(keys) as lease:
            node.kill()
            for index, slot in enumerate(lease.slots):
                expected = content(tokens[: 16 * (index + 1)]).numpy().tobytes()
                assert bytes(client.arena.slot(slot)) == expected, "the mapping outlives it"
        assert engine.restore(tokens) == []


def test_a_daemon_that_hangs_costs_one_bounded_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Process("node", node_toml(tmp_path), tmp_path) as node:
        engine = attach(tmp_path)
        tokens = prompt(8, 4)
        engine.save(tokens)
        monkeypatch.setattr("kvtier.engine.client.ANSWER_S", 1.0)
        os.kill(node.pid, signal.SIGSTOP)
        try:
            assert engine.tier.match(engine.tier.keys(tokens)) == 0
            assert engine.tier._client is None, "no second wait: the next calls miss at once"
        finally:
            os.kill(node.pid, signal.SIGCONT)
        monkeypatch.undo()
        wait_for("the engine to attach again", lambda: engine.restore(tokens) == [Tier.HOST] * 4)


def test_storage_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="rows have 5 bytes"):
        BlockTensor(LAYOUT, torch.zeros(3, 5, dtype=torch.uint8))
    with pytest.raises(ValueError, match="contiguous uint8"):
        BlockTensor(LAYOUT, torch.zeros(3, LAYOUT.nbytes))
