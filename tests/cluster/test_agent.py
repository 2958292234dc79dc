"""The agent as a plain object: in this process while it behaves, in its own where it must die."""

import dataclasses
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

from kvtier.cluster.agent import Agent, Report
from kvtier.config import (
    Config,
    DiskConfig,
    NodeConfig,
    PeerConfig,
    PeersConfig,
    parse_peers,
)
from tests.cluster.support import DEADLINE_S

ROOMS = "tests.cluster.rooms"


def until(agent: Agent, true: Callable[[Report], bool]) -> Report:
    """The first report for which it is true."""
    give_up_at = time.monotonic() + DEADLINE_S
    while not true(report := agent.report()):
        assert time.monotonic() < give_up_at, f"never so: {report}"
        threading.Event().wait(0.05)
    return report


def test_a_room_runs_until_it_is_asked_to_stop(tmp_path):
    config = Config(
        node=NodeConfig(name="alpha", listen="127.0.0.1:0"), disk=DiskConfig(path=str(tmp_path))
    )
    agent = Agent(f"{ROOMS}:serve", config, "digest")
    report = until(agent, lambda r: bool(r.address) and r.answering)
    assert report.address.startswith("127.0.0.1:")
    assert not report.address.endswith(":0")
    assert report.lends == f"alpha.invalid:{report.address.rpartition(':')[2]}"
    assert report.digest == "digest"
    assert not report.stopped
    assert agent.stop(DEADLINE_S)
    assert (tmp_path / "stopped").read_text() == "alpha"
    after = agent.report()
    assert after.stopped
    assert not after.address
    assert not after.lends
    assert not after.failure
    assert agent.stop(0), "stopping twice is stopping"


def test_who_lends_is_written_down_where_the_settings_say(tmp_path):
    members = (PeerConfig(node="b", address="h:1"),)
    config = Config(node=NodeConfig(name="alpha", listen="127.0.0.1:0"),
                    disk=DiskConfig(path=str(tmp_path)))  # fmt: skip
    for file, written in (("", True), ("peers", True), ("nowhere/peers", False)):
        peers = PeersConfig(file=file and str(tmp_path / file))
        agent = Agent(f"{ROOMS}:serve", dataclasses.replace(config, peers=peers), "digest")
        assert agent.peers(members) is written
        assert agent.stop(DEADLINE_S)
    assert parse_peers((tmp_path / "peers").read_bytes(), "") == members


def in_a_process(room: str, then: str = "threading.Event().wait()") -> subprocess.CompletedProcess:
    program = f"""
import threading
from kvtier.cluster.agent import Agent
from kvtier.config import Config
agent = Agent("{room}", Config(), "d", pause_s=2.0)
{then}
"""
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)


@pytest.mark.parametrize(
    ("room", "why"),
    [
        (f"{ROOMS}:fails", "ValueError: no such weights"),
        (f"{ROOMS}:ends", "ended by itself"),
        (f"{ROOMS}:missing", "AttributeError"),
        ("tests.cluster.nowhere:serve", "ModuleNotFoundError"),
    ],
)
def test_the_process_ends_when_its_room_does_and_says_why(room, why):
    done = in_a_process(room)
    assert done.returncode == 1
    assert why in done.stderr
    assert room in done.stderr


def test_a_failure_can_be_read_before_the_process_ends():
    then = """
while not agent.report().failure:
    pass
print(agent.report().failure, flush=True)
threading.Event().wait()
"""
    done = in_a_process(f"{ROOMS}:fails", then)
    assert done.stdout == "ValueError: no such weights\n"
    assert done.returncode == 1


def test_a_stuck_room_is_told_from_a_healthy_one_and_does_not_hold_up_stop():
    then = """
while not agent.report().address:
    pass
while agent.report().answering is not {answering}:
    pass
print(agent.stop(0.1), flush=True)
import os; os._exit(7)
"""
    for room, answering in (("stuck", False), ("deaf", True)):
        done = in_a_process(f"{ROOMS}:{room}", then.format(answering=answering))
        assert (done.stdout, done.returncode) == ("False\n", 7), room
