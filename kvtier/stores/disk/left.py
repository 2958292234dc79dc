"""What earlier processes left in a folder: told by the first page of each record."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple

from kvtier.core.blocks import BEGINS, BlockKey
from kvtier.stores.disk.files import Folder
from kvtier.stores.disk.space import Record, Segment, Space
from kvtier.stores.disk.transfer import Transfer, at_once

_HEADERS: Final = 16  # read at once: small requests, so more of them in flight


class Left(NamedTuple):
    """The segments, the records in the order of writing, and the block before each.

    That is missing where the header of the frame is not to be used.
    """

    segments: list[Segment]
    records: list[Record]
    before: Mapping[BlockKey, BlockKey]


def left_behind(folder: Folder, space: Space, transfer: Transfer) -> Left:
    """Enter the segments that are there into `space`; what lies in them is the caller's to index.

    One page a record is read, and no payload. A segment larger than `space` may get is removed.

    Raises:
        OSError: A file cannot be opened.
    """
    segments: list[Segment] = []
    for shape in folder.shapes():
        if shape.nbytes > space.capacity:  # a name may claim any length
            folder.remove(shape)
        else:
            segments.append(space.found(folder.open(shape)))
    with ThreadPoolExecutor(_HEADERS, thread_name_prefix="disk-start") as pool:
        found = [each for part in at_once(pool, transfer.headers, segments) for each in part]
    found.sort(key=lambda each: each[0].header.sequence)
    same = {record.header.key: record.header.key for record, _ in found}  # one object a key
    same[BEGINS] = BEGINS
    before = {
        record.header.key: same.get(parent, parent)
        for record, parent in found
        if parent is not None
    }
    return Left(segments, [record for record, _ in found], before)
