"""What a model folder and a running engine say of an engine that is to be routed to."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Final

from kvtier.core import vllm_keys
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
    return Served(
        model=name or folder.resolve().name,
        revision=said.revision,
        block_tokens=block_tokens,
        max_tokens=max_tokens or text["max_position_embeddings"],
        vocab_size=text["vocab_size"],
        # In two bytes each: an estimate for routers, which weigh loads against computing.
        kv_bytes_per_token=text["num_hidden_layers"] * 2 * heads * head_dim * 2,
        eos_token_ids=tuple(eos if isinstance(eos, list) else [eos] if eos is not None else []),
        tokenizer_files=files,
        none_hash=said.none_hash,
        root=said.root,
        events=events,
        replay=replay,
        spaces=spaces,
    )
