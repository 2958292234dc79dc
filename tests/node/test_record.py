"""A trace recorded from a real node daemon: which blocks its engines asked for, and no text."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvtier.core.blocks import BlockKey
from kvtier.core.policy import Use
from kvtier.engine.client import TierClient
from kvtier.errors import ConfigError
from kvtier.sim.evict import Workload
from kvtier.sim.record import TOLD, TOLD_S, Numbering, Pieces
from kvtier.sim.trace import read_trace
from tests.launching import Process, node_toml
from tests.node.conftest import LAYOUT, new_keys

COMMAND = [sys.executable, "-m", "kvtier.cli", "trace", "record"]
SIZE = LAYOUT.block_tokens
Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def record() -> Iterator[Start]:
    """Starts recorders, and waits until they have begun; none is left at the end."""
    running: list[subprocess.Popen[bytes]] = []

    def start(node: Process, out: Path, *more: str) -> "subprocess.Popen[bytes]":
        process = subprocess.Popen(
            [*COMMAND, node.address, "--out", str(out), *more],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        running.append(process)
        assert process.stderr is not None
        line = process.stderr.readline()
        assert line.startswith(b"recording"), line
        return process

    yield start
    for process in running:
        if process.poll() is None:
            process.kill()
        process.communicate()


def ask(client: TierClient, keys: list[BlockKey], request: int, output: int | None) -> None:
    """As an engine tells of a prompt: found, restored, and the rest written at its end."""
    held = client.match(keys).blocks
    with client.read(keys[:held], use=Use(request=request)):
        pass
    use = Use(request=request, output_tokens=output)
    with client.write(keys, use=use) as lease:
        lease.filled = len(lease.slots)


def test_pieces_are_prompts_and_prefixes_are_shared(tmp_path: Path, record: Start) -> None:
    out = tmp_path / "trace.jsonl"
    with Process("node", node_toml(tmp_path), tmp_path) as node:
        client = TierClient(f"{tmp_path}/node.sock", LAYOUT)
        system, one, two = new_keys(3), new_keys(4), new_keys(2)
        ask(client, new_keys(5), 6, 1)  # before anybody records
        process = record(node, out, "--requests", "4")
        ask(client, system + one, 7, 20)
        ask(client, system + two, 8, None)
        with client.read(system):  # of an engine that numbers no prompts
            pass
        with client.write(new_keys(2)) as lease:  # blocks that came by themselves
            lease.filled = len(lease.slots)
        ask(client, [*system, *one, *new_keys(2)], 9, 40)
        ask(client, new_keys(1), 10, 1)  # where it begins, the four before it are whole
        client.close()
        stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == 0, stderr
    assert b"4 requests" in stdout
    requests = [*read_trace(out)]
    assert [each.blocks for each in requests] == [
        (0, 1, 2, 3, 4, 5, 6), (0, 1, 2, 7, 8), (0, 1, 2), (0, 1, 2, 3, 4, 5, 6, 9, 10),
    ]  # fmt: skip
    assert [each.input_tokens for each in requests] == [7 * SIZE, 5 * SIZE, 3 * SIZE, 9 * SIZE]
    assert [each.output_tokens for each in requests] == [20, 0, 0, 40]
    assert {each.block_tokens for each in requests} == {SIZE}
    known = {"timestamp", "input_length", "output_length", "hash_ids", "block_size"}
    assert all(json.loads(line).keys() <= known for line in out.read_text().splitlines())
    assert Workload(requests).footprint == 11  # what `kvtier simulate` makes of it


def test_a_number_of_prompts_is_whole_ones(tmp_path: Path, record: Start) -> None:
    out = tmp_path / "trace.jsonl"
    with Process("node", node_toml(tmp_path), tmp_path) as node:
        client = TierClient(f"{tmp_path}/node.sock", LAYOUT)
        process = record(node, out, "--requests", "2", "--block-tokens", str(2 * SIZE))
        for request in (1, 2, 3):
            ask(client, new_keys(6), request, 5)
        client.close()
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 0, stderr
    assert [each.blocks for each in read_trace(out)] == [(0, 1, 2), (3, 4, 5)]


def test_a_prompt_of_which_nothing_more_is_told_is_whole() -> None:
    pieces, keys = Pieces(Numbering()), new_keys(4)
    assert [*pieces.add(10.0, 1, keys[:2], SIZE, 0)] == []
    assert [*pieces.add(12.0, 1, keys, SIZE, 3)] == []
    assert [*pieces.add(13.0, 1, keys[:3], SIZE, 0)] == []  # a shorter path, told late
    assert [*pieces.add(20.0, 2, keys[:1], SIZE, 0)] == []
    (whole,) = pieces.add(13.1 + TOLD_S, 3, keys[:1], SIZE, 0)
    assert (whole.at_s, whole.blocks, whole.output_tokens) == (10.0, (0, 1, 2, 3), 3)
    assert [each.at_s for each in pieces.rest()] == [20.0, 13.1 + TOLD_S]
    for request in range(TOLD + 5):
        assert len([*pieces.add(100.0, request + 1, keys[:1], SIZE, 0)]) == (request >= TOLD)
    assert len(pieces) == TOLD


def test_blocks_of_another_size_must_be_whole_ones() -> None:
    pieces = Pieces(Numbering(24))
    assert [*pieces.add(0.0, 1, new_keys(3), SIZE, 0)] == []
    with pytest.raises(ConfigError, match="--block-tokens is 24"):
        next(pieces.rest())
