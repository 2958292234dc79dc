import threading
import time
from collections.abc import Callable, Iterator

import pytest
import redis

from kvtier.errors import ConfigError, StoreUnavailable
from kvtier.stores import redis as store_module
from kvtier.stores.base import Store
from kvtier.stores.redis import RedisStore
from kvtier.testing.stores import StoreTests, content, frames, key
from kvtier.testing.valkey import ValkeyServer

LAYOUT_ID = "0123456789abcdef"
DEADLINE_S = 30


def store_at(url: str, *, layout_id: str = LAYOUT_ID, ttl_s: int = 1000, timeout_s: float = 10.0):
    return RedisStore(url, prefix="kvtier", layout_id=layout_id, ttl_s=ttl_s, timeout_s=timeout_s)


def wait_until(true: Callable[[], bool]) -> None:
    give_up_at = time.monotonic() + DEADLINE_S
    while not true():
        assert time.monotonic() < give_up_at
        time.sleep(0.01)


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


def test_a_frame_lies_under_its_layout_s_name(server: ValkeyServer, admin: redis.Redis) -> None:
    store = store_at(server.url)
    store.write(frames(["a"]))
    name = f"kvtier:1:{LAYOUT_ID}:{key('a').hex()}"
    assert admin.keys() == [name.encode()]
    assert admin.get(name) == content("a", 1000)
    other = store_at(server.url, layout_id="f" * 16)
    assert other.read([key("a")]) == [None]
    assert other.count([key("a")]) == 0
    other.delete([key("a")])
    assert store.count([key("a")]) == 1
    other.close()
    store.close()


def test_frames_die_unless_they_are_read(server: ValkeyServer, admin: redis.Redis) -> None:
    store = store_at(server.url, ttl_s=1000)
    store.write(frames(["a", "b"]))
    names = [f"kvtier:1:{LAYOUT_ID}:{key(each).hex()}" for each in "ab"]
    assert all(900 < admin.ttl(name) <= 1000 for name in names)
    for name in names:
        admin.expire(name, 50)
    store.read([key("a")])
    store.count([key("b")])
    assert 900 < admin.ttl(names[0]) <= 1000
    assert 0 < admin.ttl(names[1]) <= 50
    admin.pexpire(names[0], 1)
    wait_until(lambda: store.count([key("a")]) == 0)
    assert store.read([key("a"), key("b")]) == [None, content("b", 1000)]
    store.close()


def test_round_trips_are_bounded(
    server: ValkeyServer, admin: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bytes for frames, by growing steps for `count`, which ends where the chain does."""
    sent: list[int] = []
    execute = store_module.Redis.pipeline

    def pipeline(client: redis.Redis, **options: bool) -> object:
        made = execute(client, **options)
        run = made.execute

        def counted(**how: bool) -> object:
            sent.append(len(made.command_stack))
            return run(**how)

        made.execute = counted
        return made

    monkeypatch.setattr(store_module.Redis, "pipeline", pipeline)
    store = store_at(server.url)
    mebi = 2**20
    store.write([*frames(range(10), 3 * mebi), *frames(["big"], 20 * mebi)])
    assert sent == [2, 2, 2, 2, 2, 1]
    sent.clear()
    assert len(store.read([key("big"), *(key(n) for n in range(10))])) == 11
    assert sent[0] == 1
    assert max(sent) * 3 * mebi <= 8 * mebi
    store.write(frames(range(100), 64))
    sent.clear()
    assert store.count([key(n) for n in range(5000)]) == 100
    assert sent == [16, 64, 256]
    sent.clear()
    assert store.read([key(n) for n in range(100)]) == [content(n, 64) for n in range(100)]
    assert sent == [100]
    store.close()


# Bad settings, and secrets


@pytest.mark.parametrize(
    "url",
    [
        "http://:s3cret@h", "redis://:s3/cret@h:1", "redis://:s3cret@h:99999",
        "redis://:s3cret@h:1?colour=blue", "redis://:s3cret@h:1?socket_timeout=soon", "",
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


def test_options_in_the_url_cannot_change_what_is_read(
    server: ValkeyServer, admin: redis.Redis
) -> None:
    store = store_at(server.url + "?decode_responses=true")
    store.write(frames(["a"]))
    assert store.read([key("a")]) == [content("a", 1000)]
    store.close()


# A server that fails


def all_fail(store: Store) -> None:
    for ask in (
        lambda: store.write(frames(["x"])),
        lambda: store.read([key("a")]),
        lambda: store.count([key("a")]),
        lambda: store.delete([key("y")]),
    ):
        with pytest.raises(StoreUnavailable, match=r"redis 127\.0\.0\.1:"):
            ask()


def test_a_server_that_is_gone_and_comes_back(own_server: ValkeyServer) -> None:
    store = store_at(own_server.url)
    store.write(frames(["a"]))
    own_server.kill()
    all_fail(store)
    own_server.restart()
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
    store = store_at(own_server.url, timeout_s=0.3)
    store.write(frames(["a", "b"], 100_000))
    own_server.pause()
    try:
        all_fail(store)
    finally:
        own_server.resume()
    # An answer to a question from before is never taken for one to a later question.
    wait_until(lambda: _answers(store))
    assert store.read([key("b"), key("a")]) == [content("b", 100_000), content("a", 100_000)]
    store.close()


def _answers(store: Store) -> bool:
    try:
        store.count([key("b")])
    except StoreUnavailable:
        return False
    return True


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
        store.delete([key(n) for n in names])
        wait_until(lambda: store.write(frames(["new"], 2**20)) == [True])
        store.close()


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
    server: ValkeyServer, admin: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "MAX_FRAME_NBYTES", 5000)
    store = store_at(server.url)
    assert store.write([*frames(["a"]), *frames(["large"], 5001), *frames(["b"])]) == [
        True, False, True,
    ]  # fmt: skip
    assert store.read([key("a"), key("large"), key("b")])[1] is None
    assert store.count([key("a"), key("b")]) == 2
    store.close()


def test_more_threads_than_connections_wait_for_one(
    server: ValkeyServer, admin: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "MAX_CONNECTIONS", 2)
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
