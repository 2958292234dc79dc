"""What happens, told to those who record a trace of it; a slow reader loses some, nobody waits."""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from typing import Final, Generic, TypeVar

import grpc

from kvtier import metrics
from kvtier.errors import Overloaded
from kvtier.wire.pb import node_pb2, router_pb2
from kvtier.wire.rpc import refuse

MAX_READERS: Final = 4
# What a slow reader may be behind; what comes then is dropped. A message is 16 bytes a block.
QUEUE: Final = 1024  # messages
QUEUE_NBYTES: Final = 8 << 20

M = TypeVar("M", router_pb2.RecordedRequest, node_pb2.RecordedUse)


class Recording(Generic[M]):
    """Hands messages to its readers. Costs nothing while there is none. One loop's own."""

    def __init__(self) -> None:
        self._readers: list[Reader[M]] = []

    @property
    def wanted(self) -> bool:
        """Whether anybody reads."""
        return bool(self._readers)

    def put(self, message: M) -> None:
        """Hand `message` to every reader; its `dropped` is each reader's own."""
        for reader in self._readers:
            reader.put(message)

    @contextmanager
    def reader(self) -> "Iterator[Reader[M]]":
        """A reader that has every message from now on, until the context ends.

        Raises:
            Overloaded: There are MAX_READERS already.
        """
        if len(self._readers) >= MAX_READERS:
            raise Overloaded(f"{MAX_READERS} readers record already, which is the limit")
        reader = Reader[M]()
        self._readers.append(reader)
        try:
            yield reader
        finally:
            self._readers.remove(reader)


async def recorded(
    recording: Recording[M], context: grpc.aio.ServicerContext
) -> AsyncGenerator[M, None]:
    """Answer a `Record` call: every message from now on, until its caller goes."""
    try:
        with recording.reader() as reader:
            await context.send_initial_metadata(())  # from here on nothing is missed
            while True:
                yield await reader.get()
    except Overloaded as error:
        await refuse(context, error)


class Reader(Generic[M]):
    """What one reader has not read yet, at most QUEUE messages and QUEUE_NBYTES."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[M] = asyncio.Queue(QUEUE)
        self._nbytes = 0
        self._dropped = 0

    def put(self, message: M) -> None:
        """`message` is the next, or is dropped where the reader is too slow."""
        nbytes = message.ByteSize()
        if self._queue.full() or self._nbytes + nbytes > QUEUE_NBYTES:
            self._dropped += 1
            metrics.RECORDS_DROPPED.inc()
            return
        self._nbytes += nbytes
        self._queue.put_nowait(message)

    async def get(self) -> M:
        """The next message, when there is one."""
        shared = await self._queue.get()  # among readers, and `dropped` is this one's
        self._nbytes -= shared.ByteSize()
        message = type(shared)()
        message.CopyFrom(shared)
        message.dropped = self._dropped
        return message
