"""What the engine does next: prefill in steps, decode in turn, keep full blocks in the pool.

No thread and no queue here: whoever calls `step` does the work. Each request is a forward pass of
its own, so who else is running never changes a request's numbers. What the lower tiers do for one
request happens beside, and the others compute meanwhile.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Final

import torch

from kvtier import metrics
from kvtier.config import WorkerConfig
from kvtier.core.blocks import block_keys
from kvtier.core.policy import Use
from kvtier.core.tiers import Tier
from kvtier.engine.beside import Beside, LowerTiers
from kvtier.engine.kvcache import WorkingKV
from kvtier.engine.model import LoadedModel
from kvtier.engine.pool import BlockPool
from kvtier.engine.prefill import PrefillSpeed, Work
from kvtier.engine.pulling import arrived, pull
from kvtier.engine.saving import Saver, save_runs
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


@dataclass(frozen=True, slots=True)
class _Piece:
    """Blocks that the lower tiers are filling for a request; loose until that has ended."""

    sequence: Running  # may have ended meanwhile
    first: int  # of its keys
    ids: list[int]
    sources: "Future[list[Tier]]"


class Scheduler:
    """The running requests of one model and their blocks. Not thread-safe.

    Args:
        loaded: The model; `pool` numbers the rows of `storage`, which has its layout.
        pool: Which block holds what.
        storage: uint8 [pool.capacity, layout.nbytes] on the model's device.
        tiers: Below the pool, or None.
        saver: Of the same pool.
        config: Its loads and prefill_tokens are used.
        clock: Seconds; only for measurements.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        pool: BlockPool,
        storage: torch.Tensor,
        tiers: Beside | None,
        saver: Saver,
        config: WorkerConfig,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._loaded = loaded
        self._layout = loaded.layout
        self._roots = {name: loaded.namespace(name).root() for name in ("", *loaded.tenants)}
        self._pool = pool
        self._storage = storage
        self._tiers = tiers
        self._saver = saver
        self._prefill_tokens = config.prefill_tokens
        self._clock = clock
        self._restoring: deque[Running] = deque()  # each is asked one piece for, in turn
        self._prefilling: deque[Running] = deque()
        self._decoding: deque[Running] = deque()
        self._ending: deque[Running] = deque()  # all is told, the last blocks are being saved
        self._piece: _Piece | None = None
        self.prefill = PrefillSpeed(
            Work.of(loaded.model, loaded.layout), loaded.layout.block_tokens
        )
        self._judges_loads = config.loads == "worth"

    @property
    def running(self) -> list[Running]:
        """Requests that were admitted and have not ended."""
        return [*self._restoring, *self._prefilling, *self._decoding, *self._ending]

    @property
    def ready(self) -> bool:
        """Whether there is something for `step`; if not, there may be when the tiers are done."""
        return bool(
            self._prefilling
            or self._decoding
            or (self._piece is not None and self._piece.sources.done())
            or self._saver.ready
            or any(sequence.cancelled for sequence in (*self._restoring, *self._ending))
        )

    @torch.inference_mode()
    def admit(self, sequence: Running) -> None:
        """Begin a request: find what is cached of it and load that; `step` goes on with it."""
        self._restoring.append(sequence)
        self._guarded(self._begin, sequence)

    @torch.inference_mode()
    def step(self) -> None:
        """Compute one prefill step of one request and one token of every other that is ready.

        Never waits for the lower tiers, but with save "evict" for blocks to be handed down before
        they are written: for that copy alone, whatever is being restored meanwhile.
        """
        self._drop_cancelled()
        self._settle()
        while self._restoring and self._piece is None:
            self._guarded(self._restore, self._restoring[0])
        if self._prefilling:
            sequence = self._prefilling[0]
            self._prefilling.rotate(-1)
            self._guarded(self._prefill, sequence)
        for sequence in list(self._decoding):
            self._guarded(self._decode, sequence)

    def fail_all(self, error: RequestError) -> None:
        """End every running request with `error`; return when no copy is under way any more."""
        self._drop_cancelled()
        for sequence in (*self._restoring, *self._prefilling, *self._decoding):
            self._fail(sequence, error)
        try:
            if self._piece is not None:
                wait([self._piece.sources])
                self._settle()
            while self._saver.wait():
                self._settle()
        finally:  # none is left there, unless a bug came between
            for sequence in list(self._ending):
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

    def _settle(self) -> None:
        """Take in what the lower tiers have done."""
        piece = self._piece
        if piece is not None and piece.sources.done():
            self._piece = None
            if piece.sequence in self._restoring:
                self._guarded(lambda _: self._arrived(piece), piece.sequence)
            else:
                self._pool.free(piece.ids)
        self._saver.settle()
        for sequence in list(self._ending):
            self._end(sequence)

    def _drop_cancelled(self) -> None:
        for sequence in self.running:
            if sequence.cancelled:
                self._release(sequence)

    def _release(self, sequence: Running) -> None:
        for queue in (self._restoring, self._prefilling, self._decoding, self._ending):
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
        size = self._layout.block_tokens
        sequence.keys = block_keys(self._root(sequence), sequence.tokens, size)
        sequence.kv = WorkingKV(self._layout, sequence.limit, self._loaded.device)
        self._take_from_pool(sequence, sequence.kv)
        if self._tiers is None or self._lacking(sequence, sequence.kv) <= 0:
            self._restored(sequence)

    def _root(self, sequence: Running) -> bytes:
        return self._roots[sequence.request.tenant]

    def _restored(self, sequence: Running) -> None:
        """The rest has to be computed."""
        self._restoring.remove(sequence)
        self._prefilling.append(sequence)
        sequence.admitted_s = self._clock()
        sequence.restore_s = sequence.admitted_s - sequence.submitted_s - sequence.queue_s

    def _reusable(self, sequence: Running) -> int:
        """Blocks that may come from a cache: the last prompt token is always computed."""
        return (sequence.prompt_length - 1) // self._layout.block_tokens

    def _lacking(self, sequence: Running, kv: WorkingKV) -> int:
        """Blocks that the lower tiers may have yet."""
        return self._reusable(sequence) - kv.length // self._layout.block_tokens

    def _take_from_pool(self, sequence: Running, kv: WorkingKV) -> None:
        """Load what the pool holds beyond what is there; others may have just computed it."""
        size = self._layout.block_tokens
        ids = self._pool.match(sequence.keys[: self._reusable(sequence)])
        if len(ids) * size <= kv.length:
            return
        first, before = kv.length // size, kv.length
        self._pool.pin(sequence.keys[: len(ids)], sequence.pinned, self._use(sequence))
        sequence.pinned = sequence.hits = len(ids)
        kv.load_blocks(self._storage, first, ids[first:])
        self._count_restored(sequence, Tier.VRAM, kv.length - before)

    def _restore(self, sequence: Running) -> None:
        """Ask the lower tiers for the next piece, or go on to computing."""
        kv = sequence.kv
        assert kv is not None
        assert self._tiers is not None
        self._take_from_pool(sequence, kv)
        first, lacking = kv.length // self._layout.block_tokens, self._lacking(sequence, kv)
        ids, evicted = self._pool.allocate(max(0, min(RESTORE_BLOCKS, lacking)))
        if not ids:
            self._restored(sequence)
            return
        keys, saved_first = sequence.keys[: first + lacking], self._saver.due(evicted)
        # Prompts take turns: what else is computed makes computing this one take longer.
        among = len(self._prefilling) + 1
        compute = self.prefill.cost(among) if self._judges_loads else None
        use = self._use(sequence)

        def fetch(tiers: LowerTiers) -> list[Tier]:
            save_runs(tiers, saved_first)
            pull(tiers, sequence, keys[: first + len(ids)], first, compute, use)
            return tiers.restore(keys, first, ids, compute, use)

        self._piece = _Piece(sequence, first, ids, self._tiers.submit(fetch))

    def _arrived(self, piece: _Piece) -> None:
        """Put what came into the pool and load it from there."""
        sequence, first, ids = piece.sequence, piece.first, piece.ids
        sources = [] if piece.sources.exception() else piece.sources.result()
        path, count = sequence.keys[: first + len(sources)], len(sources)
        arrived(sequence, sources)
        there = len(self._pool.match(path)) - first  # others may have computed the same meanwhile
        self._pool.free([*ids[:there], *ids[count:]])
        if sources:
            self._pool.insert(path, ids[there:count], self._use(sequence))
            self._pool.pin(path, sequence.pinned, self._use(sequence))
            self._pool.mark_saved(path[first:])
            sequence.pinned = len(path)
            assert sequence.kv is not None
            sequence.kv.load_blocks(self._storage, first, self._pool.match(path)[first:])
            for tier in sources:
                self._count_restored(sequence, tier, self._layout.block_tokens)
        piece.sources.result()  # raises what a bug raised
        if count < len(ids):
            self._restored(sequence)
        else:
            self._restoring.rotate(-1)  # the others' turn

    def _count_restored(self, sequence: Running, tier: Tier, tokens: int) -> None:
        sequence.restored[tier] = sequence.restored.get(tier, 0) + tokens
        metrics.RESTORED_TOKENS.labels(tier.label).inc(tokens)

    # --- computing ------------------------------------------------------------------------

    def _prefill(self, sequence: Running) -> None:
        kv = sequence.kv
        assert kv is not None
        self._take_from_pool(sequence, kv)
        start, position = self._clock(), kv.length
        step = sequence.tokens[position : position + self._prefill_tokens]
        logits = self._forward(kv, step)
        self.prefill.measure(len(step), position, self._clock() - start)
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
                pulled_tokens=sequence.pulled * self._layout.block_tokens,
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
        if reason is None:
            self._saver.offer(sequence, at_once=sequence.produced == 1)
            return
        self._decoding.remove(sequence)
        self._ending.append(sequence)
        sequence.finish_reason = reason
        path = sequence.keys[: sequence.pinned]
        self._pool.used(path, self._use(sequence, sequence.produced))
        self._end(sequence)

    def _end(self, sequence: Running) -> None:
        """Save the last blocks; once that is done, end."""
        self._saver.offer(sequence, at_once=True)
        if sequence.saving:
            return
        self._release(sequence)
        assert sequence.finish_reason is not None
        sequence.deliver(
            Done(
                finish_reason=sequence.finish_reason,
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
            keys += block_keys(keys[-1] if keys else self._root(sequence), new, size)
        there = len(self._pool.match(keys[:full]))  # others may have computed the same
        if there > sequence.pinned:
            self._pool.pin(keys[:there], sequence.pinned, self._use(sequence))
            sequence.pinned = there
        ids = self._allocate(full - sequence.pinned)
        if ids:
            first, path = sequence.pinned, keys[: sequence.pinned + len(ids)]
            kv.store_blocks(self._storage, first, ids)
            self._pool.insert(path, ids, self._use(sequence))
            self._pool.pin(path, first, self._use(sequence))
            sequence.pinned = len(path)

    def _use(self, sequence: Running, output_tokens: int | None = None) -> Use:
        return Use(self._clock(), sequence.number, output_tokens)

    def _allocate(self, count: int) -> list[int]:
        """Loose blocks of the pool; what was evicted for them is saved first where that is due."""
        ids, evicted = self._pool.allocate(count)
        self._saver.save_now(evicted)
        return ids
