"""What a block costs to compute, from measured steps of a model whose arithmetic is known."""

import pytest

from kvtier.engine.model import LoadedModel
from kvtier.engine.newest import FEW
from kvtier.engine.prefill import PrefillSpeed, Work

WORK = Work(parameters=1_000_000, layers=10, width=100)  # 2e6 a token, and 4e3 more each token


def test_nothing_is_known_before_a_step_that_says_something() -> None:
    speed = PrefillSpeed(WORK, 100)
    assert speed.cost() is None
    speed.measure(63, 0, 1.0)
    speed.measure(64, 0, 0.0)
    assert speed.cost() is None
    assert speed.tokens_per_s == 0


@pytest.mark.parametrize("position", [0, 100, 5000])
def test_a_step_at_any_position_tells_the_cost_at_every_other(position: int) -> None:
    speed = PrefillSpeed(WORK, 100)
    # A machine of 2e9 operations a second: the step takes what the model's formula says.
    seconds = sum(2e6 + 4e3 * at for at in range(position, position + 100)) / 2e9
    for _ in range(FEW):
        assert not speed.tokens_per_s
        speed.measure(100, position, seconds)
    assert speed.tokens_per_s == pytest.approx(1000), "as at the start of a prompt"
    cost = speed.cost()
    assert cost is not None
    for block in (0, 7, 300):
        expected = sum(2e6 + 4e3 * at for at in range(100 * block, 100 * block + 100)) / 2e9
        assert cost.block_s + block * cost.growth_s == pytest.approx(expected)


def test_prompts_that_take_turns_take_longer() -> None:
    speed = PrefillSpeed(WORK, 100)
    speed.measure(100, 0, 0.1)
    alone, shared = speed.cost(), speed.cost(3)
    assert alone is not None
    assert shared is not None
    assert shared.block_s == pytest.approx(3 * alone.block_s)
    assert shared.growth_s == pytest.approx(3 * alone.growth_s)


def test_one_slow_step_changes_nothing() -> None:
    speed = PrefillSpeed(WORK, 100)
    for seconds in (0.1, 0.1, 60.0):
        speed.measure(100, 0, seconds)
    assert speed.tokens_per_s == pytest.approx(WORK.flops(100, 0) / 0.1 / 2e6)


def test_a_token_takes_twice_as_long_where_attention_is_half_of_it() -> None:
    assert WORK.doubles_at == 500
    assert WORK.flops(1, 500) == 2 * WORK.flops(1, 0)
    assert Work(1, 1, 0).doubles_at == 0


def test_what_a_model_computes_is_read_from_it(tiny: LoadedModel) -> None:
    """Two layers of width 64 with 4 heads of 16, 2 for KV, 128 inside; embeddings don't count."""
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64
    assert Work.of(tiny.model, tiny.layout) == Work(2 * layer + 64, 2, 64)
