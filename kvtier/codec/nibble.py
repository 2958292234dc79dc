"""bp4: rotated byte planes, and four bits for an exponent; no entropy coder, so fast to decode."""

from collections.abc import Sequence
from typing import Final

import numpy as np

from kvtier.codec import planes
from kvtier.core.blocks import BlockLayout
from kvtier.errors import CorruptFrame

_DTYPES: Final = frozenset(("bfloat16", "float32"))  # whose top byte is the whole exponent
_HEADER: Final = 8  # u8 base, 3 zeros, u32 how many escapes
_ESCAPE: Final = 15
_ESCAPE_NBYTES: Final = 5  # u32 position, u8 exponent
_SAMPLES: Final = 1 << 14  # exponents looked at to choose the window
_MOST_ESCAPES: Final = 32  # one in so many; above, 4 bits and escapes save too little


class Nibbles:
    """Each exponent as its distance below a base, 0 to 14, in 4 bits. See `Codec`.

    Lossless. Payload: header; positions of the exponents that are elsewhere, as little-endian
    u32; these exponents; the nibbles, first half of the block in the low ones; the other bytes
    as they are. Blocks of other dtypes, or of exponents all over, are not encoded.
    """

    id = 3
    name = "bp4"
    exact = True

    def encode(self, block: memoryview, layout: BlockLayout) -> Sequence[bytes | memoryview] | None:
        """See `Codec.encode`."""
        n = planes.count(layout)
        if layout.dtype not in _DTYPES or n % 2:
            return None
        top, rest = planes.split(block, layout)
        base = _base(top)
        distance = np.subtract(np.uint8(base), top)  # wraps: what is above the base is far below
        escaped = np.flatnonzero(distance >= _ESCAPE)
        if escaped.size * _MOST_ESCAPES > n:
            return None
        exponents = top[escaped]
        distance[escaped] = _ESCAPE
        codes = distance[n // 2 :] * np.uint8(16)
        codes |= distance[: n // 2]
        header = bytes((base, 0, 0, 0)) + escaped.size.to_bytes(4, "little")
        positions = escaped.astype("<u4").tobytes()
        return (header, positions, exponents.tobytes(), codes.data, rest.data)

    def decode(self, payload: memoryview, out: memoryview, layout: BlockLayout) -> None:
        """See `Codec.decode`."""
        n = planes.count(layout)
        fixed = _HEADER + n // 2 + n * (layout.itemsize - 1)
        if layout.dtype not in _DTYPES or n % 2 or payload.nbytes < fixed:
            raise CorruptFrame(f"bp4 payload of {payload.nbytes} bytes is none of this layout")
        escapes = int.from_bytes(payload[4:8], "little")
        if payload.nbytes != fixed + escapes * _ESCAPE_NBYTES or payload[1:4] != bytes(3):
            raise CorruptFrame(f"bp4 payload of {payload.nbytes} bytes with {escapes} escapes")
        raw = np.frombuffer(payload, np.uint8)[_HEADER:]
        positions = np.frombuffer(raw[: 4 * escapes], "<u4")
        exponents, codes = raw[4 * escapes : 5 * escapes], raw[5 * escapes :][: n // 2]
        if escapes and int(positions.max()) >= n:
            raise CorruptFrame(f"bp4 payload has an escape beyond its {n} numbers")
        top = np.empty(n, np.uint8)
        np.bitwise_and(codes, 15, out=top[: n // 2])
        np.floor_divide(codes, np.uint8(16), out=top[n // 2 :])
        np.subtract(np.uint8(payload[0]), top, out=top)
        top[positions] = exponents
        rest = raw[5 * escapes + n // 2 :]
        planes.merge(lambda start, end: top[start:end], rest, out, layout)


def _base(top: planes.U8) -> int:
    """The upper end of the window of 15 exponents that holds most of a sample."""
    counts = np.bincount(top[:: max(1, top.size // _SAMPLES)], minlength=256)
    return int(np.convolve(counts, np.ones(_ESCAPE, np.int64))[:256].argmax())
