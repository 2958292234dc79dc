"""How fast a model reads prompts here, measured, and what a block therefore costs to compute.

Speed at the start of a prompt says little about its end, where attention looks back on all of it.
So a step is measured by the operations that it takes, `2 parameters + 4 layers width position` a
token (Kaplan et al. 2020, section 2.1), and a block's cost is what its own operations take at that
speed. Of a mixture of experts all parameters count: its blocks far behind are then thought to be a
little cheaper than they are.
"""

from collections import deque
from statistics import median
from typing import Final, NamedTuple

from transformers import PreTrainedModel

from kvtier.core.blocks import BlockLayout
from kvtier.core.breakeven import ComputeCost, doubles_at
from kvtier.engine.newest import FEW

_LEAST_TOKENS: Final = 64  # steps smaller than this say nothing about speed
_NEWEST: Final = 16  # measurements that count


class Work(NamedTuple):
    """What a token's operations depend on."""

    parameters: int  # that each token of a prompt meets: no embedding, no head
    layers: int
    width: int  # of all query heads together

    @classmethod
    def of(cls, model: PreTrainedModel, layout: BlockLayout) -> "Work":
        """A model's, whose layers are those of `layout`."""
        ends = (
            model.get_input_embeddings(),
            model.get_output_embeddings(),  # type: ignore[no-untyped-call]
        )
        apart = {id(weight) for end in ends if end is not None for weight in end.parameters()}
        heads = getattr(model.config.get_text_config(decoder=True), "num_attention_heads", 0)
        return cls(
            sum(each.numel() for each in model.parameters() if id(each) not in apart),
            sum(group.layers for group in layout.groups),
            heads * max(group.head_dim for group in layout.groups),
        )

    @property
    def doubles_at(self) -> float:
        """See `kvtier.core.breakeven.doubles_at`."""
        return doubles_at(parameters=self.parameters, layers=self.layers, width=self.width)

    def flops(self, tokens: int, position: int) -> float:
        """Operations for `tokens` that begin at `position`."""
        middle = position + (tokens - 1) / 2
        return tokens * (2.0 * self.parameters + 4.0 * self.layers * self.width * middle)


class PrefillSpeed:
    """Medians of the newest steps: other work on the machine makes a few very slow.

    The engine's thread measures.
    """

    def __init__(self, work: Work, block_tokens: int) -> None:
        self.doubles_at = work.doubles_at
        self._work = work
        self._block_tokens = block_tokens
        self._steps: deque[float] = deque(maxlen=_NEWEST)  # operations a second
        self.tokens_per_s = 0.0  # at a prompt's start, as routers are told: 0 until FEW steps
        self._flops_per_s = 0.0

    def measure(self, tokens: int, position: int, seconds: float) -> None:
        """A step of `tokens` tokens, the first of them at `position`, took so long."""
        if tokens < _LEAST_TOKENS or seconds <= 0:
            return
        self._steps.append(self._work.flops(tokens, position) / seconds)
        self._flops_per_s = median(self._steps)
        if len(self._steps) >= FEW:
            self.tokens_per_s = self._flops_per_s / self._work.flops(1, 0)

    def cost(self, among: int = 1) -> ComputeCost | None:
        """Of a block of a prompt that `among` prompts in all take turns with; None: not known."""
        if not self._flops_per_s:
            return None
        return ComputeCost.of_model(
            flops_per_s=self._flops_per_s / among,
            parameters=self._work.parameters,
            layers=self._work.layers,
            width=self._work.width,
            block_tokens=self._block_tokens,
        )
