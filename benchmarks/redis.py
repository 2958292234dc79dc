"""The shared tier over loopback, beside bare redis-py on the same server, in turn.

Blocks of 512 KiB, 2 MiB and 16 MiB, one at a time, as frames of codec raw: what `RedisStore` adds
(envelopes, parts, TTL, deadlines) against plain GET and SET of the same bytes with no TTL. The
client's CPU a block is measured in the same loop; so is a raw socket that only moves the bytes,
for the distance to what the machine can do.
"""

import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing

import redis

from benchmarks.common import Bar, paired_ratio, summary
from kvtier.codec.frame import HEADER_NBYTES
from kvtier.config import RedisConfig
from kvtier.stores.redis import RedisStore
from kvtier.testing.stores import content, key
from kvtier.testing.valkey import ValkeyServer

KIB = 1024
SIZES = {"512KiB": 512 * KIB, "2MiB": 2048 * KIB, "16MiB": 16384 * KIB}
ROUNDS = {"512KiB": 400, "2MiB": 200, "16MiB": 60}
WARM_UP = 3
READ_BAR = 0.9
WRITE_BAR = 1.0


def run(*, tiny: bool) -> dict[str, object]:
    with ExitStack() as stack:
        server = stack.enter_context(ValkeyServer())
        store = stack.enter_context(closing(RedisStore(RedisConfig(url=server.url), "0" * 16)))
        plain = stack.enter_context(redis.Redis.from_url(server.url))
        wire = stack.enter_context(_Wire(max(SIZES.values())))
        sizes = {"512KiB": SIZES["512KiB"]} if tiny else SIZES
        measured = {
            name: _measure(store, plain, wire, nbytes, 3 if tiny else ROUNDS[name])
            for name, nbytes in sizes.items()
        }
    return _result(measured, tiny=tiny)


Times = dict[str, list[float]]


def _measure(
    store: RedisStore, plain: redis.Redis, wire: "_Wire", nbytes: int, rounds: int
) -> dict[str, Times]:
    """Seconds and CPU seconds of each operation, round by round."""
    payload = memoryview(content("block", nbytes))
    header = content("header", HEADER_NBYTES)
    whole = header + bytes(payload)
    name = key(nbytes)

    def read() -> None:
        (frame,) = store.read([name])
        assert frame is not None
        assert len(frame) == len(whole)

    def plain_read() -> None:
        assert len(plain.get(f"plain:{nbytes}")) == len(whole)

    operations: dict[str, Callable[[], object]] = {
        "write": lambda: store.write([(name, [header, payload])]),
        "redis-py write": lambda: plain.set(f"plain:{nbytes}", whole),
        "read": read,
        "redis-py read": plain_read,
        "socket write": lambda: wire.send(payload),
    }
    times: Times = {each: [] for each in operations}
    cpu: Times = {each: [] for each in operations}
    for number in range(WARM_UP + rounds):
        # Turned around each time, so that neither always comes after the other.
        order = [*operations.items()]
        for each, operation in reversed(order) if number % 2 else order:
            start, start_cpu = time.perf_counter(), time.thread_time()
            operation()
            if number >= WARM_UP:
                times[each].append(time.perf_counter() - start)
                cpu[each].append(time.thread_time() - start_cpu)
    (frame,) = store.read([name])
    assert frame == whole
    return {"times": times, "cpu": cpu}


class _Wire:
    """A socket to a thread that receives what is sent and says so: no protocol, no server."""

    def __init__(self, largest: int) -> None:
        self._buffer = memoryview(bytearray(largest))
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self._near = socket.create_connection(listener.getsockname())
            self._far, _ = listener.accept()
        self._thread = threading.Thread(target=self._receive)

    def __enter__(self) -> "_Wire":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._near.close()
        self._thread.join()
        self._far.close()

    def send(self, payload: memoryview) -> None:
        self._near.sendall(payload.nbytes.to_bytes(8, "little"))
        self._near.sendall(payload)
        assert self._near.recv(1) == b"+"

    def _receive(self) -> None:
        while header := self._far.recv(8, socket.MSG_WAITALL):
            nbytes = int.from_bytes(header, "little")
            self._far.recv_into(self._buffer, nbytes, socket.MSG_WAITALL)
            self._far.sendall(b"+")


def _result(measured: dict[str, dict[str, Times]], *, tiny: bool) -> dict[str, object]:
    times = {size: each["times"] for size, each in measured.items()}
    speed = {
        size: {way: paired_ratio(each[way], each[f"redis-py {way}"]) for way in ("read", "write")}
        for size, each in times.items()
    }
    # A tiny run only shows that everything runs: three rounds say nothing of speed.
    slack = 0.0 if tiny else 1.0
    bars = [
        Bar(f"{size} read, speed of redis-py's", each["read"], at_least=READ_BAR * slack)
        for size, each in speed.items()
    ]
    bars += [
        Bar(f"{size} write, speed of redis-py's", each["write"], at_least=WRITE_BAR * slack)
        for size, each in speed.items()
        if tiny or size == "16MiB"
    ]
    return {
        "bytes": {size: SIZES[size] + HEADER_NBYTES for size in measured},
        "times": {
            size: {name: summary(seconds) for name, seconds in each.items()}
            for size, each in times.items()
        },
        "cpu": {
            size: {name: summary(seconds)["median_s"] for name, seconds in each["cpu"].items()}
            for size, each in measured.items()
        },
        "speed_of_redis_py": speed,
        "bars": [each.as_dict() for each in bars],
    }
