"""kvtier as a secondary tier of vLLM's tiering: where any failure of ours becomes a miss."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar, TypeVar

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import (
    OffloadingConnectorStats,
)
from vllm.logger import init_logger
from vllm.v1.kv_offload.base import (
    LookupResult,
    Medium,
    OffloadingCounterMetadata,
    OffloadingGaugeMetadata,
    OffloadingMetricMetadata,
    OffloadingSpec,
    OffloadKey,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
)
from vllm.v1.kv_offload.tiering.backpressure import BackpressureDetector
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob

from kvtier.core.tiers import Tier
from kvtier.engine.vllm.announced import Announced, write_announced
from kvtier.engine.vllm.facts import facts, problems
from kvtier.engine.vllm.hub import Hub, Identity
from kvtier.engine.vllm.namespace import identity, weights_revision
from kvtier.engine.vllm.owner import Owned, Restored
from kvtier.engine.vllm.settings import TierSettings
from kvtier.engine.vllm.transfers import Outcome, befores

BLOCKS = "vllm:kvtier_blocks"  # labels: operation, result
NBYTES = "vllm:kvtier_bytes"  # label: operation
LATE = "vllm:kvtier_late_lookups"
DROPPED = "vllm:kvtier_dropped_blocks"
FAILURES = "vllm:kvtier_failures"
AWAY = "vllm:kvtier_away"

logger = init_logger("vllm.kvtier")  # so that vLLM's own handler prints it

T = TypeVar("T")


class Told:
    """What `KvtierConnector` tells a tier and asks it, besides what vLLM's tiering does."""

    _hub: Hub
    _chunk_tokens: int
    _owner: Owned | None

    def expect(self, request: str, keys: Callable[[], Sequence[bytes]]) -> None:
        """See `Hub.expect`."""
        self._shielded(False, lambda: self._hub.expect(request, keys))

    def turn(self, request: str) -> None:
        """See `Lookups.turn`."""
        self._shielded(None, lambda: self._hub.lookups.turn(request))

    def restored(self, request: str, tokens: int) -> None:
        """So many tokens of a request are given from outside of VRAM: tell who asked for it."""
        self._shielded(None, lambda: self._tell(request, tokens))

    def pending(self, request: str) -> bool:
        """See `Hub.pending`."""
        return self._shielded(False, lambda: self._hub.pending(request))

    def answered(self, request: str) -> bool:
        """See `Hub.answered`."""
        return self._shielded(False, lambda: self._hub.answered(request))

    def step(self, *, idle: bool) -> None:
        """See `Hub.step`."""
        self._shielded(None, lambda: self._hub.step(idle=idle))

    def _tell(self, request: str, tokens: int) -> None:
        if self._owner is None:
            return
        blocks, seconds = self._hub.lookups.restored(request)
        found: dict[Tier, int] = {}
        left = tokens
        for where, count in sorted(blocks.items()):
            found[where] = min(left, count * self._chunk_tokens)
            left -= found[where]
        # What we did not load for it lay in vLLM's own region of host memory.
        found[Tier.HOST] = found.get(Tier.HOST, 0) + left
        self._owner.tell(request, Restored(found, seconds))

    def _shielded(self, miss: T, work: Callable[[], T]) -> T:
        try:
            return work()
        except Exception as error:
            # An exception here would end the whole engine.
            self._hub.health.fault("a bug of kvtier's is a miss for vLLM", error)
            return miss


class KvtierTier(Told, SecondaryTierManager):
    """Hands vLLM's blocks to this host's node daemon, and gets them back.

    Everything here runs in vLLM's scheduler, and so only hands work to threads and takes results.
    """

    medium: ClassVar[Medium] = Medium.STORAGE

    def __init__(
        self,
        offloading_spec: OffloadingSpec,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: BackpressureDetector | None = None,
        **table: object,
    ) -> None:
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        table.pop("locality", None)
        settings = TierSettings.parse(table)
        row_nbytes = primary_kv_view.strides[0] if primary_kv_view.strides else 0

        def identify() -> Identity | None:
            return _identify(offloading_spec, row_nbytes, settings)

        self._hub = Hub(primary_kv_view, identify, settings)
        self._chunk_tokens = offloading_spec.tokens_per_hash * offloading_spec.blocks_per_chunk
        self._owner = Owned(settings.owner) if settings.owner else None
        self._stats = OffloadingConnectorStats()
        self._told = (0, 0, 0)  # late, dropped, failures
        self._not_begun: list[JobResult] = []  # which nobody else would tell vLLM of

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """See `SecondaryTierManager`: a question now, its answer in a later step."""
        miss: bool | None = False
        held = self._shielded(miss, lambda: self._hub.lookups.lookup(req_context.req_id, key))
        if held is None:
            return LookupResult.RETRY
        return LookupResult.HIT if held else LookupResult.MISS

    def submit_store(self, job_metadata: TransferJob) -> None:
        """See `SecondaryTierManager`."""
        self._submit(job_metadata, storing=True)

    def submit_load(self, job_metadata: TransferJob) -> None:
        """See `SecondaryTierManager`."""
        self._submit(job_metadata, storing=False)

    def get_finished_jobs(self) -> Iterable[JobResult]:
        """See `SecondaryTierManager`: each job once, whatever fails, or vLLM would wait for it."""
        nothing: list[Outcome] = []
        ended = self._shielded(nothing, self._hub.transfers.finished)
        results, self._not_begun = self._not_begun, []
        for each in ended:
            bug: JobResult | None = None
            result = self._shielded(bug, functools.partial(self._result, each))
            results.append(result or self._missed(each.job, each, storing=each.storing))
        return results

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        """See `SecondaryTierManager`."""
        return RequestOffloadingContext()

    def on_request_finished(self, req_context: ReqContext) -> None:
        """See `SecondaryTierManager`."""
        self._shielded(None, lambda: self._hub.lookups.end(req_context.req_id))

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        """See `SecondaryTierManager`."""
        self._shielded(None, self._hub.lookups.step_ends)

    def drain_jobs(self) -> None:
        """See `SecondaryTierManager`: ends queued jobs, and waits for copies, not for a daemon."""
        # Not shielded: vLLM uses the rows for other blocks once this has returned.
        self._hub.transfers.drain()

    def shutdown(self) -> None:
        """See `SecondaryTierManager`: stores get `drain_s` to end."""
        if self._owner is not None:
            self._shielded(None, self._owner.close)
        self._shielded(None, self._hub.close)

    @classmethod
    def build_metric_definitions(
        cls, extra_config: dict[str, object]
    ) -> dict[str, OffloadingMetricMetadata]:
        """See `SecondaryTierManager`."""
        counter = OffloadingCounterMetadata
        return {
            BLOCKS: counter(
                "Blocks that kvtier was asked to load or store", ("operation", "result")
            ),
            NBYTES: counter("Bytes that kvtier copied", ("operation",)),
            LATE: counter("Blocks taken for a miss because kvtier's answer came too late"),
            DROPPED: counter("Blocks not stored because too many stores were under way"),
            FAILURES: counter("Failures of kvtier turned into misses"),
            AWAY: OffloadingGaugeMetadata("1 while the node daemon cannot be reached"),
        }

    def get_stats(self) -> OffloadingConnectorStats | None:
        """See `SecondaryTierManager`."""
        return self._shielded(None, self._take_stats)

    def _take_stats(self) -> OffloadingConnectorStats:
        hub, stats = self._hub, self._stats
        told = (hub.lookups.late, hub.transfers.dropped, hub.health.failures)
        for name, now, before in zip((LATE, DROPPED, FAILURES), told, self._told, strict=True):
            if now > before:
                stats.increase_counter(name, now - before)
        self._told = told
        if not stats.is_empty():
            stats.set_gauge(AWAY, int(hub.health.away))
        self._stats = OffloadingConnectorStats()
        return stats

    def _submit(self, job: TransferJob, *, storing: bool) -> None:
        def begun() -> bool:
            self._begin(job, storing=storing)
            return True

        def missed() -> None:
            self._not_begun.append(self._missed(job.job_id, job, storing=storing))

        if not self._shielded(False, begun):
            self._shielded(None, missed)

    def _missed(self, number: int, job: TransferJob | Outcome, *, storing: bool) -> JobResult:
        """A bug has ended it. What a load was to bring is a miss, or vLLM would ask again."""
        if not storing:
            self._shielded(None, lambda: self._hub.lookups.failed([*job.keys]))
        return JobResult(job_id=number, success=False)

    def _begin(self, job: TransferJob, *, storing: bool) -> None:
        """Whatever may fail comes before `Transfers.submit`: a job that it has ends by itself."""
        blocks = list(zip(job.keys, map(int, job.chunk_ids), strict=True))
        if storing:  # a set of keys, in no order; a path has one, and its rows are neighbours
            at = job.req_context.get_offload_key_position
            blocks.sort(key=lambda block: (block[0][-4:], at(block[0]) or 0))
        keys = [key for key, _ in blocks]
        # vLLM's own record of a request's blocks, in order; it has no other name for it.
        named = getattr(job.req_context, "_offload_key_positions", None) if storing else None
        self._hub.transfers.submit(
            job.job_id, storing=storing, keys=keys, rows=[row for _, row in blocks],
            before=befores(named, keys),
            request=getattr(job.req_context, "req_id", None),
        )  # fmt: skip

    def _result(self, outcome: Outcome) -> JobResult:
        operation = "store" if outcome.storing else "load"
        missed = len(outcome.keys) - outcome.done
        for result, count in (("ok", outcome.done), ("missed", missed)):
            if count:
                self._stats.increase_counter(BLOCKS, count, (operation, result))
        self._stats.increase_counter(NBYTES, outcome.nbytes, (operation,))
        if outcome.request is not None and not outcome.storing:
            some = outcome.keys[: outcome.done]
            self._hub.lookups.loaded(outcome.request, some, outcome.sources)
        good = None
        if not outcome.whole and not outcome.storing:
            good = tuple(OffloadKey(key) for key in outcome.keys[: outcome.done]) or None
            self._hub.lookups.failed(outcome.keys[outcome.done :])
        return JobResult(
            job_id=outcome.job,
            success=outcome.whole,
            successful_keys=good,
            transfer_time=outcome.seconds,
            transfer_bytes=outcome.nbytes,
        )


def _identify(spec: OffloadingSpec, row_nbytes: int, settings: TierSettings) -> Identity | None:
    """Who this engine is; None, said in one line, where nobody can tell."""
    try:
        known = facts(spec)
        said = functools.partial(logger.info, "kvtier: %s")
        weights = weights_revision(known, settings.revision, said)
        if warning := problems(known, settings.adapters_revision):
            logger.warning("kvtier: %s", warning)
        life = str(known.pop("adapters", ""))
        adapters = settings.adapters_revision or life
        who = identity(known, row_nbytes, weights, adapters, settings.tenant)
        if settings.announce:
            tokens = spec.tokens_per_hash * spec.blocks_per_chunk
            groups = known["groups"]  # each has keys of its own
            layout = who.layout if isinstance(groups, list) and len(groups) == 1 else None
            told = Announced(who.root, bytes.fromhex(str(known["none_hash"])), weights, layout)
            write_announced(settings.announce, told, str(known["hash"]), tokens)
    except Exception as error:
        logger.warning("kvtier is off, nothing is kept or restored: %s", error)
        return None
    logger.info(
        "kvtier: namespace %s (weights %s, %d bytes a block of %s tokens, keys %s)",
        who.root.hex()[:16], weights, row_nbytes, known["chunk_tokens"], known["hash"],
    )  # fmt: skip
    return who
