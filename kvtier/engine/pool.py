"""Which block of the paged VRAM pool holds what. Bookkeeping only: no bytes, no torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from kvtier.core.blocks import BEGINS, BlockKey
from kvtier.core.policy import LRU, NO_USE, Learning, PolicyFactory, Use
from kvtier.core.shards import KeyMap
from kvtier.core.tiers import Tier


@dataclass(frozen=True, slots=True)
class EvictedRun:
    """Blocks of one path that were just evicted: `path[first:]` lay in `block_ids`.

    Their bytes stay as they were until the caller writes to the blocks it was given.
    """

    path: tuple[BlockKey, ...]
    first: int
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Changes:
    """Keys that came and went since the last look, each named at most once."""

    added: tuple[BlockKey, ...] = ()
    removed: tuple[BlockKey, ...] = ()
    before: tuple[BlockKey, ...] = ()  # the block before each of `added`, or BEGINS


@dataclass(slots=True)
class _Block:
    id: int
    parent: BlockKey | None
    depth: int  # 0: the first block of a prompt
    pins: int = 0
    children: int = 0
    saved: bool = False


@dataclass(slots=True)
class _Run:
    """An `EvictedRun` that grows towards the root."""

    path: tuple[BlockKey, ...]
    parent: BlockKey | None
    ids: list[int] = field(default_factory=list)  # deepest first


class BlockPool:
    """Keys of full blocks and the numbers of the blocks that hold them.

    A block is free, loose (handed out by `allocate`, not keyed yet) or resident under one key.
    A resident key's parent is resident too, and a pinned key's parent is pinned: callers pin and
    insert along paths, from the root on. Not thread-safe.
    """

    def __init__(self, capacity_blocks: int, policy: PolicyFactory = LRU) -> None:
        self.capacity = capacity_blocks
        self._free = list(range(capacity_blocks - 1, -1, -1))
        self._loose: set[int] = set()
        self._blocks = KeyMap[_Block]()
        self._resident = 0
        self._policy = policy()
        self._changes: dict[BlockKey, bool] = {}
        # The policy, if it is one that learns: for whoever keeps that over a restart.
        self.learning: dict[Tier, Learning] = (
            {Tier.VRAM: self._policy} if isinstance(self._policy, Learning) else {}
        )

    def __len__(self) -> int:
        """Resident keys."""
        return self._resident

    def __iter__(self) -> Iterator[BlockKey]:
        """Resident keys, in no order."""
        return iter(self._blocks)

    def match(self, path: Sequence[BlockKey]) -> list[int]:
        """The blocks of the leading resident keys. Changes nothing, not even recency."""
        found: list[int] = []
        shards = self._blocks.shards
        for key in path:
            block = shards[key[-1]].get(key)
            if block is None:
                break
            found.append(block.id)
        return found

    def pin(self, path: Sequence[BlockKey], first: int = 0, use: Use = NO_USE) -> None:
        """Keep the resident `path[first:]` from eviction, once more; the whole path is now warm.

        `path[:first]` must be pinned already.
        """
        for key in path[first:]:
            self._blocks[key].pins += 1
        self._policy.touch(path, use)

    def used(self, path: Sequence[BlockKey], use: Use) -> None:
        """More is known of the request that used the resident `path`."""
        self._policy.touch(path, use)

    def unpin(self, path: Sequence[BlockKey]) -> None:
        """Take one pin off each key of `path`."""
        for key in path:
            block = self._blocks[key]
            assert block.pins > 0, "unpinned more often than pinned"
            block.pins -= 1

    def allocate(self, count: int) -> tuple[list[int], list[EvictedRun]]:
        """At most `count` loose blocks: free ones, then those of the coldest unpinned keys.

        Fewer come back when the rest is pinned. Whoever wants to save what was evicted does so
        before writing to any of the blocks.
        """
        evicted = self._evict(count - len(self._free))
        ids = [self._free.pop() for _ in range(min(count, len(self._free)))]
        self._loose.update(ids)
        return ids, evicted

    def free(self, block_ids: Sequence[int]) -> None:
        """Give loose blocks back."""
        for block_id in block_ids:
            self._loose.remove(block_id)
            self._free.append(block_id)

    def insert(self, path: Sequence[BlockKey], block_ids: Sequence[int], use: Use = NO_USE) -> None:
        """The loose `block_ids` now hold the last keys of `path`, which were not resident.

        The keys before them must be resident. The whole path becomes warm.
        """
        first = len(path) - len(block_ids)
        for depth, block_id in enumerate(block_ids, first):
            key, parent = path[depth], path[depth - 1] if depth else None
            assert key not in self._blocks, "inserted a key twice"
            if parent is not None:
                self._blocks[parent].children += 1
            self._loose.remove(block_id)
            self._blocks[key] = _Block(block_id, parent, depth)
            self._resident += 1
            self._changed(key, held=True)
        self._policy.touch(path, use)

    def mark_saved(self, keys: Sequence[BlockKey]) -> None:
        """A lower tier was given these resident keys' blocks."""
        for key in keys:
            self._blocks[key].saved = True

    def first_unsaved(self, path: Sequence[BlockKey], start: int = 0) -> int:
        """Index, from `start`, of the first key of the resident `path` not marked as saved."""
        unsaved = (i for i in range(start, len(path)) if not self._blocks[path[i]].saved)
        return next(unsaved, len(path))

    def clear(self) -> int:
        """Drop every key that is not pinned; how many those were."""
        victims = [key for key, block in self._blocks.items() if not block.pins]
        for key in sorted(victims, key=lambda key: -self._blocks[key].depth):
            self._drop(key)
        return len(victims)

    def take_changes(self) -> Changes:
        """What came and went since the last call; a key that did both is not named."""
        changes, self._changes = self._changes, {}
        added = tuple(key for key, held in changes.items() if held)
        return Changes(
            added,
            tuple(key for key, held in changes.items() if not held),
            tuple(self._blocks[key].parent or BEGINS for key in added),
        )

    def check(self) -> None:
        """Assert every invariant; O(blocks)."""
        used = [block.id for _, block in self._blocks.items()]
        every = [*self._free, *self._loose, *used]
        assert sorted(every) == list(range(self.capacity)), "a block is lost or held twice"
        assert len(self._blocks) == self._resident, "blocks are miscounted"
        assert len(self._policy) == len(self._blocks), "the policy knows other keys"
        children = dict.fromkeys(self._blocks, 0)
        for key, block in self._blocks.items():
            assert key in self._policy, "the policy does not know a resident key"
            assert block.pins >= 0, "negative pins"
            if block.parent is not None:
                parent = self._blocks.get(block.parent)
                assert parent is not None, "a block outlived its parent"
                assert parent.depth == block.depth - 1, "depths do not follow"
                assert parent.pins or not block.pins, "a pinned block's parent is not pinned"
                children[block.parent] += 1
        for key, block in self._blocks.items():
            assert block.children == children[key], "children miscounted"

    def _evict(self, count: int) -> list[EvictedRun]:
        if count <= 0:
            return []
        victims: list[tuple[BlockKey, _Block]] = []
        for key in self._policy.coldest(self._pinned):
            if len(victims) == count:
                break
            block = self._blocks[key]
            if block.pins or block.children:
                continue
            victims.append((key, block))
            if block.parent is not None:  # at once: the parent may be the next victim
                self._blocks[block.parent].children -= 1
        runs: list[_Run] = []
        for key, block in victims:
            if not runs or runs[-1].parent != key:
                runs.append(_Run(self._path(key), None))
            runs[-1].parent = block.parent
            runs[-1].ids.append(block.id)
        for key, block in victims:
            block.parent = None  # uncounted above
            self._drop(key)
        return [
            EvictedRun(run.path, len(run.path) - len(run.ids), tuple(reversed(run.ids)))
            for run in runs
        ]

    def _pinned(self, key: BlockKey) -> bool:
        return self._blocks[key].pins > 0

    def _drop(self, key: BlockKey) -> None:
        block = self._blocks.pop(key)
        self._resident -= 1
        if block.parent is not None:
            self._blocks[block.parent].children -= 1
        self._free.append(block.id)
        self._policy.remove(key)
        self._changed(key, held=False)

    def _path(self, key: BlockKey) -> tuple[BlockKey, ...]:
        path = [key]
        while (parent := self._blocks[path[-1]].parent) is not None:
            path.append(parent)
        return tuple(reversed(path))

    def _changed(self, key: BlockKey, *, held: bool) -> None:
        if self._changes.pop(key, held) == held:  # else the two cancel out
            self._changes[key] = held
