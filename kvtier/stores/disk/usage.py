"""What a disk store holds and what it cost the disk."""

from typing import NamedTuple


class Usage(NamedTuple):
    """What a store holds, and has written since it was opened; bytes but for `blocks`."""

    blocks: int
    frames: int  # of all frames held
    files: int  # of all segments, free slots too
    capacity: int
    accepted: int = 0  # of frames that were written
    written: int = 0  # to the disk for them: headers, padding, erasures and moved records too
    moved: int = 0  # of `written`: records that made room

    @property
    def write_amplification(self) -> float:
        """Bytes written to the disk for each byte of a frame."""
        return self.written / self.accepted if self.accepted else 1.0
