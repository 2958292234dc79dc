"""One stream of a source's feed, checked and told to the directory."""

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Final

from kvtier.core.blocks import KEY_NBYTES
from kvtier.core.directory import Directory, Filling, Steps, Told
from kvtier.core.tiers import Tier
from kvtier.errors import RemoteProtocolError
from kvtier.wire.chains import hear
from kvtier.wire.pb import feed_pb2

MAX_BLOCKS: Final = 1 << 23  # that one source may say it holds; 128 MiB of keys


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
        self.heartbeat: feed_pb2.Heartbeat | None = None  # what the last message was, if one
        self._directory = directory
        self._source = source
        self._tiers = frozenset(tiers)
        self._seq = 0
        self._blocks = 0  # in the snapshot so far, then at most held
        self._filling: Filling | None = None
        self._began = False
        self.position = directory.position(source)  # epoch and seq of what is known

    def take(self, message: feed_pb2.FeedMessage) -> Steps:
        """Apply one message, in short steps: what is wrong with it is said before the first.

        Raises:
            FeedGap: The stream jumped in `seq` or changed its `epoch`.
            RemoteProtocolError: The message breaks the protocol; nothing of it was applied.
        """
        self.heartbeat = None
        if not self._began:
            self._began, self.epoch, self._seq = True, message.epoch, message.seq
            if message.WhichOneof("body") != "snapshot":
                self._resume()
        if message.epoch != self.epoch:
            raise FeedGap(f"epoch {message.epoch} after {self.epoch}")
        body = message.WhichOneof("body")
        if body == "snapshot":
            return self._snapshot(message)
        if not self.ready:
            raise RemoteProtocolError(f"feed: {body} before the snapshot was whole")
        if body == "delta":
            return self._delta(message)
        if body != "heartbeat":
            raise RemoteProtocolError("feed: a message without a body")
        self._expect(message.seq, self._seq)
        self.heartbeat = message.heartbeat
        return iter(())

    def close(self) -> None:
        """The stream has ended: half a snapshot counts for nothing."""
        if self._filling is not None:
            self._directory.abandon(self._filling)

    def _resume(self) -> None:
        if self.position is not None and self.position[0] == self.epoch:
            self._seq, self.ready = self.position[1], True
            self._blocks = sum(self._directory.counts(self._source).values())

    def _snapshot(self, message: feed_pb2.FeedMessage) -> Steps:
        if self.ready:
            raise RemoteProtocolError("feed: a second snapshot in one stream")
        self._expect(message.seq, self._seq)
        held = self._parse(message.snapshot.held)
        self._count(message.snapshot.held)
        return self._fill(held, last=message.snapshot.last)

    def _fill(self, held: Iterable[Told], *, last: bool) -> Iterator[None]:
        if self._filling is None:
            self._filling = self._directory.begin(self._source, self.epoch, self._seq)
        yield from self._directory.fill(self._filling, held)
        if last:
            self._directory.finish(self._filling)
            self.ready = True

    def _delta(self, message: feed_pb2.FeedMessage) -> Steps:
        self._expect(message.seq, self._seq + 1)
        added = self._parse(message.delta.added)
        removed = self._parse(message.delta.removed, gone=True)
        self._count(message.delta.added)
        steps = self._directory.delta(self._source, self.epoch, message.seq, added, removed)
        assert steps is not None, f"{self._source}: the directory knows of another stream"
        self._blocks -= min(self._blocks, _blocks(message.delta.removed))
        self._seq = message.seq
        return steps

    def _expect(self, seq: int, expected: int) -> None:
        if seq != expected:
            raise FeedGap(f"message {seq} where {expected} was next", replay=self.ready)

    def _count(self, parts: Iterable[feed_pb2.TierKeys]) -> None:
        self._blocks += _blocks(parts)
        if self._blocks > MAX_BLOCKS:
            raise RemoteProtocolError(f"feed: more than {MAX_BLOCKS} blocks held")

    def _parse(self, parts: Iterable[feed_pb2.TierKeys], *, gone: bool = False) -> Iterator[Told]:
        return chain.from_iterable([hear(part, self._tiers, gone=gone) for part in parts])


def _blocks(parts: Iterable[feed_pb2.TierKeys]) -> int:
    return sum(len(part.keys) for part in parts) // KEY_NBYTES
