"""kvtier's side of the vLLM tier, without vLLM: plain memory above, a real daemon below."""

import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from kvtier.core.blocks import BEGINS, BlockLayout
from kvtier.core.tiers import Tier as Tiers
from kvtier.core.vllm_keys import key_of
from kvtier.engine.client import TierClient
from kvtier.engine.vllm.hub import Hub, Identity
from kvtier.engine.vllm.line import Health
from kvtier.engine.vllm.lookups import MAX_AHEAD
from kvtier.engine.vllm.namespace import identity, row_layout
from kvtier.engine.vllm.settings import TierSettings, completed, engine_table
from kvtier.engine.vllm.transfers import Outcome, befores
from kvtier.errors import ConfigError
from kvtier.sim.trace import read_trace
from kvtier.testing.valkey import ValkeyServer
from kvtier.wire import local
from kvtier.wire.chains import hear
from kvtier.wire.pb import feed_pb2, feed_pb2_grpc
from tests.launching import Process, disk_toml, node_toml, redis_toml, wait_for

ROW = 8192  # bytes
ROWS = 32
FACTS = {"dtype": "bfloat16", "chunk_tokens": 16, "hash": "sha256_cbor", "model": "/a"}
LAYOUT = row_layout(ROW, 16, "bfloat16")
IDENTITY = Identity(b"root", LAYOUT)


def keys(count: int, start: int = 0, group: int = 0) -> list[bytes]:
    """OffloadKeys as vLLM makes them."""
    return [bytes([1]) * 28 + n.to_bytes(4, "big") + group.to_bytes(4, "big")
            for n in range(start, start + count)]  # fmt: skip


class Tier:
    """A hub and its region, driven as vLLM's scheduler would."""

    def __init__(
        self, socket: Path, *, layout: BlockLayout = LAYOUT,
        identify: Callable[[], Identity] | None = None, **settings: object,
    ) -> None:  # fmt: skip
        self.region = np.zeros((ROWS, ROW), np.int8)
        patient = {"lookup_s": 30.0, "load_s": 30.0, "store_s": 30.0, **settings}
        table = TierSettings.parse({"socket": str(socket), **patient})
        who = Identity(b"root", layout)
        self.hub = Hub(memoryview(self.region), identify or (lambda: who), table)
        self.numbers = itertools.count()

    def fill(self, row: int, value: int) -> None:
        self.region[row] = np.resize(np.arange(value, value + 97, dtype=np.int8), ROW)

    def submit(
        self, keys: list[bytes], rows: list[int], *, storing: bool, request: str | None = None,
        before: dict[bytes, bytes] | None = None,
    ) -> int:  # fmt: skip
        number = next(self.numbers)
        job = self.hub.transfers.submit
        job(number, storing=storing, keys=keys, rows=rows, before=before, request=request)
        return number

    def finished(self, number: int) -> Outcome:
        found: list[Outcome] = []

        def there() -> bool:
            found.extend(self.hub.transfers.finished())
            return any(each.job == number for each in found)

        wait_for("a job to end", there)
        return next(each for each in found if each.job == number)

    def store(self, keys: list[bytes], rows: list[int]) -> Outcome:
        return self.finished(self.submit(keys, rows, storing=True))

    def load(self, keys: list[bytes], rows: list[int]) -> Outcome:
        return self.finished(self.submit(keys, rows, storing=False))

    def held(self, keys: list[bytes], request: str = "r") -> int:
        """Leading blocks that a request finds, in as many steps as it takes."""
        answers: list[bool | None] = []

        def known() -> bool:
            answers[:] = [self.hub.lookups.lookup(request, key) for key in keys]
            self.hub.lookups.flush()
            return None not in answers

        wait_for("a lookup", known)
        self.hub.lookups.end(request)
        return next((n for n, answer in enumerate(answers) if not answer), len(keys))


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Process]:
    with Process(
        "node", node_toml(tmp_path, host="1MiB", more=disk_toml(tmp_path)), tmp_path
    ) as it:
        yield it


@pytest.fixture
def tier(tmp_path: Path, node: Process) -> Iterator[Tier]:
    it = Tier(tmp_path / "node.sock")
    yield it
    it.hub.close()


def test_what_comes_before_a_block_is_known_by_all_of_its_request():
    first, other = keys(6), keys(4, group=1)
    named = dict.fromkeys([*first[:4], *other[:3], *first[4:], *other[3:]])  # as they came
    links = dict(zip(first[1:], first, strict=False)) | dict(zip(other[1:], other, strict=False))
    assert befores(named, [*named]) == links
    assert befores(named, first[4:]) == {each: links[each] for each in first[4:]}
    assert befores(named, [other[0], first[0], first[3]]) == {first[3]: first[2]}
    assert befores(named, []) == {}


def test_another_record_of_a_request_is_none():
    """vLLM has no name for it: a release may keep another, and an error would end the engine."""
    first = keys(6)
    named = dict.fromkeys(first)
    others = [None, {}, [], [*first], 7, object(), {0: first}, dict.fromkeys(first[1:]),
              {7: 0, **named}, {**named, None: 0}, {(0, key): 0 for key in first}]  # fmt: skip
    assert [befores(other, first) for other in others] == [None] * len(others)


def test_the_daemon_tells_which_block_comes_before_what_was_stored(tier, node):
    """Pieces of a prompt, of which some blocks are not stored, and of another group of layers."""
    first, other = keys(12), keys(5, group=1)
    links = dict(zip(first[1:], first, strict=False)) | dict(zip(other[1:], other, strict=False))
    for some in (first[:4], [*first[5:7], *first[8:12], *other[2:5]]):
        job = tier.submit(some, list(range(len(some))), storing=True, before=links)
        assert tier.finished(job).whole
    wanted = {*first[:4], *first[5:7], *first[8:12], *other[2:5]}
    as_told = {key_of(b"root", each): key_of(b"root", links[each]) for each in wanted
               if each in links}  # fmt: skip
    told: dict[bytes, bytes] = {}
    with grpc.insecure_channel(node.address) as channel:
        for message in feed_pb2_grpc.FeedStub(channel).Watch(feed_pb2.WatchRequest(), timeout=60):
            for part in message.snapshot.held:
                for chain in hear(part, list(Tiers)):
                    blocks = local.unpack_keys(chain.packed)
                    told |= dict(zip(blocks, [chain.before, *blocks], strict=False))
            if message.snapshot.last:
                break
    assert told == {**as_told, key_of(b"root", first[0]): BEGINS}


def stored(tier: Tier, count: int = 8) -> list[bytes]:
    some = keys(count)
    for row in range(count):
        tier.fill(row, row)
    assert tier.store(some, list(range(count))).whole
    return some


def test_what_is_loaded_is_what_was_stored(tier):
    some = stored(tier)
    assert tier.held([*some, *keys(2, 50)]) == 8
    outcome = tier.load(some, list(range(20, 28)))
    assert outcome.whole
    assert outcome.nbytes == 8 * ROW
    assert np.array_equal(tier.region[20:28], tier.region[:8])


def test_nothing_is_found_of_what_was_never_stored(tier):
    stored(tier)
    assert tier.held(keys(3, 100)) == 0
    before = tier.region.copy()
    outcome = tier.load([*keys(2), *keys(2, 100)], [20, 21, 22, 23])
    assert (outcome.done, outcome.whole) == (2, False)
    assert np.array_equal(tier.region[22:], before[22:]), "rows of a miss stay as they were"


def test_a_store_of_what_is_held_copies_nothing(tier):
    some = stored(tier)
    again = tier.store([*some, *keys(1, 8)], list(range(9)))
    assert again.whole
    assert again.nbytes == ROW


def test_groups_of_layers_are_apart(tier):
    stored(tier)
    assert tier.held(keys(4, group=1)) == 0
    mixed = [*keys(2), *keys(2, group=1)]
    assert tier.held(mixed) == 2
    assert tier.store(mixed, [0, 1, 5, 6]).whole
    assert tier.load(mixed, [20, 21, 22, 23]).whole
    assert np.array_equal(tier.region[20:24], tier.region[[0, 1, 5, 6]])


def test_a_prompt_larger_than_the_arena(tier):
    # 1 MiB of host memory are 128 blocks; more go down to the disk, and come back.
    for at in range(0, 320, ROWS):
        some = keys(ROWS, at)
        tier.region[:] = (np.arange(ROWS, dtype=np.int8) + at % 97)[:, None]
        wait_for("room", lambda some=some: tier.store(some, list(range(ROWS))).whole)
    assert tier.held(keys(320)) == 320
    tier.region[:] = 0
    assert tier.load(keys(ROWS), list(range(ROWS))).whole
    assert np.array_equal(tier.region[:, 0], np.arange(ROWS, dtype=np.int8))


def test_from_the_shared_store_of_another_node(tmp_path):
    with ValkeyServer() as valkey:
        one, two = tmp_path / "one", tmp_path / "two"
        for folder in (one, two):
            folder.mkdir()
        with Process("node", node_toml(one, more=redis_toml(valkey.url)), one) as first:
            tier = Tier(one / "node.sock")
            stored(tier)
            tier.hub.close()
            first.terminate()  # saves what it holds
        with Process("node", node_toml(two, more=redis_toml(valkey.url)), two):
            other = Tier(two / "node.sock")
            assert other.held(keys(9)) == 8
            assert other.load(keys(8), list(range(8))).whole
            assert np.array_equal(other.region[:8], tier.region[:8])
            other.hub.close()


def test_without_a_daemon_everything_is_a_miss_until_there_is_one(tmp_path):
    tier = Tier(tmp_path / "node.sock")
    assert tier.held(keys(3)) == 0
    assert not tier.store(keys(3), [0, 1, 2]).done
    assert not tier.load(keys(3), [0, 1, 2]).done
    assert tier.hub.health.away
    with Process("node", node_toml(tmp_path), tmp_path):
        wait_for("the daemon to be found", lambda: tier.store(keys(3), [0, 1, 2]).whole)
        assert tier.held(keys(3)) == 3
        assert not tier.hub.health.away
    tier.hub.close()


def test_a_daemon_killed_and_restarted(tier, node):
    some = stored(tier)
    node.kill()
    assert tier.held(some) == 0
    assert not tier.load(some, list(range(20, 28))).done
    node.restart()
    wait_for("the daemon to be found", lambda: tier.store(some, list(range(8))).whole)
    # Each of the three connections tries again by itself.
    wait_for("a load", lambda: tier.load(some, list(range(20, 28))).whole)
    assert np.array_equal(tier.region[20:28], tier.region[:8])


def test_a_daemon_that_hangs_costs_no_more_than_the_deadlines(tmp_path, node):
    tier = Tier(tmp_path / "node.sock", lookup_s=0.2, load_s=0.2, store_s=0.2)
    tier.fill(0, 1)  # not as empty as the rows that a late load would fill
    tier.fill(1, 2)
    wait_for("a first store", lambda: tier.store(keys(2), [0, 1]).whole)
    node.process.send_signal(19)  # SIGSTOP
    try:
        before = tier.region.copy()
        assert tier.held(keys(2), "hangs") == 0
        assert tier.load(keys(2), [20, 21]).done == 0
        assert tier.store(keys(2, 5), [0, 1]).done == 0
        assert tier.hub.lookups.late
        tier.hub.transfers.drain()
        assert not tier.hub.transfers.finished()
    finally:
        node.process.send_signal(18)  # SIGCONT
    # What the daemon answers now is too late: the rows belong to others.
    wait_for("the daemon to answer again", lambda: tier.held(keys(2), str(time.monotonic())) == 2)
    assert np.array_equal(tier.region, before)
    tier.hub.close()


def test_a_request_is_known_to_wait_for_us_until_there_is_an_answer(tier, node):
    some = stored(tier)
    assert tier.held(some) == 8
    hub = tier.hub
    node.process.send_signal(19)  # SIGSTOP
    try:
        assert hub.lookups.lookup("a", some[0]) is None
        hub.lookups.flush()
        hub.transfers.submit(99, storing=False, keys=some, rows=list(range(20, 28)), request="b")
        hub.transfers.submit(98, storing=True, keys=keys(1, 60), rows=[9], request="c")
        assert [hub.pending(request) for request in "abcd"] == [True, True, False, False]
        hub.step(idle=True)
        assert not hub.answered("a"), "only a moment is waited"
        assert not hub.answered("d"), "nothing was asked"
    finally:
        node.process.send_signal(18)  # SIGCONT
    wait_for("an answer", lambda: hub.step(idle=True) or hub.answered("a") or not hub.pending("a"))
    assert hub.lookups.lookup("a", some[0]) is True
    wait_for("a load", lambda: not hub.pending("b"))
    assert np.array_equal(tier.region[20:28], tier.region[:8])


def test_nobody_waits_longer_than_a_lookup_may_last(tmp_path, node):
    now = [0.0]
    region = np.zeros((ROWS, ROW), np.int8)
    table = TierSettings(socket=str(tmp_path / "node.sock"), lookup_s=1.0)
    who = Identity(b"root", LAYOUT)
    hub = Hub(memoryview(region), lambda: who, table, clock=lambda: now[0])
    node.process.send_signal(19)  # SIGSTOP
    try:
        assert hub.lookups.lookup("a", keys(1)[0]) is None
        hub.lookups.flush()
        assert hub.pending("a")
        now[0] = 1.0
        assert not hub.pending("a")
        assert hub.lookups.lookup("a", keys(1)[0]) is False
    finally:
        node.process.send_signal(18)  # SIGCONT
    hub.close()


def looked_up(tier: Tier, request: str, names: list[bytes]) -> list[bool | None]:
    """One step's look-up, as vLLM makes it: it ends at the first miss."""
    answers: list[bool | None] = []
    for name in names:
        answers.append(tier.hub.lookups.lookup(request, name))
        if answers[-1] is False:
            break
    return answers


def test_requests_that_come_at_once_are_asked_for_before_they_are_looked_up(tier):
    some = stored(tier)
    lookups = tier.hub.lookups
    names = {"new": keys(4, 100), "known": [*some, *keys(2, 50)], "deeper": keys(8, 200)}
    for request, each in names.items():
        lookups.ahead(request, each)
    assert not any(tier.hub.pending(request) for request in names), "nobody has looked them up"
    assert looked_up(tier, "deeper", names["deeper"][3:]) == [None] * 5, "vLLM has three of them"
    wait_for("the answers", lambda: not tier.hub.pending("deeper"))
    assert looked_up(tier, "new", names["new"]) == [False]
    assert looked_up(tier, "known", names["known"]) == [*[True] * 8, False]
    # What lies behind a miss was not asked for.
    assert looked_up(tier, "deeper", names["deeper"][3:]) == [None] * 5
    lookups.step_ends()
    wait_for("an answer", lambda: looked_up(tier, "deeper", names["deeper"][3:]) == [False])


def test_what_was_asked_for_in_an_earlier_step_is_asked_for_anew(tier):
    some = keys(8)
    tier.hub.lookups.ahead("a", some)
    tier.hub.lookups.step_ends()  # no place for it in this one
    stored(tier)
    assert tier.held(some, "a") == 8


def test_a_request_looked_up_while_it_is_asked_for_ahead_waits_for_the_answer(tier, node):
    some = stored(tier)
    node.process.send_signal(19)  # SIGSTOP
    try:
        tier.hub.lookups.ahead("a", some)
        assert looked_up(tier, "a", some) == [None] * 8
        tier.hub.lookups.step_ends()
        assert tier.hub.pending("a")
    finally:
        node.process.send_signal(18)  # SIGCONT
    wait_for("the answer", lambda: not tier.hub.pending("a"))
    assert looked_up(tier, "a", some) == [True] * 8
    tier.hub.lookups.end("a")
    assert not tier.hub.lookups.waiting


def test_no_more_requests_are_asked_for_ahead_than_find_a_place_in_the_step(tier):
    lookups = tier.hub.lookups
    assert not lookups.ahead("hybrid", [*keys(2), *keys(2, group=1)])
    assert not lookups.ahead("none", [])

    def asked(step: int) -> int:
        """How many are asked for of more than may be; in the first step none has a place."""
        names = [f"{step} {number}" for number in range(MAX_AHEAD + 1)]
        count = sum(lookups.ahead(name, keys(1, 100)) for name in names)
        if step:
            for name in names:
                lookups.lookup(name, keys(1, 100)[0])
        lookups.step_ends()
        wait_for("the answers", lambda: not any(map(tier.hub.pending, names)))
        for name in names:
            lookups.end(name)
        return count

    assert [asked(step) for step in range(7)] == [MAX_AHEAD, 1, 2, 4, 8, 16, 16]
    assert not lookups.waiting


def test_requests_that_need_nothing_of_us_had_their_place_all_the_same(tier):
    lookups = tier.hub.lookups

    def asked(step: int, *, turn: bool) -> int:
        names = [f"{step} {number}" for number in range(4)]
        count = sum(lookups.ahead(name, keys(1, 100)) for name in names)
        for name in names if turn else ():
            lookups.turn(name)  # all of it is in VRAM, so no block is looked up
        lookups.step_ends()
        assert not lookups.waiting
        for name in names:
            lookups.end(name)
        return count

    assert [asked(step, turn=True) for step in range(3)] == [4, 4, 4]
    assert [asked(step, turn=False) for step in range(3, 6)] == [4, 1, 1]


def test_what_nobody_waits_for_any_more_is_not_asked(tmp_path, node, monkeypatch):
    match, asked = TierClient.match, []

    def heard(client, names):
        asked.append(list(names))
        return match(client, names)

    monkeypatch.setattr(TierClient, "match", heard)
    now, go_on = [0.0], threading.Event()
    table = TierSettings(socket=str(tmp_path / "node.sock"), lookup_s=1.0)
    hub = Hub(
        memoryview(np.zeros((ROWS, ROW), np.int8)), lambda: go_on.wait(60) and IDENTITY, table,
        clock=lambda: now[0],
    )  # fmt: skip
    try:
        for name in ("no place", "ended", "late"):
            assert hub.lookups.ahead(name, keys(4, 100))
        hub.lookups.end("ended")
        hub.lookups.turn("late")
        assert hub.lookups.lookup("late", keys(4, 100)[0]) is None
        hub.lookups.step_ends()
        now[0] = 1.0  # the daemon was busy for so long
        assert hub.lookups.lookup("late", keys(4, 100)[0]) is False
        assert hub.lookups.ahead("new", keys(4, 200))
        hub.lookups.lookup("new", keys(4, 200)[0])
        go_on.set()
        wait_for("the answer", lambda: not hub.pending("new"))
        assert hub.lookups.lookup("new", keys(4, 200)[0]) is False
        assert len(asked) == 1, "only the new one's"
    finally:
        go_on.set()
        hub.close()


def test_a_vllm_that_names_blocks_otherwise_is_not_asked_ahead_and_told_once(tier, caplog):
    stored(tier)
    hub = tier.hub

    class Elsewhere:
        """The scheduler of a release without the book that the connector reads."""

    def names() -> list[bytes]:
        return Elsewhere()._req_status["r"]  # type: ignore[attr-defined]

    for number in range(5):
        assert not hub.expect(f"r{number}", names)
    assert not hub.expect("later", lambda: keys(8)), "what was missing is not looked for again"
    assert (hub.health.failures, hub.health.away) == (1, False)
    (said,) = [line for line in caplog.messages if "_req_status" in line]
    assert "so none is asked for ahead" in said
    assert tier.held([*keys(8), *keys(2, 50)]) == 8, "all is found when it is looked up"


def test_a_bug_on_the_way_to_the_daemon_is_a_miss_until_it_has_passed(tmp_path, node, caplog):
    tries = itertools.count()

    def identify() -> Identity:
        if next(tries) < 4:  # more than there are lines
            raise LookupError("shapes of another release")
        return IDENTITY

    tier = Tier(tmp_path / "node.sock", identify=identify)
    try:
        wait_for("a store", lambda: tier.store(keys(2), [0, 1]).whole)
        assert tier.held(keys(2)) == 2
        assert tier.hub.health.failures == 4
        said = [line for line in caplog.messages if "kvtier is away" in line]
        assert said, caplog.messages
        assert all("shapes of another release" in line for line in said)
    finally:
        tier.hub.close()


def test_a_bug_does_not_take_the_daemon_for_away(caplog):
    health = Health()
    for error in (ValueError("one"), ValueError("one more"), KeyError("another")):
        health.fault("a bug", error)
    assert (health.failures, health.away) == (3, False)
    assert caplog.messages == [
        "kvtier: a bug (ValueError: one)",
        "kvtier: a bug (KeyError: 'another')",
    ]


def test_stores_under_way_leave_room_in_the_region(tmp_path):
    tier = Tier(tmp_path / "node.sock")
    tier.hub.transfers.drain()
    go_on = threading.Event()
    gate = Tier.__new__(Tier)  # a line that never gets on: its layout is never known
    gate.region, gate.numbers = np.zeros((ROWS, ROW), np.int8), itertools.count()
    gate.hub = Hub(
        memoryview(gate.region), lambda: go_on.wait(60) and None, TierSettings(socket="/none")
    )  # type: ignore[arg-type, return-value]
    first = gate.submit(keys(20), list(range(20)), storing=True)
    second = gate.submit(keys(12, 20), list(range(20, 32)), storing=True)
    assert gate.finished(second).done == 0
    assert gate.hub.transfers.dropped == 12
    gate.hub.transfers.drain()
    assert gate.finished(first).done == 0
    go_on.set()
    gate.hub.close()
    tier.hub.close()


def test_a_failed_load_is_a_miss_for_the_rest_of_the_request(tier):
    some = stored(tier)
    wait_for(
        "an answer", lambda: (tier.hub.lookups.lookup("a", some[0]), tier.hub.lookups.flush())[0]
    )
    tier.hub.lookups.failed(some)
    assert tier.hub.lookups.lookup("a", some[0]) is False


def test_nobody_can_tell_who_the_engine_is(tmp_path, node):
    region = np.zeros((ROWS, ROW), np.int8)
    table = TierSettings(socket=str(tmp_path / "node.sock"))
    tier = Tier.__new__(Tier)
    tier.hub, tier.numbers = Hub(memoryview(region), lambda: None, table), itertools.count()
    assert tier.held(keys(2)) == 0
    assert not tier.store(keys(2), [0, 1]).done
    tier.hub.close()


@pytest.mark.parametrize(
    ("nbytes", "tokens", "dtype"),
    [
        (737280, 32, "bfloat16"),
        (8192, 16, "fp8_e4m3"),
        (4096 * 7, 3, "float32"),
        (1 << 29, 128, "float16"),
    ],
)
def test_a_row_of_any_size_has_a_layout(nbytes, tokens, dtype):
    assert row_layout(nbytes, tokens, dtype).nbytes == nbytes


def test_what_differs_has_other_keys():
    def root(weights: str = "w", adapters: str = "", tenant: str = "", **more: object) -> bytes:
        return identity({**FACTS, **more}, ROW, weights, adapters, tenant).root

    assert root() == root(model="/elsewhere")
    others = [
        root("v"),
        root(adapters="1"),
        root(tenant="t"),
        root(hash="sha256"),
        root(layout="x"),
    ]
    assert len({root(), *others}) == 6


def test_one_flag_is_enough():
    whole = completed({})
    assert whole["spec_name"] == "KvtierSpec"
    assert whole["cpu_bytes_to_use"]
    tier = completed({"kvtier": {"load_s": 1.5}, "cpu_bytes_to_use": 7})
    assert tier["cpu_bytes_to_use"] == 7
    assert tier["secondary_tiers"][0]["load_s"] == 1.5


@pytest.mark.parametrize(
    ("table", "text"),
    [
        ({"load_s": 0}, "load_s is 0"),
        ({"lode_s": 1}, "'lode_s'"),
        ({"socket": 3}, "socket must be"),
        ({"save": "evict"}, "save is 'evict', must be 'fill' or 'second-use'"),
    ],
)
def test_a_wrong_setting_is_named(table, text):
    with pytest.raises(ConfigError, match=text):
        completed({"kvtier": table})


def test_more_of_vllms_arguments_come_as_json():
    assert engine_table("") == {}
    assert engine_table('{"tensor_parallel_size": 2}') == {"tensor_parallel_size": 2}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("{", "worker.vllm is not JSON"),
        ("[]", "worker.vllm must be a JSON table"),
        ('{"block_size": 16}', "worker.vllm: block_size is for worker.block_tokens to say"),
    ],
)
def test_arguments_that_the_worker_decides_are_refused(text, line):
    with pytest.raises(ConfigError, match=line):
        engine_table(text)


def test_a_recorded_prompt_is_all_that_was_loaded_and_saved_of_it(
    tmp_path: Path, node: Process, tier: Tier
) -> None:
    """vLLM saves a long prompt step by step, and of the next turn what is new."""
    out, path = tmp_path / "trace.jsonl", keys(9)
    recorder = subprocess.Popen(
        [sys.executable, "-m", "kvtier.cli", "trace", "record", node.address,
         "--out", str(out), "--requests", "2"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert recorder.stderr is not None
        assert recorder.stderr.readline().startswith(b"recording")

        def job(some: list[bytes], request: str, *, storing: bool) -> None:
            rows = list(range(len(some)))
            number = tier.submit(some, rows, storing=storing, request=request)
            assert tier.finished(number).whole

        job(path[:3], "first", storing=True)
        job(path[3:5], "first", storing=True)
        job(path[:5], "second", storing=False)
        job(path[5:6], "second", storing=True)
        job(path[6:9], "second", storing=True)
        job(keys(1, start=20), "third", storing=True)  # where it begins, the others are whole
        _, stderr = recorder.communicate(timeout=60)
        assert recorder.returncode == 0, stderr
    finally:
        if recorder.poll() is None:
            recorder.kill()
        recorder.communicate()
    first, second = (each.blocks for each in read_trace(out))
    assert first == tuple(range(5))
    assert second == tuple(range(9))
