"""Block keys that lie one after the other in one `bytes`, 16 bytes each."""

from collections.abc import Iterable

from kvtier.core.blocks import KEY_NBYTES, BlockKey
from kvtier.core.table import Prints, prints


def pack(keys: Iterable[BlockKey]) -> bytes:
    """Keys, one after the other."""
    return b"".join(keys)


def unpack(packed: bytes) -> list[BlockKey]:
    """Them one by one."""
    return [BlockKey(packed[i : i + KEY_NBYTES]) for i in range(0, len(packed), KEY_NBYTES)]


def distinct(packed: bytes) -> tuple[bytes, Prints]:
    """The keys without repetitions, and their fingerprints."""
    found = prints(packed)
    if len(set(found)) == len(found):
        return packed, found
    by_print = dict(zip(reversed(found), reversed(unpack(packed)), strict=True))
    found = list(dict.fromkeys(found))
    return b"".join(by_print[each] for each in found), found


def place(held: bytes, packed: bytes, i: int) -> int | None:
    """Where in `held` the block at `i` lies, if it does."""
    key = _key(packed, i)
    at = held.find(key)
    while at % KEY_NBYTES and at > 0:
        at = held.find(key, at + 1)
    return None if at < 0 else at // KEY_NBYTES


def either_way(held: bytes, packed: bytes, i: int) -> tuple[int, int] | None:
    """Where in `held` the block at `i` and those after it lie, in the same order or backwards.

    What leaves a tier is told so: a prompt's deep end first.
    """
    start = place(held, packed, i)
    if start is None:
        return None
    back, end = 1, min(start + 1, len(packed) // KEY_NBYTES - i)
    while back < end and _key(held, start - back) == _key(packed, i + back):
        back += 1
    if back > 1:
        return start + 1 - back, start + 1
    return start, start + common(held, start, packed, i)


def _key(packed: bytes, i: int) -> bytes:
    return packed[i * KEY_NBYTES : (i + 1) * KEY_NBYTES]


def common(held: bytes, start: int, packed: bytes, i: int) -> int:
    """How many blocks from `i` on lie in `held` from `start` on, given that the first does."""
    a, b = start * KEY_NBYTES, i * KEY_NBYTES
    high = min(len(held) - a, len(packed) - b) // KEY_NBYTES
    if held[a : a + high * KEY_NBYTES] == packed[b : b + high * KEY_NBYTES]:
        return high
    low = 1  # so many are equal; fewer than `high` are
    while low < high - 1:
        middle = (low + high) // 2
        if (
            held[a + low * KEY_NBYTES : a + middle * KEY_NBYTES]
            == packed[b + low * KEY_NBYTES : b + middle * KEY_NBYTES]
        ):
            low = middle
        else:
            high = middle
    return low
