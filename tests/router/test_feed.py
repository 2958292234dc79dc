from hashlib import sha256
from itertools import pairwise

import pytest

from kvtier.core.blocks import BEGINS, BlockKey
from kvtier.core.directory import Directory
from kvtier.core.tiers import Tier
from kvtier.errors import RemoteProtocolError
from kvtier.router import feed
from kvtier.router.feed import FeedGap, FeedReader
from kvtier.wire.feed import MAX_BEHIND, FeedServicer
from kvtier.wire.pb import feed_pb2
from kvtier.wire.rpc import KEYS_PER_MESSAGE
from tests.router.stub_engine import tier_keys

KEYS = [BlockKey(bytes([i + 1]) * 16) for i in range(8)]
BEFORE = dict(zip(KEYS, [BEGINS, *KEYS], strict=False))
DAEMON = (Tier.HOST, Tier.DISK, Tier.SHARED)


def snapshot(seq=5, epoch=1, last=True, **held):
    body = feed_pb2.Snapshot(held=named(held), last=last)
    return feed_pb2.FeedMessage(epoch=epoch, seq=seq, snapshot=body)


def delta(seq, epoch=1, added=None, removed=None):
    body = feed_pb2.Delta(added=named(added or {}), removed=named(removed or {}))
    return feed_pb2.FeedMessage(epoch=epoch, seq=seq, delta=body)


def heartbeat(seq, epoch=1, draining=False):
    body = feed_pb2.Heartbeat(draining=draining)
    return feed_pb2.FeedMessage(epoch=epoch, seq=seq, heartbeat=body)


def named(held):
    return tier_keys({Tier[name.upper()]: keys for name, keys in held.items()})


@pytest.fixture
def directory():
    return Directory()


@pytest.fixture
def reader(directory):
    return FeedReader(directory, "s", DAEMON)


def take(reader, message):
    for _ in reader.take(message):
        pass
    return reader.heartbeat


def warm(directory):
    return directory.warmth(KEYS, {"n": ["s"]})["n"]


def test_a_snapshot_counts_once_it_is_whole(directory, reader):
    take(reader, snapshot(last=False, host=KEYS[:2]))
    take(reader, snapshot(last=False, disk=KEYS[2:3], shared=KEYS[4:5]))
    assert not reader.ready
    assert warm(directory).blocks == 0
    take(reader, snapshot(host=KEYS[3:4]))
    assert reader.ready
    assert warm(directory) == (0, 3, 1, 1)


def test_deltas_follow_one_by_one(directory, reader):
    take(reader, snapshot(host=KEYS[:2]))
    take(reader, delta(6, added={"disk": KEYS[2:4]}, removed={"host": KEYS[1:2]}))
    assert warm(directory).blocks == 1
    take(reader, delta(7, added={"disk": KEYS[1:2]}))
    assert warm(directory) == (0, 1, 3, 0)


def test_heartbeats_are_handed_on(reader):
    take(reader, snapshot())
    assert take(reader, heartbeat(5, draining=True)).draining
    assert take(reader, delta(6)) is None
    assert take(reader, heartbeat(6)) is not None


@pytest.mark.parametrize(
    "message",
    [
        delta(7, added={"host": KEYS}),  # 6 was lost
        delta(5, added={"host": KEYS}),  # not the next
        heartbeat(6),  # a lost delta that no other follows
        delta(6, epoch=2, added={"host": KEYS}),  # another life
        heartbeat(5, epoch=2),
    ],
)
def test_a_gap_or_another_life_is_told_and_changes_nothing(directory, reader, message):
    take(reader, snapshot(host=KEYS[:1]))
    with pytest.raises(FeedGap):
        take(reader, message)
    assert warm(directory).blocks == 1


def test_a_snapshot_of_two_moments_is_a_gap(reader):
    take(reader, snapshot(seq=5, last=False))
    with pytest.raises(FeedGap):
        take(reader, snapshot(seq=6))


def odd_keys(tier=feed_pb2.TIER_HOST, keys=b"x" * 17):
    part = feed_pb2.TierKeys(tier=tier, keys=keys)
    body = feed_pb2.Delta(added=[part])
    return feed_pb2.FeedMessage(epoch=1, seq=6, delta=body)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (odd_keys(), "17 bytes"),
        (odd_keys(keys=b"x" * 32), "2 of 2 blocks lie in no chain"),
        (odd_keys(tier=0, keys=b""), "tier 0"),
        (odd_keys(tier=9, keys=b""), "tier 9"),
        (odd_keys(tier=feed_pb2.TIER_VRAM, keys=b""), "tier 1"),  # a daemon has no VRAM
        (feed_pb2.FeedMessage(epoch=1, seq=6), "body"),
        (snapshot(), "second snapshot"),
    ],
)
def test_messages_that_break_the_protocol_are_refused(directory, reader, message, words):
    take(reader, snapshot(host=KEYS[:1]))
    with pytest.raises(RemoteProtocolError, match=words):
        take(reader, message)
    assert warm(directory).blocks == 1


@pytest.mark.parametrize("message", [delta(6), heartbeat(5)])
def test_nothing_comes_before_the_snapshot(reader, message):
    with pytest.raises(RemoteProtocolError, match="before the snapshot"):
        take(reader, message)


def test_a_source_cannot_fill_the_memory(monkeypatch, reader):
    monkeypatch.setattr(feed, "MAX_BLOCKS", 4)
    take(reader, snapshot(host=KEYS[:4]))
    take(reader, delta(6, removed={"host": KEYS[:2]}))
    take(reader, delta(7, added={"host": KEYS[:2]}))
    with pytest.raises(RemoteProtocolError, match="more than 4 blocks"):
        take(reader, delta(8, added={"host": KEYS[4:5]}))


class Calls:
    """As much of a gRPC context as `Watch` needs."""

    async def abort(self, code, details):
        raise AssertionError((code, details))


async def watched(source, epoch, after, count):
    """The first `count` messages of a stream that goes on from there."""
    stream = source.Watch(feed_pb2.WatchRequest(epoch=epoch, after=after), Calls())
    return [await anext(stream) for _ in range(count)], stream


async def test_a_gap_is_filled_by_the_deltas_that_were_missed(directory):
    held = {Tier.HOST: KEYS[:1]}
    source = FeedServicer(lambda: held, feed_pb2.Heartbeat, BEFORE.get)
    first, stream = await watched(source, 0, 0, 3)
    assert [each.WhichOneof("body") for each in first] == ["snapshot", "snapshot", "heartbeat"]
    await stream.aclose()
    reader = FeedReader(directory, "s", DAEMON)
    for message in first:
        take(reader, message)
    for key in KEYS[1:4]:
        source.changed([(Tier.HOST, key, True)])
        source.flush()
    epoch, after = directory.position("s")
    replay, stream = await watched(source, epoch, after, 4)
    await stream.aclose()
    assert [each.WhichOneof("body") for each in replay] == ["delta"] * 3 + ["heartbeat"]
    again = FeedReader(directory, "s", DAEMON)
    for message in replay:
        take(again, message)
    assert again.ready
    assert warm(directory).host == 4


@pytest.mark.parametrize("why", ["another life", "too long ago", "from the future"])
async def test_where_the_deltas_are_gone_a_snapshot_comes(why):
    source = FeedServicer(lambda: {Tier.HOST: KEYS}, feed_pb2.Heartbeat, BEFORE.get)
    for n in range(MAX_BEHIND + 2):
        source.changed([(Tier.HOST, KEYS[0], bool(n % 2))])
        source.flush()
    epoch, after = {
        "another life": (source.epoch ^ 1, MAX_BEHIND),
        "too long ago": (source.epoch, 1),
        "from the future": (source.epoch, MAX_BEHIND + 3),
    }[why]
    (first,), stream = await watched(source, epoch, after, 1)
    await stream.aclose()
    assert first.WhichOneof("body") == "snapshot"


def test_a_stream_that_goes_on_from_elsewhere_is_a_gap(directory, reader):
    take(reader, snapshot(host=KEYS[:2]))
    for message in (delta(8), heartbeat(6)):
        with pytest.raises(FeedGap) as caught:
            take(FeedReader(directory, "s", DAEMON), message)
        assert caught.value.replay
    with pytest.raises(RemoteProtocolError, match="before the snapshot"):
        take(FeedReader(directory, "s", DAEMON), delta(6, epoch=2))


async def test_who_changes_much_at_once_tells_it_in_several_messages(directory, reader):
    source = FeedServicer(dict, feed_pb2.Heartbeat, lambda key: BEFORE.get(key, BEGINS))
    (first, _), stream = await watched(source, 0, 0, 2)
    take(reader, first)
    many = [
        BlockKey(sha256(n.to_bytes(4, "big")).digest()[:16]) for n in range(1, 2 * KEYS_PER_MESSAGE)
    ]
    source.changed((Tier.HOST, key, True) for key in [*KEYS[:2], *many])
    source.changed([(Tier.HOST, many[-1], False)])
    source.flush()  # the rest follows by itself
    sizes = []
    while len(sizes) < 3:
        message = await anext(stream)
        take(reader, message)
        if message.WhichOneof("body") == "delta":
            sizes.append(sum(len(part.keys) for part in message.delta.added) // 16)
    await stream.aclose()
    assert max(sizes) <= KEYS_PER_MESSAGE
    assert sum(sizes) == directory.counts("s")[Tier.HOST] == len(many) + 1


async def test_a_source_names_the_block_before(directory):
    source = FeedServicer(lambda: {Tier.HOST: KEYS[:3]}, feed_pb2.Heartbeat, BEFORE.get)
    (snapshot, _, _), stream = await watched(source, 0, 0, 3)
    (held,) = snapshot.snapshot.held
    assert (list(held.starts), held.parents) == ([0], bytes(16))
    source.changed([(Tier.HOST, KEYS[4], True), (Tier.HOST, KEYS[3], True)])
    source.flush()
    (added,) = (await anext(stream)).delta.added
    await stream.aclose()
    assert added.keys == KEYS[3] + KEYS[4]
    assert (list(added.starts), added.parents) == ([0], KEYS[2])


async def test_a_snapshot_tells_prompts_one_after_the_other(directory, reader):
    """As a disk has them that were saved in turn; told so, a router takes them in as runs."""
    prompts = [
        [BlockKey(sha256(f"{prompt} {n}".encode()).digest()[:16]) for n in range(50)]
        for prompt in range(4)
    ]
    before = {key: last for prompt in prompts for last, key in pairwise([BEGINS, *prompt])}
    held = [key for level in zip(*prompts, strict=True) for key in level]
    source = FeedServicer(lambda: {Tier.DISK: held}, feed_pb2.Heartbeat, before.get)
    (first, last), stream = await watched(source, 0, 0, 2)
    await stream.aclose()
    (part,) = first.snapshot.held
    assert (list(part.starts), part.parents) == ([0, 50, 100, 150], bytes(64))
    assert part.keys == b"".join(key for prompt in prompts for key in prompt)
    for message in (first, last):
        take(reader, message)
    assert directory.counts("s")[Tier.DISK] == 200


def test_half_a_snapshot_of_a_stream_that_broke_leaves_nothing(directory, reader):
    take(reader, snapshot(last=False, host=KEYS))
    reader.close()
    while directory.tidy():
        pass
    assert directory.blocks == 0
    assert directory.position("s") is None
