"""Which blocks a real daemon gives up: those that the simulator says, also after a restart."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgpack
import pytest

from kvtier.arena import stride
from kvtier.config import Config, load
from kvtier.core.policies import POLICIES
from kvtier.core.policy import Use
from kvtier.engine.client import TierClient
from kvtier.node.daemon import NodeDaemon
from kvtier.node.learned import LEARNED_FILE
from kvtier.sim.evict import Hits, Prompt, Workload, replay
from kvtier.sim.live import HostTier
from kvtier.sim.workloads import generate
from tests.launching import disk_toml, node_toml, wait_for
from tests.node.conftest import LAYOUT


class Clock:
    """The time of the request that is played."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def configured(folder: Path, policy: str, blocks: int, more: str = "") -> Config:
    file = folder / "kvtier.toml"
    host = f'policy = "{policy}"\n{more}'
    file.write_text(node_toml(folder, host=str(blocks * stride(LAYOUT.nbytes)), more=host))
    return load(file)


@contextmanager
def daemon(config: Config, clock: Clock) -> Iterator[NodeDaemon]:
    """A node daemon with its socket and its tiers, on a thread of this process for its clock."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def make() -> NodeDaemon:
        node = NodeDaemon(config, clock)
        await node.reopen()
        await node.local.start()
        return node

    try:
        node = asyncio.run_coroutine_threadsafe(make(), loop).result(60)
        try:
            yield node
        finally:
            asyncio.run_coroutine_threadsafe(node.close(60.0), loop).result(120)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


def play(client: TierClient, clock: Clock, prompts: list[Prompt]) -> Hits:
    """Each prompt as an engine tells of it: asked for, restored, and the rest handed down."""
    hits = Hits()
    for number, prompt in enumerate(prompts, 1):
        clock.now, use = prompt.at_s, Use(request=number)
        hits.count(prompt, client.match(prompt.keys).blocks)
        if not prompt.keys:
            continue
        with client.read(prompt.keys, use=use):
            pass
        use = use._replace(output_tokens=prompt.output_tokens)
        with client.write(prompt.keys, use=use) as lease:
            lease.filled = len(lease.slots)
    return hits


@pytest.mark.parametrize("policy", ["lru", "phd"])
@pytest.mark.parametrize("kind", ["chat", "shared"])
def test_the_simulator_counts_what_a_daemon_finds(tmp_path: Path, kind: str, policy: str) -> None:
    workload, clock = Workload(generate(kind, 11, 800)), Clock()
    blocks = workload.capacity(0.1)
    with daemon(configured(tmp_path, policy, blocks), clock):
        client = TierClient(f"{tmp_path}/node.sock", LAYOUT)
        assert client.arena.slots == blocks
        found = play(client, clock, workload.prompts)
        client.close()
    said = replay(workload, POLICIES[policy], blocks, cache=HostTier).hits
    assert (found.hit_blocks, found.hit_tokens) == (said.hit_blocks, said.hit_tokens)
    assert found.hit_blocks > 0
    if policy == "lru":  # for which it makes no difference whether room is made before or after
        assert found.hit_blocks == replay(workload, POLICIES[policy], blocks).hits.hit_blocks


def counts(node: NodeDaemon) -> dict[str, float]:
    """Uses that the policies of a daemon's tiers have seen."""
    return {
        tier.label: sum(map(sum, policy.save()["hit"]))  # type: ignore[arg-type]
        for tier, policy in node.layouts[LAYOUT.id].learning.items()
    }


def test_a_restart_does_not_begin_blind(tmp_path: Path) -> None:
    workload, clock = Workload(generate("shared", 3, 300)), Clock()
    both = disk_toml(tmp_path, size="256MiB") + 'policy = "phd"\n'
    config = configured(tmp_path, "phd", workload.capacity(0.2), both)
    with daemon(config, clock) as node:
        client = TierClient(f"{tmp_path}/node.sock", LAYOUT)
        assert counts_of_nothing(counts(node))
        play(client, clock, workload.prompts)
        learned = counts(node)
        assert learned["host"] > 100
        assert learned["disk"] > 0
        client.close()
    with daemon(config, clock) as node:  # the layout is opened again because the disk has it
        after = counts(node)
        assert all(after[tier] > 0.5 * learned[tier] for tier in ("host", "disk"))


def counts_of_nothing(seen: dict[str, float]) -> bool:
    return seen == {"host": 0, "disk": 0}


def test_what_was_learned_is_saved_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvtier.node.learned.SAVE_S", 0.05)
    file = tmp_path / "disk" / LAYOUT.id / LEARNED_FILE
    with daemon(configured(tmp_path, "phd", 40, disk_toml(tmp_path)), Clock()):
        TierClient(f"{tmp_path}/node.sock", LAYOUT).close()
        wait_for("the file", file.exists)
        file.unlink()
        wait_for("the file again", file.exists)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "not msgpack"),
        (b"\xc1 no msgpack", "not msgpack"),
        (msgpack.packb([1, 2]), "not what eviction has learned"),
        (msgpack.packb({"version": 99, "tiers": {}}), "version 1"),
        (msgpack.packb({"version": 1, "tiers": {"host": {"version": 7}}}), "version 1"),
        (msgpack.packb({"version": 1, "tiers": {"host": {"version": 1, "hit": [], "end": []}}}),
         "37 classes"),
        (bytes(5 << 20), "more than 4194304 bytes"),
    ],
)  # fmt: skip
def test_a_learned_state_that_is_none_is_refused_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes, complaint: str
) -> None:
    file = tmp_path / "disk" / LAYOUT.id / LEARNED_FILE
    config, clock = configured(tmp_path, "phd", 40, disk_toml(tmp_path)), Clock()
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    with daemon(config, clock) as node:
        TierClient(f"{tmp_path}/node.sock", LAYOUT).close()
        assert counts(node) == {"host": 0}
    said = [record for record in caplog.records if "eviction learns from nothing" in record.message]
    assert len(said) == 1
    assert complaint in said[0].message
    assert msgpack.unpackb(file.read_bytes())["version"] == 1, "a good one takes its place"


def test_a_node_without_phd_leaves_what_was_learned_alone(tmp_path: Path) -> None:
    file = tmp_path / "disk" / LAYOUT.id / LEARNED_FILE
    file.parent.mkdir(parents=True)
    file.write_bytes(b"of a node with another setting")
    with daemon(configured(tmp_path, "lru", 40, disk_toml(tmp_path)), Clock()):
        TierClient(f"{tmp_path}/node.sock", LAYOUT).close()
    assert file.read_bytes() == b"of a node with another setting"
