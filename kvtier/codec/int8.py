"""8-bit integers with a scale a token and head, or a scale a channel: half of bfloat16 KV."""

from collections.abc import Sequence
from typing import Final

import numpy as np

from kvtier.codec.lossy import F32, Field, Fields, bf16_above, from_bf16, largest_of_rows

_LEVELS: Final = 127
# Below it a scale's inverse could overflow; such numbers are stored as zeros.
_LEAST: Final = 1e-30


class Int8PerToken:
    """Symmetric, one scale for the head_dim numbers of a token; independent of block_tokens."""

    def fields(self, tokens: int, dim: int) -> Sequence[Field] | None:
        """Scales, then codes."""
        return Field("u2", tokens), Field("i1", tokens * dim)

    def encode(self, x: F32, fields: Fields) -> None:
        """See `Quantizer.encode`."""
        _quantize(x, largest_of_rows(x), fields)

    def decode(self, fields: Fields, x: F32) -> None:
        """See `Quantizer.decode`."""
        scales, codes = fields
        np.copyto(x, codes.reshape(x.shape))
        np.multiply(x, from_bf16(scales).reshape(*x.shape[:-1], 1), out=x)


class Int8PerChannel:
    """Symmetric, one scale for the numbers of a channel: K has few channels that are large.

    As in KIVI (arXiv 2402.02750), which does so with 2 bits. For blocks of 32 tokens and more:
    below, scales take more than they save.
    """

    def fields(self, tokens: int, dim: int) -> Sequence[Field] | None:
        """Scales, then codes."""
        return Field("u2", dim), Field("i1", tokens * dim)

    def encode(self, x: F32, fields: Fields) -> None:
        """See `Quantizer.encode`."""
        _quantize(x, np.abs(x).max(1, keepdims=True), fields)

    def decode(self, fields: Fields, x: F32) -> None:
        """See `Quantizer.decode`."""
        scales, codes = fields
        np.copyto(x, codes.reshape(x.shape))
        np.multiply(x, from_bf16(scales).reshape(len(x), 1, -1), out=x)


def _quantize(x: F32, largest: F32, fields: Fields) -> None:
    """Codes of x in steps of largest / 127; the scale is rounded up, so that nothing clips."""
    scales, codes = fields
    bits = bf16_above(largest / np.float32(_LEVELS))
    scale = from_bf16(bits)
    tiny = scale < _LEAST
    bits[tiny] = 0
    inverse = np.float32(1) / np.where(tiny, np.float32(np.inf), scale)
    y = np.multiply(x, inverse)
    np.rint(y, out=y)
    np.copyto(codes, y.reshape(codes.shape), casting="unsafe")
    np.copyto(scales, bits.reshape(scales.shape))
