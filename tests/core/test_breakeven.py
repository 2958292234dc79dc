"""Against the published arithmetic of prefill: 2 P + 4 L d pos FLOPs a token."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.core.breakeven import ComputeCost, worth_loading

LLAMA_8B = {"flops_per_s": 1.5e14, "parameters": 7.5e9, "layers": 32, "width": 4096}
BLOCK = 64


def tokens_per_s(block: int) -> float:
    cost = ComputeCost.of_model(**LLAMA_8B, block_tokens=BLOCK)
    return BLOCK / (cost.block_s + block * cost.growth_s)


@pytest.mark.parametrize(
    ("position", "tokens"), [(0, 10_000), (8192, 7_774), (32_768, 4_661), (131_072, 1_792)]
)
def test_recompute_rates_of_an_8b_model_fall_with_the_position(position: int, tokens: int) -> None:
    assert tokens_per_s(position // BLOCK) == pytest.approx(tokens, rel=0.01)


def test_a_slow_store_is_left_alone_at_the_front_and_used_further_behind() -> None:
    compute = ComputeCost(1.0, 0.1)
    load_s = [0.0, 3.0]
    assert worth_loading([1] * 5, 0, compute, load_s) == 0, "computed in 1.0 to 1.4, loaded in 3"
    assert worth_loading([1] * 5, 30, compute, load_s) == 5, "computed in 4.0 and more"
    assert worth_loading([1] * 60, 0, compute, load_s) == 60, "the later ones pay for the first"


def test_blocks_behind_a_slow_one_can_pay_for_it() -> None:
    compute, load_s = ComputeCost(1.0), [0.0, 0.1, 1.5]
    assert worth_loading([2, 1, 1], 0, compute, load_s) == 3
    assert worth_loading([1, 1, 2], 0, compute, load_s) == 2
    assert worth_loading([2, 2, 2], 0, compute, load_s) == 0


def test_a_mean_over_blocks_takes_as_long_as_they_do() -> None:
    cost = ComputeCost(1.0, 0.1)
    assert cost.mean(30, 40).block_s * 10 == pytest.approx(sum(1 + 0.1 * i for i in range(30, 40)))
    assert cost.mean(7, 8).block_s == pytest.approx(1.7)


def test_what_was_never_measured_is_tried() -> None:
    assert worth_loading([1] * 3, 0, ComputeCost(1e-9), [0.0, 0.0]) == 3


@given(
    st.lists(st.integers(0, 2), max_size=12),
    st.integers(0, 50),
    st.floats(0, 2),
    st.floats(0, 0.2),
    st.lists(st.floats(0, 4), min_size=3, max_size=3),
)
def test_no_other_number_of_blocks_saves_more(
    sources: list[int], first: int, block_s: float, growth_s: float, load_s: list[float]
) -> None:
    compute = ComputeCost(block_s, growth_s)

    def saved(count: int) -> float:
        return sum(
            block_s + (first + i) * growth_s - load_s[source]
            for i, source in enumerate(sources[:count])
        )

    best = worth_loading(sources, first, compute, load_s)
    assert saved(best) >= max(saved(count) for count in range(len(sources) + 1)) - 1e-9


def test_a_cost_that_is_none_is_refused() -> None:
    for bad in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="block_s is"):
            ComputeCost(bad)
