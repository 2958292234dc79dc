"""Slots for records that have none yet: new segments, made from idle ones if need be."""

import errno
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Final

from kvtier.stores.disk.files import Folder
from kvtier.stores.disk.space import Place, Record, Segment, Space

NO_ROOM: Final = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

log = logging.getLogger(__name__)


class Room:
    """Makes and removes the segments of `space` in `folder`.

    Args:
        folder: Where the files lie.
        space: Which slot is free.
        state: The lock over `space`; no I/O is done under it.
        move: Gives each record another slot if it can; called with records that it was made a
            reader of, and lets them go.
    """

    def __init__(
        self,
        folder: Folder,
        space: Space,
        state: threading.Condition,
        move: Callable[[Sequence[Record]], None],
    ) -> None:
        self._folder = folder
        self._space = space
        self._state = state
        self._move = move
        self._growing = threading.Lock()  # one thread at a time makes and removes segments
        self._told = False  # that the disk is full, since it last took a segment

    def full(self, error: OSError) -> None:
        """Tell people, once until it takes a segment again, that the disk has no room."""
        if not self._told:
            self._told = True
            log.warning("disk %s: %s; it takes no more for now", self._folder.path, error.strerror)

    def take(self, nbytes: int) -> Place | None:
        """A slot for a record; None: there is no room, in the store or on the disk.

        Raises:
            OSError: A segment could not be made or removed.
        """
        while True:
            with self._state:
                place = self._space.take(nbytes)
            if place is None:
                return self._grow(nbytes)
            if place.segment.file.linked():
                return place
            with self._state:  # a file that somebody removed: what is there can still be read
                place.segment.closed = True
                self._space.give(place)

    def _grow(self, nbytes: int) -> Place | None:
        with self._growing:
            for made_room in (self._as_it_is, self._remove_spare, self._clean):
                if made_room():
                    with self._state:
                        place = self._space.take(nbytes)
                    if place is not None or (place := self._add(nbytes)) is not None:
                        return place
            with self._state:
                return self._space.take(nbytes, waste=1.0)

    def _as_it_is(self) -> bool:
        return True

    def _add(self, nbytes: int) -> Place | None:
        """A slot of a new segment; of a smaller one where the disk has no more to give."""
        with self._state:
            shape = self._space.plan(nbytes)
        full: OSError | None = None
        while shape is not None:
            try:
                file = self._folder.create(shape)
            except OSError as error:
                with self._state:
                    self._space.drop(shape)
                    if error.errno not in NO_ROOM:
                        raise
                    shape = self._space.smaller(shape)
                full = error
            else:
                self._told = False
                with self._state:
                    self._space.add(file)
                    return self._space.take(nbytes)
        if full is not None:
            self.full(full)
        return None

    def _remove_spare(self) -> bool:
        with self._state:
            segment = self._space.spare()
            if segment is None:
                return False
            segment.closed = True
        self._remove(segment)
        return True

    def _remove(self, segment: Segment) -> None:
        """Give back the room of a segment that is closed and empty."""
        self._folder.remove(segment.shape)
        segment.file.close()
        with self._state:
            self._space.drop(segment.shape)

    def _clean(self) -> bool:
        """Empty the sparsest segment by moving what it holds; whether its room came back."""
        with self._state:
            victim = self._space.sparsest()
            if victim is None:
                return False
            victim.closed = True
            records = list(victim.records.values())
            for record in records:
                record.readers += 1
        self._move(records)
        with self._state:
            if victim.used:
                victim.closed = False  # somebody reads there, or a record could not be moved
                return False
        self._remove(victim)
        return True
