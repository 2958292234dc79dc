"""Whether a block's bytes are the ones that an exact computation gives."""

from enum import IntFlag


class Fidelity(IntFlag):
    """What has happened to a block's bytes; 0 is nothing. Goes along with the block."""

    EXACT = 0
    CODED = 1  # they went through a lossy codec
    DERIVED = 2  # they were computed on a prefix that is not exact
