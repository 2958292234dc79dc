"""A bounded run of every fuzz target: the corpus, the seeds, and mutations of both."""

import random
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from tests.fuzz.seeds import CORPUS, seeds
from tests.fuzz.targets import TARGETS, once

ROOT = Path(__file__).parent.parent.parent
MUTATIONS = 1500


def corpus(name: str) -> list[bytes]:
    return [*seeds()[name], *(each.read_bytes() for each in sorted((CORPUS / name).glob("*")))]


def mutated(draw: random.Random, inputs: list[bytes]) -> bytes:
    """One to four changes: a bit, a byte, a number, a cut, a repeat, a piece of another input."""
    data = bytearray(draw.choice(inputs))
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(data) + 1)
        match draw.randrange(6):
            case 0 if at < len(data):
                data[at] ^= 1 << draw.randrange(8)
            case 1:
                data[at : at + 1] = draw.randbytes(1)
            case 2:
                number = draw.choice([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, len(data)])
                data[at : at + 8] = number.to_bytes(8, "little")
            case 3:
                del data[at : at + draw.randint(1, 64)]
            case 4:
                data[at:at] = data[at : at + draw.randint(1, 64)]
            case _:
                other = draw.choice(inputs)
                data[at:at] = other[draw.randrange(len(other) + 1) :][:256]
    return bytes(data)


@pytest.mark.parametrize("name", TARGETS)
def test_only_the_errors_that_are_meant_come_out_and_memory_is_bounded(name: str) -> None:
    target, inputs, draw = TARGETS[name], corpus(name), random.Random(name)
    for data in inputs:
        once(target, data)  # and what is loaded at first use is loaded
    tracemalloc.start()
    try:
        for number in range(MUTATIONS):
            data = mutated(draw, inputs)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            try:
                once(target, data)
            except BaseException as error:
                error.add_note(f"{name}, input {number}: {data.hex()}")
                raise
            taken = tracemalloc.get_traced_memory()[1] - before
            assert taken <= target.most, f"input {number} took {taken} bytes: {data.hex()}"
    finally:
        tracemalloc.stop()


def test_every_target_has_seeds() -> None:
    assert seeds().keys() == TARGETS.keys()


@pytest.mark.parametrize("name", ["wire", "sealed_frame"])
def test_the_coverage_guided_fuzzer_runs(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.run", name, str(tmp_path), "-runs=2000", "-seed=1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "stat::number_of_executed_units" in done.stderr
