"""What engines ask of the node, for those who record a trace: keys and times, and no text."""

import time
from collections.abc import Sequence

from kvtier.core.blocks import BlockKey
from kvtier.core.policy import Use
from kvtier.wire import local
from kvtier.wire.pb import node_pb2
from kvtier.wire.recording import Recording


class Recorder(Recording[node_pb2.RecordedUse]):
    """Tells its readers of reads and writes."""

    def tell(self, keys: Sequence[BlockKey], use: Use, block_tokens: int) -> None:
        """An engine reads or writes along the path `keys`, for the request of `use`."""
        if not self.wanted:
            return
        message = node_pb2.RecordedUse(
            at_s=time.time(),
            request=use.request or 0,
            block_tokens=block_tokens,
            keys=local.pack_keys(keys),
        )
        if use.output_tokens is not None:
            message.output_tokens = use.output_tokens
        self.put(message)
