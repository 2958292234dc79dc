"""What a block is called, what shape it has, and whose it is.

A block is a fixed number of consecutive tokens' KV in all layers. Its key is chained over the
whole prompt up to its end, so equal keys mean equal prefixes, not only equal tokens.
"""

import json
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from hashlib import sha256
from hmac import new as new_hmac
from typing import NewType

KEY_NBYTES = 16
MAX_BLOCK_TOKENS = 4096
MAX_BLOCK_NBYTES = 1 << 30

BlockKey = NewType("BlockKey", bytes)  # KEY_NBYTES bytes
BEGINS = BlockKey(bytes(KEY_NBYTES))  # in place of the block before one that begins a prompt
Slot = NewType("Slot", int)  # index of one block in a host arena

_ITEMSIZES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2,
    "float8_e4m3fn": 1, "float8_e5m2": 1, "int8": 1, "uint8": 1,
}  # fmt: skip


class Attention(StrEnum):
    """How the layers of a group keep the past."""

    FULL = "full"  # K and V of every token: MHA, GQA and MQA differ only in kv_heads
    SLIDING = "sliding"  # K and V of the last `window` tokens
    LATENT = "latent"  # one compressed vector a token (MLA); kv_heads is 1


def _whole(what: str, owner: object, names: Sequence[str]) -> None:
    """Refuse what only equals a whole number: 2.0 and True would give a layout another text."""
    for name in names:
        value = getattr(owner, name)
        if type(value) is not int:
            raise ValueError(f"{what}: {name} is {value!r}, must be a whole number")


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Consecutive-in-the-block layers whose KV has one shape.

    In a block a group lies as [layers, planes, kv_heads, block_tokens, head_dim]; planes is 2
    (K, then V) except for latent attention, where it is 1.
    """

    attention: Attention
    layers: int
    kv_heads: int
    head_dim: int
    window: int = 0  # tokens; only for sliding attention

    def __post_init__(self) -> None:
        _whole("layer group", self, ("layers", "kv_heads", "head_dim", "window"))
        for name in ("layers", "kv_heads", "head_dim"):
            value = getattr(self, name)
            if not 1 <= value <= 65536:
                raise ValueError(f"layer group: {name} is {value}, must be 1 to 65536")
        if (self.attention is Attention.SLIDING) != (self.window > 0):
            raise ValueError(
                f"layer group: window is {self.window} for {self.attention} attention; "
                "a window goes with sliding attention and with no other"
            )
        if self.attention is Attention.LATENT and self.kv_heads != 1:
            raise ValueError(f"layer group: latent attention has 1 KV head, not {self.kv_heads}")

    @property
    def planes(self) -> int:
        """2 for K and V apart, 1 for a latent vector."""
        return 1 if self.attention is Attention.LATENT else 2

    @property
    def values_per_token(self) -> int:
        """Numbers that one token keeps in this group."""
        return self.layers * self.planes * self.kv_heads * self.head_dim


@dataclass(frozen=True)
class BlockLayout:
    """The exact bytes of one block on one rank: groups in order, no padding, native order.

    Raises:
        ValueError: A field is out of range; the message names it, its value and the limit.
    """

    groups: tuple[LayerGroup, ...]
    block_tokens: int
    dtype: str
    rank: int = 0  # which tensor-parallel shard this is
    ranks: int = 1

    def __post_init__(self) -> None:
        if not self.groups:
            raise ValueError("block layout: no layer groups")
        _whole("block layout", self, ("block_tokens", "rank", "ranks"))
        if not 1 <= self.block_tokens <= MAX_BLOCK_TOKENS:
            raise ValueError(
                f"block layout: block_tokens is {self.block_tokens}, "
                f"must be 1 to {MAX_BLOCK_TOKENS}"
            )
        if self.dtype not in _ITEMSIZES:
            known = ", ".join(_ITEMSIZES)
            raise ValueError(f"block layout: dtype is {self.dtype!r}, must be one of {known}")
        if not 0 <= self.rank < self.ranks:
            raise ValueError(f"block layout: rank is {self.rank}, must be 0 to {self.ranks - 1}")
        if self.nbytes > MAX_BLOCK_NBYTES:
            raise ValueError(f"block layout: {self.nbytes} bytes a block, limit {MAX_BLOCK_NBYTES}")

    @property
    def itemsize(self) -> int:
        """Bytes of one number."""
        return _ITEMSIZES[self.dtype]

    @cached_property
    def nbytes(self) -> int:
        """Bytes of one block."""
        return self.nbytes_per_token * self.block_tokens

    @property
    def nbytes_per_token(self) -> int:
        """Bytes that one token keeps on this rank."""
        return sum(group.values_per_token for group in self.groups) * self.itemsize

    def describe(self) -> str:
        """One canonical line of JSON: equal layouts give equal text, and only they do."""
        groups = [
            [str(g.attention), g.layers, g.kv_heads, g.head_dim, g.window] for g in self.groups
        ]
        fields = [groups, self.block_tokens, self.dtype, self.rank, self.ranks]
        return json.dumps(fields, separators=(",", ":"))

    @classmethod
    def parse(cls, text: str) -> "BlockLayout":
        """The layout that `describe` wrote.

        Raises:
            ValueError: `text` is not such a line.
        """
        try:
            groups, block_tokens, dtype, rank, ranks = json.loads(text)
            return cls(
                tuple(LayerGroup(Attention(kind), *sizes) for kind, *sizes in groups),
                block_tokens, dtype, rank, ranks,
            )  # fmt: skip
        except (TypeError, KeyError, ValueError, RecursionError) as error:
            raise ValueError(f"not a block layout: {text[:200]!r} ({error})") from None

    @cached_property
    def id(self) -> str:
        """16 hex digits that name this layout in folders, frames and store keys."""
        return sha256(self.describe().encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Namespace:
    """Whatever makes equal tokens unequal KV; its `root` starts every chain of keys.

    `revision` is a fingerprint of the weights' content. `tenant_secret` keeps tenants apart:
    without it nobody can compute, and so ask for, another tenant's keys.
    """

    model: str
    revision: str
    layout: BlockLayout
    scheme: str = "kvtier-sha256-1"
    adapter: str = ""
    tenant: str = ""
    tenant_secret: bytes = b""

    def root(self) -> bytes:
        """The parent of the first block's key: 32 bytes.

        The rank is left out, so that all ranks of one engine name a block alike; their bytes are
        kept apart by the layout's id.
        """
        layout = BlockLayout(self.layout.groups, self.layout.block_tokens, self.layout.dtype)
        fields = [
            self.scheme, self.model, self.revision, layout.describe(), self.layout.ranks,
            self.adapter, self.tenant,
        ]  # fmt: skip
        text = json.dumps(fields, separators=(",", ":")).encode()
        return new_hmac(self.tenant_secret, text, sha256).digest()


def block_keys(root: bytes, token_ids: Sequence[int], block_tokens: int) -> list[BlockKey]:
    """The chained keys of every full block of a prompt; a trailing partial block has none.

    key[i] = SHA-256(key[i-1] or root, token ids of block i as little-endian u32), cut to 16
    bytes: the chain of vLLM's prefix caching with a fixed binary form.

    Raises:
        ValueError: A token id is negative or does not fit in 32 bits.
    """
    try:
        packed = array("I", token_ids)
    except OverflowError:
        raise ValueError("token ids must be 0 to 4294967295") from None
    if sys.byteorder == "big":
        packed.byteswap()
    raw = packed.tobytes()
    step = 4 * block_tokens
    keys: list[BlockKey] = []
    parent = root
    for start in range(0, len(raw) - step + 1, step):
        # One call with the parts joined: faster than two updates of a hash.
        parent = sha256(parent + raw[start : start + step]).digest()[:KEY_NBYTES]
        keys.append(parent)  # type: ignore[arg-type]  # a call of BlockKey costs a tenth of it all
    return keys
