"""A worker with its tiers: the engine, its gRPC service and the node daemon put together."""

import asyncio
from collections.abc import Callable
from functools import partial

from kvtier.config import Config
from kvtier.engine import worker
from kvtier.engine.embedded import attach


async def serve(config: Config, *, started: Callable[[str], None], stop: asyncio.Event) -> None:
    """Run a worker until `stop`; `started` gets the gRPC address once the model is loaded.

    A node daemon that is not there yet, or goes away, costs misses and nothing else.

    Raises:
        ConfigError: The address is taken, or the model cannot be loaded.
    """
    make_tier = partial(attach, config.worker)
    await worker.serve(config, started=started, stop=stop, make_tier=make_tier)
