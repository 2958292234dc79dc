"""What the engine does next: prefill in steps, decode in turn, keep full blocks in the pool.

No thread and no queue here: whoever calls `step` does the work. Each request is a forward pass of
its own, so who else is running never changes a request's numbers.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from statistics import median
from typing import Final, Protocol

import torch

from kvtier import metrics
from kvtier.config import WorkerConfig
from kvtier.core.blocks import BlockKey, block_keys
from kvtier.core.tiers import Tier
from kvtier.engine.kvcache import WorkingKV
from kvtier.engine.model import LoadedModel
from kvtier.engine.pool import BlockPool
from kvtier.engine.sequence import (
    Done,
    Failed,
    FinishReason,
    Running,
    Started,
    Tokens,
    sample,
)
from kvtier.errors import RequestError

RESTORE_BLOCKS: Final = 64  # asked of the lower tiers at once: bounds what is evicted for a miss
SAVE_BLOCKS: Final = 4  # of an answer, gathered before they are handed down
_RATE_TOKENS: Final = 64  # prefill steps smaller than this say nothing about speed
_RATES: Final = 16  # newest measurements that count


class LowerTiers(Protocol):
    """What lies under the pool, as `engine.tier.EngineTier` offers it. No method raises.

    Block ids are rows of the pool's storage; keys are whole paths from the root.
    """

    def restore(self, keys: Sequence[BlockKey], first: int, block_ids: Sequence[int]) -> list[Tier]:
        """Fill `block_ids` with keys[first:], from the first on; where each filled one was."""
        ...

    def save(self, keys: Sequence[BlockKey], first: int, block_ids: Sequence[int]) -> int:
        """Hand keys[first:], which lie in `block_ids`, down; how many were taken."""
        ...

    def bytes_per_s(self) -> dict[Tier, float]:
        """How fast restores from each tier have been."""
        ...

    def close(self) -> None:
        """Hang up."""
        ...


class Scheduler:
    """The running requests of one model and their blocks. Not thread-safe.

    Args:
        loaded: The model; `pool` numbers the rows of `storage`, which has its layout.
        pool: Which block holds what.
        storage: uint8 [pool.capacity, layout.nbytes] on the model's device.
        tiers: Below the pool, or None.
        config: Its save and prefill_tokens are used.
        clock: Seconds; only for measurements.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        pool: BlockPool,
        storage: torch.Tensor,
        tiers: LowerTiers | None,
        config: WorkerConfig,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._loaded = loaded
        self._layout = loaded.layout
        self._root = loaded.namespace().root()
        self._pool = pool
        self._storage = storage
        self._tiers = tiers
        self._save_when = config.save
        self._prefill_tokens = config.prefill_tokens
        self._clock = clock
        self._prefilling: deque[Running] = deque()
        self._decoding: deque[Running] = deque()
        self.prefill_tokens_per_s = 0.0  # measured; 0: not known yet
        self._rates: deque[float] = deque(maxlen=_RATES)

    @property
    def running(self) -> list[Running]:
        """Requests that were admitted and have not ended."""
        return [*self._prefilling, *self._decoding]

    @torch.inference_mode()
    def admit(self, sequence: Running) -> None:
        """Begin a request: find what is cached of it and load that."""
        self._prefilling.append(sequence)
        self._guarded(self._begin, sequence)

    @torch.inference_mode()
    def step(self) -> None:
        """Compute one prefill step of one request and one token of every other that is ready."""
        self._drop_cancelled()
        if self._prefilling:
            sequence = self._prefilling[0]
            self._prefilling.rotate(-1)
            self._guarded(self._prefill, sequence)
        for sequence in list(self._decoding):
            self._guarded(self._decode, sequence)

    def fail_all(self, error: RequestError) -> None:
        """End every running request with `error`."""
        for sequence in self.running:
            self._fail(sequence, error)

    def _guarded(self, work: Callable[[Running], None], sequence: Running) -> None:
        """Do `work`; what torch cannot do, above all for want of memory, fails this request."""
        try:
            work(sequence)
        except RuntimeError as error:
            line = next(iter(str(error).splitlines()), type(error).__name__)
            self._fail(sequence, RequestError(f"the model failed: {line}"))

    def _fail(self, sequence: Running, error: RequestError) -> None:
        self._release(sequence)
        sequence.deliver(Failed(error))

    def _drop_cancelled(self) -> None:
        for sequence in self.running:
            if sequence.cancelled:
                self._release(sequence)

    def _release(self, sequence: Running) -> None:
        for queue in (self._prefilling, self._decoding):
            if sequence in queue:
                queue.remove(sequence)
        self._pool.unpin(sequence.keys[: sequence.pinned])
        sequence.pinned = 0
        sequence.kv = None

    # --- finding what is cached ---------------------------------------------------------

    def _begin(self, sequence: Running) -> None:
        start = self._clock()
        sequence.queue_s = start - sequence.submitted_s
        request = sequence.request
        if request.temperature > 0:
            sequence.generator = torch.Generator().manual_seed(request.seed)
        sequence.keys = block_keys(self._root, sequence.tokens, self._layout.block_tokens)
        sequence.kv = WorkingKV(self._layout, sequence.limit, self._loaded.device)
        self._take_from_pool(sequence, sequence.kv)
        if self._tiers is not None:
            self._restore(sequence, sequence.kv, self._tiers)
        sequence.admitted_s = self._clock()
        sequence.restore_s = sequence.admitted_s - start

    def _reusable(self, sequence: Running) -> int:
        """Blocks that may come from a cache: the last prompt token is always computed."""
        return (sequence.prompt_length - 1) // self._layout.block_tokens

    def _take_from_pool(self, sequence: Running, kv: WorkingKV) -> None:
        """Load what the pool holds beyond what is there; others may have just computed it."""
        size = self._layout.block_tokens
        ids = self._pool.match(sequence.keys[: self._reusable(sequence)])
        if len(ids) * size <= kv.length:
            return
        first, before = kv.length // size, kv.length
        self._pool.pin(sequence.keys[: len(ids)], sequence.pinned)
        sequence.pinned = sequence.hits = len(ids)
        kv.load_blocks(self._storage, first, ids[first:])
        self._count_restored(sequence, Tier.VRAM, kv.length - before)
        metrics.RESTORED_TOKENS.labels(Tier.VRAM.label).inc(kv.length - before)

    def _restore(self, sequence: Running, kv: WorkingKV, tiers: LowerTiers) -> None:
        """Load what the lower tiers hold after that, by way of the pool."""
        size, end = self._layout.block_tokens, self._reusable(sequence)
        while (first := kv.length // size) < end:
            ids = self._allocate(min(RESTORE_BLOCKS, end - first))
            path = sequence.keys[: first + len(ids)]
            sources = tiers.restore(path, first, ids) if ids else []
            self._pool.free(ids[len(sources) :])
            if not sources:
                break
            path = path[: first + len(sources)]
            self._pool.insert(path, ids[: len(sources)])
            self._pool.pin(path, sequence.pinned)
            self._pool.mark_saved(path[first:])
            sequence.pinned = len(path)
            kv.load_blocks(self._storage, first, ids[: len(sources)])
            for tier in sources:
                self._count_restored(sequence, tier, size)
            if len(sources) < len(ids):
                break

    def _count_restored(self, sequence: Running, tier: Tier, tokens: int) -> None:
        sequence.restored[tier] = sequence.restored.get(tier, 0) + tokens

    # --- computing ------------------------------------------------------------------------

    def _prefill(self, sequence: Running) -> None:
        kv = sequence.kv
        assert kv is not None
        self._take_from_pool(sequence, kv)
        start = self._clock()
        step = sequence.tokens[kv.length : kv.length + self._prefill_tokens]
        logits = self._forward(kv, step)
        self._measure(len(step), self._clock() - start)
        sequence.computed += len(step)
        metrics.COMPUTED_TOKENS.inc(len(step))
        if kv.length < sequence.prompt_length:
            self._keep(sequence, kv)
            return
        self._prefilling.remove(sequence)
        self._decoding.append(sequence)
        sequence.deliver(
            Started(
                prompt_tokens=sequence.prompt_length,
                restored=sequence.restored,
                computed_tokens=sequence.computed,
                queue_s=sequence.queue_s,
                restore_s=sequence.restore_s,
                prefill_s=self._clock() - sequence.admitted_s,
                first_logits=logits.numpy().tobytes()
                if sequence.request.return_first_logits
                else b"",
            )
        )
        self._tell_next(sequence, kv, logits)

    def _decode(self, sequence: Running) -> None:
        kv = sequence.kv
        assert kv is not None
        self._tell_next(sequence, kv, self._forward(kv, sequence.tokens[-1:]))

    def _tell_next(self, sequence: Running, kv: WorkingKV, logits: torch.Tensor) -> None:
        """Tell the next token first, then keep and save what is complete, then maybe end."""
        token = sample(logits, sequence.request, sequence.generator)
        sequence.tokens.append(token)
        sequence.deliver(Tokens((token,)))
        reason: FinishReason | None = None
        if token in self._loaded.eos_token_ids and not sequence.request.ignore_eos:
            reason = FinishReason.STOP
        elif len(sequence.tokens) >= sequence.limit:
            reason = FinishReason.LENGTH
        self._keep(sequence, kv)
        self._save(sequence, at_once=reason is not None or sequence.produced == 1)
        if reason is not None:
            self._release(sequence)
            sequence.deliver(
                Done(
                    finish_reason=reason,
                    completion_tokens=sequence.produced,
                    saved_tokens=sequence.saved_tokens,
                )
            )

    def _forward(self, kv: WorkingKV, token_ids: Sequence[int]) -> torch.Tensor:
        """Logits after the last of `token_ids`: float32 [vocab_size] on the CPU."""
        ids = torch.tensor([list(token_ids)], device=self._loaded.device)
        out = self._loaded.model(
            input_ids=ids, past_key_values=kv, use_cache=True, logits_to_keep=1
        )
        logits: torch.Tensor = out.logits[0, -1].float().cpu()  # waits for the device
        return logits

    def _measure(self, tokens: int, seconds: float) -> None:
        if tokens >= _RATE_TOKENS and seconds > 0:
            self._rates.append(tokens / seconds)
            # Not the mean: other work on the machine makes a few steps very slow.
            self.prefill_tokens_per_s = median(self._rates)

    # --- keeping what was computed --------------------------------------------------------

    def _keep(self, sequence: Running, kv: WorkingKV) -> None:
        """Put the blocks that are complete now into the pool, as far as there is room."""
        size = self._layout.block_tokens
        full = kv.length // size
        if full <= max(sequence.pinned, sequence.offered):
            return
        sequence.offered = full  # where there is no room now, the next full block tries again
        keys = sequence.keys
        if full > len(keys):
            new = sequence.tokens[len(keys) * size : full * size]
            keys += block_keys(keys[-1] if keys else self._root, new, size)
        there = len(self._pool.match(keys[:full]))  # others may have computed the same
        if there > sequence.pinned:
            self._pool.pin(keys[:there], sequence.pinned)
            sequence.pinned = there
        ids = self._allocate(full - sequence.pinned)
        if ids:
            first, path = sequence.pinned, keys[: sequence.pinned + len(ids)]
            kv.store_blocks(self._storage, first, ids)
            self._pool.insert(path, ids)
            self._pool.pin(path, first)
            sequence.pinned = len(path)

    def _allocate(self, count: int) -> list[int]:
        """Loose blocks of the pool; what was evicted for them is saved first where that is due."""
        ids, evicted = self._pool.allocate(count)
        if self._tiers is not None and self._save_when == "evict":
            for run in evicted:
                self._tiers.save(run.path, run.first, run.block_ids)
        return ids

    def _save(self, sequence: Running, *, at_once: bool) -> None:
        """Hand blocks down that were not yet, if it is time; in batches where not `at_once`."""
        if self._tiers is None or self._save_when == "evict":
            return
        whole = sequence.pinned if self._save_when == "fill" else sequence.hits
        path = sequence.keys[:whole]
        # What this request has handed down already is not tried again before another request.
        first = self._pool.first_unsaved(path, sequence.handed)
        if len(path) - first < (1 if at_once else SAVE_BLOCKS):
            return
        sequence.handed = len(path)
        saved = self._tiers.save(path, first, self._pool.match(path)[first:])
        if saved == len(path) - first:
            self._pool.mark_saved(path[first:])
        sequence.saved_tokens += saved * self._layout.block_tokens
