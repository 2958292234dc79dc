"""What a daemon takes of its lower tiers before it opens any: so it is refused at once."""

import logging
import os
import tempfile
import threading
from pathlib import Path

from kvtier import metrics
from kvtier.config import Config, DiskConfig, RedisConfig
from kvtier.core.blocks import KEY_NBYTES, BlockKey
from kvtier.core.tiers import Tier
from kvtier.errors import ConfigError, StoreUnavailable
from kvtier.stores.disk.files import lock
from kvtier.stores.redis import RedisStore

log = logging.getLogger(__name__)


class Claimed:
    """The folder of the disk tier, this daemon's alone until `close`.

    `disk.bytes` is a limit of the folder with all that lies in it: two daemons there, of different
    layouts, would each take as much.
    """

    def __init__(self) -> None:
        self._lock: int | None = None

    def disk(self, config: Config) -> None:
        """Refuse at the start what would else be seen only when the first engine comes.

        Blocks for at most a second, unless the disk hangs.

        Raises:
            ConfigError: The disk's folder cannot be written, or another process has it, or the URL
                of Redis is none.
        """
        if config.redis:
            RedisStore(config.redis, "").close()  # connects at its first use only
        if config.disk:
            self._lock = _locked(config.disk)
            if config.disk.bytes < config.host.bytes:
                log.warning(
                    "disk.bytes is %d, less than host.bytes, %d: nearly all that it can hold lies "
                    "in host memory too, and a part of the saves is refused",
                    config.disk.bytes,
                    config.host.bytes,
                )

    def close(self) -> None:
        """Let the next daemon have the folder. Idempotent."""
        held, self._lock = self._lock, None
        if held is not None:
            os.close(held)


def greet_redis(redis: RedisConfig) -> None:
    """Say now, in a thread, if it is not there: else the first engine's tiers would be the first.

    Nothing else comes of it. The thread keeps no process from ending.
    """

    def ask() -> None:
        store = RedisStore(redis, "")
        try:
            store.count([BlockKey(bytes(KEY_NBYTES))])
        except StoreUnavailable as error:
            metrics.STORE_ERRORS.labels(Tier.SHARED.label).inc()
            log.warning("%s tier: %s; going on without it", Tier.SHARED.label, error)
        finally:
            store.close()

    threading.Thread(target=ask, name="kvtier-greet", daemon=True).start()


def _locked(disk: DiskConfig) -> int:
    if not disk.path:
        raise ConfigError("disk.path is empty, must be a folder")
    folder = Path(disk.path)
    try:
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"disk.path {folder}: not a folder")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"disk.path {folder}: {error.strerror}") from None
    return lock(folder)
