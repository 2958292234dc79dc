"""What a model keeps of a token, and what it computes for one: read from its config.json.

Bytes are exact for MHA, GQA, MQA, MLA and sliding windows. Layers with a recurrent state (Mamba,
gated linear attention) keep nothing a token; their state a sequence is not counted.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from importlib import resources
from pathlib import Path
from typing import Final, cast

from kvtier.core.blocks import Attention, LayerGroup
from kvtier.errors import ConfigError

# Bits of one number of the cache. Scales that a quantised cache keeps beside are not counted:
# engines differ in them (vLLM's FP8 has one a layer).
KV_BITS: Final = {"fp32": 32, "fp16": 16, "bf16": 16, "fp8": 8, "int8": 8, "int4": 4}
MAX_CONFIG_NBYTES: Final = 1 << 20
MAX_LAYERS: Final = 1 << 12

Json = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Shape:
    """One model: layer groups with KV, and the sizes that its prefill cost follows from."""

    name: str
    groups: tuple[LayerGroup, ...]
    weights: int  # parameters
    active: int  # parameters that one token passes through
    layers: int
    width: int  # of all query heads together

    def token_nbytes(self, bits: int) -> Fraction:
        """Bytes that one more token keeps, in all layers, while every window is not yet full."""
        return Fraction(sum(g.values_per_token for g in self.groups) * bits, 8)

    def prompt_nbytes(self, tokens: int, bits: int) -> int:
        """Bytes that a prompt of `tokens` keeps in VRAM, with sliding windows cut."""
        values = sum(
            g.values_per_token * (min(tokens, g.window) if g.window else tokens)
            for g in self.groups
        )
        return -(-values * bits // 8)

    def prefill_flops(self, start: int, end: int) -> float:
        """Floating point operations of computing tokens start..end of a prompt.

        2 a parameter and token, and in each layer 4 x width a token and token that it sees.
        """
        dense = 2.0 * self.active * (end - start)
        seen = sum(g.layers * (_area(end, g.window) - _area(start, g.window)) for g in self.groups)
        return dense + 4.0 * self.width * seen


def _area(tokens: int, window: int) -> float:
    """Pairs of a token and one that it sees, up to `tokens`."""
    if not window or tokens <= window:
        return tokens * tokens / 2
    return window * window / 2 + (tokens - window) * window


def known() -> list[str]:
    """Names that `load` takes besides paths."""
    return sorted(_known())


def load(model: str) -> Shape:
    """The shape of a well-known model, a config.json, or a folder with one.

    Raises:
        ConfigError: No such model, or a config that does not say what is needed.
    """
    configs = _known()
    if model.lower() in configs:
        return parse(model.lower(), configs[model.lower()])
    path = Path(model)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ConfigError(f"--model {model}: the folder has no config.json")
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        names = ", ".join(sorted(configs))
        raise ConfigError(f"--model {model}: no such file, and none of the known: {names}")
    if path.stat().st_size > MAX_CONFIG_NBYTES:
        raise ConfigError(f"--model {path}: over {MAX_CONFIG_NBYTES} bytes, so no config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--model {path}: not JSON: {error}") from None
    except OSError as error:
        raise ConfigError(f"--model {path}: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"--model {path}: not a JSON object")
    return parse(path.parent.name or model, config)


def parse(name: str, config: Json) -> Shape:
    """The shape that a Transformers config describes.

    Raises:
        ConfigError: A field is missing or out of range; the message names it.
    """
    for part in ("text_config", "llm_config", "language_config"):
        if isinstance(config.get(part), dict):  # a multimodal model: the part that has a KV cache
            config = {**cast("Json", config[part])}
    try:
        return _parse(name, _Reader(name, config))
    except ValueError as error:  # of LayerGroup: names the field, its value and the limit
        raise ConfigError(f"--model {name}: {error}") from None


def _parse(name: str, read: "_Reader") -> Shape:
    layers = read.size("num_hidden_layers", "n_layer", limit=MAX_LAYERS)
    hidden = read.size("hidden_size", "n_embd")
    heads = read.size("num_attention_heads", "n_head")
    if read.get("kv_lora_rank") is not None:
        latent = read.size("kv_lora_rank") + read.size("qk_rope_head_dim", default=0)
        groups: tuple[LayerGroup, ...] = (LayerGroup(Attention.LATENT, layers, 1, latent),)
        kv_width = latent
    else:
        kv_heads = read.size("num_key_value_heads", "num_kv_heads", default=heads)
        if read.get("multi_query"):
            kv_heads = 1
        head_dim = read.size("head_dim", default=max(1, hidden // heads))
        groups = _groups(read, layers, kv_heads, head_dim)
        kv_width = 2 * kv_heads * head_dim
    head_dim = read.size("head_dim", "v_head_dim", default=max(1, hidden // heads))
    weights, active = _parameters(read, layers, hidden, heads * head_dim, kv_width)
    return Shape(name, groups, weights, active, layers, heads * head_dim)


class _Reader:
    """Fields of a config by any of their names."""

    def __init__(self, name: str, config: Json) -> None:
        self._name = name
        self._config = config

    def get(self, *names: str) -> object:
        return next((self._config[n] for n in names if self._config.get(n) is not None), None)

    def size(self, *names: str, default: int | None = None, limit: int = 1 << 24) -> int:
        value = self.get(*names)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= limit:
            what = "is missing" if value is None else f"is {value!r}"
            where = f"--model {self._name}: {names[0]}"
            raise ConfigError(f"{where} {what}, must be a number of 0 to {limit}")
        if value == 0 and default is None:
            raise ConfigError(f"--model {self._name}: {names[0]} is 0, must be at least 1")
        return value

    def kinds(self, layers: int) -> list[str]:
        """What each layer is: "full", "sliding", or "state" (no KV a token)."""
        given = self.get("layer_types")
        if isinstance(given, list):
            if len(given) != layers:
                raise ConfigError(
                    f"--model {self._name}: {len(given)} layer_types for {layers} layers"
                )
            return [_kind(str(each)) for each in given]
        if self.get("attn_layer_period") is not None:  # Jamba
            period = self.size("attn_layer_period", limit=MAX_LAYERS)
            offset = self.size("attn_layer_offset", default=0)
            return ["full" if n % period == offset else "state" for n in range(layers)]
        if self.get("full_attention_interval") is not None:  # Qwen3-Next
            every = self.size("full_attention_interval", limit=MAX_LAYERS)
            return ["full" if (n + 1) % every == 0 else "state" for n in range(layers)]
        if not self.get("sliding_window") or self.get("use_sliding_window") is False:
            return ["full"] * layers
        if self.get("sliding_window_pattern") is not None:  # Gemma 3
            every = self.size("sliding_window_pattern", limit=MAX_LAYERS)
            return ["full" if (n + 1) % every == 0 else "sliding" for n in range(layers)]
        if self.get("model_type") == "gemma2":
            return ["sliding" if n % 2 == 0 else "full" for n in range(layers)]
        if self.get("max_window_layers") is not None:  # Qwen2: the first of them see everything
            first = self.size("max_window_layers", default=0)
            return ["full" if n < first else "sliding" for n in range(layers)]
        return ["sliding"] * layers


def _kind(text: str) -> str:
    if "sliding" in text or "chunked" in text or text == "local":
        return "sliding"
    return "full" if "full" in text or text in ("attention", "global") else "state"


def _groups(read: _Reader, layers: int, kv_heads: int, head_dim: int) -> tuple[LayerGroup, ...]:
    kinds = read.kinds(layers)
    full, sliding = kinds.count("full"), kinds.count("sliding")
    groups: list[LayerGroup] = []
    if full:
        heads = read.size("num_global_key_value_heads", default=kv_heads)
        groups.append(LayerGroup(Attention.FULL, full, heads, head_dim))
    if sliding:
        window = read.size("sliding_window", "attention_chunk_size")
        groups.append(LayerGroup(Attention.SLIDING, sliding, kv_heads, head_dim, window))
    if not groups:
        raise ConfigError("--model: no layer has attention, so there is no KV cache to keep")
    return tuple(groups)


def _parameters(
    read: _Reader, layers: int, hidden: int, width: int, kv_width: int
) -> tuple[int, int]:
    """Parameters in all, and those that one token passes through; within a few percent."""
    attention = hidden * (2 * width + kv_width)
    vocabulary = read.size("vocab_size", default=0) * hidden
    tied = 1 if read.get("tie_word_embeddings") in (True, None) else 2
    dense = 3 * hidden * read.size("intermediate_size", default=0)
    if read.get("n_embd") is not None:  # GPT-2: two matrices of four times the width
        dense = 2 * hidden * read.size("n_inner", default=4 * hidden)
    experts = read.size("num_local_experts", "n_routed_experts", "num_experts", default=0)
    if not experts:
        total = layers * (attention + dense) + tied * vocabulary
        return total, layers * (attention + dense) + vocabulary
    width = 3 * hidden * read.size("moe_intermediate_size", "intermediate_size")
    used = read.size("num_experts_per_tok", default=1)
    shared = read.size("n_shared_experts", default=0)
    first = min(layers, read.size("first_k_dense_replace", default=0))
    sparse = layers - first
    common = layers * attention + first * dense
    total = common + sparse * (experts + shared) * width + tied * vocabulary
    return total, common + sparse * (used + shared) * width + vocabulary


def _known() -> dict[str, Json]:
    text = resources.files("kvtier.sim").joinpath("models.json").read_text(encoding="utf-8")
    return cast("dict[str, Json]", json.loads(text))
