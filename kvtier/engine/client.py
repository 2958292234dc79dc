"""One engine's connection to its node daemon: synchronous, one socket, leases as contexts."""

import os
import select
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Final, cast

from kvtier.arena import Arena
from kvtier.core.blocks import BlockKey, BlockLayout, Slot
from kvtier.core.breakeven import ComputeCost
from kvtier.core.policy import NO_USE, Use
from kvtier.core.tiers import Tier
from kvtier.engine.credit import Credit, Met
from kvtier.engine.hangup import HangUp
from kvtier.engine.leases import ReadLease, TierMatch, WriteLease
from kvtier.engine.notes import note
from kvtier.engine.seen import Seen
from kvtier.engine.telling import costs, told
from kvtier.errors import ArenaLost, ConfigError, RemoteProtocolError
from kvtier.wire import local
from kvtier.wire.local import Op, Value

CONNECT_S: Final = 5.0
ANSWER_S: Final = 5.0  # beyond what the request itself may wait
RECEIVE_NBYTES: Final = 64 << 10
_TIMEVAL = struct.Struct("@ll")


class TierClient:
    """A node's tiers for one engine. Not thread-safe: one thread, one client.

    `read` and `write` send their request when they are called, and wait for the answer when the
    context that they give begins. Between the two the daemon works while the caller does something
    else, such as copying what an earlier lease is of; the only other call that may come there is
    the end of a lease. Whatever else comes ends the connection, as does dropping such a context.

    Raises:
        ConfigError: Nobody listens at the socket path, or the daemon refuses this engine.
        ArenaLost: (any method) The daemon is gone or gave no answer; the client is of no more
            use, and no lease of it exists any more.
        RemoteProtocolError: (any method) The daemon refused a request; likewise the end.
    """

    def __init__(
        self, path: str, layout: BlockLayout, name: str = "", met: Met | None = None
    ) -> None:
        self.layout = layout
        self._decoder = local.Decoder()
        self._received = memoryview(bytearray(RECEIVE_NBYTES))
        self._timeout_s = self._wait_s = 0.0  # of the newest read, the second
        self._credit = Credit(met)
        self._unanswered = False  # a request was sent, and its answer was not read
        self._ended_by = "this end has hung up"
        self._notes = -1
        self._ended = select.poll()
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.settimeout(CONNECT_S)
            self._socket.connect(path)
            self._hello(name or f"pid {os.getpid()}")
        except BaseException as error:
            self._close_connection()
            if isinstance(error, OSError):
                raise ConfigError(f"no node daemon at {path}: {error.strerror or error}") from None
            raise

    def _hello(self, name: str) -> None:
        request = local.encode(Op.HELLO, local.VERSION, self.layout.describe(), name)
        self._socket.sendall(request)
        # A first layout makes the daemon take its memory and scan its disk: this can last.
        self._socket.settimeout(120.0)
        data, fds, _, _ = socket.recv_fds(self._socket, 65536, 2)
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
            if len(fds) != 2:
                raise RemoteProtocolError("the daemon's HELLO came without an arena and a pipe")
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
        # From here on the kernel keeps the time.
        self._socket.settimeout(None)
        self._limit(socket.SO_SNDTIMEO, ANSWER_S)
        self.node, self.epoch = str(node), cast("int", epoch)
        self.tiers = [Tier(tier) for tier in tiers]
        self._notes = fds[1]
        self.arena = Arena.attach(fds[0], self.layout.nbytes, slots)
        self._ended.register(self._socket, select.POLLRDHUP)

    def match(self, keys: Sequence[BlockKey]) -> TierMatch:
        """What the node knows to hold of a prompt; one round trip, no I/O, nothing changes."""
        match self._ask(ANSWER_S, Op.MATCH, local.pack_keys(keys)):
            case [int(blocks), list(by_tier), bytes(slots), int(turn)]:
                seen = Seen(keys, slots, turn, self.epoch)
                return TierMatch(blocks, dict(zip(self.tiers, by_tier, strict=True)), seen)
        raise self._broken("MATCH")

    def used(self, keys: Sequence[BlockKey], use: Use = NO_USE) -> None:
        """Say that blocks of the path `keys` were copied from where a match saw them.

        Wakes nobody and waits for nothing. To the node's eviction it is as a read of `keys`.
        """
        self._credit.met(keys)
        with suppress(ArenaLost):  # right they are without it, too; the next call hears of it
            self._note(Op.USED, local.pack_keys(keys), *told(use))

    def pull(
        self,
        keys: Sequence[BlockKey],
        first: int,
        node: str,
        *,
        wait_s: float = 2.0,
        compute: ComputeCost | None = None,
        use: Use = NO_USE,
    ) -> int:
        """Have the daemon load what it lacks of keys[first:] from `node`; how many blocks came.

        They are in the host tier then. The daemon asks only nodes of its own settings, and gives up
        after `wait_s`; arguments as of `read`.
        """
        (blocks,) = self._ask(
            wait_s + ANSWER_S, Op.PULL, local.pack_keys(keys), node, first, int(wait_s * 1000),
            *costs(compute), *told(use),
        )  # fmt: skip
        if not isinstance(blocks, int):
            raise self._broken("PULL")
        return blocks

    def read(
        self,
        keys: Sequence[BlockKey],
        first: int = 0,
        *,
        wait_s: float = 2.0,
        wanted: int | None = None,
        compute: ComputeCost | None = None,
        use: Use = NO_USE,
    ) -> AbstractContextManager[ReadLease]:
        """Ask for a lease of the held blocks of keys[first:]; `keys` is the path from the root.

        What lies in lower tiers has `wait_s` to arrive and is cut off then. The lease is given
        once the first `wanted` blocks have arrived, or all that will: None asks for all. With
        `compute` nothing is loaded that is faster computed again. `use` names the request, so that
        reads and writes of one prompt count as one use of it; the time in it is not sent.
        """
        self._wait_s = wait_s
        self._send(
            Op.READ, local.pack_keys(keys), first, len(keys) if wanted is None else wanted,
            int(wait_s * 1000), *costs(compute), *told(use),
        )  # fmt: skip
        return self._reading(wait_s + ANSWER_S, keys[first:])

    @contextmanager
    def _reading(self, timeout_s: float, keys: Sequence[BlockKey]) -> Iterator[ReadLease]:
        match self._answer(timeout_s, Op.READ):
            case [int(lease), bytes(slots), bytes(sources), int(arrived)]:
                tiers = [self.tiers[each] for each in sources]
            case _:
                raise self._broken("READ")
        self._credit.met(keys[: len(tiers)])
        try:
            yield ReadLease(lease, self._slots(slots), tiers, arrived)
        finally:
            # Where the daemon is lost, so is the lease; the caller hears of it at the next call.
            with suppress(ArenaLost):
                self._note(Op.RELEASE, lease)

    def more(self, lease: ReadLease, step: int = 1) -> None:
        """Wait until `step` more of a lease's blocks have arrived, or all that will.

        Those that will not are cut off. Do not call it once `lease.arrived` is the number of slots.
        """
        have = min(lease.arrived + step, len(lease.slots)) - 1
        arrived, blocks = self._ask(self._wait_s + ANSWER_S, Op.AWAIT, lease.id, have)
        if not (isinstance(arrived, int) and isinstance(blocks, int)):
            raise self._broken("AWAIT")
        if not lease.arrived <= arrived <= blocks <= len(lease.slots):
            raise self._broken("AWAIT")
        if arrived == lease.arrived and arrived < blocks:
            raise self._broken("AWAIT")  # or we would ask for ever
        lease.arrived = arrived
        del lease.slots[blocks:], lease.sources[blocks:]

    def write(
        self, keys: Sequence[BlockKey], first: int = 0, use: Use = NO_USE
    ) -> AbstractContextManager[WriteLease]:
        """Ask for slots for the absent ones of keys[first:]; may grant fewer, never waits.

        What `filled` counts at the end of the context is kept from then on. That is told and
        not asked: should the daemon be gone by then, the next call says so. `use` as for `read`;
        without a request the blocks came by themselves, and are not used by that.

        Where this engine has as many slots on credit (`ask_credit`), and has not met keys[first],
        nothing is asked: they are granted here, for all of keys[first:]. Blocks that other
        engines have saved are copied for nothing then.
        """
        if first < len(keys) and not self._unanswered:
            self._hear()
            if slots := self._credit.first(keys[first:]):
                return self._putting(keys, first, slots, use)
        self._send(Op.WRITE, local.pack_keys(keys), first, *told(use))
        return self._writing(keys[first:])

    def ask_credit(self, slots: int) -> None:
        """See to it that this engine has `slots` slots for `write` to grant without asking.

        Wakes nobody and waits for nothing: they are there for some later call, or not at all.
        To be called while a lease is open.
        """
        if missing := self._credit.wanted(slots):
            self._note(Op.CREDIT, missing)

    @contextmanager
    def _putting(
        self, keys: Sequence[BlockKey], first: int, slots: list[Slot], use: Use
    ) -> Iterator[WriteLease]:
        self._credit.fill(slots)
        granted = WriteLease(0, [*range(first, len(keys))], slots)
        try:
            yield granted
        except BaseException:
            self._credit.put(slots, 0)
            raise
        self._credit.put(slots, granted.filled)
        self._credit.met(keys[first : first + granted.filled])
        if granted.filled:
            path, filled = keys[: first + granted.filled], slots[: granted.filled]
            self._note(Op.PUT, local.pack_keys(path), local.pack_numbers(filled), *told(use))

    @contextmanager
    def _writing(self, keys: Sequence[BlockKey]) -> Iterator[WriteLease]:
        lease, indexes, slots = self._answer(ANSWER_S, Op.WRITE)
        if not (isinstance(lease, int) and isinstance(indexes, bytes) and isinstance(slots, bytes)):
            raise self._broken("WRITE")
        granted = WriteLease(lease, local.unpack_numbers(indexes), self._slots(slots))
        try:
            yield granted
        except BaseException:
            with suppress(ArenaLost):
                self._note(Op.RELEASE, lease)
            raise
        if granted.filled == len(granted.slots):  # else some may be nowhere
            self._credit.met(keys)
        self._note(Op.COMMIT, lease, granted.filled)

    @property
    def alive(self) -> bool:
        """Whether no side has hung up; asks the kernel, not the daemon. Of the client's thread."""
        return not self._ended.poll(0)

    def hang_up(self) -> HangUp:
        """What another thread can wait for: that this connection ends, by whichever side."""
        return HangUp(os.dup(self._socket.fileno()))

    def close(self) -> None:
        """Hang up; the daemon ends every lease. Idempotent."""
        with suppress(OSError):  # the daemon has hung up before, or we have
            self._socket.shutdown(socket.SHUT_RDWR)  # also for whoever waits for it
        self._close_connection()
        self.arena.close()

    def _close_connection(self) -> None:
        self._socket.close()
        if self._notes >= 0:
            notes, self._notes = self._notes, -1
            os.close(notes)

    def _slots(self, raw: bytes) -> list[Slot]:
        return cast("list[Slot]", local.unpack_numbers(raw))

    def _deliver(self, op: Op, message: bytes) -> None:
        """Bytes of a request."""
        try:
            self._socket.sendall(message)
        except OSError as error:
            raise self._lost(f"the node daemon gives no answer to {op.name}: {error}") from None
        except BaseException:  # half a message may be on its way
            self.close()
            raise

    def _note(self, op: Op, *arguments: Value) -> None:
        """A request without an answer that wakes nobody; in order with all that is asked later."""
        message = local.encode(op, *arguments)
        try:
            if len(message) <= local.MAX_NOTE and note(self._notes, message, ANSWER_S):
                return
        except OSError as error:
            raise self._lost(f"the node daemon gives no answer to {op.name}: {error}") from None
        except BaseException:  # half a message may lie there
            self.close()
            raise
        self._deliver(op, message)  # a very long path, or so many notes

    def _ask(self, timeout_s: float, op: Op, *arguments: Value) -> list[Value]:
        """One request and its answer."""
        self._send(op, *arguments)
        return self._answer(timeout_s, op)

    def _send(self, op: Op, *arguments: Value) -> None:
        """The first half of a request with an answer."""
        if self._unanswered:  # and so this one's would be taken for that
            raise self._lost(f"{op.name} while an earlier request has no answer")
        self._unanswered = True
        self._deliver(op, local.encode(op, *arguments))

    def _answer(self, timeout_s: float, op: Op) -> list[Value]:
        """The second half."""
        try:
            self._set_timeout(timeout_s)
            while True:
                count = self._socket.recv_into(self._received)
                if not count:
                    raise self._lost("the node daemon hung up")
                if messages := self._replies(count):
                    break
        except OSError as error:  # a time-out is one as well
            raise self._lost(f"the node daemon gives no answer to {op.name}: {error}") from None
        except BaseException:  # or the answer would be taken for that of the next request
            self.close()
            raise
        if len(messages) > 1:
            raise self._broken(op.name)
        self._unanswered = False
        ok, *values = messages[0]
        if not ok:
            self.close()
            raise RemoteProtocolError(f"the node daemon refused {op.name}: {values[0]!s}")
        return values

    def _hear(self) -> None:
        """Take in what the daemon has told by itself; waits for nothing."""
        count = RECEIVE_NBYTES
        while count == RECEIVE_NBYTES:  # one that is shorter was all
            try:
                count = self._socket.recv_into(self._received, 0, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError as error:
                raise self._lost(f"the node daemon is gone: {error}") from None
            if not count:
                raise self._lost("the node daemon hung up")
            for ok, *values in self._replies(count):  # to something that has no answer
                self.close()
                text = "answered what was not asked" if ok else f"refused: {values[0]!s}"
                raise RemoteProtocolError(f"the node daemon {text}")

    def _replies(self, count: int) -> list[list[Value]]:
        """The replies that `count` bytes just received complete; what else they tell is noted."""
        replies: list[list[Value]] = []
        for message in self._decoder.feed(self._received[:count]):
            match message:
                case [bool(), *_]:
                    replies.append(message)
                case [Op.CREDIT, bytes(slots)]:
                    self._credit.told(self._slots(slots))
                case _:
                    raise self._broken("nothing")
        return replies

    def _set_timeout(self, timeout_s: float) -> None:
        if timeout_s != self._timeout_s:
            self._limit(socket.SO_RCVTIMEO, timeout_s)
            self._timeout_s = timeout_s

    def _limit(self, option: int, seconds: float) -> None:
        timeval = _TIMEVAL.pack(int(seconds), int(seconds % 1.0 * 1e6))
        self._socket.setsockopt(socket.SOL_SOCKET, option, timeval)

    def _lost(self, text: str) -> ArenaLost:
        """What to raise: what ended the connection, also where that went by unheard."""
        if self._socket.fileno() >= 0:
            self._ended_by = text
        self.close()
        return ArenaLost(self._ended_by)

    def _broken(self, what: str) -> RemoteProtocolError:
        self.close()
        return RemoteProtocolError(f"the node daemon's answer to {what} makes no sense")
