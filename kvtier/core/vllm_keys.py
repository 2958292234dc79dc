"""vLLM's chain of block hashes (`--prefix-caching-hash-algo sha256_cbor`) as a scheme of keys.

    hash[i] = SHA-256(CBOR([hash[i-1] or NONE_HASH, [token ids of block i], extra keys or null]))
    key     = SHA-256(root, hash of a block, group as 4 bytes big-endian), cut to 16 bytes

`root` is the engine's namespace. So a router and an engine name a block alike from tokens alone.
What a router is given for a space (an adapter, a tenant) is NONE_HASH, that root, and the extra
keys that all prompts of the space have; see `space_root`.
The chain is that of vllm/v1/core/kv_cache_utils.py (0.32), the CBOR that of RFC 8949, section
4.2.1, for the few types that occur.
"""

import json
from collections.abc import Iterable, Sequence
from hashlib import sha256
from typing import Final, NamedTuple

from kvtier.core.blocks import KEY_NBYTES, BlockKey

SCHEME: Final = "vllm-sha256-cbor-1"
DEFAULT_SEED: Final = "vllm-none-hash"  # of NONE_HASH, where PYTHONHASHSEED is not set
HASH_NBYTES: Final = 32
_PLAIN: Final = 2 * HASH_NBYTES  # bytes of NONE_HASH and a namespace's root
_KNOWN_INTS: Final = 1 << 18  # token ids whose bytes are remembered: larger than vocabularies are

Extra = tuple[str | int | bytes, ...]  # one extra key, tagged by its first item


class Media(NamedTuple):
    """One picture, sound or the like in a prompt: where its tokens lie."""

    identifier: str
    start: int
    length: int


class _Ints(dict[int, bytes]):
    """Token ids in CBOR; encoding a prompt is then a join of known bytes."""

    def __missing__(self, number: int) -> bytes:
        encoded = _head(0, number) if number >= 0 else _head(1, -1 - number)
        if len(self) < _KNOWN_INTS:
            self[number] = encoded
        return encoded


def _head(major: int, number: int) -> bytes:
    """The first bytes of a CBOR item: its kind, and a number in the fewest bytes."""
    if number < 24:
        return bytes([major << 5 | number])
    for code, size in ((24, 1), (25, 2), (26, 4), (27, 8)):
        if number < 1 << 8 * size:
            return bytes([major << 5 | code]) + number.to_bytes(size, "big")
    raise ValueError(f"{number} does not fit in 64 bits")


_ints = _Ints()


def _text(text: str) -> bytes:
    raw = text.encode()
    return _head(3, len(raw)) + raw


def _item(item: str | int | bytes) -> bytes:
    if isinstance(item, str):
        return _text(item)
    if isinstance(item, int):
        return _ints[item]
    return _head(2, len(item)) + item


def _extras(extras: Sequence[Extra] | None) -> bytes:
    if not extras:
        return b"\xf6"
    keys = [_head(4, len(key)) + b"".join(map(_item, key)) for key in extras]
    return _head(4, len(keys)) + b"".join(keys)


def none_hash(seed: str = DEFAULT_SEED) -> bytes:
    """The parent of the first block: `seed` is the engine's PYTHONHASHSEED, if it has one."""
    return sha256(_text(seed)).digest()


def block_hash(parent: bytes, token_ids: Sequence[int], extras: Sequence[Extra] | None) -> bytes:
    """The hash of one block; 32 bytes."""
    ints = _ints
    body = b"".join([ints[token] for token in token_ids])
    return sha256(
        b"\x83" + _item(parent) + _head(4, len(token_ids)) + body + _extras(extras)
    ).digest()


def extra_keys(
    start: int,
    end: int,
    *,
    adapter: tuple[str, str] | None = None,
    media: Iterable[Media] = (),
    salt: str = "",
) -> list[Extra]:
    """What else than tokens the block of tokens `start` to `end` depends on, in vLLM's order.

    `adapter` is a LoRA's name and path. A medium counts in every block that it overlaps; the salt
    in the first block only, since the others are chained to it.
    """
    extras: list[Extra] = [("lora", *adapter)] if adapter else []
    extras += [
        ("mm", each.identifier, each.start - start)
        for each in sorted(media, key=lambda each: each.start)
        if each.start < end and each.start + each.length > start
    ]
    if salt and start == 0:
        extras.append(("cache_salt", salt))
    return extras


def block_hashes(
    parent: bytes,
    token_ids: Sequence[int],
    block_tokens: int,
    *,
    adapter: tuple[str, str] | None = None,
    media: Sequence[Media] = (),
    salt: str = "",
) -> list[bytes]:
    """The hashes of every full block of a prompt; `parent` is `none_hash(...)`."""
    hashes: list[bytes] = []
    for start in range(0, len(token_ids) - block_tokens + 1, block_tokens):
        end = start + block_tokens
        extras = extra_keys(start, end, adapter=adapter, media=media, salt=salt)
        parent = block_hash(parent, token_ids[start:end], extras)
        hashes.append(parent)
    return hashes


def space_root(
    none_hash: bytes, root: bytes, *, adapter: tuple[str, str] | None = None, salt: str = ""
) -> bytes:
    """All that the keys of a space's prompts depend on besides tokens, for `prompt_keys`.

    `adapter` is a LoRA's name and path, `salt` the `cache_salt` of the space's requests.
    """
    if adapter is None and not salt:
        return none_hash + root
    return none_hash + root + json.dumps([adapter, salt], separators=(",", ":")).encode()


def prompt_keys(root: bytes, token_ids: Sequence[int], block_tokens: int) -> list[BlockKey]:
    """The keys of a prompt's full blocks, without media; `root` is what `space_root` gave.

    Raises:
        ValueError: `root` is no such thing.
    """
    parent, space, more = root[:HASH_NBYTES], root[HASH_NBYTES:_PLAIN], root[_PLAIN:]
    adapter, salt = _space(more) if more else (None, "")
    hashes = block_hashes(parent, token_ids, block_tokens, adapter=adapter, salt=salt)
    return keys_of(space, hashes)


def _space(more: bytes) -> tuple[tuple[str, str] | None, str]:
    """What `space_root` put behind the plain root."""
    match json.loads(more):
        case [None, str(salt)]:
            return None, salt
        case [[str(name), str(path)], str(salt)]:
            return (name, path), salt
    raise ValueError("not the root of a space of vLLM's keys")


def key_of(root: bytes, offload_key: bytes) -> BlockKey:
    """The block key for vLLM's own `OffloadKey`: a block's hash and its group."""
    return BlockKey(sha256(root + offload_key).digest()[:KEY_NBYTES])


def keys_of(root: bytes, hashes: Iterable[bytes], group: int = 0) -> list[BlockKey]:
    """The block keys of blocks with these hashes."""
    suffix = group.to_bytes(4, "big")
    return [key_of(root, each + suffix) for each in hashes]
