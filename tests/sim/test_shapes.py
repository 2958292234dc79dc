"""Bytes of KV a token, against what the models' own pages and papers say."""

import json
from pathlib import Path

import pytest

from kvtier.errors import ConfigError
from kvtier.sim import shapes


@pytest.mark.parametrize(
    ("model", "kv", "nbytes"),
    [
        ("gpt2-xl", "fp16", 300 * 1024),  # MHA
        ("llama-3-8b", "fp16", 128 * 1024),  # GQA
        ("llama-3-8b", "fp8", 64 * 1024),
        ("llama-3-8b", "int8", 64 * 1024),
        ("llama-3-8b", "int4", 32 * 1024),
        ("llama-3-70b", "bf16", 320 * 1024),
        ("deepseek-v3", "bf16", 61 * (512 + 64) * 2),  # MLA: one latent vector a layer
        ("smollm2-135m", "fp32", 45 * 1024),
    ],
)
def test_bytes_of_a_token_are_exact(model: str, kv: str, nbytes: int) -> None:
    assert shapes.load(model).token_nbytes(shapes.KV_BITS[kv]) == nbytes


def test_one_kv_head_is_enough_for_multi_query_attention() -> None:
    config = {"n_layer": 2, "n_head": 4, "n_embd": 64, "multi_query": True, "vocab_size": 10}
    assert shapes.parse("mqa", config).token_nbytes(16) == 2 * 2 * 1 * 16 * 2


def test_a_sliding_window_stops_growing() -> None:
    shape = shapes.load("gemma-3-27b")
    full, sliding = 10, 52  # every sixth of 62 layers sees everything
    per_layer = 2 * 16 * 128 * 2
    assert shape.prompt_nbytes(1000, 16) == 1000 * 62 * per_layer
    assert shape.prompt_nbytes(100_000, 16) == per_layer * (full * 100_000 + sliding * 1024)


@pytest.mark.parametrize(
    ("extra", "full"),
    [
        ({"sliding_window": 128, "use_sliding_window": False}, 4),
        ({"sliding_window": None}, 4),
        ({"sliding_window": 128}, 0),
        ({"sliding_window": 128, "max_window_layers": 3}, 3),
        ({"sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"] * 2}, 2),
        ({"layer_types": ["linear_attention"] * 3 + ["full_attention"]}, 1),
        ({"attn_layer_period": 4, "attn_layer_offset": 1}, 1),
        ({"full_attention_interval": 2}, 2),
    ],
)
def test_layers_are_told_apart(extra: dict[str, object], full: int) -> None:
    config = {"num_hidden_layers": 4, "num_attention_heads": 2, "hidden_size": 32, **extra}
    groups = shapes.parse("some", config).groups
    assert sum(g.layers for g in groups if g.attention == "full") == full


@pytest.mark.parametrize(
    ("model", "weights", "active"),
    [("llama-3-70b", 70.6, 69.5), ("mixtral-8x7b", 46.7, 12.8), ("deepseek-v3", 671, 37.6)],
)
def test_weights_are_about_what_they_are(model: str, weights: float, active: float) -> None:
    shape = shapes.load(model)
    assert shape.weights / 1e9 == pytest.approx(weights, rel=0.07)
    assert shape.active / 1e9 == pytest.approx(active, rel=0.07)


def test_a_prefill_in_two_steps_costs_what_one_does() -> None:
    for name in ("llama-3-8b", "gemma-2-9b", "deepseek-v3"):
        shape = shapes.load(name)
        parts = shape.prefill_flops(0, 3000) + shape.prefill_flops(3000, 9000)
        assert parts == pytest.approx(shape.prefill_flops(0, 9000))


def test_a_folder_and_the_text_part_of_a_multimodal_config_are_read(tmp_path: Path) -> None:
    text = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": text}))
    assert shapes.load(str(tmp_path)).token_nbytes(16) == 2 * 8 * 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "not a JSON object"),
        ("{", "not JSON: Expecting property name"),
        ('{"num_hidden_layers": 2}', "hidden_size is missing"),
        ('{"num_hidden_layers": -1}', "num_hidden_layers is -1, must be a number of 0 to 4096"),
        ('{"num_hidden_layers": true}', "num_hidden_layers is True"),
        (
            '{"num_hidden_layers": 2, "num_attention_heads": 0, "hidden_size": 4}',
            "num_attention_heads is 0, must be at least 1",
        ),
        (
            (
                '{"num_hidden_layers": 2, "num_attention_heads": 1, "hidden_size": 4,'
                ' "layer_types": ["full_attention"]}'
            ),
            "1 layer_types for 2 layers",
        ),
        (
            (
                '{"num_hidden_layers": 1, "num_attention_heads": 1, "hidden_size": 4,'
                ' "layer_types": ["mamba"]}'
            ),
            "no layer has attention",
        ),
        (
            (
                '{"num_hidden_layers": 1, "num_attention_heads": 1, "hidden_size": 4,'
                ' "num_key_value_heads": 100000}'
            ),
            "kv_heads is 100000, must be 1 to 65536",
        ),
    ],
)
def test_a_bad_config_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        shapes.load(str(path))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"no such file.*llama-3-8b"):
        shapes.load("no-such-model")
