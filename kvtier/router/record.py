"""Requests as they end, for those who record a trace: lengths and keys, and no text."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kvtier.router.placement import Prompt
from kvtier.wire.pb import router_pb2, worker_pb2
from kvtier.wire.recording import Recording


class Recorder(Recording[router_pb2.RecordedRequest]):
    """Tells its readers of requests."""

    def tell(
        self, prompt: Prompt, by: worker_pb2.WorkerInfo, root: bytes, at_s: float,
        output_tokens: int,
    ) -> None:  # fmt: skip
        """A request has ended that came at `at_s`, seconds since the epoch.

        `root` is that of the prompt's keys at `by`.
        """
        if not self.wanted:
            return
        message = router_pb2.RecordedRequest(
            at_s=at_s,
            input_tokens=len(prompt.ids),
            output_tokens=output_tokens,
            block_tokens=by.block_tokens,
            keys=prompt.keys(by, root),
        )
        self.put(message)

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
