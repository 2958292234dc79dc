"""`kvtier worker --engine vllm`: vLLM's asynchronous engine in our process, kvtier under it."""

import asyncio
import logging
import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Final

from vllm import SamplingParams
from vllm.config import KVEventsConfig, KVTransferConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from kvtier.config import Config, WorkerConfig, cache_dir
from kvtier.core.tiers import Tier
from kvtier.engine import smollm2
from kvtier.engine.sequence import Done, FinishReason, Request, Started, Tokens
from kvtier.engine.vllm import gateway
from kvtier.engine.vllm.announced import HASH, read_announced
from kvtier.engine.vllm.gateway import Answer
from kvtier.engine.vllm.owner import Owner, Restored
from kvtier.engine.vllm.puller import Puller
from kvtier.engine.vllm.served import alone, describe
from kvtier.engine.vllm.settings import engine_table
from kvtier.engine.vllm.spaces import adapters_revision, spaces_of
from kvtier.errors import ConfigError, InvalidRequest, Overloaded, WorkerLost

KNOWN_S: Final = 300.0  # for the tier to fingerprint the weights
POLL_S: Final = 0.05
CLEAR_S: Final = 10.0  # for copies to end before VRAM can be emptied

log = logging.getLogger(__name__)


class InProcess:
    """A `gateway.Backend` over vLLM's AsyncLLM."""

    def __init__(self, engine: AsyncLLM, served: gateway.Served, owner: Owner) -> None:
        self.served = served
        self._engine = engine
        self._owner = owner
        self._loras = {
            name: LoRARequest(name, number, path)
            for number, (name, path) in enumerate(served.spaces.adapters.items(), 1)
        }
        self._names = count()

    async def answer(self, request: Request) -> Answer:
        """See `gateway.Backend`."""
        params = SamplingParams(
            temperature=request.temperature, max_tokens=request.max_tokens,
            seed=request.seed if request.temperature else None, ignore_eos=request.ignore_eos,
            output_kind=RequestOutputKind.DELTA,
        )  # fmt: skip
        prompt = TokensPrompt(prompt_token_ids=list(request.token_ids))
        if request.tenant:
            prompt["cache_salt"] = self.served.spaces.salts[request.tenant]
        lora = self._loras[request.adapter] if request.adapter else None
        name = str(next(self._names))
        begun, told = time.monotonic(), 0
        reason: FinishReason | None = None
        try:
            async for output in self._engine.generate(prompt, params, name, lora_request=lora):
                (one,) = output.outputs
                if not told:
                    cached, restored = output.num_cached_tokens or 0, self._owner.take(name)
                    yield _started(len(request.token_ids), cached, restored, begun)
                if one.token_ids:
                    told += len(one.token_ids)
                    yield Tokens(tuple(one.token_ids))
                if one.finish_reason in tuple(FinishReason):
                    reason = FinishReason(one.finish_reason)
        except ValueError as error:
            raise InvalidRequest(f"vLLM refuses the request: {error}") from None
        except RuntimeError as error:  # EngineDeadError is one
            raise WorkerLost(f"vLLM is dead: {error}") from None
        if reason is None:  # aborted
            raise WorkerLost(f"vLLM's answer has no end after {told} tokens")
        yield Done(finish_reason=reason, completion_tokens=told, saved_tokens=0)

    async def clear(self) -> None:
        """See `gateway.Backend`; the lower tiers keep what they have."""
        end = time.monotonic() + CLEAR_S
        # A block that is still being copied down is in use.
        while not await self._engine.reset_prefix_cache(reset_connector=True):
            if time.monotonic() > end:
                raise Overloaded("vLLM empties its VRAM only when no request runs")
            await asyncio.sleep(POLL_S)

    async def alive(self) -> bool:
        """See `gateway.Backend`."""
        return not self._engine.errored

    async def close(self) -> None:
        """See `gateway.Backend`."""
        await asyncio.to_thread(self._engine.shutdown)


def _started(prompt: int, cached: int, restored: Restored, begun: float) -> Started:
    """What vLLM did not compute, and, as our tier says, which of it was restored."""
    tiers = {tier: tokens for tier, tokens in restored.tokens.items() if tokens}
    vram = cached - sum(tiers.values())
    if vram > 0:
        tiers[Tier.VRAM] = vram
    return Started(
        prompt_tokens=prompt,
        restored=tiers,
        computed_tokens=prompt - cached,
        queue_s=0.0,
        restore_s=restored.seconds,
        prefill_s=max(0.0, time.monotonic() - begun - restored.seconds),
    )


def _arguments(worker: WorkerConfig, model: Path, scratch: Path) -> AsyncEngineArgs:
    transfer = None
    if worker.save == "evict":
        raise ConfigError("worker.save is evict: not with vLLM; must be fill or second-use")
    if worker.socket:
        # Half as long as it waits for blocks it waits to hear which there are.
        wait_s = max(0.1, worker.wait_s)
        extra = {"kvtier": {"socket": worker.socket, "load_s": wait_s, "lookup_s": wait_s / 2,
                            "announce": str(scratch / "who"), "owner": str(scratch / "owner"),
                            "save": worker.save,
                            "adapters_revision": adapters_revision(worker, log.info)},
                 "cpu_bytes_to_use": worker.vram_bytes}  # fmt: skip
        transfer = KVTransferConfig(
            kv_connector="KvtierConnector",
            kv_connector_module_path="kvtier.engine.vllm.connector",
            kv_role="kv_both",
            kv_connector_extra_config=extra,
        )
    events = KVEventsConfig(
        enable_kv_cache_events=True, publisher="zmq", endpoint=f"ipc://{scratch}/events",
        replay_endpoint=f"ipc://{scratch}/replay",
    )  # fmt: skip
    return engine_arguments(worker, model, kv_transfer_config=transfer, kv_events_config=events)


def engine_arguments(worker: WorkerConfig, model: Path, **more: object) -> AsyncEngineArgs:
    """What decides how an engine computes; `more` adds to it, or replaces.

    Raises:
        ConfigError: `worker.vllm` makes no sense.
    """
    settings: dict[str, object] = {
        "model": str(model),
        "served_model_name": worker.name or model.name,
        "dtype": worker.dtype,
        "block_size": worker.block_tokens,
        "prefix_caching_hash_algo": HASH,
        "enable_prefix_caching": True,
        "enforce_eager": current_platform.is_cpu(),
        "kv_cache_memory_bytes": worker.vram_bytes,
        "max_num_seqs": worker.max_running,
        "max_model_len": -1,  # what the model has, or what VRAM holds
        "distributed_executor_backend": "mp",  # not Ray's, though Ray may have started us
    }
    if worker.adapters:
        settings |= {"enable_lora": True, "max_loras": len(worker.adapters)}
    try:
        return AsyncEngineArgs(**(settings | engine_table(worker.vllm) | more))
    except TypeError as error:
        raise ConfigError(f"worker.vllm: {error}") from None


async def serve(config: Config, *, started: Callable[[str], None], stop: asyncio.Event) -> None:
    """Run a worker on vLLM until `stop`; `started` gets its gRPC address.

    Raises:
        ConfigError: vLLM does not take this model or these settings, or the address is taken.
    """
    worker = config.worker
    model = Path(worker.model)
    if worker.model == "smollm2":
        model = await asyncio.to_thread(smollm2.folder, cache_dir(), log.info)
    with (
        tempfile.TemporaryDirectory(prefix="kvtier-vllm-") as folder,
        Owner(Path(folder) / "owner") as owner,
    ):
        scratch = Path(folder)
        try:
            arguments = await asyncio.to_thread(_arguments, worker, model, scratch)
            # In a thread: whoever watches this process would take it for stuck.
            engine = await asyncio.to_thread(AsyncLLM.from_engine_args, arguments)
        except (ValueError, RuntimeError, OSError) as error:
            raise ConfigError(f"vLLM does not start with {model}: {error}") from None
        try:
            said = alone(model)
            if worker.socket:
                await _known(scratch / "who")
                said = read_announced(scratch / "who", worker.block_tokens)
            served = describe(
                model, worker.name, said, block_tokens=worker.block_tokens,
                max_tokens=engine.model_config.max_model_len,
                events=f"ipc://{scratch}/events", replay=f"ipc://{scratch}/replay",
                spaces=spaces_of(worker, said.root),
            )  # fmt: skip
        except BaseException:
            engine.shutdown()
            raise
        backend, puller = InProcess(engine, served, owner), None
        if said.layout is not None and worker.wait_s > 0:
            puller = Puller(worker.socket, said.layout, worker.wait_s)
        try:
            await gateway.serve(config, backend, puller, started=started, stop=stop)
        finally:
            if puller is not None:
                await puller.close()


async def _known(path: Path) -> None:
    """Return when the tier has said who it is.

    Raises:
        ConfigError: It does not; its own line in vLLM's log says why.
    """

    def there() -> bool:
        end = time.monotonic() + KNOWN_S
        while not path.exists():
            if time.monotonic() > end:
                return False
            time.sleep(POLL_S)
        return True

    if not await asyncio.to_thread(there):
        raise ConfigError(f"kvtier said nothing in this vLLM for {KNOWN_S:g} s; see its log")
