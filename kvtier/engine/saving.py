"""What of the pool is handed down to the lower tiers, and when."""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Final

from kvtier.config import WorkerConfig
from kvtier.core.blocks import BlockKey
from kvtier.core.policy import Use
from kvtier.engine.beside import Beside, LowerTiers
from kvtier.engine.pool import BlockPool, EvictedRun
from kvtier.engine.sequence import Running

SAVE_BLOCKS: Final = 4  # of an answer, gathered before they are handed down


@dataclass(frozen=True, slots=True)
class _Save:
    """Blocks that the lower tiers are taking; pinned for that, whatever becomes of the request."""

    sequence: Running
    path: list[BlockKey]
    first: int
    taken: "Future[int]"


class Saver:
    """Saves a pool's blocks beside the engine's thread, which alone calls it.

    Args:
        pool: Saved blocks are pinned there until they were copied.
        tiers: Below the pool, or None: then nothing is saved. With save "evict" used for nothing
            else, or the engine's thread would wait behind a restore.
        config: Its save and max_running are used.
        block_tokens: Tokens of a block.
    """

    def __init__(
        self, pool: BlockPool, tiers: Beside | None, config: WorkerConfig, block_tokens: int
    ) -> None:
        self._pool = pool
        self._tiers = tiers
        self._when = config.save
        self._block_tokens = block_tokens
        self._under_way: deque[_Save] = deque()  # at most one of each request that runs
        # Those of cancelled requests included; beyond that, what is computed is not saved.
        self._most = 2 * config.max_running

    @property
    def ready(self) -> bool:
        """Whether `settle` has something to do."""
        return bool(self._under_way) and self._under_way[0].taken.done()

    def due(self, evicted: list[EvictedRun]) -> list[EvictedRun]:
        """What has to be saved before its blocks are written."""
        return evicted if self._when == "evict" else []

    def save_now(self, evicted: list[EvictedRun]) -> None:
        """Save what is due of `evicted`, and wait for it: the caller writes to the blocks next."""
        due = self.due(evicted)
        if due and self._tiers is not None:
            self._tiers.submit(lambda tiers: save_runs(tiers, due)).result()

    def offer(self, sequence: Running, *, at_once: bool) -> None:
        """Hand blocks down that were not yet, if it is time; in batches where not `at_once`.

        `sequence.saving` holds from then until `settle` sees that the copies have ended.
        """
        if self._tiers is None or self._when == "evict" or sequence.saving:
            return
        whole = sequence.pinned if self._when == "fill" else sequence.hits
        path = sequence.keys[:whole]
        # What this request has handed down already is not tried again before another request.
        first = self._pool.first_unsaved(path, sequence.handed)
        if len(path) - first < (1 if at_once else SAVE_BLOCKS):
            return
        if len(self._under_way) >= self._most:
            return
        sequence.handed = len(path)
        sequence.saving = True
        self._pool.pin(path)
        ids = self._pool.match(path)[first:]
        output = sequence.produced if sequence.finish_reason is not None else None
        use = Use(request=sequence.number, output_tokens=output)
        taken = self._tiers.submit(lambda tiers: tiers.save(path, first, ids, use))
        self._under_way.append(_Save(sequence, path, first, taken))

    def settle(self) -> None:
        """Take in which saves have ended."""
        while self.ready:
            save = self._under_way.popleft()
            save.sequence.saving = False
            self._pool.unpin(save.path)
            taken = save.taken.result()
            if taken == len(save.path) - save.first:
                self._pool.mark_saved(save.path[save.first :])
            save.sequence.saved_tokens += taken * self._block_tokens

    def wait(self) -> bool:
        """Wait until all that is under way has ended; whether there was anything."""
        wait([save.taken for save in self._under_way])
        return bool(self._under_way)


def save_runs(tiers: LowerTiers, runs: Sequence[EvictedRun]) -> None:
    """Hand each run down, for no request: they were used long ago. On the tiers' own thread."""
    for run in runs:
        tiers.save(run.path, run.first, run.block_ids)
