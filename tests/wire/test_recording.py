"""What a reader of a trace may be behind is bounded, in messages and in bytes."""

from kvtier.wire.pb import node_pb2
from kvtier.wire.recording import QUEUE, QUEUE_NBYTES, Recording


async def test_a_slow_reader_is_behind_by_a_bounded_number_of_messages() -> None:
    recording = Recording[node_pb2.RecordedUse]()
    with recording.reader() as reader:
        for request in range(QUEUE + 3):
            recording.put(node_pb2.RecordedUse(request=request))
        got = [await reader.get() for _ in range(QUEUE)]
        assert [each.request for each in got] == [*range(QUEUE)]
        assert {each.dropped for each in got} == {3}
        recording.put(node_pb2.RecordedUse(request=7))
        assert (await reader.get()).request == 7


async def test_a_slow_reader_is_behind_by_a_bounded_number_of_bytes() -> None:
    recording = Recording[node_pb2.RecordedUse]()
    long = node_pb2.RecordedUse(keys=bytes(1 << 20))
    most = QUEUE_NBYTES // long.ByteSize()
    with recording.reader() as slow, recording.reader() as quick:
        for _ in range(most + 5):
            recording.put(long)
            assert (await quick.get()).dropped == 0, "each reader has a bound of its own"
        assert {(await slow.get()).dropped for _ in range(most)} == {5}
        for _ in range(2 * most):  # what was read takes no room any more
            recording.put(long)
            assert (await slow.get()).keys == long.keys
