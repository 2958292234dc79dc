"""Keys of made-up prompts: readable, and as long as real ones."""

import hashlib
from collections.abc import Sequence
from typing import Final

from kvtier.core.blocks import KEY_NBYTES, BlockKey

MOST: Final = KEY_NBYTES - 1  # steps that a key shows


def key_of(steps: bytes) -> BlockKey:
    """The key of the block to which a prompt comes by `steps`, a byte for each block, none 0."""
    if len(steps) > MOST:
        return BlockKey(hashlib.sha256(steps).digest()[:KEY_NBYTES])
    return BlockKey(steps.ljust(MOST, b"\0") + steps[-1:])


def steps_to(key: BlockKey) -> bytes:
    """The steps of a key that shows them."""
    return key[:MOST].rstrip(b"\0")


def path_of(steps: bytes | Sequence[int]) -> list[BlockKey]:
    """The keys of a prompt; those that begin with equal steps share these keys."""
    return [key_of(bytes(steps[: n + 1])) for n in range(len(steps))]
