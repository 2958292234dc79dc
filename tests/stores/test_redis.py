import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import redis

from kvtier.errors import ConfigError, StoreUnavailable
from kvtier.metrics import REGISTRY
from kvtier.stores.base import BROKEN, Store
from kvtier.stores.redis import connection
from kvtier.stores.redis.breaker import FAILURES
from kvtier.stores.redis.parts import MAX_FRAME_NBYTES, PART_NBYTES
from kvtier.stores.redis.resp import ENVELOPE_NBYTES
from kvtier.testing.stores import StoreTests, content, frames, key
from kvtier.testing.valkey import ValkeyServer
from tests.stores.redis_support import (
    DEADLINE_S,
    MIB,
    all_fail,
    answers,
    name_of,
    store_at,
    wait_until,
)


@pytest.fixture(scope="module")
def server() -> Iterator[ValkeyServer]:
    with ValkeyServer() as server:
        yield server


@pytest.fixture
def admin(server: ValkeyServer) -> Iterator[redis.Redis]:
    """A plain client of an empty server."""
    with redis.Redis.from_url(server.url, protocol=2) as client:
        client.flushall()
        yield client


@pytest.fixture
def own_server() -> Iterator[ValkeyServer]:
    """A server that a test may harm."""
    with ValkeyServer() as server:
        yield server


class TestRedisStore(StoreTests):
    shared = True

    @pytest.fixture
    def store(self, server: ValkeyServer, admin: redis.Redis) -> Iterator[Store]:
        store = store_at(server.url)
        yield store
        store.close()


# What lies on the server


def test_a_frame_lies_under_its_namespace_s_and_layout_s_name(
    server: ValkeyServer, admin: redis.Redis
) -> None:
    with closing(store_at(server.url)) as store:
        store.write(frames(["a"]))
        assert admin.keys() == [name_of("a").encode()]
        assert admin.get(name_of("a"))[ENVELOPE_NBYTES:] == content("a", 1000)
        for other in (
            store_at(server.url, layout_id="f" * 16),
            store_at(server.url, namespace="other"),
            store_at(server.url, prefix="other"),
        ):
            with closing(other):
                assert other.read([key("a")]) == [None]
                assert other.count([key("a")]) == 0


def test_frames_die_unless_they_are_read(server: ValkeyServer, admin: redis.Redis) -> None:
    with closing(store_at(server.url, ttl_s=1000)) as store:
        store.write([*frames(["a"], 5 * MIB), *frames(["b"])])
        names = admin.keys()
        assert len(names) == 4
        assert all(900 < admin.ttl(name) <= 1000 for name in names)
        for name in names:
            admin.expire(name, 50)
        store.read([key("a")])
        store.count([key("b")])
        assert 0 < admin.ttl(name_of("b")) <= 50
        admin.pexpire(name_of("b"), 1)
        names.remove(name_of("b").encode())
        assert all(900 < admin.ttl(name) <= 1000 for name in names)
        wait_until(lambda: store.count([key("b")]) == 0)
        assert store.read([key("b"), key("a")]) == [None, content("a", 5 * MIB)]


def test_a_large_frame_lies_in_values_that_never_block_the_server_for_long(
    server: ValkeyServer, admin: redis.Redis
) -> None:
    with closing(store_at(server.url)) as store:
        assert store.write(frames(["large", "small"], 20 * MIB + 1)) == [True, True]
        lengths = [admin.strlen(name) for name in admin.keys("*")]
        assert sum(lengths) > 40 * MIB
        assert max(lengths) <= PART_NBYTES + ENVELOPE_NBYTES
        names = ["small", "large"]
        assert store.read([key(n) for n in names]) == [content(n, 20 * MIB + 1) for n in names]
        assert store.write(frames(["small"], 100)) == [True]
        assert store.read([key("small")]) == [content("small", 100)]


def test_existence_is_asked_in_growing_steps_up_to_the_first_miss(
    server: ValkeyServer, admin: redis.Redis
) -> None:
    def asked() -> int:
        return admin.info("commandstats").get("cmdstat_exists", {"calls": 0})["calls"]

    with closing(store_at(server.url)) as store:
        store.write(frames(range(100), 64))
        admin.config_resetstat()
        assert store.count([key("missing"), *(key(n) for n in range(100))]) == 0
        assert asked() <= 16
        assert store.count([key(n) for n in range(5000)]) == 100
        assert asked() <= 16 + 16 + 64 + 256


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_frame_that_lost_a_part_is_said_to_be_broken_and_may_be_written_again(
    server: ValkeyServer, admin: redis.Redis, lost: int
) -> None:
    """Such as one that the server evicted. It counts as there, so its reader must hear of it."""
    with closing(store_at(server.url)) as store:
        store.write(frames(["a", "b"], 5 * MIB))
        admin.delete(name_of("a", lost))
        left = sorted(admin.keys())
        expected = BROKEN if lost else None
        assert store.read([key("b"), key("a")]) == [content("b", 5 * MIB), expected]
        assert store.count([key("a")]) == (1 if lost else 0)
        assert sorted(admin.keys()) == left, "what is shared was removed"
        assert store.write(frames(["a"], 5 * MIB)) == [True]
        assert store.read([key("a")]) == [content("a", 5 * MIB)]


def test_parts_of_two_writes_are_never_put_together(
    server: ValkeyServer, admin: redis.Redis
) -> None:
    with closing(store_at(server.url)) as store:
        store.write(frames(["a"], 5 * MIB))
        older = admin.get(name_of("a", 1))
        store.write(frames(["a"], 5 * MIB))
        admin.set(name_of("a", 1), older)
        assert store.read([key("a")]) == [BROKEN]


@pytest.mark.parametrize("value", [b"", b"short", b"x" * 40, b"KVTP" + b"\xff" * 60, ["list"]])
def test_a_value_that_is_no_part_of_a_frame_is_broken(
    server: ValkeyServer, admin: redis.Redis, value: bytes | list[str]
) -> None:
    with closing(store_at(server.url)) as store:
        if isinstance(value, list):
            admin.rpush(name_of("a"), *value)
        else:
            admin.set(name_of("a"), value)
        store.write(frames(["b"]))
        assert store.read([key("a"), key("b")]) == [BROKEN, content("b", 1000)]
        assert store.write(frames(["a"])) == [True]
        assert store.read([key("a")]) == [content("a", 1000)]


def test_nothing_that_a_node_calls_removes_a_value(
    server: ValkeyServer, admin: redis.Redis
) -> None:
    """By the server's own count of commands; only a person's `kvtier purge` removes."""
    admin.config_resetstat()
    with closing(store_at(server.url)) as store:
        store.write(frames(["a", "b"], 5 * MIB))
        admin.set(name_of("a", 1), b"damaged")
        assert store.read([key("a"), key("b"), key("c")]) == [BROKEN, content("b", 5 * MIB), None]
        store.delete([key("a"), key("b"), key("c")])
        assert store.count([key("a"), key("b")]) == 2
        assert [*store.scan()] == []
    assert len(admin.keys()) == 6
    removing = ("unlink", "del", "getdel", "flushdb", "flushall", "eval", "rename", "expireat")
    done = admin.info("commandstats")
    assert [name for name in removing if f"cmdstat_{name}" in done] == []


# Bad settings, and secrets


@pytest.mark.parametrize(
    "url",
    [
        "http://:s3cret@h", "redis://:s3/cret@h:1", "redis://:s3cret@h:99999",
        "redis://:s3cret@h:1?colour=blue", "redis://:s3@cret@h", "redis+sentinel://:s3cret@h:1", "",
    ],
)  # fmt: skip
def test_a_bad_url_is_refused_without_saying_it(url: str) -> None:
    with pytest.raises(ConfigError, match=r"redis.url is not redis://") as caught:
        store_at(url)
    assert "s3" not in str(caught.value)
    assert "cret" not in str(caught.value)
    assert caught.value.__suppress_context__


def test_the_password_is_used_and_never_said() -> None:
    with ValkeyServer(password="s3cret") as server:
        store = store_at(server.url)
        assert store.write(frames(["a"])) == [True]
        assert "s3cret" not in repr(store) + str(store)
        assert str(server.port) in repr(store)
        wrong = store_at(server.url.replace("s3cret", "wr0ng"))
        with pytest.raises(StoreUnavailable) as caught:
            wrong.read([key("a")])
        assert "wr0ng" not in str(caught.value) + repr(caught.value.__cause__)
        with pytest.raises(StoreUnavailable):
            store_at(server.url.replace(":s3cret@", "")).read([key("a")])
        server.kill()
        with pytest.raises(StoreUnavailable) as caught:
            store.read([key("a")])
        assert "s3cret" not in str(caught.value) + repr(caught.value.__cause__)
        store.close()
        wrong.close()


# A server that fails


def test_a_server_that_is_gone_and_comes_back(own_server: ValkeyServer) -> None:
    store = store_at(own_server.url)
    store.write(frames(["a"]))
    own_server.kill()
    all_fail(store)
    own_server.restart()
    wait_until(lambda: answers(store))
    assert store.read([key("a")]) == [None]
    assert store.write(frames(["a"])) == [True]
    own_server.restart()  # between two calls: what was pooled is dead, and nobody notices
    assert store.read([key("a")]) == [None]
    store.close()


def test_kill_9_in_mid_use(own_server: ValkeyServer) -> None:
    """Every thread learns of it, none reads wrong bytes, and all go on after a restart."""
    store = store_at(own_server.url, timeout_s=2.0)
    failures = threading.Semaphore(0)
    wrong: list[object] = []
    ended = threading.Event()

    def use(thread: int) -> None:
        while not ended.is_set():
            try:
                store.write(frames([thread], 300_000))
                if store.read([key(thread)])[0] not in (None, content(thread, 300_000)):
                    wrong.append(thread)
            except StoreUnavailable:
                failures.release()
                time.sleep(0.01)

    threads = [threading.Thread(target=use, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    with redis.Redis.from_url(own_server.url, protocol=2) as admin:
        wait_until(lambda: admin.dbsize() == 4)
    own_server.kill()
    assert all(failures.acquire(timeout=DEADLINE_S) for _ in range(8))
    own_server.restart()
    with redis.Redis.from_url(own_server.url, protocol=2) as admin:
        wait_until(lambda: admin.dbsize() == 4)
    ended.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    store.close()


def test_a_server_that_hangs(own_server: ValkeyServer) -> None:
    """An answer to a question from before is never taken for one to a later question."""
    with closing(store_at(own_server.url)) as patient:
        patient.write(frames(["a", "b"], 100_000))
    with closing(store_at(own_server.url, timeout_s=0.3)) as store:
        for _ in range(3):
            own_server.pause()
            with pytest.raises(StoreUnavailable):
                store.count([key("a")])
            resume = threading.Timer(0.1, own_server.resume)
            resume.start()
            with contextlib.suppress(StoreUnavailable):  # of a machine that is too slow for it
                assert store.read([key("b")]) == [content("b", 100_000)]
            resume.join()
            wait_until(lambda: answers(store))
        own_server.pause()
        try:
            all_fail(store)
        finally:
            own_server.resume()
        wait_until(lambda: answers(store))
    with closing(store_at(own_server.url)) as patient:
        both = patient.read([key("b"), key("a")])
        assert both == [content("b", 100_000), content("a", 100_000)]


def test_a_server_that_never_was() -> None:
    with ValkeyServer() as server:
        url = server.url
    store = store_at(url)
    all_fail(store)
    store.close()


def test_a_full_server_refuses_and_recovers() -> None:
    with ValkeyServer(maxmemory=6 * 2**20) as server:
        store = store_at(server.url)
        kept = store.write(frames(range(10), 2**20))
        assert kept[0]
        assert not kept[-1]
        names = [n for n in range(10) if kept[n]]
        assert store.read([key(n) for n in range(10)]) == [
            content(n, 2**20) if n in names else None for n in range(10)
        ]
        with redis.Redis.from_url(server.url, protocol=2) as admin:
            admin.flushall()
        wait_until(lambda: store.write(frames(["new"], 2**20)) == [True])
        store.close()


def test_parts_of_what_a_full_server_refused_die_soon() -> None:
    """Nobody could ever read them, and they would take the room of others as long as `ttl_s`."""
    with (
        ValkeyServer(maxmemory=14 * MIB) as server,
        closing(store_at(server.url, ttl_s=100_000)) as store,
        redis.Redis.from_url(server.url, protocol=2) as admin,
    ):
        assert store.write(frames(["a", "large"], 9 * MIB)) == [True, False]
        assert store.read([key("a"), key("large")]) == [content("a", 9 * MIB), None]
        kept = {name_of("a", part).encode() for part in range(5)}
        assert min(admin.ttl(name) for name in kept) > 90_000
        left = set(admin.keys()) - kept
        assert left <= {name_of("large", part).encode() for part in range(1, 5)}
        assert all(0 < admin.ttl(name) <= 60 + 12 for name in left)
        refused = REGISTRY.get_sample_value("kvtier_store_refused_total", {"tier": "shared"})
        assert refused
        admin.delete(*kept)
        wait_until(lambda: store.write(frames(["large"], 9 * MIB)) == [True])
        assert min(admin.ttl(name) for name in admin.keys("*")) > 90_000


def test_a_server_that_is_loading_gives_no_answer_until_it_has_loaded(tmp_path: Path) -> None:
    with ValkeyServer(folder=tmp_path) as server, closing(store_at(server.url)) as store:
        store.write(frames(range(50)))
        assert server.call("SAVE") == b"OK"
    slow = "key-load-delay 100000\nloading-process-events-interval-bytes 1024"
    with (
        ValkeyServer(folder=tmp_path, settings=slow) as server,
        closing(store_at(server.url)) as store,
    ):
        all_fail(store, "LOADING")
        server.call("CONFIG", "SET", "key-load-delay", 0)
        wait_until(lambda: answers(store))
        assert store.count([key(n) for n in range(50)]) == 50


def test_a_dead_server_is_left_alone_and_asked_again_now_and_then() -> None:
    """Seen from its side: a listener that hangs up on everyone."""
    came = 0
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

        def hang_up() -> None:
            nonlocal came
            with contextlib.suppress(OSError):
                while True:
                    listener.accept()[0].close()
                    came += 1

        thread = threading.Thread(target=hang_up)
        thread.start()
        stack.callback(thread.join)
        stack.callback(listener.shutdown, socket.SHUT_RDWR)
        url = f"redis://127.0.0.1:{listener.getsockname()[1]}"
        store = stack.enter_context(closing(store_at(url)))

        def no_answer() -> int:
            with pytest.raises(StoreUnavailable):
                store.count([key("a")])
            return came

        for _ in range(2000):
            no_answer()
        assert FAILURES <= came < 1000
        before = came
        wait_until(lambda: no_answer() > before)


def test_a_replica_gives_no_answer_to_a_write(own_server: ValkeyServer) -> None:
    store = store_at(own_server.url)
    store.write(frames(["a"]))
    with redis.Redis.from_url(own_server.url, protocol=2) as admin:
        admin.replicaof("127.0.0.1", 1)
        with pytest.raises(StoreUnavailable, match=r"(?i)read.?only"):
            store.write(frames(["b"]))
        admin.replicaof("NO", "ONE")
    assert store.write(frames(["b"])) == [True]
    store.close()


def test_a_user_who_may_do_nothing_is_told_so(own_server: ValkeyServer) -> None:
    """A command that fails is no miss, and never a hit."""
    with redis.Redis.from_url(own_server.url, protocol=2) as admin:
        admin.execute_command("ACL", "SETUSER", "guest", "on", ">s3cret", "~*", "+@connection")
    store = store_at(own_server.url.replace("redis://", "redis://guest:s3cret@"))
    all_fail(store)
    with pytest.raises(StoreUnavailable, match="permission") as caught:
        store.count([key("a")])
    assert "s3cret" not in str(caught.value)
    store.close()


def test_a_frame_that_no_server_takes_is_refused_at_once(
    server: ValkeyServer, admin: redis.Redis
) -> None:
    large = np.empty(MAX_FRAME_NBYTES + 1, np.uint8).data  # takes no memory: it is never touched
    with closing(store_at(server.url)) as store:
        wanted = [*frames(["a"]), (key("large"), [large]), *frames(["b"])]
        assert store.write(wanted) == [True, False, True]
        assert store.read([key("a"), key("large"), key("b")])[1] is None
        assert store.count([key("a"), key("b")]) == 2


def test_more_threads_than_connections_wait_for_one(
    server: ValkeyServer, admin: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "MAX_CONNECTIONS", 2)
    store = store_at(server.url)
    failures: list[str] = []

    def use(thread: int) -> None:
        try:
            store.write(frames([thread], 200_000))
            if store.read([key(thread)]) != [content(thread, 200_000)]:
                failures.append("other bytes")
        except StoreUnavailable as error:
            failures.append(str(error))

    threads = [threading.Thread(target=use, args=(n,)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len([c for c in admin.client_list() if c["id"] != str(admin.client_id())]) <= 2
    store.close()
