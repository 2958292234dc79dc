"""What the lossy codecs share: a block as heads of float32 numbers, and how these are stored.

A block is taken plane by plane: of each layer group all layers' K, then all layers' V (or the
latent vectors, which count as V). A quantizer turns each head's [block_tokens, head_dim] numbers
into a few fields of a fixed size; a plane is stored field by field, each for all heads. So the
length of a payload follows from the layout alone.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from kvtier.core.blocks import BlockLayout
from kvtier.errors import CorruptFrame

F32: TypeAlias = npt.NDArray[np.float32]
Array: TypeAlias = npt.NDArray[Any]
Fields: TypeAlias = Sequence[Array]

_PIECE: Final = 1 << 16  # numbers that are converted at once, as in planes.py
# The largest number that is quantized, by dtype; what is decoded is near it and must fit as well.
_LARGEST: Final = {"bfloat16": 1e37, "float16": 3e4, "float32": 1e37}


class Field(NamedTuple):
    """What a quantizer stores of one head: that many numbers of a dtype."""

    dtype: str
    numbers: int


class Quantizer(Protocol):
    """How one head's numbers become fields. Keeps no state."""

    def fields(self, tokens: int, dim: int) -> Sequence[Field] | None:
        """What it stores of a head of this shape; None: it is not for this shape."""
        ...

    def encode(self, x: F32, fields: Fields) -> None:
        """Fill `fields` ([heads, numbers] each) from x [heads, tokens, dim]; all are finite."""
        ...

    def decode(self, fields: Fields, x: F32) -> None:
        """Fill x [heads, tokens, dim] from `fields`; any bits are taken."""
        ...


class Lossy:
    """A codec of two quantizers, one for K and one for V. See `Codec`.

    Passes on a block with a number that is not finite, or so large that it might become so, on
    layouts that a quantizer is not for, and on dtypes of 8 bits.
    """

    exact = False

    def __init__(self, codec_id: int, name: str, k: Quantizer, v: Quantizer) -> None:
        self.id = codec_id
        self.name = name
        self._k, self._v = k, v

    def encode(self, block: memoryview, layout: BlockLayout) -> Sequence[bytes | memoryview] | None:
        """See `Codec.encode`."""
        nbytes = self._payload_nbytes(layout)
        if nbytes is None:
            return None
        payload = np.empty(nbytes, np.uint8)
        # Aligned and in the machine's own order; x86 and ARM are little-endian, as frames are.
        for quantizer, plane, stored in self._planes(block, payload, layout):
            for start, words in _pieces(plane):
                x = _to_float(words, layout.dtype)
                if not _all_below(x, _LARGEST[layout.dtype]):
                    return None
                quantizer.encode(x, [each[start : start + len(x)] for each in stored])
        return (payload.data,)

    def decode(self, payload: memoryview, out: memoryview, layout: BlockLayout) -> None:
        """See `Codec.decode`."""
        if payload.nbytes != (nbytes := self._payload_nbytes(layout)):
            raise CorruptFrame(f"{self.name} payload of {payload.nbytes} bytes, must be {nbytes}")
        raw = np.frombuffer(payload, np.uint8)
        with np.errstate(all="ignore"):  # scales that no encoder writes
            for quantizer, plane, stored in self._planes(out, raw, layout):
                room = np.empty(0, np.float32)  # one for all pieces: fresh memory costs page faults
                for start, words in _pieces(plane):
                    if room.size < words.size:
                        room = np.empty(words.size, np.float32)
                    x = room[: words.size].reshape(-1, *words.shape[2:])
                    quantizer.decode([each[start : start + len(x)] for each in stored], x)
                    _from_float(x, words, layout.dtype)

    def _payload_nbytes(self, layout: BlockLayout) -> int | None:
        """None: not for this layout."""
        if layout.dtype not in _LARGEST:
            return None
        total = 0
        for group in layout.groups:
            for quantizer in self._quantizers(group.planes):
                fields = quantizer.fields(layout.block_tokens, group.head_dim)
                if fields is None:
                    return None
                heads = group.layers * group.kv_heads
                total += heads * sum(np.dtype(f.dtype).itemsize * f.numbers for f in fields)
        return total

    def _quantizers(self, planes: int) -> Sequence[Quantizer]:
        return (self._k, self._v) if planes == 2 else (self._v,)

    def _planes(
        self, block: memoryview, payload: npt.NDArray[np.uint8], layout: BlockLayout
    ) -> Iterator[tuple[Quantizer, Array, list[Array]]]:
        """Each plane: its quantizer, words [layers, kv_heads, tokens, dim], fields by head."""
        words = np.frombuffer(block, f"u{layout.itemsize}")
        tokens = layout.block_tokens
        at = place = 0
        for group in layout.groups:
            heads, dim = group.layers * group.kv_heads, group.head_dim
            size = group.values_per_token * tokens
            shape = (group.layers, group.planes, group.kv_heads, tokens, dim)
            view = words[at : at + size].reshape(shape)
            at += size
            for index, quantizer in enumerate(self._quantizers(group.planes)):
                stored = []
                for field in quantizer.fields(tokens, dim) or ():
                    nbytes = heads * field.numbers * np.dtype(field.dtype).itemsize
                    part = np.frombuffer(payload[place : place + nbytes], field.dtype)
                    stored.append(part.reshape(heads, field.numbers))
                    place += nbytes
                yield quantizer, view[:, index], stored


def _pieces(plane: Array) -> Iterator[tuple[int, Array]]:
    """Some heads of a plane at a time: how many came before, and a 4-dimensional view."""
    layers, kv_heads, tokens, dim = plane.shape
    step = max(1, _PIECE // (kv_heads * tokens * dim))
    width = kv_heads if step > 1 else max(1, _PIECE // (tokens * dim))
    for layer in range(0, layers, step):
        for head in range(0, kv_heads, width):
            yield layer * kv_heads + head, plane[layer : layer + step, head : head + width]


def _to_float(words: Array, dtype: str) -> F32:
    """float32 [heads, tokens, dim] of words [layers, kv_heads, tokens, dim]."""
    if dtype == "bfloat16":
        wide = words.astype(np.uint32)
        np.left_shift(wide, 16, out=wide)
        x = wide.view(np.float32)
    else:
        x = words.view(dtype).astype(np.float32)
    return x.reshape(-1, *words.shape[2:])


def _from_float(x: F32, words: Array, dtype: str) -> None:
    """Write x [heads, tokens, dim] into words [layers, kv_heads, tokens, dim]; changes x."""
    x = x.reshape(words.shape)
    if dtype == "bfloat16":
        np.copyto(words, _bf16_bits(x), casting="unsafe")
    else:
        np.copyto(words.view(dtype), x, casting="same_kind")


def to_bf16(x: F32) -> npt.NDArray[np.uint16]:
    """The bits of the nearest bfloat16, ties away from zero; changes x, which must be finite."""
    return _bf16_bits(x).astype(np.uint16)


def _bf16_bits(x: F32) -> npt.NDArray[np.uint32]:
    bits = x.view(np.uint32)
    np.add(bits, 0x8000, out=bits)
    np.right_shift(bits, 16, out=bits)
    return bits


def bf16_above(x: F32) -> npt.NDArray[np.uint16]:
    """The bits of the smallest bfloat16 that is not below x; x >= 0."""
    return ((x.view(np.uint32) + np.uint32(0xFFFF)) >> 16).astype(np.uint16)


def from_bf16(bits: Array) -> F32:
    """The numbers that bfloat16 bits stand for."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def largest_of_rows(x: F32) -> F32:
    """The largest magnitude along the last axis, [..., 1]; a NaN is larger than any number."""
    # As integers magnitudes have the same order, and reduceat is 6 times faster than max(-1).
    bits = (x.view(np.int32) & 0x7FFFFFFF).ravel()
    largest = np.maximum.reduceat(bits, np.arange(0, bits.size, x.shape[-1]))
    return largest.view(np.float32).reshape(*x.shape[:-1], 1)


def _all_below(x: F32, limit: float) -> bool:
    # Written so that a NaN says no.
    return bool(x.max() <= limit and x.min() >= -limit)
