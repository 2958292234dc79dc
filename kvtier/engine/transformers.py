"""The engine: one thread that owns a Transformers model and a paged pool of its KV blocks.

Others, `beside`, move blocks between the pool and what lies under it.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from kvtier.config import WorkerConfig
from kvtier.core.blocks import Namespace
from kvtier.core.breakeven import as_first
from kvtier.core.policies import POLICIES
from kvtier.core.tiers import Tier
from kvtier.engine.beside import Beside, LowerTiers
from kvtier.engine.kvcache import allocate_storage
from kvtier.engine.model import LoadedModel
from kvtier.engine.pool import BlockPool, Changes
from kvtier.engine.saving import Saver
from kvtier.engine.scheduler import Scheduler
from kvtier.engine.sequence import Deliver, Done, Event, Failed, Request, Running
from kvtier.errors import ConfigError, Overloaded, UnknownTenant, WorkerLost
from kvtier.stores import learned

STOPPING: Final = "the worker is stopping"

MakeTiers = Callable[[Namespace, torch.Tensor], LowerTiers | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLoad:
    """How busy an engine is and how fast it has been; a rate of 0 is not known yet."""

    running: int  # requests
    waiting: int  # requests
    waiting_tokens: int  # prompt tokens still to be computed, all requests together
    waiting_as_first: float  # as so many at the start of a prompt (`breakeven.as_first`)
    computed_as_first: float  # of the prompts that wait for their first token, in the same unit
    prefill_tokens_per_s: float
    bytes_per_s: dict[Tier, float]  # of restores, by tier


class Handle:
    """A submitted request."""

    def __init__(self, engine: "Engine", sequence: Running) -> None:
        self._engine = engine
        self._sequence = sequence

    def cancel(self) -> None:
        """End the request soon, freeing all that it holds; nothing more is told. Idempotent."""
        self._engine._cancel(self._sequence)


class Engine:
    """Serves requests of one model, at most `max_running` at once. Thread-safe.

    Args:
        loaded: The model.
        config: Its vram_bytes, policy, learned, save, loads, prefill_tokens, max_running,
            max_waiting and threads are used.
        make_tiers: Given the namespace and the pool's memory (uint8 [blocks, layout.nbytes] on
            the model's device, row i is block i), returns what lies under the pool. One thread,
            not the one that computes, calls it from then on and closes it at the end. With save
            "evict" it is called twice: what the engine's thread waits for is no restore's turn.
        on_change: Told on the engine's thread which keys came to the pool and which went.
        clock: Seconds; only for measurements and the drain's deadline.

    Raises:
        ConfigError: vram_bytes does not hold one block.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        config: WorkerConfig,
        make_tiers: MakeTiers | None = None,
        on_change: Callable[[Changes], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        nbytes = loaded.layout.nbytes
        blocks = config.vram_bytes // nbytes
        if not blocks:
            raise ConfigError(
                f"worker.vram_bytes is {config.vram_bytes}, must be at least {nbytes}: "
                f"one block of {loaded.layout.block_tokens} tokens of {loaded.name}"
            )
        self.loaded = loaded
        self.pool = BlockPool(blocks, POLICIES[config.policy])  # for the engine's thread only
        self._storage = allocate_storage(loaded.layout, blocks, loaded.device)
        self._wake = threading.Condition()  # guards all below `_clock`
        self._tiers = self._beside(make_tiers)
        self._saves = self._beside(make_tiers) if config.save == "evict" else self._tiers
        self._config = config
        saver = Saver(self.pool, self._saves, config, loaded.layout.block_tokens)
        self._scheduler = Scheduler(
            loaded, self.pool, self._storage, self._tiers, saver, config, clock
        )
        self._on_change = on_change
        self._clock = clock
        self._waiting: deque[Running] = deque()
        self._active: list[Running] = []
        self._clears: deque[Future[int]] = deque()
        self._closing = False
        self._deadline_s = 0.0
        self._executor = ThreadPoolExecutor(1, "kvtier-engine")
        self.ended = self._executor.submit(self._run)  # carries what ended the thread, if a bug did

    def submit(self, request: Request, deliver: Deliver) -> Handle:
        """Queue a request. `deliver` is called on the engine's thread and must not block or raise.

        It gets Started, Tokens..., Done; or at any point Failed and nothing more; or nothing
        more once the request is cancelled.

        Raises:
            InvalidRequest: The model cannot compute this.
            UnknownTenant: Its tenant is none of the model's.
            Overloaded: `max_waiting` requests are waiting already.
            WorkerLost: The engine is closing.
        """
        most = self.loaded.max_tokens
        request.check(self.loaded.vocab_size, most)
        if request.tenant and request.tenant not in self.loaded.tenants:
            raise UnknownTenant(f"tenant {request.tenant[:200]!r} is not known to this worker")
        tokens = list(request.token_ids)
        limit = min(most, len(tokens) + request.max_tokens)
        sequence = Running(request, deliver, self._clock(), limit, tokens)
        config = self._config
        with self._wake:
            if self._closing:
                raise WorkerLost(STOPPING)
            if len(self._waiting) + len(self._active) >= config.max_running + config.max_waiting:
                raise Overloaded(
                    f"{len(self._active)} requests run and {len(self._waiting)} wait; the limits "
                    f"are worker.max_running {config.max_running} and worker.max_waiting "
                    f"{config.max_waiting}"
                )
            self._waiting.append(sequence)
            self._wake.notify_all()
        return Handle(self, sequence)

    def stream(self, request: Request) -> Iterator[Event]:
        """Submit, and yield the events; closing the iterator cancels. Raises like `submit`."""
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()  # bounded by the answer's length
        handle = self.submit(request, events.put)

        def follow() -> Iterator[Event]:
            try:
                while True:
                    event = events.get()
                    yield event
                    if isinstance(event, Done | Failed):
                        return
            finally:
                handle.cancel()

        return follow()

    def clear(self) -> "Future[int]":
        """Drop every block of the pool that no running request uses; how many those were.

        Raises:
            WorkerLost: The engine is closing.
        """
        answer: Future[int] = Future()
        with self._wake:
            if self._closing:
                raise WorkerLost(STOPPING)
            self._clears.append(answer)
            self._wake.notify_all()
        return answer

    @property
    def doubles_at(self) -> float:
        """The position whose token takes twice as long to compute as a prompt's first; 0: none."""
        return self._scheduler.prefill.doubles_at

    def load(self) -> EngineLoad:
        """How busy the engine is now."""
        with self._wake:
            waiting, active = list(self._waiting), list(self._active)
        uncomputed = [(each.uncomputed, each.prompt_length) for each in (*waiting, *active)]
        return EngineLoad(
            running=len(active),
            waiting=len(waiting),
            waiting_tokens=sum(tokens for tokens, _ in uncomputed),
            waiting_as_first=sum(
                as_first(length - tokens, length, self.doubles_at) for tokens, length in uncomputed
            ),
            computed_as_first=sum(as_first(*each.prefilled, self.doubles_at) for each in active),
            prefill_tokens_per_s=self._scheduler.prefill.tokens_per_s,
            bytes_per_s=self._tiers.bytes_per_s() if self._tiers else {},
        )

    def close(self, drain_s: float = 0.0) -> None:
        """Take no more requests, give those there `drain_s` to end, fail the rest. Idempotent.

        Raises:
            Exception: Whatever bug ended the engine's thread before.
        """
        with self._wake:
            if not self._closing:
                self._closing = True
                self._deadline_s = self._clock() + drain_s
            self._wake.notify_all()
        self._executor.shutdown()
        self.ended.result()

    def _beside(self, make_tiers: MakeTiers | None) -> Beside | None:
        tiers = make_tiers(self.loaded.namespace(), self._storage) if make_tiers else None
        return None if tiers is None else Beside(tiers, self._look_again)

    def _cancel(self, sequence: Running) -> None:
        with self._wake:
            sequence.cancelled = True
            if sequence in self._waiting:
                self._waiting.remove(sequence)
            self._wake.notify_all()

    def _look_again(self) -> None:
        with self._wake:
            self._wake.notify_all()

    # --- on the engine's thread -----------------------------------------------------------

    def _run(self) -> None:
        if self._config.threads:
            torch.set_num_threads(self._config.threads)
        kept, policies = Path(self._config.learned), self.pool.learning
        if self._config.learned:
            learned.restore(kept, policies)
        try:
            while self._await_work():
                self._turn()
        finally:
            with self._wake:
                self._closing = True
                waiting, clears = list(self._waiting), list(self._clears)
                self._waiting.clear()
                self._active = []
            lost = WorkerLost(STOPPING)
            for sequence in waiting:
                sequence.deliver(Failed(lost))
            for answer in clears:
                if answer.set_running_or_notify_cancel():
                    answer.set_exception(lost)
            try:
                self._scheduler.fail_all(lost)
            finally:
                for each in {self._tiers, self._saves}:
                    if each is not None:
                        each.close()
                if self._config.learned and policies:
                    learned.write(kept, learned.pack(policies))

    def _await_work(self) -> bool:
        """Sleep until there is something to do; False: it is time to end."""
        with self._wake:
            self._wake.wait_for(lambda: self._closing or self._to_do())
            if not self._closing:
                return True
            # No longer than the drain lasts: what is left may be with the lower tiers.
            left_s = max(0.0, self._deadline_s - self._clock())
            self._wake.wait_for(
                lambda: self._to_do() or not (self._waiting or self._active), left_s
            )
            return bool(self._waiting or self._active) and self._clock() < self._deadline_s

    def _to_do(self) -> bool:
        room = len(self._active) < self._config.max_running
        return bool(self._clears or (self._waiting and room) or self._scheduler.ready)

    def _turn(self) -> None:
        with self._wake:
            clears = [self._clears.popleft() for _ in range(len(self._clears))]
            room = max(0, self._config.max_running - len(self._active))
            admitted = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
            self._active += admitted
        for sequence in admitted:
            self._scheduler.admit(sequence)
        self._scheduler.step()
        for answer in clears:
            if answer.set_running_or_notify_cancel():
                answer.set_result(self.pool.clear())
        changes = self.pool.take_changes()
        if self._on_change is not None and (changes.added or changes.removed):
            self._on_change(changes)
        with self._wake:
            self._active = self._scheduler.running
