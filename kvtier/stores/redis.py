"""A Redis or Valkey server that all nodes share.

A frame of block key K lies at "<prefix>:1:<layout id>:<K in hex>" and dies `ttl_s` seconds after
it was last written or read. The server's own `maxmemory` decides what it keeps; use the policy
`volatile-lru` or `allkeys-lru`. Needs Redis 6.2 or any Valkey.
"""

from collections.abc import Iterator, Sequence

from redis import Redis
from redis.backoff import NoBackoff
from redis.connection import BlockingConnectionPool, parse_url
from redis.exceptions import OutOfMemoryError, RedisError
from redis.retry import Retry

from kvtier.core.blocks import BlockKey
from kvtier.errors import ConfigError, StoreUnavailable
from kvtier.stores.base import Parts

MAX_FRAME_NBYTES = 512 * 2**20  # the server's proto-max-bulk-len
PIPELINE_NBYTES = 8 * 2**20  # of frames in one round trip; a larger frame goes alone
MAX_CONNECTIONS = 64  # the most threads that a tier may have
_FIRST_COUNT = 16  # keys asked for in the first round trip of `count`
_MOST_COUNT = 1024
_SMALLEST_NBYTES = 4096  # no pipeline reads more than PIPELINE_NBYTES / this many keys
_GUESSED_NBYTES = 2 * 2**20  # of a frame, before one was seen

_Argument = bytes | str | int | float | memoryview | tuple[memoryview, ...]


class RedisStore:
    """Frames on the server at `url`, kept apart by `prefix` and `layout_id`. See `Store`.

    Nothing is asked twice: whoever calls decides when to try again after StoreUnavailable. A
    refused write (False) is the server's "out of memory". Up to MAX_CONNECTIONS threads at once;
    each of them waits at most `timeout_s` for a connection, for it to open, and for any one
    answer. The URL's password appears in no message.

    Raises:
        ConfigError: `url` is not one that a client can use.
    """

    def __init__(
        self, url: str, *, prefix: str, layout_id: str, ttl_s: int, timeout_s: float
    ) -> None:
        self._pool = _pool(url, timeout_s)
        self._client = Redis(connection_pool=self._pool)
        at = self._pool.connection_kwargs
        self._where = f"redis {at.get('path') or '{host}:{port}'.format_map(at)}"
        self._root = f"{prefix}:1:{layout_id}:"
        self._ttl_s = ttl_s
        # Frames of one layout are alike, so the last one tells how many fit in a pipeline.
        self._frame_nbytes = _GUESSED_NBYTES

    def __repr__(self) -> str:
        return f"<RedisStore {self._where} {self._root}*>"

    def write(self, frames: Sequence[tuple[BlockKey, Parts]]) -> list[bool]:
        """See `Store.write`; no copy is made. False also for a frame over MAX_FRAME_NBYTES."""
        kept: list[bool] = [False] * len(frames)
        batch: dict[int, tuple[_Argument, ...]] = {}
        nbytes = 0
        for index, (key, parts) in enumerate(frames):
            value = tuple(memoryview(part).cast("B") for part in parts)
            size = sum(view.nbytes for view in value)
            if size > MAX_FRAME_NBYTES:
                continue
            if batch and nbytes + size > PIPELINE_NBYTES:
                self._set(batch, kept)
                batch, nbytes = {}, 0
            batch[index] = ("SET", self._name(key), value, "EX", self._ttl_s)
            nbytes += size
            self._frame_nbytes = size
        if batch:
            self._set(batch, kept)
        return kept

    def read(self, keys: Sequence[BlockKey]) -> list[bytes | memoryview | None]:
        """See `Store.read`; a key that is there lives `ttl_s` longer."""
        found: list[bytes | memoryview | None] = []
        while len(found) < len(keys):
            step = max(1, PIPELINE_NBYTES // max(self._frame_nbytes, _SMALLEST_NBYTES))
            wanted = keys[len(found) : len(found) + step]
            for answer in self._ask(
                [("GETEX", self._name(key), "EX", self._ttl_s) for key in wanted]
            ):
                if isinstance(answer, RedisError):
                    raise self._unavailable(answer)
                assert answer is None or isinstance(answer, bytes), type(answer)
                found.append(answer)
                if answer is not None:
                    self._frame_nbytes = len(answer)
        return found

    def count(self, keys: Sequence[BlockKey]) -> int:
        """See `Store.count`; asks for few keys first, as most chains end early."""
        counted, step = 0, _FIRST_COUNT
        while counted < len(keys):
            wanted = keys[counted : counted + step]
            for answer in self._ask([("EXISTS", self._name(key)) for key in wanted]):
                if isinstance(answer, RedisError):
                    raise self._unavailable(answer)
                if not answer:
                    return counted
                counted += 1
            step = min(4 * step, _MOST_COUNT)
        return counted

    def delete(self, keys: Sequence[BlockKey]) -> None:
        """See `Store.delete`. For all nodes: a node asks for it only where a frame is corrupt."""
        for start in range(0, len(keys), _MOST_COUNT):
            wanted = keys[start : start + _MOST_COUNT]
            for answer in self._ask([("UNLINK", self._name(key)) for key in wanted]):
                if isinstance(answer, RedisError):
                    raise self._unavailable(answer)

    def scan(self) -> Iterator[tuple[BlockKey, int]]:
        """See `Store.scan`: nothing, as the server is shared."""
        return iter(())

    def close(self) -> None:
        """See `Store.close`."""
        self._pool.disconnect()

    def _name(self, key: BlockKey) -> str:
        return self._root + key.hex()

    def _set(self, batch: dict[int, tuple[_Argument, ...]], kept: list[bool]) -> None:
        for index, answer in zip(batch, self._ask([*batch.values()]), strict=True):
            if isinstance(answer, RedisError) and not isinstance(answer, OutOfMemoryError):
                raise self._unavailable(answer)
            kept[index] = not isinstance(answer, RedisError)

    def _ask(self, commands: Sequence[tuple[_Argument, ...]]) -> list[object]:
        """The answers to `commands`, sent in one go; a command that failed answers its error."""
        try:
            with self._client.pipeline(transaction=False) as pipeline:
                for command in commands:
                    pipeline.execute_command(*command)
                return pipeline.execute(raise_on_error=False)
        except (RedisError, OSError) as error:
            raise self._unavailable(error) from error

    def _unavailable(self, error: Exception) -> StoreUnavailable:
        return StoreUnavailable(f"{self._where}: {error or type(error).__name__}")


def _pool(url: str, timeout_s: float) -> BlockingConnectionPool:
    try:
        options = parse_url(url)
        options.update(
            timeout=timeout_s,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),
            max_connections=MAX_CONNECTIONS,
            protocol=2,  # the newer one brings nothing here but a longer handshake
            decode_responses=False,
            command_packer=_Packer(),
        )
        options.setdefault("host", "localhost")
        options.setdefault("port", 6379)
        if "path" in options:
            del options["host"], options["port"]
        pool = BlockingConnectionPool(**options)
        pool.make_connection()  # opens nothing, but refuses options that no connection has
    except (TypeError, ValueError, RedisError):
        # What these errors say may quote a piece of the password.
        raise ConfigError(
            "redis.url is not redis://[user:password@]host[:port][/db], rediss://... or "
            "unix://[user:password@]/path (not shown: it may hold a password; '/', '@', ':' and "
            "'#' in one are written as %2F, %40, %3A and %23)"
        ) from None
    return pool


class _Packer:
    """Commands as the server reads them; a frame's buffers go to the socket as they are.

    redis-py would join them first, and its hiredis packer copies everything once more.
    """

    def pack(self, *arguments: _Argument) -> list[bytes | memoryview]:
        """One command: https://redis.io/docs/latest/develop/reference/protocol-spec/."""
        # redis-py names some commands by two words in one argument.
        name = arguments[0]
        words = [*(name.split() if isinstance(name, str) else (name,)), *arguments[1:]]
        packed: list[bytes | memoryview] = [b"*%d\r\n" % len(words)]
        for word in words:
            views = word if isinstance(word, tuple) else (_plain(word),)
            packed.append(b"$%d\r\n" % sum(len(view) for view in views))
            packed.extend(views)
            packed.append(b"\r\n")
        return packed


def _plain(word: bytes | str | float | memoryview) -> bytes | memoryview:
    return word if isinstance(word, bytes | memoryview) else str(word).encode()
