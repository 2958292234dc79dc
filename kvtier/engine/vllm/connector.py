"""`--kv-transfer-config '{"kv_connector": "KvtierConnector", "kv_role": "kv_both"}'` is enough."""

import functools

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    PromMetric,
    PromMetricT,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.request import Request

from kvtier.engine.vllm.facts import KEY, engine_facts
from kvtier.engine.vllm.settings import completed
from kvtier.engine.vllm.tier import KvtierTier
from kvtier.errors import ConfigError


class KvtierConnector(OffloadingConnector):
    """vLLM's own OffloadingConnector, with kvtier filled in as its tier."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        complete(vllm_config)
        super().__init__(vllm_config, role, kv_cache_config)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """See `KVConnectorBase_V1`; in a step without work it waits a moment, see `Hub.step`."""
        meta = super().build_connector_meta(scheduler_output)
        idle = not scheduler_output.total_num_scheduled_tokens
        for tier in self._tiers():
            tier.step(idle=idle)
        return meta

    def on_new_request(self, request: Request) -> None:
        """See `KVConnectorBase_V1`; vLLM calls it right before it schedules."""
        super().on_new_request(request)
        for tier in self._tiers():
            tier.expect(request.request_id, functools.partial(self._keys, request))

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """See `KVConnectorBase_V1`.

        A request that waits for us is not looked up block by block, and a new one has its answer in
        this step: another step would cost more than the moment it takes, see `Patience`.
        """
        tiers, name = self._tiers(), request.request_id
        for tier in tiers:
            tier.turn(name)
        if any(tier.pending(name) for tier in tiers):
            return None, False
        found: tuple[int | None, bool]
        found = super().get_num_new_matched_tokens(request, num_computed_tokens)
        if found[0] is None and any(tier.answered(name) for tier in tiers):
            found = super().get_num_new_matched_tokens(request, num_computed_tokens)
        return found

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """See `KVConnectorBase_V1`."""
        super().update_state_after_alloc(request, blocks, num_external_tokens)
        if num_external_tokens:
            for tier in self._tiers():
                tier.restored(request.request_id, num_external_tokens)

    def _tiers(self) -> list[KvtierTier]:
        manager = getattr(self.connector_scheduler, "manager", None)
        tiers = getattr(manager, "secondary_tiers", ())
        return [each for each in tiers if isinstance(each, KvtierTier)]

    def _keys(self, request: Request) -> list[bytes]:
        """The names of a new request's blocks, group by group."""
        if request.skip_reading_prefix_cache:  # it will not be looked up
            return []
        status = self.connector_scheduler._req_status[request.request_id]
        status.update_offload_keys()
        return [key for group in status.group_states for key in group.offload_keys]

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[type[PromMetric], type[PromMetricT]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics:
        """See `KVConnectorBase_V1`; runs in the API server's process."""
        complete(vllm_config)
        return super().build_prom_metrics(
            vllm_config, metric_types, labelnames, per_engine_labelvalues
        )


def complete(config: VllmConfig) -> None:
    """Fill in what a user need not write. Idempotent.

    Raises:
        ConfigError: What the user wrote makes no sense.
    """
    transfer = config.kv_transfer_config
    assert transfer is not None
    extra = transfer.kv_connector_extra_config
    if KEY in extra:
        return
    whole = completed(extra)
    try:
        whole[KEY] = engine_facts(config)
    except ConfigError as error:
        whole[KEY] = str(error)  # the tier says it, and is off
    extra.update(whole)
    # A failed load is a miss, not a failed request.
    transfer.kv_load_failure_policy = "recompute"
