"""What the engine's tests share: a tier in plain memory, a tiny model's prompts, short forms."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from kvtier.config import WorkerConfig
from kvtier.core.blocks import BlockKey, Namespace
from kvtier.core.breakeven import ComputeCost
from kvtier.core.policy import NO_USE, Use
from kvtier.core.tiers import Tier
from kvtier.engine.model import LoadedModel
from kvtier.engine.sequence import Done, Event, Request, Started, Tokens
from kvtier.engine.transformers import Engine

BLOCK = 16
STEP = 32


class DictTier:
    """A lower tier that keeps blocks' bytes in a dict."""

    def __init__(self, storage: torch.Tensor, tier: Tier = Tier.HOST) -> None:
        self.storage = storage
        self.tier = tier
        self.blocks: dict[BlockKey, torch.Tensor] = {}
        self.away = False
        self.closed = False
        self.told: list[ComputeCost | None] = []  # what computing costs, at each restore
        self.on_save: Callable[[], None] = lambda: None

    def restore(
        self,
        keys: Sequence[BlockKey],
        first: int,
        block_ids: Sequence[int],
        compute: ComputeCost | None = None,
        use: Use = NO_USE,
    ) -> list[Tier]:
        assert len(keys) >= first + len(block_ids)
        self.told.append(compute)
        restored: list[Tier] = []
        for key, block_id in zip(keys[first:], block_ids, strict=False):
            if self.away or key not in self.blocks:
                break
            self.storage[block_id].copy_(self.blocks[key])
            restored.append(self.tier)
        return restored

    def save(
        self, keys: Sequence[BlockKey], first: int, block_ids: Sequence[int], use: Use = NO_USE
    ) -> int:
        assert len(keys) == first + len(block_ids)
        self.on_save()
        if self.away:
            return 0
        new = [
            (key, block_id)
            for key, block_id in zip(keys[first:], block_ids, strict=True)
            if key not in self.blocks
        ]
        self.blocks.update((key, self.storage[block_id].clone()) for key, block_id in new)
        return len(new)

    def bytes_per_s(self) -> dict[Tier, float]:
        return {self.tier: 1e9}

    def close(self) -> None:
        self.closed = True


@dataclass
class Tiers:
    """Passed as `make_tiers`; what it makes holds the same blocks."""

    tier: Tier = Tier.HOST
    made: list[DictTier] = field(default_factory=list)

    def __call__(self, namespace: Namespace, storage: torch.Tensor) -> DictTier:
        assert storage.shape[1] == namespace.layout.nbytes
        self.made.append(DictTier(storage, self.tier))
        self.made[-1].blocks = self.made[0].blocks
        return self.made[-1]

    @property
    def only(self) -> DictTier:
        """The one that restores."""
        return self.made[0]


@dataclass
class Answer:
    """All that was told of one request."""

    started: Started
    ids: list[int]
    done: Done

    @property
    def hit(self) -> int:
        return sum(self.started.restored.values())

    @property
    def logits(self) -> torch.Tensor:
        return torch.from_numpy(np.frombuffer(self.started.first_logits, np.float32).copy())


def collect(events: Sequence[Event]) -> Answer:
    """The parts of a complete answer; fails where they come in another order."""
    started, *middle, done = events
    assert isinstance(started, Started)
    assert isinstance(done, Done)
    ids: list[int] = []
    for event in middle:
        assert isinstance(event, Tokens)
        ids += event.ids
    assert done.completion_tokens == len(ids)
    assert started.prompt_tokens == sum(started.restored.values()) + started.computed_tokens
    return Answer(started, ids, done)


def ask(
    engine: Engine,
    prompt: Sequence[int],
    max_tokens: int = 8,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    ignore_eos: bool = True,
) -> Answer:
    request = Request(
        token_ids=prompt,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        ignore_eos=ignore_eos,
        return_first_logits=True,
    )
    return collect(list(engine.stream(request)))


def prompt_of(tokens: int, seed: int, vocab_size: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(3, vocab_size) for _ in range(tokens)]


def small(loaded: LoadedModel, blocks: int = 64, **settings: object) -> WorkerConfig:
    """Settings with a pool of `blocks` blocks (at least the 1 MiB that a config asks for)."""
    values = {
        "device": "cpu",
        "block_tokens": loaded.layout.block_tokens,
        "prefill_tokens": STEP,
        "vram_bytes": blocks * loaded.layout.nbytes,
    }
    return WorkerConfig(**{**values, **settings})  # type: ignore[arg-type]
