"""The model that a worker serves: from a folder on this machine, never from a hub."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.utils import logging as transformers_logging

from kvtier.config import WorkerConfig, cache_dir, tenant_secrets
from kvtier.core.blocks import Attention, BlockLayout, LayerGroup, Namespace
from kvtier.engine import smollm2
from kvtier.engine.revision import revision as fingerprint
from kvtier.errors import ConfigError

BUILT_IN: Final = "smollm2"
TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
SUPPORTED: Final = "only causal language models with full attention (MHA, GQA, MQA) are served"

# These make a token's key depend on how long the whole prompt is, not only on what precedes it.
_LENGTH_DEPENDENT_ROPE: Final = ("dynamic", "longrope")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model in memory, ready to compute, with all that others must know of it."""

    model: PreTrainedModel
    tokenizer_files: dict[str, bytes]  # those of TOKENIZER_FILES that the folder has
    name: str  # what requests call it
    revision: str  # fingerprint of weights and config: 16 hex digits
    layout: BlockLayout
    max_tokens: int  # prompt and answer together
    eos_token_ids: frozenset[int]
    vocab_size: int
    device: torch.device
    dtype: torch.dtype
    tenants: Mapping[str, bytes] = field(default_factory=dict, repr=False)  # secrets, by name

    def namespace(self, tenant: str = "") -> Namespace:
        """What the keys of a tenant's blocks start from; without a tenant, everybody's.

        Raises:
            KeyError: There is no such tenant.
        """
        secret = self.tenants[tenant] if tenant else b""
        return Namespace(self.name, self.revision, self.layout, tenant=tenant, tenant_secret=secret)


def _silent(_: str) -> None:
    pass


def load(config: WorkerConfig, progress: Callable[[str], None] = _silent) -> LoadedModel:
    """Load the model that `config` names; takes seconds, more when it is converted first.

    Args:
        config: Its model, name, device, dtype, block_tokens and tenants are used.
        progress: Told in one line what takes long.

    Raises:
        ConfigError: The folder is missing, incomplete or not of a supported kind, or the device
            is not there; the message names it. Or a tenant's secret cannot be had.
    """
    secrets = tenant_secrets(config)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    path = smollm2.folder(cache_dir(), progress) if config.model == BUILT_IN else Path(config.model)
    device = _device(config.device)
    settings = _read_config(path)
    revision = fingerprint(path, progress)
    progress(f"loading {path}")
    dtype: torch.dtype = getattr(torch, config.dtype)
    model = _read_weights(path, dtype, device)
    return LoadedModel(
        model=model,
        tokenizer_files={
            name: (path / name).read_bytes() for name in TOKENIZER_FILES if (path / name).is_file()
        },
        name=config.name or path.resolve().name,
        revision=revision,
        layout=_layout(model, path, config.block_tokens, config.dtype),
        max_tokens=settings.max_position_embeddings,
        eos_token_ids=_eos(model),
        vocab_size=settings.vocab_size,
        device=device,
        dtype=dtype,
        tenants=secrets,
    )


def _device(wanted: str) -> torch.device:
    there = torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise ConfigError("worker.device is cuda, but torch sees no CUDA device")
    return torch.device("cuda" if there and wanted != "cpu" else "cpu")


def _read_config(path: Path) -> PreTrainedConfig:
    """The model's text settings, once they are known to be of a kind that is served."""
    if not path.is_dir():
        raise ConfigError(f"worker.model {path}: no such folder (nor the built-in {BUILT_IN!r})")
    if not (path / "config.json").is_file():
        raise ConfigError(f"worker.model {path}: no config.json, so not a Transformers model")
    try:
        whole = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        config: PreTrainedConfig = whole.get_text_config(decoder=True)
        kinds = {type(layer).__name__ for layer in DynamicCache(config=config).layers}
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f"worker.model {path}: config.json: {_line(error)}") from None
    if why := _unsupported(config, kinds):
        raise ConfigError(
            f"worker.model {path}: model type {config.model_type}: {why}; {SUPPORTED}"
        )
    for name in ("max_position_embeddings", "vocab_size"):
        if not isinstance(getattr(config, name, None), int):
            raise ConfigError(f"worker.model {path}: config.json gives no {name}")
    return config


def _unsupported(config: PreTrainedConfig, cache_layers: set[str]) -> str:
    """Why such a model cannot be served; empty if it can."""
    if config.is_encoder_decoder:
        return "it has an encoder"
    if getattr(config, "kv_lora_rank", None):
        return "it has latent attention (MLA)"
    if other := cache_layers - {DynamicLayer.__name__}:
        return f"its cache has layers of other kinds ({', '.join(sorted(other))})"
    rope = getattr(config, "rope_parameters", None) or {}
    if (kind := rope.get("rope_type")) in _LENGTH_DEPENDENT_ROPE:
        return f"its rotary embedding ({kind}) makes KV depend on the length of the whole prompt"
    return ""


def _read_weights(path: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    try:
        model: PreTrainedModel
        report: dict[str, set[str]]
        model, report = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
            path,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
        # Transformers fills what is missing with random numbers and only warns.
        if missing := sorted(report["missing_keys"]):
            raise ConfigError(f"worker.model {path}: weights are missing, the first: {missing[0]}")
        model.to(device).eval()  # type: ignore[arg-type]
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"worker.model {path}: {_line(error)}") from None
    return model


def _layout(model: PreTrainedModel, path: Path, block_tokens: int, dtype: str) -> BlockLayout:
    """The shape of a block, as seen in what the model writes for one token."""
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        ids = torch.zeros((1, 1), dtype=torch.long, device=model.device)
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    layers = [layer for layer in cache.layers if isinstance(layer, DynamicLayer)]
    kv = [each for layer in layers for each in (layer.keys, layer.values) if each is not None]
    shapes, types = {tuple(each.shape) for each in kv}, {each.dtype for each in kv}
    if len(shapes) != 1 or types != {getattr(torch, dtype)}:
        raise ConfigError(
            f"worker.model {path}: model type {model.config.model_type}: its layers keep KV of "
            f"different shapes or types ({shapes}, {types}); {SUPPORTED}"
        )
    ((_, kv_heads, _, head_dim),) = shapes
    group = LayerGroup(Attention.FULL, len(layers), kv_heads, head_dim)
    try:
        return BlockLayout((group,), block_tokens, dtype)
    except ValueError as error:
        raise ConfigError(f"worker.block_tokens is {block_tokens}: {error}") from None


def _eos(model: PreTrainedModel) -> frozenset[int]:
    settings = getattr(model, "generation_config", None)
    ids = getattr(settings, "eos_token_id", None)
    if ids is None:
        ids = model.config.eos_token_id
    return frozenset([ids] if isinstance(ids, int) else ids or ())


def _line(error: Exception) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
