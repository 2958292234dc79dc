"""Whether what a worker says of itself can be used."""

import math
from typing import Final

from kvtier.core import vllm_keys
from kvtier.core.blocks import MAX_BLOCK_TOKENS
from kvtier.errors import RemoteProtocolError
from kvtier.wire.pb import worker_pb2

MAX_ROOT: Final = 1024  # bytes
MAX_SPACES: Final = 4096  # of one worker
KEY_SCHEMES: Final = ("", vllm_keys.SCHEME)


def check(info: worker_pb2.WorkerInfo) -> None:
    """Refuse a worker that cannot be used.

    Raises:
        RemoteProtocolError: A field is out of range; the message names it.
    """
    for name, low, high in (
        ("block_tokens", 1, MAX_BLOCK_TOKENS),
        ("max_tokens", 2, 2**31),
        ("vocab_size", 1, 2**31),
    ):
        value = getattr(info, name)
        if not low <= value <= high:
            raise RemoteProtocolError(f"worker info: {name} is {value}, must be {low} to {high}")
    for name in ("worker_id", "model"):
        value = getattr(info, name)
        if not 1 <= len(value) <= 256:
            raise RemoteProtocolError(f"worker info: {name} has {len(value)} characters")
    if info.doubles_at and not 1 <= info.doubles_at < math.inf:
        raise RemoteProtocolError(
            f"worker info: doubles_at is {info.doubles_at}, must be 0, or 1 or more"
        )
    if info.key_scheme not in KEY_SCHEMES:
        raise RemoteProtocolError(f"worker info: key_scheme {info.key_scheme[:64]!r} is unknown")
    if len(info.spaces) > MAX_SPACES:
        raise RemoteProtocolError(
            f"worker info: {len(info.spaces)} spaces, which are more than {MAX_SPACES}"
        )
    roots = [
        ("root", info.root),
        *((f"root of spaces[{i}]", s.root) for i, s in enumerate(info.spaces)),
    ]
    for name, root in roots:
        if not 1 <= len(root) <= MAX_ROOT:
            raise RemoteProtocolError(
                f"worker info: {name} has {len(root)} bytes, limit {MAX_ROOT}"
            )
        if info.key_scheme == vllm_keys.SCHEME:
            try:
                vllm_keys.prompt_keys(root, (), info.block_tokens)
            except (ValueError, RecursionError):
                raise RemoteProtocolError(f"worker info: {name} is no root of its scheme") from None
