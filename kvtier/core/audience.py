"""Who is meant by a holder's bit: from runs of a prompt to what each candidate has of it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, NamedTuple

from kvtier.core.shapes import bits
from kvtier.core.strips import Run
from kvtier.core.tiers import Tier

OWNED: Final = (Tier.VRAM, Tier.HOST, Tier.DISK)  # warmest first
_MAX_KNOWN: Final = 4096  # masks of which the meaning is remembered


class Warmth(NamedTuple):
    """Leading blocks of a prompt that somebody has without a gap, by the warmest tier of each."""

    vram: int = 0
    host: int = 0
    disk: int = 0
    shared: int = 0

    @property
    def blocks(self) -> int:
        """All of them."""
        return sum(self)


_COLD: Final = Warmth()


class _Group(NamedTuple):
    """Candidates with the same history so far."""

    members: int
    warmth: Warmth


class Audience:
    """The candidates of a look-up, ready for many look-ups.

    `bit_of` gives the holder's bit of a source in one of its own tiers, `shared` is that of the
    shared store; they must stay the same for as long as the audience is used.
    """

    def __init__(
        self,
        candidates: Mapping[str, Sequence[str]],
        bit_of: Callable[[str, Tier], int],
        shared: int,
    ) -> None:
        self._names = list(candidates)
        self._shared = shared
        self._members: tuple[dict[int, int], ...] = tuple({} for _ in OWNED)  # by bit
        self._known: dict[int, tuple[int, int, int]] = {}
        self._lists: dict[int, list[str]] = {}
        for number, sources in enumerate(candidates.values()):
            for source in sources:
                for tier, members in zip(OWNED, self._members, strict=True):
                    bit = bit_of(source, tier)
                    members[bit] = members.get(bit, 0) | 1 << number
        self._masks = tuple(sum(members) for members in self._members)

    def warmth(self, runs: Iterable[Run]) -> dict[str, Warmth]:
        """What each candidate has of a prompt that goes through these runs."""
        found = dict.fromkeys(self._names, _COLD)
        groups = [_Group((1 << len(self._names)) - 1, _COLD)]
        for run in runs:
            vram, host, disk = self._tiers(run.mask)
            shared = -1 if run.mask & self._shared else 0
            going: list[_Group] = []
            for members, had in groups:
                for tier, holders in enumerate((vram, host, disk, shared)):
                    having = members & holders
                    if having:
                        counts = list(had)
                        counts[tier] += run.blocks
                        going.append(_Group(having, Warmth(*counts)))
                        members ^= having
                if members and had is not _COLD:
                    found.update(dict.fromkeys(self._named(members), had))
            groups = going
            if not groups:
                break
        for members, had in groups:
            if had is not _COLD:
                found.update(dict.fromkeys(self._named(members), had))
        return found

    def _tiers(self, mask: int) -> tuple[int, int, int]:
        """The candidates that are in a holders' mask, by tier."""
        known = self._known.get(mask)
        if known is None:
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
            vram, host, disk = (
                _union(members, mask & of_tier)
                for members, of_tier in zip(self._members, self._masks, strict=True)
            )
            known = self._known[mask] = vram, host, disk
        return known

    def _named(self, members: int) -> list[str]:
        names = self._lists.get(members)
        if names is None:
            if len(self._lists) >= _MAX_KNOWN:
                self._lists.clear()
            names = [self._names[bit.bit_length() - 1] for bit in bits(members)]
            self._lists[members] = names
        return names


def _union(members: Mapping[int, int], mask: int) -> int:
    union = 0
    for bit in bits(mask):
        union |= members[bit]
    return union
