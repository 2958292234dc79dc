"""4-bit integers of rotated numbers, with a least number and a step a group."""

from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from typing import Final

import numpy as np

from kvtier.codec.lossy import F32, Field, Fields, bf16_above, from_bf16, to_bf16

_LEVELS: Final = 15
_LARGEST_GROUP: Final = 64
_LEAST_GROUP: Final = 16  # below, steps take more than they save
_LEAST: Final = 1e-30
# Rows of one matrix product: OpenBLAS starts threads for larger ones, which in a process that has
# threads of its own, on cores that others need, is slower by up to a hundred times (measured).
_ROWS: Final = 32


class Int4Hadamard:
    """Asymmetric in groups of up to 64 channels of a token, after a random Hadamard rotation.

    The rotation spreads outliers over all channels of the group (as in QuaRot, arXiv 2404.00456).
    """

    def fields(self, tokens: int, dim: int) -> Sequence[Field] | None:
        """Least numbers, steps, then codes: a head's first half in the low nibbles."""
        group = _group(dim)
        if group < _LEAST_GROUP:
            return None
        groups = tokens * dim // group
        return Field("u2", groups), Field("u2", groups), Field("u1", tokens * dim // 2)

    def encode(self, x: F32, fields: Fields) -> None:
        """See `Quantizer.encode`."""
        leasts, steps, codes = fields
        group = _group(x.shape[-1])
        y = _product(x, _rotation(group), group)
        # Reductions along short rows are slow, along columns they are not.
        columns = np.ascontiguousarray(y.reshape(-1, group).T)
        least = columns.min(0)
        least_bits = to_bf16(least.copy())
        np.copyto(leasts, least_bits.reshape(leasts.shape))
        least = from_bf16(least_bits)
        step_bits = bf16_above(np.maximum(columns.max(0) - least, 0) / np.float32(_LEVELS))
        step = from_bf16(step_bits)
        tiny = step < _LEAST
        step_bits[tiny] = 0
        np.copyto(steps, step_bits.reshape(steps.shape))
        inverse = np.float32(1) / np.where(tiny, np.float32(np.inf), step)
        y = y.reshape(-1, group)
        np.subtract(y, least[:, None], out=y)
        np.multiply(y, inverse[:, None], out=y)
        np.rint(y, out=y)
        np.clip(y, 0, _LEVELS, out=y)
        nibbles = y.astype(np.uint8).reshape(len(x), -1)
        half = codes.shape[1]
        np.bitwise_or(nibbles[:, half:] * np.uint8(16), nibbles[:, :half], out=codes)

    def decode(self, fields: Fields, x: F32) -> None:
        """See `Quantizer.decode`."""
        leasts, steps, codes = fields
        group = _group(x.shape[-1])
        half = codes.shape[1]
        y = np.empty((len(x), 2 * half), np.float32)
        np.copyto(y[:, :half], codes & 15)
        np.copyto(y[:, half:], codes // np.uint8(16))
        y = y.reshape(-1, group)
        np.multiply(y, from_bf16(steps).reshape(-1, 1), out=y)
        np.add(y, from_bf16(leasts).reshape(-1, 1), out=y)
        np.copyto(x, _product(y, _rotation(group).T, group).reshape(x.shape))


def _group(dim: int) -> int:
    """The largest power of two that divides `dim`, up to 64."""
    return min(dim & -dim, _LARGEST_GROUP)


@cache
def _rotation(size: int) -> F32:
    """Random signs, then the Hadamard matrix of `size`, a power of two; orthogonal."""
    bits = np.unpackbits(np.frombuffer(sha256(b"kvtier int4-had").digest(), np.uint8))
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    signs = 1 - 2 * bits[:size].astype(np.float32)
    return np.ascontiguousarray(signs[:, None] * matrix / np.float32(size) ** 0.5, np.float32)


def _product(x: F32, matrix: F32, group: int) -> F32:
    """Each `group` numbers of x times `matrix`, [-1, group]."""
    rows = x.size // group
    step = min(rows & -rows, _ROWS)
    product: F32 = np.matmul(x.reshape(-1, step, group), matrix)
    return product.reshape(-1, group)
