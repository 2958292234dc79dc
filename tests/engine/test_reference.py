"""The yardstick itself: plain Transformers, whatever way the past was computed."""

import pytest
import torch

from kvtier.engine.model import LoadedModel
from kvtier.engine.reference import Reference
from tests.engine.support import STEP, prompt_of


def generated(loaded: LoadedModel, prompt: list[int], tokens: int) -> list[int]:
    """What `generate` of Transformers answers."""
    ids = torch.tensor([prompt])
    out = loaded.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return out[0, len(prompt) :].tolist()


def test_answers_as_transformers_generates(tiny: LoadedModel) -> None:
    prompt = prompt_of(100, 1, tiny.vocab_size)
    _, ids = Reference(tiny.model, STEP).next_token_logits_and_greedy(prompt, 0, 20)
    assert ids == generated(tiny, prompt, 20)


def test_the_logits_are_those_of_the_next_token(tiny: LoadedModel) -> None:
    prompt = prompt_of(100, 2, tiny.vocab_size)
    logits, ids = Reference(tiny.model, STEP).next_token_logits_and_greedy(prompt, 0, 1)
    with torch.inference_mode():
        whole = tiny.model(torch.tensor([prompt])).logits[0, -1]
    assert logits.shape == (tiny.vocab_size,)
    torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-4)
    assert ids == [int(logits.argmax())]


@pytest.mark.parametrize("hit", [0, 1, 48, 99])
def test_its_own_past_and_a_fresh_start_agree(tiny: LoadedModel, hit: int) -> None:
    prompt = prompt_of(100, 3, tiny.vocab_size)
    used, fresh = Reference(tiny.model, STEP), Reference(tiny.model, STEP)
    used.next_token_logits_and_greedy([*prompt[:70], 7, 8, 9], 0, 10)  # another end
    used.next_token_logits_and_greedy(prompt, 70, 10)
    after, ids = used.next_token_logits_and_greedy(prompt, hit, 10)
    expected, expected_ids = fresh.next_token_logits_and_greedy(prompt, hit, 10)
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)
    assert ids == expected_ids


def test_a_past_that_does_not_fit_is_not_used(tiny: LoadedModel) -> None:
    prompt = prompt_of(100, 4, tiny.vocab_size)
    used, fresh = Reference(tiny.model, STEP), Reference(tiny.model, STEP)
    used.next_token_logits_and_greedy(prompt_of(100, 5, tiny.vocab_size), 0, 10)
    after, _ = used.next_token_logits_and_greedy(prompt, 64, 10)
    expected, _ = fresh.next_token_logits_and_greedy(prompt, 64, 10)
    assert torch.equal(after, expected)


def test_it_stops_at_an_end_token(tiny: LoadedModel) -> None:
    prompt = prompt_of(50, 6, tiny.vocab_size)
    _, ids = Reference(tiny.model, STEP).next_token_logits_and_greedy(prompt, 0, 10)
    stop = ids[4]
    _, ended = Reference(tiny.model, STEP, [stop]).next_token_logits_and_greedy(prompt, 0, 10)
    assert ended == ids[: ids.index(stop) + 1]
