"""Were the answers what they would have been without kvtier? Each is computed again to see."""

from collections.abc import Callable, Sequence
from typing import Final

import torch

from kvtier.demo.record import Record
from kvtier.engine.model import LoadedModel
from kvtier.engine.reference import Reference

# Float32 sums in another order differ by about this much in a logit; a wrong block by whole units.
LOGITS_TOLERANCE: Final = 1e-2


def check(
    model: LoadedModel,
    records: Sequence[Record],
    prefill_tokens: int,
    progress: Callable[[Record], None],
) -> bool:
    """Fill in `identical` of every request that gave tokens; whether all are.

    A plain Transformers cache replays each conversation with the same hit boundaries. The greedy
    tokens must be the same, and the first token's logits within LOGITS_TOLERANCE.
    """
    references: dict[str, Reference] = {}
    for record in records:
        if not record.ids:
            continue
        reference = references.setdefault(
            record.conversation, Reference(model.model, prefill_tokens, ())
        )
        logits, ids = reference.next_token_logits_and_greedy(
            record.prompt_ids, record.hit_tokens, len(record.ids)
        )
        got = torch.frombuffer(bytearray(record.first_logits), dtype=torch.float32)
        record.logits_difference = float((logits - got).abs().max())
        record.identical = ids == record.ids and record.logits_difference <= LOGITS_TOLERANCE
        progress(record)
    return all(record.identical for record in records if record.ids)
