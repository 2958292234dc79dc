"""Frames in large segment files on a local disk.

    LOCK                                             held by the one process that uses the folder
    segments/<number>-<slot bytes>-<slots>.seg       preallocated, cut into slots of one size

A slot holds one record (record.py): a page with a header, then the frame. A segment's name says
where its slots begin, so that every record is found by itself, whatever happened to its
neighbours. A start reads one page a slot and no payload. A deleted record has its header
overwritten, and its slot takes the next one. docs/disk.md says what that promises.
"""

from kvtier.stores.disk.store import DiskStore
from kvtier.stores.disk.usage import Usage

__all__ = ["DiskStore", "Usage"]
