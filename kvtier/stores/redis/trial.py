"""Values of this process's own on the shared servers, written and read to measure the way there."""

import os
from dataclasses import replace
from typing import Final

from kvtier.config import RedisConfig
from kvtier.core.blocks import BlockKey
from kvtier.stores.redis.store import RedisStore

TTL_S: Final = 10  # nothing is deleted on shared servers, so they go by themselves
_CONTENT: Final = 1 << 20  # bytes that are noise, as often as a frame needs them


class RedisTrial:
    """`count` frames of up to `nbytes` bytes each under names that nobody else has. See `Trial`.

    They lie under the prefix and the namespace of `config`, where its user may write, in a layout
    of their own that no engine has; written again, they take the place of those before.
    """

    def __init__(self, config: RedisConfig, layout_id: str, nbytes: int, count: int) -> None:
        name = f"{layout_id}.trial.{os.urandom(8).hex()}"
        self._store = RedisStore(replace(config, ttl_s=TTL_S), name)
        self._keys = [BlockKey(os.urandom(16)) for _ in range(count)]
        noise = os.urandom(min(nbytes, _CONTENT))
        self._content = memoryview(noise * -(-nbytes // len(noise)))

    def write(self, nbytes: int) -> bool:
        """See `Trial.write`."""
        return all(self._store.write([(key, [self._content[:nbytes]]) for key in self._keys]))

    def read(self, nbytes: int) -> bool:
        """See `Trial.read`; reads all that was written."""
        found = self._store.read(self._keys)
        return all(each is not None and len(each) == nbytes for each in found)

    def close(self) -> None:
        """See `Trial.close`; only hangs up."""
        self._store.close()
