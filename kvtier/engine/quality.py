"""What a codec does to a model: the KV that it computes, and how far its answers move.

Perplexity hardly tells codecs apart (half a percent of noise on a thousand tokens); the divergence
of the next token's distribution does, and it is 0 for nothing but the same KV.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer

from kvtier.codec.base import Codec
from kvtier.config import WorkerConfig
from kvtier.core.blocks import BlockLayout
from kvtier.engine import model as models
from kvtier.engine.kvcache import WorkingKV, allocate_storage, as_blocks
from kvtier.engine.model import LoadedModel
from kvtier.errors import ConfigError

Blocks = npt.NDArray[np.uint8]  # [blocks, layout.nbytes]

_STEP: Final = 256  # tokens computed at once
_JUDGED_IN: Final = "float32"  # what answers are computed in, so that only the KV differs


@dataclass(frozen=True, slots=True)
class Divergence:
    """KL(exact || codec) of the next token, over all tokens of a continuation, in nats."""

    mean: float
    p99: float
    largest: float
    same_choice: float  # share of tokens where both would choose the same one


class Quality:
    """One text through one model: real KV of its beginning, and answers on any version of it.

    Args:
        settings: Its model, device and block_tokens are used, and dtype for the KV.
        text: Must give `prefix_tokens` and `continued_tokens` tokens.
        prefix_tokens: Whose KV is looked at; a multiple of block_tokens.
        continued_tokens: That follow, and whose distributions are compared.

    Raises:
        ConfigError: The model cannot be loaded, or the text is too short.
    """

    def __init__(
        self, settings: WorkerConfig, text: str, prefix_tokens: int, continued_tokens: int
    ) -> None:
        assert prefix_tokens % settings.block_tokens == 0
        computed = models.load(settings)
        ids = _token_ids(computed, text)[: prefix_tokens + continued_tokens]
        if len(ids) < prefix_tokens + continued_tokens:
            raise ConfigError(
                f"a text of {len(ids)} tokens, {prefix_tokens + continued_tokens} needed"
            )
        self.layout = computed.layout
        self.blocks = _blocks_of(computed, ids[:prefix_tokens])
        self._continued = ids[prefix_tokens:]
        del computed
        self._judge = models.load(replace(settings, dtype=_JUDGED_IN))
        self._exact = self._answers(self.blocks)

    def through(self, codec: Codec) -> Blocks:
        """The blocks once encoded and decoded; those on which `codec` passes, as they are."""
        decoded = self.blocks.copy()
        for before, after in zip(self.blocks, decoded, strict=True):
            parts = codec.encode(before.data, self.layout)
            if parts is not None:
                codec.decode(memoryview(b"".join(parts)), after.data, self.layout)
        return decoded

    def divergence(self, blocks: Blocks) -> Divergence:
        """How answers on `blocks` differ from answers on the exact ones."""
        exact, other = self._exact, self._answers(blocks)
        each = torch.nn.functional.kl_div(other, exact, reduction="none", log_target=True)
        kl = each.double().sum(-1).clamp(min=0)
        same = (exact.argmax(-1) == other.argmax(-1)).double().mean()
        return Divergence(float(kl.mean()), float(kl.quantile(0.99)), float(kl.max()), float(same))

    @torch.inference_mode()
    def _answers(self, blocks: Blocks) -> torch.Tensor:
        """Log probabilities after each continued token, float32 [tokens, vocab], on the CPU."""
        judge = self._judge
        given = as_blocks(torch.from_numpy(blocks), self.layout)
        storage = allocate_storage(judge.layout, len(blocks), judge.device)
        as_blocks(storage, judge.layout).copy_(given)
        prefix = len(blocks) * self.layout.block_tokens
        kv = WorkingKV(judge.layout, prefix + len(self._continued), judge.device)
        kv.load_blocks(storage, 0, range(len(blocks)))
        answers = [
            judge.model(input_ids=ids, past_key_values=kv, use_cache=True).logits[0]
            for ids in _steps(judge, self._continued)
        ]
        return torch.cat([each.float().log_softmax(-1).cpu() for each in answers])


def _token_ids(loaded: LoadedModel, text: str) -> list[int]:
    raw = loaded.tokenizer_files.get("tokenizer.json")
    if raw is None:
        raise ConfigError(f"model {loaded.name}: no tokenizer.json")
    ids: list[int] = Tokenizer.from_str(raw.decode()).encode(text).ids
    return ids


def _steps(loaded: LoadedModel, ids: Sequence[int]) -> list[torch.Tensor]:
    whole = torch.tensor([ids], device=loaded.device)
    return [whole[:, at : at + _STEP] for at in range(0, len(ids), _STEP)]


@torch.inference_mode()
def _blocks_of(loaded: LoadedModel, ids: Sequence[int]) -> Blocks:
    """The KV of `ids` as the engine would save it."""
    layout: BlockLayout = loaded.layout
    kv = WorkingKV(layout, len(ids), loaded.device)
    for step in _steps(loaded, ids):
        loaded.model(input_ids=step, past_key_values=kv, use_cache=True, logits_to_keep=1)
    count = len(ids) // layout.block_tokens
    storage = allocate_storage(layout, count, loaded.device)
    kv.store_blocks(storage, 0, range(count))
    return storage.cpu().numpy()
