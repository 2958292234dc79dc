"""What the demo refuses before it loads or starts anything."""

import os
from typing import Final

from kvtier.config import RedisConfig
from kvtier.core.blocks import KEY_NBYTES, BlockKey
from kvtier.errors import ConfigError, StoreUnavailable
from kvtier.stores.redis import RedisStore

CHECK_S: Final = 5.0  # for a shared store to answer


def check_redis(url: str) -> None:
    """Refuse a server that could not be the shared tier.

    One value is written and read, and dies after a minute: a replica, or a user who may not
    write, is found, too.

    Raises:
        ConfigError: The URL is none, nobody answers there, or the server refuses; in one line.
    """
    settings = RedisConfig(
        url=url, prefix=f"kvtier-demo-{os.getpid()}", ttl_s=60, timeout_s=CHECK_S
    )
    key, frame = BlockKey(os.urandom(KEY_NBYTES)), os.urandom(4096)
    try:
        store = RedisStore(settings, "check")
        try:
            if not store.write([(key, [frame])])[0]:
                raise ConfigError("the server has no room: it says that it is out of memory")
            if [each and bytes(each) for each in store.read([key])] != [frame]:
                raise ConfigError("the server does not give back what was written to it")
        finally:
            store.close()
    except (ConfigError, StoreUnavailable) as error:
        raise ConfigError(f"--redis: {error}") from None
