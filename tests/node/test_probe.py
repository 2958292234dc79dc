"""What codec `auto` measures at the start, before any block is there."""

import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import redis

from kvtier.codec.auto import Cost, line
from kvtier.codec.codecs import RAW
from kvtier.config import RedisConfig
from kvtier.core.blocks import Attention, BlockKey, BlockLayout, LayerGroup
from kvtier.core.tiers import Tier
from kvtier.engine.client import TierClient
from kvtier.errors import StoreUnavailable
from kvtier.node.tuner import SAMPLES, Tuner
from kvtier.stores.disk import DiskStore
from kvtier.stores.disk.check import State, slots
from kvtier.stores.redis import RedisTrial
from kvtier.stores.redis.trial import TTL_S
from kvtier.testing.valkey import ValkeyServer
from kvtier.wire.chains import TO_WIRE
from kvtier.wire.pb import node_pb2
from tests.launching import Process, disk_toml, node_toml, redis_toml, wait_for
from tests.node.conftest import blocks, new_keys, status

MIB = 1 << 20


def layout(dtype: str = "bfloat16") -> BlockLayout:
    return BlockLayout((LayerGroup(Attention.FULL, 4, 4, 64),), 32, dtype)


class TurningTrial:
    """A store that takes a second for each call and for so many bytes, of a clock of its own."""

    def __init__(self, now: list[float], call_s: float, byte_s: float) -> None:
        self._now, self._call_s, self._byte_s = now, call_s, byte_s
        self.frames = 0
        self.closed = False

    def write(self, nbytes: int) -> bool:
        self._now[0] += self.frames * (self._call_s + nbytes * self._byte_s)
        return True

    def read(self, nbytes: int) -> bool:
        return self.write(nbytes)

    def close(self) -> None:
        self.closed = True


def probed(dtype: str, call_s: float, byte_s: float) -> Tuner:
    """A tuner over such a store, once its probe has ended; codecs take no time on its clock."""
    now = [0.0]
    tuner = Tuner("disk", layout(dtype), 2, 2, period_s=10.0, clock=lambda: now[0])
    trial = TurningTrial(now, call_s, byte_s)

    def begin(_: int, count: int) -> TurningTrial:
        trial.frames = count
        return trial

    tuner.probe(begin)
    wait_for("the probe to end", lambda: tuner.measured)
    tuner.close()
    assert trial.closed
    return tuner


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_first_choice_is_made_before_there_is_a_block(dtype: str) -> None:
    tuner = probed(dtype, 1e-5, 1e-8)
    assert tuner.codec is not RAW
    assert tuner.codec.exact
    nbytes = layout(dtype).nbytes
    assert tuner.measured is not None
    assert tuner.measured.by == "probe"
    assert tuner.measured.write == pytest.approx(nbytes / (1e-5 + nbytes * 1e-8))
    assert tuner.measured.read == pytest.approx(tuner.measured.write)


def test_where_calls_and_not_bytes_take_the_time_it_begins_raw() -> None:
    assert probed("bfloat16", 1e-3, 1e-12).codec is RAW


def test_of_integers_nothing_is_assumed() -> None:
    tuner = probed("int8", 1e-5, 1e-8)
    assert tuner.codec is RAW
    assert tuner.measured is not None


def test_the_first_real_blocks_overrule_what_was_assumed_of_them() -> None:
    tuner = probed("bfloat16", 1e-5, 1e-8)
    noise = random.Random(2).randbytes(layout().nbytes)
    for _ in range(SAMPLES - 1):
        tuner.offer(memoryview(noise))
    assert tuner.codec is not RAW
    tuner.offer(memoryview(noise))
    assert tuner.codec is RAW


def test_a_line_has_no_negative_part() -> None:
    assert line([(1.0, 3.0), (2.0, 5.0), (3.0, 7.0)]) == Cost(pytest.approx(1.0), pytest.approx(2))
    assert line([(1.0, 5.0), (3.0, 1.0)]) == Cost(pytest.approx(3.0), 0.0)
    steep = line([(1.0, 1.0), (2.0, 9.0)])
    assert steep is not None
    assert steep.block_s == pytest.approx(0.0)
    assert line([(2.0, 5.0), (2.0, 6.0)]) is None


def test_a_daemon_that_ends_meanwhile_waits_for_one_call_and_is_told_nothing() -> None:
    begun, go = threading.Event(), threading.Event()

    class Slow:
        def write(self, nbytes: int) -> bool:
            begun.set()
            go.wait(60)
            return True

        def read(self, nbytes: int) -> bool:
            return True

        def close(self) -> None:
            pass

    tuner = Tuner("disk", layout(), 2, 2)
    tuner.probe(lambda *_: Slow())
    assert begun.wait(60)
    ending = threading.Thread(target=tuner.close)
    ending.start()
    assert tuner._probe is not None
    wait_for("the end to be asked for", tuner._probe._stop.is_set)
    go.set()
    ending.join(60)
    assert not ending.is_alive()
    assert tuner.measured is None
    assert tuner.codec is RAW


def test_a_store_that_gives_no_answer_is_left_to_the_blocks() -> None:
    class Away:
        def write(self, nbytes: int) -> bool:
            raise StoreUnavailable("away")

        def read(self, nbytes: int) -> bool:
            raise StoreUnavailable("away")

        def close(self) -> None:
            pass

    tuner = Tuner("disk", layout(), 2, 2)
    tuner.probe(lambda *_: Away())
    tuner.close()
    assert tuner.measured is None
    tuner.offer(memoryview(bytes(layout().nbytes)))


# --- the disk's part ------------------------------------------------------------------


def test_what_a_trial_writes_is_no_block_to_anybody_and_its_room_comes_back(tmp_path: Path) -> None:
    with closing(DiskStore(tmp_path, 64 * MIB)) as store:
        trial = store.trial(MIB, 4)
        assert trial.write(MIB)
        assert trial.read(MIB)
        assert [*store.scan()] == []
        assert store.nbytes <= 64 * MIB
        # As a kill in the middle of it leaves the folder.
        found = [each.state for each in slots(tmp_path, payloads=True)]
        assert set(found) == {State.FREE}
        trial.close()
        frames = [(BlockKey(bytes([n]) * 16), [bytes(MIB)]) for n in range(60)]
        assert all(store.write(frames)), "all room is there again"
    with closing(DiskStore(tmp_path, 64 * MIB)) as store:
        assert len([*store.scan()]) == 60


def test_a_store_with_little_room_lends_none_of_it(tmp_path: Path) -> None:
    with closing(DiskStore(tmp_path, 16 * MIB)) as store:
        keys = new_keys(15)
        assert all(store.write([(key, [bytes(MIB - 4096)]) for key in keys]))
        trial = store.trial(MIB - 4096, 4)
        assert not trial.write(MIB - 4096)
        assert store.write([(BlockKey(bytes(16)), [bytes(MIB - 4096)])]) == [True]
        trial.close()
        assert len([*store.scan()]) == 16, "none had to go"


def test_a_trial_keeps_to_the_bytes_of_a_day(tmp_path: Path) -> None:
    now = [0.0]
    with closing(
        DiskStore(tmp_path, 64 * MIB, write_bytes_per_day=24 * 3 * MIB, clock=lambda: now[0])
    ) as store:
        trial = store.trial(MIB, 4)
        assert trial.write(MIB // 4)
        assert not trial.write(MIB)
        trial.close()


# --- the shared tier's part -----------------------------------------------------------


@pytest.fixture
def admin(valkey: ValkeyServer) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(valkey.url, protocol=2) as client:
        yield client


def test_on_shared_servers_a_trial_goes_by_itself(valkey: ValkeyServer, admin: redis.Redis) -> None:
    admin.set("kvtier:3:main:a-block", "another node's")
    config = RedisConfig(url=valkey.url)
    trials = [RedisTrial(config, "layout", 2 * MIB, 4) for _ in range(2)]
    for trial in trials:
        assert trial.write(64 << 10)
        assert trial.read(64 << 10)
        assert trial.write(2 * MIB)
        assert trial.read(2 * MIB)
    names = [each for each in admin.scan_iter() if each != b"kvtier:3:main:a-block"]
    assert len(names) >= 2 * 4, "no two nodes write to one name"
    for name in names:
        assert name.startswith(b"kvtier:3:main:layout.trial.")
        assert 0 <= admin.ttl(name) <= TTL_S
    for trial in trials:
        trial.close()
    assert admin.get("kvtier:3:main:a-block") == b"another node's"
    assert admin.info("commandstats").get("cmdstat_unlink") is None
    assert admin.info("commandstats").get("cmdstat_del") is None


# --- a daemon -------------------------------------------------------------------------


def test_a_daemon_shows_what_it_measured_before_any_block(
    tmp_path: Path, valkey: ValkeyServer
) -> None:
    more = disk_toml(tmp_path) + 'codec = "auto"\n' + redis_toml(valkey.url, 60.0)
    more += 'codec = "auto"\n'
    with Process("node", node_toml(tmp_path, host="16MiB", more=more), tmp_path) as node:
        with _client(tmp_path):
            wait_for("both to be measured", _both(node, "probe"))
        for tier in (Tier.DISK, Tier.SHARED):
            found = _tier(node, tier)
            assert found.blocks == 0
            assert found.write_bytes_per_s > 0
            assert found.read_bytes_per_s > 0
        shown = _inspect(node.address)
        assert shown.count("measured by a probe at the start: ") == 2
        counters = status(node).counters
        for name in ("disk", "shared"):
            for way in ("write", "read"):
                assert counters[f"kvtier_store_bytes_per_second_{name}_{way}"] > 0
            assert counters[f"kvtier_codec_ratio_{name}_raw"] == 1.0
            assert counters[f"kvtier_codec_bytes_per_second_{name}_raw_decode"] > 0
        node.kill()
        assert " 0 blocks 0.0 MiB, " in _inspect(f"{tmp_path}/disk")
        node.restart()  # its layout is opened again, and so measured, with no engine there
        wait_for("both to be measured again", _both(node, "probe"))
        assert blocks(node)[Tier.DISK] == 0


def test_a_shared_tier_that_is_away_stops_nothing(tmp_path: Path) -> None:
    more = '[redis]\nurl = "redis://127.0.0.1:1"\ncodec = "auto"\n'
    with (
        Process("node", node_toml(tmp_path, host="16MiB", more=more), tmp_path) as node,
        _client(tmp_path) as client,
    ):
        with client.write(new_keys(4)) as lease:
            assert len(lease.slots) == 4
        found = _tier(node, Tier.SHARED)
        assert (found.codec, found.measured_by) == ("raw", "")


def _tier(node: Process, tier: Tier) -> node_pb2.TierStatus:
    return {each.tier: each for each in status(node).layouts[0].tiers}[TO_WIRE[tier]]


def _both(node: Process, by: str) -> Callable[[], bool]:
    return lambda: all(_tier(node, tier).measured_by == by for tier in (Tier.DISK, Tier.SHARED))


def _inspect(what: str) -> str:
    command = [sys.executable, "-m", "kvtier.cli", "inspect", what]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@contextmanager
def _client(folder: Path) -> Iterator[TierClient]:
    client = TierClient(f"{folder}/node.sock", layout(), "test")
    try:
        yield client
    finally:
        client.close()
