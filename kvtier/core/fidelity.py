"""Whether a block's bytes are the ones that an exact computation gives."""

from collections.abc import Iterable, Sequence
from enum import IntFlag
from typing import Final

from kvtier.core.blocks import BlockKey

MOST_INEXACT: Final = 1 << 18  # keys that are remembered


class Fidelity(IntFlag):
    """What has happened to a block's bytes; 0 is nothing. Goes along with the block."""

    EXACT = 0
    CODED = 1  # they went through a lossy codec
    DERIVED = 2  # they were computed on a prefix that is not exact


class Lineage:
    """Which blocks of a node's host tier are not exact, and what may have been computed on them.

    A path's keys name all blocks that a new one was computed on, so engines need not say what
    they restored: as soon as one key of a path has ever been inexact here, what is written behind
    it counts as derived. That may mark an exact block, never the reverse, as long as this object
    lives. Beyond MOST_INEXACT such keys every block that is written counts as derived.

    `loaded` and `of` may be called from any thread, for blocks that are being moved.
    """

    def __init__(self) -> None:
        self._here: dict[BlockKey, Fidelity] = {}  # of blocks in the host tier that are not exact
        self._ever: set[BlockKey] = set()

    def __len__(self) -> int:
        """Blocks of the host tier that are not exact."""
        return len(self._here)

    def of(self, key: BlockKey) -> Fidelity:
        """What the host tier's copy is."""
        return self._here.get(key, Fidelity.EXACT)

    def loaded(self, key: BlockKey, fidelity: Fidelity) -> None:
        """The host tier's copy comes from such a frame."""
        self._set(key, fidelity)

    def written(self, path: Sequence[BlockKey], new: Iterable[BlockKey]) -> None:
        """An engine has computed `new`, each on what comes before it in `path`, its whole path.

        They are in the host tier now: what is never to leave it again would be remembered for ever.
        """
        if not self._ever:  # the common case, on every engine's path
            return
        full = len(self._ever) >= MOST_INEXACT
        first = next((i for i, key in enumerate(path) if key in self._ever), len(path))
        exact = set() if full else set(path[: first + 1])
        for key in new:
            self._set(key, Fidelity.EXACT if key in exact else Fidelity.DERIVED)

    def gone(self, key: BlockKey) -> None:
        """The host tier has dropped its copy; that it was inexact is still known."""
        self._here.pop(key, None)

    def _set(self, key: BlockKey, fidelity: Fidelity) -> None:
        if not fidelity:
            self._here.pop(key, None)
            return
        self._here[key] = fidelity
        if len(self._ever) < MOST_INEXACT:
            self._ever.add(key)
