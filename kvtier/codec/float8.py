"""8-bit floating point with a power of two a head, by table: for KV that is computed in fp8."""

from collections.abc import Sequence
from functools import cache
from typing import Final

import numpy as np

from kvtier.codec.lossy import F32, Array, Field, Fields, from_bf16, to_bf16

_LARGEST: Final = 448.0  # of float8_e4m3fn (OCP 8-bit floating point specification, 2023)
_LEAST_EXPONENT, _MOST_EXPONENT = -100, 120


class Float8PerHead:
    """float8_e4m3fn of a head's numbers over 2**e, with e such that the largest just fits."""

    def fields(self, tokens: int, dim: int) -> Sequence[Field] | None:
        """Exponents, then codes."""
        return Field("i1", 1), Field("u1", tokens * dim)

    def encode(self, x: F32, fields: Fields) -> None:
        """See `Quantizer.encode`."""
        exponents, codes = fields
        largest = np.abs(x).reshape(len(x), -1).max(1)
        with np.errstate(divide="ignore"):
            wanted = np.ceil(np.log2(largest / _LARGEST))
        exponents[:, 0] = np.clip(wanted, _LEAST_EXPONENT, _MOST_EXPONENT)
        bits = to_bf16(x)
        for head, exponent in enumerate(exponents[:, 0]):
            table = _encoding(int(exponent))
            np.take(table, bits[head].ravel(), out=codes[head], mode="clip")

    def decode(self, fields: Fields, x: F32) -> None:
        """See `Quantizer.decode`."""
        exponents, codes = fields
        for head, exponent in enumerate(exponents[:, 0]):
            np.take(_decoding(int(exponent)), codes[head], out=x[head].reshape(-1), mode="clip")


@cache
def _values() -> F32:
    """What the codes 0 to 126 of float8_e4m3fn stand for, in order."""
    codes = np.arange(127)
    exponent, mantissa = codes >> 3, codes & 7
    normal = (8 + mantissa) * 2.0 ** (exponent - 10.0)
    return np.where(exponent == 0, mantissa * 2.0**-9, normal).astype(np.float32)


@cache
def _encoding(exponent: int) -> Array:
    """The code of each bfloat16 number over 2**exponent, by its bits; the nearest, ties even."""
    values = _values()
    bits = np.arange(1 << 15, dtype=np.uint16)
    with np.errstate(over="ignore"):
        x = from_bf16(np.minimum(bits, 0x7F7F)) * np.float32(2.0**-exponent)
    middles = (values[1:] + values[:-1]) / 2
    codes = np.searchsorted(middles, x, side="left")
    tie = (codes < len(middles)) & (x == middles[np.minimum(codes, len(middles) - 1)])
    codes += tie & (codes % 2 == 1)
    return np.concatenate((codes, codes | 0x80)).astype(np.uint8)


@cache
def _decoding(exponent: int) -> F32:
    """The number of each code, times 2**exponent; the two NaN codes, never written, give 0."""
    half = np.append(_values(), np.float32(0)) * np.float32(2.0**exponent)
    return np.concatenate((half, -half))
