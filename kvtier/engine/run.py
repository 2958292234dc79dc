"""`kvtier worker`: an engine with the node's tiers under it."""

import asyncio
import gc
import importlib
from collections.abc import Callable
from functools import partial
from typing import Final

from kvtier.config import Config, vllm_speaks_on_stderr
from kvtier.errors import ConfigError
from kvtier.wire.rpc import check_free

# What computes under each name: loaded only when asked for.
_OTHERS: Final = {
    "vllm": "kvtier.engine.vllm.inprocess",
    "vllm-http": "kvtier.engine.vllm.http",
}


async def serve(config: Config, *, started: Callable[[str], None], stop: asyncio.Event) -> None:
    """Run a worker until `stop`; `started` gets the gRPC address once the model is loaded.

    A node daemon that is not there yet, or goes away, costs misses and nothing else.

    Raises:
        ConfigError: The address is taken, the model cannot be loaded, or the engine is not there.
    """
    # Whether it is free is decided once the model is loaded, but said here where it is not.
    check_free(config.worker.listen, "worker.listen")

    def ready(address: str) -> None:
        gc.collect()
        gc.freeze()  # a model and its libraries: no pass of the collector looks at them again
        started(address)

    if config.worker.engine in _OTHERS:
        vllm_speaks_on_stderr()
        try:
            module = importlib.import_module(_OTHERS[config.worker.engine])
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"worker.engine is {config.worker.engine}, but {error.name} is not installed"
            ) from None
        await module.serve(config, started=ready, stop=stop)
        return
    from kvtier.engine import worker
    from kvtier.engine.credit import Met
    from kvtier.engine.embedded import attach

    make_tier = partial(attach, config.worker, Met())
    await worker.serve(config, started=ready, stop=stop, make_tier=make_tier)
