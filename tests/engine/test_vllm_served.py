"""What a model's folder says of an engine that is to be routed to."""

import json
from pathlib import Path

import pytest

from kvtier.engine.vllm.served import alone, describe
from kvtier.engine.vllm.spaces import Spaces

LLAMA = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 8192, "eos_token_id": 128001,
}  # fmt: skip
LAYER = 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336)  # weights that each token meets in one layer


@pytest.mark.parametrize(
    ("more", "doubles_at"),
    [
        ({}, LAYER / (2 * 4096)),
        ({"sliding_window": None}, LAYER / (2 * 4096)),
        ({"sliding_window": 4096, "use_sliding_window": False}, LAYER / (2 * 4096)),
        ({"sliding_window": 4096}, 0.0),
        ({"intermediate_size": None}, 0.0),
        (
            {"num_experts_per_tok": 2, "moe_intermediate_size": 1000},
            4096 * (2 * 4096 + 2 * 1024 + 3 * 2000) / (2 * 4096),
        ),
    ],
)
def test_later_tokens_cost_more_as_the_models_shape_has_it(
    tmp_path: Path, more: dict[str, object], doubles_at: float
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **more}))
    served = describe(
        tmp_path, "m", alone(tmp_path), block_tokens=16, max_tokens=0, events="", replay="",
        spaces=Spaces({}, {}),
    )  # fmt: skip
    assert served.doubles_at == pytest.approx(doubles_at)
    assert served.kv_bytes_per_token == 32 * 2 * 8 * 128 * 2
    assert served.max_tokens == 8192
