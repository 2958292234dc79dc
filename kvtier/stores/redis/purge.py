"""Removes what a namespace holds on the servers: only ever on a person's word."""

from collections.abc import Iterator
from typing import Final, NamedTuple

from kvtier.config import RedisConfig
from kvtier.errors import StoreUnavailable
from kvtier.stores.redis.connection import Ask, Deadline
from kvtier.stores.redis.resp import Reply, ReplyError
from kvtier.stores.redis.servers import Servers
from kvtier.stores.redis.store import connect, root

STEP: Final = 256  # keys looked at, or removed, in one go: a server is never blocked for long


class Found(NamedTuple):
    """What one step saw: values of the namespace, their bytes, and whether they were removed."""

    values: int
    nbytes: int
    server: str


def purge(config: RedisConfig, namespace: str, *, remove: bool) -> Iterator[Found]:
    """Walk over every value of `namespace`; `remove` them, or only tell. One step at a time.

    Values that others write meanwhile may be seen or not, and be seen twice where nothing is
    removed.

    Raises:
        ConfigError: `config` or `namespace` says what no client can use.
        StoreUnavailable: A server gave no answer, or may not be asked this. What was told so far
            is done; start again for the rest.
    """
    servers = connect(config)
    begins = root(config, namespace)
    try:
        for link in servers.primaries(Deadline(config.timeout_s)):
            cursor = b"0"
            while True:
                scan = [b"SCAN", cursor, b"MATCH", begins.encode() + b"*", b"COUNT", b"%d" % STEP]
                ask = Ask(b"", scan)
                link.pipeline([ask], Deadline(config.timeout_s))
                match _checked(ask.reply):
                    case [bytes(cursor), [*found]]:
                        keys = [each for each in found if isinstance(each, bytes)]
                    case reply:
                        raise StoreUnavailable(f"redis {link.address}: SCAN says {reply!r:.100}")
                if keys:
                    yield _step(servers, keys, str(link.address), config.timeout_s, remove=remove)
                if cursor == b"0":
                    break
    finally:
        servers.close()


def _step(
    servers: Servers, keys: list[bytes], server: str, timeout_s: float, *, remove: bool
) -> Found:
    sizes = [Ask(key, [b"STRLEN", key]) for key in keys]
    servers.run(sizes, Deadline(timeout_s))
    there = {ask.name: size for ask in sizes if isinstance(size := _checked(ask.reply), int)}
    if not remove:
        return Found(len(keys), sum(there.values()), server)
    removals = [Ask(key, [b"UNLINK", key]) for key in keys]
    servers.run(removals, Deadline(timeout_s))
    gone = [ask.name for ask in removals if _checked(ask.reply) == 1]
    return Found(len(gone), sum(there[key] for key in gone), server)


def _checked(reply: Reply) -> Reply:
    if isinstance(reply, ReplyError):
        raise StoreUnavailable(f"redis: {reply}")
    return reply
