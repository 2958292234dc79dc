"""What an engine's KV depends on besides its tokens and its weights, as vLLM's own settings say."""

import json
import secrets
from hashlib import sha256
from typing import Final

import torch
import vllm
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_offload.base import OffloadingSpec

from kvtier.core import vllm_keys
from kvtier.engine.vllm.namespace import SHARED_HASHES
from kvtier.errors import ConfigError

KEY: Final = "kvtier_engine"  # of kv_connector_extra_config: what `engine_facts` found
CBOR: Final = "sha256_cbor"
# Where and when a model's config was written changes no number.
_NOT_THE_MODEL: Final = ("_name_or_path", "transformers_version", "_commit_hash")


def engine_facts(config: VllmConfig) -> dict[str, object]:
    """What only the whole configuration knows; plain values, since they cross to other processes.

    Raises:
        ConfigError: Blocks of such an engine fit no other life of it.
    """
    model, cache = config.model_config, config.cache_config
    if getattr(cache, "calculate_kv_scales", False):
        raise ConfigError(
            "calculate_kv_scales: the scales of its FP8 KV are of one life of the engine only"
        )
    settings = {k: v for k, v in model.hf_config.to_dict().items() if k not in _NOT_THE_MODEL}
    text = json.dumps(settings, sort_keys=True, default=str)
    algorithm = cache.prefix_caching_hash_algo
    found: dict[str, object] = {
        "vllm": vllm.__version__,
        "device": _device(),
        "model": model.model,
        "model_revision": model.revision,
        "config": sha256(text.encode()).hexdigest(),
        "model_dtype": str(model.dtype),
        "quantization": str(model.quantization),
        "backend": str(config.attention_config.backend),
        "draft": str(getattr(config.speculative_config, "model", None)),
        "hash": algorithm,
        "none_hash": _none_hash(algorithm).hex(),
    }
    if config.lora_config is not None:
        found["adapters"] = secrets.token_hex(8)  # of this life, see `problems`
    return found


def _device() -> str:
    if current_platform.device_type != "cpu":
        return str(current_platform.device_type)
    # The CPU backend packs K and V as its instruction set likes them.
    wide = f"{torch.cpu._is_avx512_supported()}, {torch.cpu._is_amx_tile_supported()}"
    return f"cpu {current_platform.get_cpu_architecture().name} {wide}"


def _none_hash(algorithm: str) -> bytes:
    function = get_hash_fn_by_name(algorithm)
    seed = kv_cache_utils.resolve_none_hash_seed(function)
    return bytes(function(seed))


def facts(spec: OffloadingSpec) -> dict[str, object]:
    """All facts of an engine: those of `engine_facts`, and what vLLM resolved since.

    Raises:
        ConfigError: vLLM was started with another connector, or `engine_facts` refused.
    """
    given = spec.extra_config.get(KEY)
    if not isinstance(given, dict):
        raise ConfigError(given or "the tier needs KvtierConnector as vLLM's kv_connector")
    config = spec.config
    parallel = config.parallel
    return {
        **given,
        "dtype": config.model.dtype,
        "layout": config.kv_cache_layout,
        "groups": [[g.tokens_per_block, len(g.layer_names)] for g in config.groups],
        "chunk_tokens": spec.tokens_per_hash * spec.blocks_per_chunk,
        "hash_tokens": spec.tokens_per_hash,
        "blocks_per_chunk": spec.blocks_per_chunk,
        "worker_nbytes": config.worker_kv_bytes_per_block,
        "world": [
            parallel.world_size, parallel.tp_size, parallel.pp_size, parallel.pcp_size,
            parallel.dcp_size,
        ],
        "replicated": spec.replicated_layout,
        "canonical": config.canonical_layout,
    }  # fmt: skip


def problems(found: dict[str, object], adapters_revision: str) -> str:
    """What a user should know of these facts, in one line; empty if nothing."""
    algorithm = str(found["hash"])
    if algorithm not in SHARED_HASHES:
        return (
            f"--prefix-caching-hash-algo {algorithm} is not collision-resistant, and without "
            f"PYTHONHASHSEED every process has other keys; use {CBOR}"
        )
    if "adapters" in found and not adapters_revision:
        return (
            "LoRA adapters are known by name and path only: their blocks are kept for this life "
            "of the engine; set kvtier.adapters_revision to keep them longer"
        )
    if algorithm != CBOR:
        return f"--prefix-caching-hash-algo is {algorithm}: no router can compute such keys"
    tokens = [1, 24, 70000]
    ours = vllm_keys.block_hash(bytes.fromhex(str(found["none_hash"])), tokens, [("lora", "a", "")])
    theirs = get_hash_fn_by_name(CBOR)(
        (bytes.fromhex(str(found["none_hash"])), tuple(tokens), (("lora", "a", ""),))
    )
    if ours != theirs:
        return "this vLLM chains its hashes in another way: no router can compute such keys"
    return ""
