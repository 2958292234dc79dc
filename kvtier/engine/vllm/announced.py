"""The file by which an engine's tier tells a worker beside it what its blocks are called by."""

import json
from pathlib import Path
from typing import Final, NamedTuple

from kvtier.core.blocks import BlockLayout
from kvtier.errors import ConfigError

HASH: Final = "sha256_cbor"
MAX_ANNOUNCED: Final = 65536  # bytes


class Announced(NamedTuple):
    """What a tier writes into the file that `kvtier.announce` names."""

    root: bytes
    none_hash: bytes
    revision: str
    layout: BlockLayout | None = None  # where a prompt has one chain of blocks


def write_announced(path: str, said: Announced, algorithm: str, block_tokens: int) -> None:
    """Tell whoever waits at `path` who this engine is; whole, or not at all."""
    table = {
        "root": said.root.hex(), "none_hash": said.none_hash.hex(), "revision": said.revision,
        "hash": algorithm, "block_tokens": block_tokens,
        "layout": said.layout.describe() if said.layout else "",
    }  # fmt: skip
    scratch = Path(f"{path}.tmp")
    scratch.write_text(json.dumps(table))
    scratch.replace(path)


def read_announced(path: Path, block_tokens: int) -> Announced:
    """What `write_announced` wrote, of an engine whose keys a router can compute.

    Raises:
        ConfigError: The engine's blocks or hashes are others than this worker's.
    """
    try:
        with path.open("rb") as file:
            table = json.loads(file.read(MAX_ANNOUNCED))
        layout = table.get("layout")  # earlier releases say nothing of it
        said = Announced(
            bytes.fromhex(table["root"]), bytes.fromhex(table["none_hash"]), table["revision"],
            BlockLayout.parse(layout) if layout else None,
        )  # fmt: skip
        algorithm, tokens = table["hash"], table["block_tokens"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"worker.announced {path}: {error}") from None
    if algorithm != HASH:
        raise ConfigError(f"vLLM runs with --prefix-caching-hash-algo {algorithm}, must be {HASH}")
    if tokens != block_tokens:
        raise ConfigError(
            f"worker.block_tokens is {block_tokens}, but that vLLM's tier has blocks of {tokens}"
        )
    return said
