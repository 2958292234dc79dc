"""Who is meant by a holder's bit: from runs of a prompt to what each candidate has of it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, NamedTuple

from kvtier.core.segments import bits
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


_Group = tuple[int, list[int]]  # candidates with the same history so far, and their warmth


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
        self._members: dict[int, tuple[int, int]] = {}  # by bit: place of its tier, candidates
        self._known: dict[int, tuple[int, ...]] = {}  # by mask
        self._lists: dict[int, list[str]] = {}
        for number, sources in enumerate(candidates.values()):
            for source in sources:
                for place, tier in enumerate(OWNED):
                    bit = bit_of(source, tier)
                    _, members = self._members.get(bit, (place, 0))
                    self._members[bit] = place, members | 1 << number
        self._mask = sum(self._members)

    def warmth(self, runs: Iterable[Run]) -> dict[str, Warmth]:
        """What each candidate has of a prompt that goes through these runs."""
        ended: list[_Group] = []
        groups: list[_Group] = [((1 << len(self._names)) - 1, [0, 0, 0, 0])]
        known = self._known
        all_on: set[int] = set()  # masks with which all of the only group go on in VRAM
        had = groups[0][1]
        for blocks, mask in runs:
            if mask in all_on:
                had[0] += blocks
                continue
            by_tier = known.get(mask) or self._tiers(mask)
            if len(groups) == 1:  # mostly all of them go on, and nothing is to be parted
                members, had = groups[0]
                if members & by_tier[0] == members:
                    had[0] += blocks
                    all_on.add(mask)
                    continue
            all_on.clear()
            groups = _parted(ended, groups, blocks, by_tier)
            if not groups:
                break
        ended += groups
        # Mostly nearly all of them end at the same block: who they are need not be listed.
        most = max(range(len(ended)), key=lambda n: ended[n][0].bit_count())
        found = dict.fromkeys(self._names, Warmth(*ended.pop(most)[1]))
        for members, had in ended:
            found.update(dict.fromkeys(self._named(members), Warmth(*had)))
        return found

    def _tiers(self, mask: int) -> tuple[int, ...]:
        """The candidates that can have what the holders in a mask have, by tier."""
        if len(self._known) >= _MAX_KNOWN:
            self._known.clear()
        owned, members_of = [0] * len(OWNED), self._members
        rest = mask & self._mask
        while rest:  # not by `bits`: every first look-up comes here
            bit = rest & -rest
            rest ^= bit
            place, members = members_of[bit]
            owned[place] |= members
        known = self._known[mask] = *owned, (-1 if mask & self._shared else 0)
        return known

    def _named(self, members: int) -> list[str]:
        names = self._lists.get(members)
        if names is None:
            if len(self._lists) >= _MAX_KNOWN:
                self._lists.clear()
            names = [self._names[bit.bit_length() - 1] for bit in bits(members)]
            self._lists[members] = names
        return names


def _parted(
    ended: list[_Group], groups: Iterable[_Group], blocks: int, by_tier: tuple[int, ...]
) -> list[_Group]:
    """What becomes of the groups in a run of so many blocks; for some it ends here."""
    going: list[_Group] = []
    for members, had in groups:
        for tier, holders in enumerate(by_tier):
            having = members & holders
            if not having:
                continue
            members ^= having
            more = [*had] if members else had
            more[tier] += blocks
            going.append((having, more))
            if not members:
                break
        else:
            ended.append((members, had))
    return going
