"""Which slot of which segment holds what: the store's bookkeeping, without any I/O.

A segment is cut into slots of one size, made for the records that were at hand. Blocks of one
layout under the raw codec all have one size, so a deleted block's slot takes the next block as it
is: nothing is ever moved for it. Where a codec makes sizes differ, a record takes the smallest free
slot that wastes at most an eighth of itself. Only where no such slot is left while others lie idle
is a segment given up for a new one with other slots: an empty one, or one that is at most half
full, whose records move. So what is moved is at most half of what that room then takes.

Callers hold the store's lock.
"""

import heapq
from collections import deque
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from kvtier.stores.disk.files import SegmentFile, Shape
from kvtier.stores.disk.record import Header, record_nbytes

_SEGMENTS: Final = 256  # about as many files, whatever the capacity
_RECORDS: Final = 16  # in a segment, where the capacity is large enough for it
_MOST_SLOTS: Final = 2**20  # of a segment
_WASTE: Final = 0.125  # of a slot, by a record that is smaller
_RECENT: Final = 64  # record sizes remembered, to choose a slot's size


@dataclass(slots=True, eq=False)
class Segment:
    """An open segment file and what its slots hold."""

    file: SegmentFile
    free: list[int]  # heap: the lowest first, so that writes are sequential
    records: "dict[int, Record]" = field(default_factory=dict)
    bad: int = 0  # slots that failed and are not used again in this life
    closed: bool = False  # takes no more records

    @property
    def shape(self) -> Shape:
        """Number and slots."""
        return self.file.shape

    @property
    def used(self) -> int:
        """Slots that hold a record or are about to."""
        return self.shape.slots - self.bad - len(self.free)

    def last_written(self) -> int:
        """The sequence of its newest record; 0 where there is none."""
        return max((each.header.sequence for each in self.records.values()), default=0)


class Place(NamedTuple):
    """A slot that belongs to its holder until it is given back."""

    segment: Segment
    slot: int


@dataclass(slots=True, eq=False)
class Record:
    """A frame that is whole on the disk."""

    header: Header
    place: Place
    readers: int = 0
    dead: bool = False  # no longer indexed; its slot is free once the last reader is gone
    freeing: bool = False  # somebody has taken on to free the slot
    bad: bool = False  # the disk could not read it, so nothing is written there again

    def ends(self) -> bool:
        """Whether its slot is free now; said once, to the one who then frees it."""
        if not self.dead or self.readers or self.freeing:
            return False
        self.freeing = True
        return True


class Space:
    """All segments of a store; their files never hold more than `capacity` bytes together."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.nbytes = 0  # of all segment files, those being made and removed too
        self.segments: dict[int, Segment] = {}
        self._next = 1
        self._recent: deque[int] = deque(maxlen=_RECENT)

    def usable(self, frame_nbytes: int) -> int:
        """How many bytes of frames of that size fit."""
        return self.capacity // record_nbytes(frame_nbytes) * frame_nbytes

    def take(self, nbytes: int, *, waste: float = _WASTE) -> Place | None:
        """The smallest free slot for a record that wastes at most that share of itself."""
        self._recent.append(nbytes)
        fits = [
            segment
            for segment in self.segments.values()
            if segment.free and not segment.closed and self.fits(segment, nbytes, waste=waste)
        ]
        if not fits:
            return None
        best = min(fits, key=lambda each: (each.shape.slot_nbytes, each.shape.number))
        return Place(best, heapq.heappop(best.free))

    @staticmethod
    def fits(segment: Segment, nbytes: int, *, waste: float = _WASTE) -> bool:
        """Whether a record fits a slot of `segment` and wastes at most that share of it."""
        slot = segment.shape.slot_nbytes
        return nbytes <= slot and slot * (1 - waste) <= nbytes

    def give(self, place: Place, *, bad: bool = False) -> None:
        """Take a slot back; a bad one is left alone until the next start."""
        place.segment.records.pop(place.slot, None)
        if bad:
            place.segment.bad += 1
        else:
            heapq.heappush(place.segment.free, place.slot)

    def plan(self, nbytes: int) -> Shape | None:
        """A new segment for records of about that size, its bytes taken; None: no room.

        Make it and `add` it, or `drop` it.
        """
        near = (each for each in self._recent if nbytes <= each <= nbytes + nbytes // 8)
        slot = max(near, default=nbytes)
        room = self.capacity - self.nbytes
        if room < slot:
            slot = nbytes
        wanted = max(self.capacity // _SEGMENTS, min(_RECORDS * slot, self.capacity // _RECORDS))
        slots = min(max(1, wanted // slot), room // slot, _MOST_SLOTS)
        if slots < 1:
            return None
        shape = Shape(self._next, slot, slots)
        self._next += 1
        self.nbytes += shape.nbytes
        return shape

    def smaller(self, shape: Shape) -> Shape | None:
        """Half of a planned segment that was dropped, its bytes taken again; None: nothing left."""
        half = shape._replace(slots=shape.slots // 2)
        self.nbytes += half.nbytes
        return half if half.slots else None

    def add(self, file: SegmentFile) -> Segment:
        """A planned segment that is there now, all slots free."""
        segment = Segment(file, list(range(file.shape.slots)))
        self.segments[file.shape.number] = segment
        return segment

    def found(self, file: SegmentFile) -> Segment:
        """A segment of an earlier life, all slots free."""
        self.nbytes += file.shape.nbytes
        self._next = max(self._next, file.shape.number + 1)
        return self.add(file)

    def drop(self, shape: Shape) -> None:
        """A segment whose file is gone, or was never made."""
        self.segments.pop(shape.number, None)
        self.nbytes -= shape.nbytes

    def spare(self) -> Segment | None:
        """An empty segment, if there is one."""
        return next((each for each in self.segments.values() if not each.used), None)

    def sparsest(self) -> Segment | None:
        """The segment to be cleaned next: at most half full, and its records fit elsewhere."""
        by_live = sorted(self.segments.values(), key=lambda each: len(each.records))
        for victim in by_live:
            live = len(victim.records)
            at_rest = live == victim.used and not any(
                record.readers for record in victim.records.values()
            )
            if victim.closed or live * 2 > victim.shape.slots or not at_rest:
                continue
            others = sum(
                len(each.free)
                for each in self.segments.values()
                if each is not victim
                and not each.closed
                and each.shape.slot_nbytes >= victim.shape.slot_nbytes
            )
            if others >= live:
                return victim
        return None
