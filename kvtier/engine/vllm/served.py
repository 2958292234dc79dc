"""What a model folder and a running engine say of an engine that is to be routed to."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Final

from kvtier.core import vllm_keys
from kvtier.core.breakeven import doubles_at
from kvtier.engine.vllm.announced import Announced
from kvtier.engine.vllm.gateway import Served
from kvtier.engine.vllm.spaces import Spaces
from kvtier.errors import ConfigError

TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def alone(folder: Path) -> Announced:
    """Of an engine without kvtier: whatever its VRAM holds, nobody else restores it."""
    root = sha256(f"vllm alone {folder.resolve().name}".encode()).digest()
    return Announced(root, vllm_keys.none_hash(), "unknown")


def describe(
    folder: Path, name: str, said: Announced, *, block_tokens: int, max_tokens: int,
    events: str, replay: str, spaces: Spaces,
) -> Served:  # fmt: skip
    """All that routers must know.

    Raises:
        ConfigError: The folder is no model's.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
        files = {
            file: (folder / file).read_bytes()
            for file in TOKENIZER_FILES
            if (folder / file).is_file()
        }
    except (OSError, ValueError) as error:
        raise ConfigError(f"worker.model {folder}: {error}") from None
    text = config.get("text_config", config)
    eos = text.get("eos_token_id")
    heads = text.get("num_key_value_heads") or text["num_attention_heads"]
    head_dim = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    inner = text.get("intermediate_size") or 0
    if experts := text.get("num_experts_per_tok"):
        inner = experts * (text.get("moe_intermediate_size") or inner)
    if text.get("sliding_window") and text.get("use_sliding_window", True):
        inner = 0  # not all layers look at all tokens: not known
    return Served(
        model=name or folder.resolve().name,
        revision=said.revision,
        block_tokens=block_tokens,
        max_tokens=max_tokens or text["max_position_embeddings"],
        vocab_size=text["vocab_size"],
        # In two bytes each: an estimate for routers, which weigh loads against computing.
        kv_bytes_per_token=text["num_hidden_layers"] * 2 * heads * head_dim * 2,
        doubles_at=_doubles_at(
            hidden=text["hidden_size"],
            inner=inner,
            width=text["num_attention_heads"] * head_dim,
            kv_width=heads * head_dim,
        ),
        eos_token_ids=tuple(eos if isinstance(eos, list) else [eos] if eos is not None else []),
        tokenizer_files=files,
        none_hash=said.none_hash,
        root=said.root,
        events=events,
        replay=replay,
        spaces=spaces,
    )


def _doubles_at(*, hidden: int, inner: int, width: int, kv_width: int) -> float:
    """See worker.proto; of a layer with a gated feed-forward part of width `inner`."""
    if not inner:
        return 0.0
    layer = hidden * (2 * width + 2 * kv_width + 3 * inner)
    return doubles_at(parameters=layer, layers=1, width=width)
