"""The engine's computation with plain Transformers and without kvtier, to compare with."""

from collections.abc import Collection, Sequence

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache


class Reference:
    """One conversation, computed as `Scheduler` computes it, on a plain `DynamicCache`.

    It keeps the KV of what it computed last, as a pool would, but never cuts, copies or moves
    it. With the same history of prompts, hits and prefill steps it does the same arithmetic on
    the same numbers; an engine that differs restored something else than what was computed.

    Args:
        model: In evaluation mode.
        prefill_tokens: The engine's step.
        eos_token_ids: Where an answer ends.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prefill_tokens: int,
        eos_token_ids: Collection[int] = (),
    ) -> None:
        self._model = model
        self._prefill_tokens = prefill_tokens
        self._eos = eos_token_ids
        self._tokens: list[int] = []  # whose KV is in the cache
        self._cache = DynamicCache(config=model.config)

    @torch.inference_mode()
    def next_token_logits_and_greedy(
        self, prompt_ids: Sequence[int], hit_tokens: int, n: int
    ) -> tuple[torch.Tensor, list[int]]:
        """The logits after the prompt, float32 [vocab_size] on the CPU, and a greedy answer.

        Args:
            prompt_ids: The whole prompt.
            hit_tokens: How many of its tokens the engine did not compute. Their KV is taken from
                this conversation's past, or computed first where that does not begin with them.
            n: Tokens of the answer at most, at least 1.
        """
        prompt = list(prompt_ids)
        assert 0 <= hit_tokens < len(prompt), "the last prompt token is always computed"
        if self._tokens[:hit_tokens] != prompt[:hit_tokens]:
            self._forget()
            self._prefill(prompt[:hit_tokens])
        elif surplus := len(self._tokens) - hit_tokens:
            self._cache.crop(-surplus)
            del self._tokens[hit_tokens:]
        first = logits = self._prefill(prompt[hit_tokens:])
        answer = [int(logits.argmax())]
        while len(answer) < n and answer[-1] not in self._eos:
            logits = self._prefill(answer[-1:])
            answer.append(int(logits.argmax()))
        return first, answer

    def _forget(self) -> None:
        self._tokens = []
        self._cache = DynamicCache(config=self._model.config)

    def _prefill(self, token_ids: Sequence[int]) -> torch.Tensor:
        logits = torch.empty(0)
        for start in range(0, len(token_ids), self._prefill_tokens):
            step = list(token_ids[start : start + self._prefill_tokens])
            ids = torch.tensor([step], device=self._model.device)
            out = self._model(
                input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1
            )
            logits = out.logits[0, -1].float().cpu()
            self._tokens += step
        return logits
