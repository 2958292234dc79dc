"""Whatever makes equal block hashes of two vLLM engines stand for unequal KV."""

import json
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Final

from kvtier.core.blocks import MAX_BLOCK_TOKENS, Attention, BlockLayout, LayerGroup, Namespace
from kvtier.engine.revision import revision
from kvtier.engine.vllm.hub import Identity
from kvtier.errors import ConfigError

WEIGHTS: Final = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
# Equal hashes of these name equal prefixes in every process that has the same seed.
SHARED_HASHES: Final = ("sha256", "sha256_cbor")
_PAGE: Final = 4096

Facts = Mapping[str, object]


def row_layout(row_nbytes: int, block_tokens: int, dtype: str) -> BlockLayout:
    """A row of vLLM's CPU region as a layout: its exact size, and its numbers' width if it fits.

    What lies where in a row is vLLM's affair (ranks, layers, K and V, padding) and is part of the
    namespace; to a node daemon it is one run of numbers. Its codecs use their width.

    Raises:
        ConfigError: The row is larger than a block may be.
    """
    tries = [(dtype, block_tokens), (dtype, 1), ("uint8", 1)]
    for kind, tokens in tries:
        try:
            unit = BlockLayout((LayerGroup(Attention.LATENT, 1, 1, 1),), tokens, kind)
        except ValueError:  # a number type that we have no name for
            continue
        values, rest = divmod(row_nbytes, unit.nbytes)
        if rest:
            continue
        head_dim = next(n for n in (_PAGE, 1024, 256, 64, 16, 4, 2, 1) if values % n == 0)
        try:
            group = LayerGroup(Attention.LATENT, values // head_dim, 1, head_dim)
            return BlockLayout((group,), min(tokens, MAX_BLOCK_TOKENS), kind)
        except ValueError:
            continue
    raise ConfigError(f"kvtier: vLLM's blocks have {row_nbytes} bytes, which is too large")


def weights_revision(facts: Facts, given: str, progress: Callable[[str], None]) -> str:
    """The fingerprint of the engine's weights; `given` replaces it.

    Raises:
        ConfigError: The weights are not on this machine as files.
    """
    if given:
        return given
    return revision(_folder(str(facts["model"]), facts.get("model_revision")), progress, WEIGHTS)


def _folder(model: str, hub_revision: object) -> Path:
    if Path(model).is_dir():
        return Path(model)
    # vLLM has it: it has downloaded the model just before.
    from huggingface_hub import try_to_load_from_cache

    wanted = str(hub_revision) if hub_revision else None
    found = try_to_load_from_cache(model, "config.json", revision=wanted)
    if not isinstance(found, str):
        raise ConfigError(
            f"the weights of {model} are no folder here and not in the hub's cache, so they have "
            "no fingerprint: set kvtier.revision"
        )
    return Path(found).parent


def identity(facts: Facts, row_nbytes: int, weights: str, adapters: str, tenant: str) -> Identity:
    """The namespace of an engine.

    Args:
        facts: All that the engine's KV depends on besides tokens and weights; see `spec.facts`.
        row_nbytes: Bytes of one row of its CPU region.
        weights: Fingerprint of the weights.
        adapters: What tells the adapters' weights of two lives apart.
        tenant: Whose blocks they are.

    Raises:
        ConfigError: See `row_layout`.
    """
    tokens = facts["chunk_tokens"]
    assert isinstance(tokens, int)
    layout = row_layout(row_nbytes, tokens, str(facts["dtype"]))
    # Not by the folder's name: the same weights may lie elsewhere on another node.
    facts = {name: facts[name] for name in facts if name not in ("model", "model_revision")}
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    scheme = f"vllm {sha256(text.encode()).hexdigest()}"
    space = Namespace("", weights, layout, scheme, adapters, tenant)
    return Identity(space.root(), layout)
