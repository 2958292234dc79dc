"""A worker and the engine process that it started."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from kvtier.core.tiers import Tier
from kvtier.engine.vllm.owner import NOTHING, Owned, Owner, Restored

ENGINE = """
import signal, sys, time
from kvtier.engine.vllm.owner import Owned
if sys.argv[2] == "stuck":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
owned = Owned(sys.argv[1], 0.5)
print("there", flush=True)
time.sleep(300)
"""
WORKER = """
import sys, time
from pathlib import Path
from kvtier.engine.vllm.owner import Owner
owner = Owner(Path(sys.argv[1]))
print("there", flush=True)
time.sleep(300)
"""


@pytest.fixture
def engines(tmp_path: Path) -> Iterator[Callable[[], Owned]]:
    """Connections of engines; closed before their owner is, or they would end this process."""
    with ExitStack() as stack:

        def connect() -> Owned:
            engine = Owned(str(tmp_path / "owner"))
            stack.callback(engine.close)
            return engine

        yield connect


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[Owner]:
    with Owner(tmp_path / "owner") as owner:
        yield owner


def test_what_was_restored_is_there_with_the_first_token(owner, engines):
    said = Restored({Tier.HOST: 64, Tier.SHARED: 32}, 0.5)
    engine, second = engines(), engines()
    engine.tell("0-1a2b3c4d", said)
    second.tell("1-11111111", Restored({Tier.DISK: 32}, 0.0))
    assert owner.take("0") == said
    assert owner.take("0") == NOTHING, "said once"
    assert owner.take("1").tokens == {Tier.DISK: 32}
    assert owner.take("2") == NOTHING


def test_a_worker_that_never_asks_stops_nobody(owner, engines):
    engine = engines()
    for number in range(10_000):
        engine.tell(f"{number}-x", Restored({Tier.HOST: 32}, 0.1))
    assert owner.take("0").tokens == {Tier.HOST: 32}
    engine.close()
    engine.tell("0-x", NOTHING)


@pytest.mark.parametrize("how", ["fine", "stuck"])
def test_an_engine_ends_with_its_worker(tmp_path: Path, how: str) -> None:
    def start(code: str, *more: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code, str(tmp_path / "owner"), *more]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ})
        started.callback(process.wait)
        started.callback(process.kill)
        assert process.stdout is not None
        started.callback(process.stdout.close)
        assert process.stdout.readline() == "there\n"
        return process

    with ExitStack() as started:
        worker = start(WORKER)
        engine = start(ENGINE, how)
        assert engine.poll() is None
        worker.kill()
        assert engine.wait(60) == (1 if how == "stuck" else -signal.SIGTERM)
