"""One request inside the engine: what was asked, what is told, and what it holds meanwhile."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

import torch

from kvtier.core.blocks import BlockKey
from kvtier.core.tiers import Tier
from kvtier.engine.kvcache import WorkingKV
from kvtier.engine.requests import numbers
from kvtier.errors import InvalidRequest, RequestError

DEFAULT_MAX_TOKENS: Final = 128
MAX_SEED: Final = 2**64 - 1
_numbers = numbers()


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to compute. `max_tokens` is cut to what the model has room for."""

    token_ids: Sequence[int]
    max_tokens: int = DEFAULT_MAX_TOKENS  # of the answer
    temperature: float = 0.0  # 0 is greedy
    seed: int = 0
    ignore_eos: bool = False
    return_first_logits: bool = False
    tenant: str = ""  # whose blocks it may use and leaves
    adapter: str = ""  # a LoRA's name; checked by who serves it
    source: str = ""  # a node that has more of its blocks than this one, if known
    warm_tokens: int = 0  # of the prompt, that are thought to be in some tier here

    def check(self, vocab_size: int, max_tokens: int) -> None:
        """Refuse what a model of these limits cannot compute.

        Raises:
            InvalidRequest: The message names the value and the limit.
        """
        count = len(self.token_ids)
        if not count:
            raise InvalidRequest("token_ids is empty, must have at least 1")
        if count + 1 > max_tokens:
            raise InvalidRequest(
                f"token_ids has {count}, must be at most {max_tokens - 1}: "
                f"prompt and answer share {max_tokens} tokens"
            )
        if not 0 <= min(self.token_ids) <= max(self.token_ids) < vocab_size:
            at, bad = next((i, t) for i, t in enumerate(self.token_ids) if not 0 <= t < vocab_size)
            raise InvalidRequest(f"token_ids[{at}] is {bad}, must be 0 to {vocab_size - 1}")
        if self.max_tokens < 1:
            raise InvalidRequest(f"max_tokens is {self.max_tokens}, must be at least 1")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InvalidRequest(f"temperature is {self.temperature}, must be 0 or more")
        if not 0 <= self.seed <= MAX_SEED:
            raise InvalidRequest(f"seed is {self.seed}, must be 0 to {MAX_SEED}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """The first token is there; told just before it. The three times add up to what it took."""

    prompt_tokens: int
    restored: dict[Tier, int]  # prompt tokens not computed, by where they came from
    computed_tokens: int
    pulled_tokens: int = 0  # of those restored from the host tier: came from another node
    queue_s: float
    restore_s: float
    prefill_s: float
    first_logits: bytes = b""  # float32 [vocab_size] in native order, where they were asked for


@dataclass(frozen=True, slots=True)
class Tokens:
    """The next tokens of the answer; an end-of-sequence token is told as well."""

    ids: tuple[int, ...]


class FinishReason(StrEnum):
    """Why an answer ended."""

    STOP = "stop"  # an end-of-sequence token
    LENGTH = "length"  # as many tokens as were asked for, or as there was room for


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """The answer is complete."""

    finish_reason: FinishReason
    completion_tokens: int
    saved_tokens: int  # of blocks that this request handed to the host tier


@dataclass(frozen=True, slots=True)
class Failed:
    """The answer ends here; nothing follows."""

    error: RequestError


Event = Started | Tokens | Done | Failed
Deliver = Callable[[Event], None]


@dataclass(slots=True, eq=False)
class Running:
    """A request on its way. Only the engine's thread touches it, but for `cancelled`."""

    request: Request
    deliver: Deliver
    submitted_s: float
    limit: int  # tokens of prompt and answer together
    tokens: list[int]  # prompt and answer so far
    number: int = field(default_factory=_numbers.__next__)  # of all requests of the node
    cancelled: bool = False
    kv: WorkingKV | None = None
    keys: list[BlockKey] = field(default_factory=list)  # of all full blocks of `tokens` so far
    pinned: int = 0  # leading keys that are resident in the pool, pinned for this request
    hits: int = 0  # leading keys that the pool had before this request computed them
    offered: int = 0  # full blocks that were offered to the pool
    handed: int = 0  # leading keys of which all unsaved ones were handed to the lower tiers
    restored: dict[Tier, int] = field(default_factory=dict)
    pulled: int = 0  # blocks that came from another node and were restored
    coming: int = 0  # that came for the piece which is being restored
    computed: int = 0
    queue_s: float = 0.0
    restore_s: float = 0.0
    admitted_s: float = 0.0  # to computing: what was to be restored has been
    saving: bool = False  # blocks of it are on their way to the lower tiers
    saved_tokens: int = 0
    finish_reason: FinishReason | None = None  # where only saving is left to do
    generator: torch.Generator | None = None

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.token_ids)

    @property
    def produced(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - self.prompt_length

    @property
    def uncomputed(self) -> int:
        """Prompt tokens that are still to be computed, as far as is known before it is restored."""
        kv = self.kv  # one look: another thread may be asking
        there = kv.length if kv else 0
        if not self.admitted_s:
            there = max(there, min(self.request.warm_tokens, self.prompt_length - 1))
        elif kv is None:  # its answer has ended, and it waits for its blocks to be saved
            return 0
        return max(0, self.prompt_length - there)

    @property
    def prefilled(self) -> tuple[int, int]:
        """Where in the prompt computing has begun and how far it is; nothing once it is through."""
        kv = self.kv
        if kv is None or kv.length >= self.prompt_length:
            return 0, 0
        return max(0, kv.length - self.computed), kv.length


def sample(logits: torch.Tensor, request: Request, generator: torch.Generator | None) -> int:
    """The next token: the likeliest, or drawn at the request's temperature.

    Args:
        logits: float32 [vocab_size] on the CPU, so that a seed means the same on every device.
        request: Its temperature is used.
        generator: On the CPU; None for greedy.
    """
    if generator is None:
        return int(logits.argmax())
    # The largest becomes 0 first: a tiny temperature must not overflow.
    odds = torch.softmax((logits - logits.max()) / request.temperature, dim=0)
    return int(torch.multinomial(odds, 1, generator=generator))
