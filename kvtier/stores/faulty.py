"""A store that fails on purpose, to see what those above it do."""

from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum

from kvtier.codec.frame import frame_nbytes
from kvtier.core.blocks import BlockKey
from kvtier.errors import StoreUnavailable
from kvtier.stores.base import Parts, Placed, PlacingStore, ProbedStore, Store


class Fault(StrEnum):
    """What goes wrong; a fault that an operation can't have leaves it whole."""

    UNAVAILABLE = "unavailable"  # any operation: no answer
    SLOW = "slow"  # any operation: `wait` is called first
    REFUSE = "refuse"  # write: no room
    LOSE = "lose"  # read: what was kept is gone for good
    CORRUPT = "corrupt"  # read: one bit is flipped
    TORN = "torn"  # read: the end is missing


Plan = Callable[[str], Fault | None]


class FaultyStore:
    """`inner` with the faults that `plan` asks for. See `Store`.

    `plan` gets the operation's name: for `write` and `read` once a frame, in the batch's order,
    for the others once a call. A batch that is cut off by UNAVAILABLE has done what came before.

    Args:
        inner: Keeps the frames; closed with this store.
        plan: Which fault comes next, if any. Called from any thread that uses the store.
        wait: Called for SLOW; returns when the operation may go on.
        pick: One of range(n): which bit of a frame is flipped, how many of its bytes are left.
            Pass `random.Random(seed).randrange` for faults anywhere.
    """

    def __init__(
        self,
        inner: Store,
        plan: Plan,
        *,
        wait: Callable[[], None] = lambda: None,
        pick: Callable[[int], int] = lambda n: n // 2,
    ) -> None:
        self._inner = inner
        self._plan = plan
        self._wait = wait
        self._pick = pick

    def write(self, frames: Sequence[tuple[BlockKey, Parts]]) -> list[bool]:
        """See `Store.write`."""
        return [
            self._fault("write") is not Fault.REFUSE and self._inner.write([frame])[0]
            for frame in frames
        ]

    def read(self, keys: Sequence[BlockKey]) -> list[bytes | memoryview | None]:
        """See `Store.read`."""
        return [self._read(key) for key in keys]

    def read_into(
        self, keys: Sequence[BlockKey], places: Sequence[memoryview]
    ) -> list[bytes | memoryview | Placed | None]:
        """See `PlacingStore.read_into`; as `read` where `inner` is none."""
        if not isinstance(self._inner, PlacingStore):
            return [*self.read(keys)]
        return [
            self._read_into(self._inner, key, place)
            for key, place in zip(keys, places, strict=True)
        ]

    def count(self, keys: Sequence[BlockKey]) -> int:
        """See `Store.count`."""
        self._fault("count")
        return self._inner.count(keys)

    def probe(self) -> None:
        """See `ProbedStore.probe`; a question to `inner` where it is none."""
        self._fault("probe")
        if isinstance(self._inner, ProbedStore):
            self._inner.probe()
        else:
            self._inner.count([BlockKey(bytes(16))])

    def delete(self, keys: Sequence[BlockKey]) -> None:
        """See `Store.delete`."""
        self._fault("delete")
        self._inner.delete(keys)

    def scan(self) -> Iterator[tuple[BlockKey, int]]:
        """See `Store.scan`."""
        self._fault("scan")
        return self._inner.scan()

    def close(self) -> None:
        """See `Store.close`; never fails on purpose."""
        self._inner.close()

    def _read(self, key: BlockKey) -> bytes | memoryview | None:
        fault = self._fault("read")
        if fault is Fault.LOSE:
            self._inner.delete([key])
        return self._damaged(self._inner.read([key])[0], fault)

    def _read_into(
        self, inner: PlacingStore, key: BlockKey, place: memoryview
    ) -> bytes | memoryview | Placed | None:
        fault = self._fault("read")
        if fault is Fault.LOSE:
            inner.delete([key])
        frame = inner.read_into([key], [place])[0]
        if not isinstance(frame, Placed):
            return self._damaged(frame, fault)
        whole = frame.head + place.tobytes()
        damaged = self._damaged(whole, fault)
        assert damaged is not None
        start = len(frame.head)
        here = max(0, len(damaged) - start)
        place[:here] = damaged[start:]
        place[here:] = bytes(place.nbytes - here)
        return Placed(bytes(damaged[:start]))

    def _damaged(
        self, frame: bytes | memoryview | None, fault: Fault | None
    ) -> bytes | memoryview | None:
        if frame is None or fault not in (Fault.CORRUPT, Fault.TORN):
            return frame
        nbytes = frame_nbytes([frame])
        if fault is Fault.TORN:
            return bytes(frame[: self._pick(nbytes)])
        changed = bytearray(frame)
        byte, bit = divmod(self._pick(8 * nbytes), 8)
        changed[byte] ^= 1 << bit
        return bytes(changed)

    def _fault(self, operation: str) -> Fault | None:
        fault = self._plan(operation)
        if fault is Fault.UNAVAILABLE:
            raise StoreUnavailable(f"{operation}: no answer, on purpose")
        if fault is Fault.SLOW:
            self._wait()
        return fault
