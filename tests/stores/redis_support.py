"""What the tests of the shared tier have in common."""

import threading
import time
from collections.abc import Callable

import pytest

from kvtier.config import RedisConfig
from kvtier.errors import StoreUnavailable
from kvtier.stores.base import Store
from kvtier.stores.redis import RedisStore
from kvtier.testing.stores import frames, key

LAYOUT_ID = "0123456789abcdef"
DEADLINE_S = 60
MIB = 2**20


def store_at(url: str, *, layout_id: str = LAYOUT_ID, **settings: object) -> RedisStore:
    """A store that never waits long for a server that failed before."""
    given = {"ttl_s": 1000, "timeout_s": 10.0, "retry_s": 0.05, **settings}
    return RedisStore(RedisConfig(url=url, **given), layout_id)


def name_of(name: object, part: int = 0) -> str:
    head = f"kvtier:3:main:{LAYOUT_ID}:{{{key(name).hex()}}}"
    return f"{head}:{part}" if part else head


def wait_until(true: Callable[[], bool]) -> None:
    give_up_at = time.monotonic() + DEADLINE_S
    while not true():
        assert time.monotonic() < give_up_at
        time.sleep(0.01)


def answers(store: Store) -> bool:
    try:
        store.count([key("b")])
    except StoreUnavailable:
        return False
    return True


def takes(store: Store, name: object) -> bool:
    """Whether a write is kept now; no answer is none."""
    try:
        return store.write(frames([name])) == [True]
    except StoreUnavailable:
        return False


def all_fail(store: Store, match: str = r"redis 127\.0\.0\.1:") -> None:
    for ask in (
        lambda: store.write(frames(["x"])),
        lambda: store.read([key("a")]),
        lambda: store.count([key("a")]),
    ):
        with pytest.raises(StoreUnavailable, match=match):
            ask()


def no_thread_left(before: int) -> None:
    wait_until(lambda: threading.active_count() <= before)
