"""One engine's connection to its node daemon: synchronous, one socket, leases as contexts."""

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final, NamedTuple

from kvtier.arena import Arena
from kvtier.core.blocks import BlockKey, BlockLayout, Slot
from kvtier.core.tiers import Tier
from kvtier.errors import ArenaLost, ConfigError, RemoteProtocolError
from kvtier.wire import local
from kvtier.wire.local import Op, Value

CONNECT_S: Final = 5.0
ANSWER_S: Final = 5.0  # beyond what the request itself may wait


class TierMatch(NamedTuple):
    """Leading blocks of a prompt that the node holds, and how many of them in each tier."""

    blocks: int
    by_tier: dict[Tier, int]


@dataclass(slots=True)
class ReadLease:
    """Slots that hold blocks keys[first], keys[first + 1], ...; valid until the context ends."""

    id: int
    slots: list[Slot]
    sources: list[Tier]  # where each block was before this read


@dataclass(slots=True)
class WriteLease:
    """Slots to fill with blocks keys[i] for i in `indexes`; valid until the context ends.

    `filled` says how many of them, from the first on, are to be kept; the caller sets it once
    they are in their slots. If the context ends by an exception, none is kept.
    """

    id: int
    indexes: list[int]
    slots: list[Slot]
    filled: int = 0


class TierClient:
    """A node's tiers for one engine. Not thread-safe: one thread, one client.

    Raises:
        ConfigError: Nobody listens at the socket path, or the daemon refuses this engine.
        ArenaLost: (any method) The daemon is gone or gave no answer; the client is of no more
            use, and no lease of it exists any more.
        RemoteProtocolError: (any method) The daemon refused a request; likewise the end.
    """

    def __init__(self, path: str, layout: BlockLayout, name: str = "") -> None:
        self.layout = layout
        self._decoder = local.Decoder()
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.settimeout(CONNECT_S)
            self._socket.connect(path)
            self._hello(name or f"pid {os.getpid()}")
        except OSError as error:
            self._socket.close()
            raise ConfigError(f"no node daemon at {path}: {error.strerror or error}") from None
        except BaseException:
            self._socket.close()
            raise

    def _hello(self, name: str) -> None:
        request = local.encode(Op.HELLO, local.VERSION, self.layout.describe(), name)
        self._socket.sendall(request)
        # A first layout makes the daemon take its memory and scan its disk: this can last.
        self._socket.settimeout(120.0)
        data, fds, _, _ = socket.recv_fds(self._socket, 65536, 1)
        try:
            messages = self._decoder.feed(data)
            while not messages:
                more = self._socket.recv(65536)
                if not more:
                    raise ConfigError("the node daemon hung up without a word")
                messages = self._decoder.feed(more)
            ok, *values = messages[0]
            if not ok:
                raise ConfigError(f"the node daemon refuses this engine: {values[0]!s}")
            if len(fds) != 1:
                raise RemoteProtocolError("the daemon's HELLO came without an arena")
            node, epoch, slot_nbytes, slots, tiers = values
            assert isinstance(slots, int)
            assert isinstance(tiers, list)
            if slot_nbytes != self.layout.nbytes:
                raise RemoteProtocolError(
                    f"the daemon's slots have {slot_nbytes!s} bytes, "
                    f"our blocks {self.layout.nbytes}"
                )
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        self.node, self.epoch = str(node), epoch
        self.tiers = [Tier(tier) for tier in tiers]
        self.arena = Arena.attach(fds[0], self.layout.nbytes, slots)

    def match(self, keys: Sequence[BlockKey]) -> TierMatch:
        """What the node knows to hold of a prompt; one round trip, no I/O, nothing changes."""
        blocks, by_tier = self._ask(ANSWER_S, Op.MATCH, local.pack_keys(keys))
        if not isinstance(blocks, int) or not isinstance(by_tier, list):
            raise self._broken("MATCH")
        return TierMatch(blocks, dict(zip(self.tiers, by_tier, strict=True)))

    @contextmanager
    def read(
        self, keys: Sequence[BlockKey], first: int = 0, *, wait_s: float = 2.0
    ) -> Iterator[ReadLease]:
        """Lease the held blocks of keys[first:]; `keys` is the whole path from the root.

        Waits up to `wait_s` for what lies in lower tiers and then gives what has come.
        """
        packed = local.pack_keys(keys)
        answer = self._ask(wait_s + ANSWER_S, Op.READ, packed, first, int(wait_s * 1000))
        lease, slots, sources = answer
        if not (isinstance(lease, int) and isinstance(slots, bytes) and isinstance(sources, bytes)):
            raise self._broken("READ")
        try:
            yield ReadLease(lease, self._slots(slots), [self.tiers[each] for each in sources])
        finally:
            # Where the daemon is lost, so is the lease; the caller hears of it at the next call.
            with suppress(ArenaLost):
                self._tell(ANSWER_S, Op.RELEASE, lease)

    @contextmanager
    def write(self, keys: Sequence[BlockKey], first: int = 0) -> Iterator[WriteLease]:
        """Lease slots for the absent ones of keys[first:]; may grant fewer, never waits.

        What `filled` counts at the end of the context is kept from then on.
        """
        lease, indexes, slots = self._ask(ANSWER_S, Op.WRITE, local.pack_keys(keys), first)
        if not (isinstance(lease, int) and isinstance(indexes, bytes) and isinstance(slots, bytes)):
            raise self._broken("WRITE")
        granted = WriteLease(lease, local.unpack_numbers(indexes), self._slots(slots))
        try:
            yield granted
        except BaseException:
            with suppress(ArenaLost):
                self._tell(ANSWER_S, Op.RELEASE, lease)
            raise
        self._ask(ANSWER_S, Op.COMMIT, lease, granted.filled)

    @property
    def alive(self) -> bool:
        """Whether the daemon has not hung up; asks the kernel, not the daemon."""
        try:
            self._socket.settimeout(0)
            return self._socket.recv(1, socket.MSG_PEEK) != b""
        except BlockingIOError:
            return True
        except OSError:
            return False

    def close(self) -> None:
        """Hang up; the daemon ends every lease. Idempotent."""
        self._socket.close()
        self.arena.close()

    def _slots(self, raw: bytes) -> list[Slot]:
        return [Slot(each) for each in local.unpack_numbers(raw)]

    def _tell(self, timeout_s: float, op: Op, *arguments: Value) -> None:
        """A request without an answer, or the first half of one with."""
        message = local.encode(op, *arguments)
        try:
            self._socket.settimeout(timeout_s)
            self._socket.sendall(message)
        except OSError as error:
            raise self._lost(f"the node daemon gives no answer to {op.name}: {error}") from None

    def _ask(self, timeout_s: float, op: Op, *arguments: Value) -> list[Value]:
        """One request and its answer."""
        self._tell(timeout_s, op, *arguments)
        try:
            while True:
                data = self._socket.recv(1 << 18)
                if not data:
                    raise self._lost("the node daemon hung up")
                messages = self._decoder.feed(data)
                if messages:
                    break
        except OSError as error:  # a time-out is one as well
            raise self._lost(f"the node daemon gives no answer to {op.name}: {error}") from None
        ok, *values = messages[0]
        if not ok:
            self.close()
            raise RemoteProtocolError(f"the node daemon refused {op.name}: {values[0]!s}")
        return values

    def _lost(self, text: str) -> ArenaLost:
        self.close()
        return ArenaLost(text)

    def _broken(self, what: str) -> RemoteProtocolError:
        self.close()
        return RemoteProtocolError(f"the node daemon's answer to {what} makes no sense")
