"""Requests as they end, for those who record a trace: lengths and keys, and no text."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Final

from kvtier import metrics
from kvtier.errors import Overloaded
from kvtier.router.placement import Prompt
from kvtier.wire.pb import router_pb2, worker_pb2

MAX_READERS: Final = 4
QUEUE: Final = 1024  # requests that a slow reader may be behind; what comes then is dropped


class Recorder:
    """Tells its readers of requests. Costs nothing while there is no reader. One loop's own."""

    def __init__(self) -> None:
        self._readers: list[_Reader] = []

    def tell(
        self, prompt: Prompt, by: worker_pb2.WorkerInfo, root: bytes, at_s: float,
        output_tokens: int,
    ) -> None:  # fmt: skip
        """A request has ended that came at `at_s`, seconds since the epoch.

        `root` is that of the prompt's keys at `by`.
        """
        if not self._readers:
            return
        message = router_pb2.RecordedRequest(
            at_s=at_s,
            input_tokens=len(prompt.ids),
            output_tokens=output_tokens,
            block_tokens=by.block_tokens,
            keys=prompt.keys(by, root),
        )
        for reader in self._readers:
            reader.put(message)

    @contextmanager
    def recorded(
        self, prompt: Prompt, by: worker_pb2.WorkerInfo | None, root: bytes
    ) -> Iterator[Callable[[int], None]]:
        """Tell of a request that comes now and ends with this context, however it ends.

        What is given is to be called with the number of every few tokens that were generated.
        """
        at_s, output_tokens = time.time(), 0

        def seen(tokens: int) -> None:
            nonlocal output_tokens
            output_tokens += tokens

        try:
            yield seen
        finally:
            if by is not None:
                self.tell(prompt, by, root, at_s, output_tokens)

    async def requests(self) -> AsyncIterator[router_pb2.RecordedRequest]:
        """Every request from now on, until the caller stops reading.

        Raises:
            Overloaded: There are MAX_READERS already.
        """
        if len(self._readers) >= MAX_READERS:
            raise Overloaded(f"{MAX_READERS} readers record already, which is the limit")
        reader = _Reader()
        self._readers.append(reader)
        try:
            while True:
                yield await reader.get()
        finally:
            self._readers.remove(reader)


class _Reader:
    def __init__(self) -> None:
        self._queue: asyncio.Queue[router_pb2.RecordedRequest] = asyncio.Queue(QUEUE)
        self._dropped = 0

    def put(self, message: router_pb2.RecordedRequest) -> None:
        try:
            self._queue.put_nowait(message)
        except asyncio.QueueFull:
            self._dropped += 1
            metrics.RECORDS_DROPPED.inc()

    async def get(self) -> router_pb2.RecordedRequest:
        message = router_pb2.RecordedRequest()
        message.CopyFrom(await self._queue.get())  # readers share it, and `dropped` is this one's
        message.dropped = self._dropped
        return message
