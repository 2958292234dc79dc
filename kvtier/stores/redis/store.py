"""Frames on servers that all nodes share. See `Store`."""

import os
import re
from collections.abc import Iterator, Sequence
from math import ceil
from typing import Final

from kvtier import metrics
from kvtier.codec.frame import frame_nbytes
from kvtier.config import RedisConfig, redis_url, sentinel_password
from kvtier.core.blocks import BlockKey
from kvtier.core.tiers import Tier
from kvtier.errors import ConfigError, StoreUnavailable
from kvtier.stores.base import BROKEN, Parts
from kvtier.stores.redis.address import Login, parse, tls_context
from kvtier.stores.redis.connection import Ask, Deadline, Options
from kvtier.stores.redis.parts import (
    MAX_FRAME_NBYTES,
    PART_NBYTES,
    TAG_NBYTES,
    Assembly,
    Part,
    PartSink,
    count_of,
    part_name,
    split,
)
from kvtier.stores.redis.resp import Reply, ReplyError, room
from kvtier.stores.redis.servers import Servers

FORMAT: Final = 3  # of the keys and of what lies under them
ROUND_NBYTES: Final = 8 * 2**20  # that may take `timeout_s`
_STAGED_S: Final = 60  # that a part lives beyond its write's deadline before its frame is whole
_FIRST_COUNT: Final = 16  # keys asked for in the first round trip of `count`
_MOST_COUNT: Final = 1024
_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")


class RedisStore:
    """Frames under "PREFIX:3:NAMESPACE:LAYOUT:{KEY IN HEX}" on the servers of `config.url`.

    A refused write (False) is the server's "out of memory". Up to MAX_CONNECTIONS threads at once
    for each server. A call takes at most `timeout_s`, for each 8 MiB that it moves. A server that
    failed a few times in a row is left alone, up to `retry_s` at a time. The password appears in
    no message. Nothing is connected before the first call.

    Raises:
        ConfigError: `config` says what no client can use.
    """

    def __init__(self, config: RedisConfig, layout_id: str) -> None:
        self._target = parse(redis_url(config))
        self._servers = connect(config)
        self._root = f"{root(config, config.namespace)}{layout_id}:".encode()
        self._ttl_s = config.ttl_s
        self._ttl = b"%d" % config.ttl_s
        self._timeout_s = config.timeout_s
        room(0)  # loads what it needs now, and not at the first read
        # Frames of one layout are alike: the last one tells what to expect of the next.
        self._frame_nbytes = PART_NBYTES

    def __repr__(self) -> str:
        return f"<RedisStore {self._target} {self._root.decode()}*>"

    def write(self, frames: Sequence[tuple[BlockKey, Parts]]) -> list[bool]:
        """See `Store.write`; no copy is made. False also for a frame over MAX_FRAME_NBYTES."""
        kept: list[bool] = []
        for batch in _rounds(frames):
            kept += self._write_round(batch)
        return kept

    def read(self, keys: Sequence[BlockKey]) -> list[bytes | memoryview | None]:
        """See `Store.read`; a frame that is there lives `ttl_s` longer."""
        expected = self._frame_nbytes
        count = max(1, count_of(expected))
        deadline = self._deadline(len(keys) * expected)
        found = [Assembly() for _ in keys]
        asks = [
            self._get(key, assembly, index, expected // count)
            for key, assembly in zip(keys, found, strict=True)
            for index in range(count)
        ]
        self._servers.run(asks, deadline)
        # What was not expected, and what came before its head, as from a slot that is moving.
        more = [
            self._get(key, assembly, index, assembly.nbytes // assembly.count)
            for key, assembly in zip(keys, found, strict=True)
            for index in assembly.missing()
        ]
        deadline.extend(self._timeout_s * sum(ask.receives for ask in more) / ROUND_NBYTES)
        self._servers.run(more, deadline)
        for ask in (*asks, *more):
            if isinstance(ask.reply, ReplyError) and ask.reply.code != "WRONGTYPE":
                raise self._unavailable(ask.reply)
        self._frame_nbytes = max((each.nbytes for each in found), default=0) or expected
        return [
            frame if (frame := assembly.frame()) is not None else _missed(head.reply)
            for assembly, head in zip(found, asks[::count], strict=True)
        ]

    def count(self, keys: Sequence[BlockKey]) -> int:
        """See `Store.count`; asks for few keys first, as most chains end early."""
        counted, step = 0, _FIRST_COUNT
        deadline = self._deadline(0)
        while counted < len(keys):
            wanted = [self._name(key) for key in keys[counted : counted + step]]
            asks = [Ask(name, [b"EXISTS", name]) for name in wanted]
            self._servers.run(asks, deadline)
            for ask in asks:
                if isinstance(ask.reply, ReplyError):
                    raise self._unavailable(ask.reply)
                if ask.reply != 1:
                    return counted
                counted += 1
            step = min(4 * step, _MOST_COUNT)
        return counted

    def delete(self, keys: Sequence[BlockKey]) -> None:
        """See `Store.delete`: nothing, as the servers are shared. `purge` removes."""

    def scan(self) -> Iterator[tuple[BlockKey, int]]:
        """See `Store.scan`: nothing, as the servers are shared."""
        return iter(())

    def close(self) -> None:
        """See `Store.close`."""
        self._servers.close()

    def _name(self, key: BlockKey) -> bytes:
        return b"%b{%b}" % (self._root, key.hex().encode())

    def _seconds(self, nbytes: int) -> float:
        return self._timeout_s * max(1.0, nbytes / ROUND_NBYTES)

    def _deadline(self, nbytes: int) -> Deadline:
        return Deadline(self._seconds(nbytes))

    def _write_round(self, frames: Sequence[tuple[BlockKey, Parts]]) -> list[bool]:
        heads: dict[int, Ask] = {}
        tails: dict[int, list[Ask]] = {}
        seconds = self._seconds(sum(frame_nbytes(frame) for _, frame in frames))
        deadline = Deadline(seconds)
        staged = b"%d" % min(self._ttl_s, _STAGED_S + ceil(seconds))
        for index, (key, frame) in enumerate(frames):
            if frame_nbytes(frame) > MAX_FRAME_NBYTES:
                continue
            head, *tail = split(frame, os.urandom(TAG_NBYTES))
            name = self._name(key)
            heads[index] = _set(name, head, self._ttl)
            tails[index] = [
                _set(part_name(name, n), part, staged) for n, part in enumerate(tail, 1)
            ]
        # The head last: where it is, the whole frame is. Without it the other parts are of no use
        # to anybody, so they live long only once it is there.
        self._servers.run([ask for each in tails.values() for ask in each], deadline)
        whole = [index for index in heads if all(self._kept(ask) for ask in tails[index])]
        self._servers.run([heads[index] for index in whole], deadline)
        there = [index for index in whole if self._kept(heads[index])]
        longer = {
            index: [Ask(ask.name, [b"EXPIRE", ask.name, self._ttl]) for ask in tails[index]]
            for index in there
        }
        self._servers.run([ask for each in longer.values() for ask in each], deadline)
        kept = {index for index in there if all(self._lives(ask) for ask in longer[index])}
        metrics.STORE_REFUSED.labels(Tier.SHARED.label).inc(len(heads) - len(kept))
        return [index in kept for index in range(len(frames))]

    def _get(self, key: BlockKey, assembly: Assembly, index: int, nbytes: int) -> Ask:
        """Asks for part `index`, of about `nbytes`."""
        name = part_name(self._name(key), index)
        command = [b"GETEX", name, b"EX", self._ttl]
        return Ask(name, command, receives=nbytes, sink=PartSink(assembly, index))

    def _kept(self, ask: Ask) -> bool:
        if isinstance(ask.reply, ReplyError) and ask.reply.code != "OOM":
            raise self._unavailable(ask.reply)
        return not isinstance(ask.reply, ReplyError)

    def _lives(self, ask: Ask) -> bool:
        if isinstance(ask.reply, ReplyError):
            raise self._unavailable(ask.reply)
        return ask.reply == 1

    def _unavailable(self, reply: ReplyError) -> StoreUnavailable:
        return StoreUnavailable(f"{self._target}: {reply}")


def _set(name: bytes, part: Part, ttl: bytes) -> Ask:
    return Ask(name, [b"SET", name, part.value, b"EX", ttl], sends=part.nbytes)


def _missed(head: Reply) -> bytes | None:
    """What a frame that is not whole counts as: not there, or there and in the way."""
    if not isinstance(head, bytes | ReplyError):
        return None
    metrics.REDIS_INCOMPLETE.inc()
    return BROKEN


def _rounds(
    frames: Sequence[tuple[BlockKey, Parts]],
) -> Iterator[Sequence[tuple[BlockKey, Parts]]]:
    """Frames of at most ROUND_NBYTES together, or one.

    So a server with little room left keeps the first ones, and not some parts of all of them.
    """
    start = nbytes = 0
    for at, (_, frame) in enumerate(frames):
        size = frame_nbytes(frame)
        if at > start and nbytes + size > ROUND_NBYTES:
            yield frames[start:at]
            start, nbytes = at, 0
        nbytes += size
    if start < len(frames):
        yield frames[start:]


def connect(config: RedisConfig) -> Servers:
    """A client of the servers that `config` names; it connects at its first use.

    Raises:
        ConfigError: `config` says what no client can use.
    """
    target = parse(redis_url(config))
    tls = tls_context(config.ca_file, config.cert_file, config.key_file) if target.tls else None
    options = Options(target.login, tls, config.timeout_s, config.retry_s)
    sentinel = Login(config.sentinel_user, sentinel_password(config))
    return Servers(target, options, sentinel)


def root(config: RedisConfig, namespace: str) -> str:
    """What the keys of a namespace begin with.

    Raises:
        ConfigError: A name has characters that keys and patterns give a meaning to.
    """
    for setting, name in (("prefix", config.prefix), ("namespace", namespace)):
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"redis.{setting} is {name!r}, must be 1 to 64 of letters, digits, '.', '_', '-'"
            )
    return f"{config.prefix}:{FORMAT}:{namespace}:"
