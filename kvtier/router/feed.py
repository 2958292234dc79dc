"""One stream of a source's feed, checked and told to the directory."""

from collections.abc import Iterable
from typing import Final

from kvtier.core.blocks import KEY_NBYTES, BlockKey
from kvtier.core.directory import Directory
from kvtier.core.tiers import Tier
from kvtier.errors import RemoteProtocolError
from kvtier.wire.feed import TO_WIRE
from kvtier.wire.pb import feed_pb2

MAX_BLOCKS: Final = 1 << 23  # that one source may say it holds; 128 MiB of keys

_TIERS: Final[dict[int, Tier]] = {int(wire): tier for tier, wire in TO_WIRE.items()}


class FeedGap(RemoteProtocolError):
    """A message was missed, or the source began another life: watch it anew.

    `replay` says whether what is known holds as far as it goes, so that the rest is enough.
    """

    def __init__(self, why: str, *, replay: bool = False) -> None:
        super().__init__(why)
        self.replay = replay


class FeedReader:
    """Follows one stream: snapshot pieces until `last`, then deltas and heartbeats.

    A stream gets a reader of its own, so that nothing of an old stream can be taken for the new.
    A stream that was asked for from `position` on may begin with the deltas after it instead.
    `tiers` are those that this kind of source may speak of.
    """

    def __init__(self, directory: Directory, source: str, tiers: Iterable[Tier]) -> None:
        self.epoch = 0
        self.ready = False  # the snapshot is whole and in the directory
        self._directory = directory
        self._source = source
        self._tiers = frozenset(tiers)
        self._seq = 0
        self._blocks = 0  # in the snapshot so far, then at most held
        self._held: dict[Tier, list[BlockKey]] = {}
        self._began = False
        self.position = directory.position(source)  # epoch and seq of what is known

    def take(self, message: feed_pb2.FeedMessage) -> feed_pb2.Heartbeat | None:
        """Apply one message; returns it if it is a heartbeat.

        Raises:
            FeedGap: The stream jumped in `seq` or changed its `epoch`.
            RemoteProtocolError: The message breaks the protocol; nothing of it was applied.
        """
        if not self._began:
            self._began, self.epoch, self._seq = True, message.epoch, message.seq
            if message.WhichOneof("body") != "snapshot":
                self._resume()
        if message.epoch != self.epoch:
            raise FeedGap(f"epoch {message.epoch} after {self.epoch}")
        body = message.WhichOneof("body")
        if body == "snapshot":
            self._snapshot(message)
        elif not self.ready:
            raise RemoteProtocolError(f"feed: {body} before the snapshot was whole")
        elif body == "delta":
            self._delta(message)
        elif body == "heartbeat":
            self._expect(message.seq, self._seq)
            return message.heartbeat
        else:
            raise RemoteProtocolError("feed: a message without a body")
        return None

    def _resume(self) -> None:
        if self.position is not None and self.position[0] == self.epoch:
            self._seq, self.ready = self.position[1], True
            self._blocks = sum(self._directory.counts(self._source).values())

    def _snapshot(self, message: feed_pb2.FeedMessage) -> None:
        if self.ready:
            raise RemoteProtocolError("feed: a second snapshot in one stream")
        self._expect(message.seq, self._seq)
        for tier, keys in self._parse(message.snapshot.held):
            self._count(len(keys))
            self._held.setdefault(tier, []).extend(keys)
        if message.snapshot.last:
            self._directory.snapshot(self._source, self.epoch, self._seq, self._held.items())
            self._held = {}
            self.ready = True

    def _delta(self, message: feed_pb2.FeedMessage) -> None:
        self._expect(message.seq, self._seq + 1)
        added, removed = self._parse(message.delta.added), self._parse(message.delta.removed)
        self._count(sum(len(keys) for _, keys in added))
        applied = self._directory.apply(self._source, self.epoch, message.seq, added, removed)
        assert applied, f"{self._source}: the directory knows of another stream"
        self._blocks -= min(self._blocks, sum(len(keys) for _, keys in removed))
        self._seq = message.seq

    def _expect(self, seq: int, expected: int) -> None:
        if seq != expected:
            raise FeedGap(f"message {seq} where {expected} was next", replay=self.ready)

    def _count(self, blocks: int) -> None:
        self._blocks += blocks
        if self._blocks > MAX_BLOCKS:
            raise RemoteProtocolError(f"feed: more than {MAX_BLOCKS} blocks held")

    def _parse(self, parts: Iterable[feed_pb2.TierKeys]) -> list[tuple[Tier, list[BlockKey]]]:
        return [(self._tier(part.tier), _keys(part.keys)) for part in parts]

    def _tier(self, wire: int) -> Tier:
        tier = _TIERS.get(wire)
        if tier is None or tier not in self._tiers:
            raise RemoteProtocolError(f"feed: tier {wire} is none of this source's")
        return tier


def _keys(packed: bytes) -> list[BlockKey]:
    if len(packed) % KEY_NBYTES:
        raise RemoteProtocolError(
            f"feed: {len(packed)} bytes of keys, must be a multiple of {KEY_NBYTES}"
        )
    starts = range(0, len(packed), KEY_NBYTES)
    return [BlockKey(packed[start : start + KEY_NBYTES]) for start in starts]
