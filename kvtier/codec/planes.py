"""Floating point KV cut into the byte that repeats and the bytes that do not.

Sign, exponent and mantissa are rotated by one bit, so that the top byte holds exponent bits only
(bfloat16, float32) or the exponent and the first mantissa bits (float16, float8). Neighbours have
like exponents; signs and mantissas are noise. The split follows ZipNN (arXiv 2411.05239).

Numbers are taken in plane order: of each layer group all layers' K, then all layers' V, because
one table of codes should not have to serve both.
"""

from collections.abc import Callable, Iterator
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from kvtier.core.blocks import BlockLayout

U8: TypeAlias = npt.NDArray[np.uint8]
U16: TypeAlias = npt.NDArray[np.uint16]
U32: TypeAlias = npt.NDArray[np.uint32]
Words: TypeAlias = npt.NDArray[np.unsignedinteger[Any]]

# Numbers that are cut at once: what lies between two steps stays in a core's cache, and is small
# enough for malloc to keep; fresh megabytes cost more in page faults than the work on them.
_PIECE: Final = 1 << 16
_WORDS: Final[dict[int, np.dtype[np.unsignedinteger[Any]]]] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.uint16),
    4: np.dtype(np.uint32),
}


def splits(layout: BlockLayout) -> bool:
    """Whether blocks of this layout have such a top byte."""
    return layout.itemsize in _WORDS


def count(layout: BlockLayout) -> int:
    """Numbers in one block: bytes of the plane of top bytes."""
    return layout.nbytes // layout.itemsize


def split(block: memoryview, layout: BlockLayout) -> tuple[U8, U8]:
    """The top bytes (uint8, one a number) and the rest (uint8, itemsize - 1 a number), fresh."""
    n = count(layout)
    top = np.empty(n, np.uint8)
    rest = np.empty(n * (layout.itemsize - 1), np.uint8)
    for at, x in pieces(block, layout):
        end = at + x.size
        part = top[at:end].reshape(x.shape)
        if layout.itemsize == 1:
            np.bitwise_or(x * np.uint8(2), x // np.uint8(128), out=part)
        elif layout.itemsize == 2:
            np.right_shift(x, 7, out=part, casting="unsafe")
            _split_rest(x, rest[at:end].reshape(x.shape))
        else:
            np.copyto(part, x >> 23, casting="unsafe")
            low = rest[2 * at : 2 * end].view(np.uint16).reshape(x.shape)
            np.copyto(low, x, casting="unsafe")
            half = (x >> 16).astype(np.uint16)
            _split_rest(half, rest[2 * n :][at:end].reshape(x.shape))
    return top, rest


def merge(top: Callable[[int, int], U8], rest: U8, out: memoryview, layout: BlockLayout) -> None:
    """Undo `split`: fill `out` (layout.nbytes bytes).

    Args:
        top: Gives the top bytes from one place up to another; called in order.
        rest: As `split` gave it, at any address.
        out: Where the block goes.
        layout: The block's.
    """
    n = count(layout)
    assert rest.size == n * (layout.itemsize - 1)
    for at, x in pieces(out, layout):
        end = at + x.size
        part = top(at, end).reshape(x.shape)
        if layout.itemsize == 1:
            np.bitwise_or(part // np.uint8(2), part * np.uint8(128), out=x)
        elif layout.itemsize == 2:
            _merge16(part, rest[at:end].reshape(x.shape), x)
        else:
            half = np.empty(x.shape, np.uint16)
            _merge16(part, rest[2 * n :][at:end].reshape(x.shape), half)
            np.copyto(x, half)
            np.left_shift(x, 16, out=x)
            x |= np.frombuffer(rest[2 * at : 2 * end], "<u2").reshape(x.shape)


def pieces(block: memoryview, layout: BlockLayout) -> Iterator[tuple[int, Words]]:
    """The block's words in plane order, a piece at a time: how many came before, and a view."""
    words = np.frombuffer(block, _WORDS[layout.itemsize])
    start = done = 0
    for group in layout.groups:
        run = group.kv_heads * layout.block_tokens * group.head_dim
        size = group.layers * group.planes * run
        view = words[start : start + size].reshape(group.layers, group.planes, run)
        start += size
        layers, width = max(1, _PIECE // run), min(run, _PIECE)
        for plane in range(group.planes):
            for layer in range(0, group.layers, layers):
                for at in range(0, run, width):
                    piece = view[layer : layer + layers, plane, at : at + width]
                    yield done, piece
                    done += piece.size


def _split_rest(x: Words, rest: U8) -> None:
    """Sign and the 7 lowest bits of 16-bit words."""
    np.copyto(rest, x, casting="unsafe")
    rest &= 0x7F
    sign = (x >> 8).astype(np.uint8)
    sign &= 0x80
    rest |= sign


def _merge16(top: U8, rest: U8, out: Words) -> None:
    np.copyto(out, top)
    np.left_shift(out, 7, out=out)
    # Sign extension puts the sign where it belongs, and in 8 more places.
    low = rest.view(np.int8).astype(np.int16).view(np.uint16)
    low &= 0x807F
    out |= low
