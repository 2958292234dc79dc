"""One engine's connection to the node's Unix socket: one request at a time on it."""

import asyncio
import contextlib
import itertools
import logging
import os
import socket
import struct
from collections.abc import Callable, Coroutine
from typing import Final, Protocol, TypeVar, cast

from kvtier import metrics
from kvtier.core.blocks import BlockKey, BlockLayout, Slot
from kvtier.core.breakeven import ComputeCost
from kvtier.core.ledger import Lease
from kvtier.core.policy import Use
from kvtier.errors import KVTierError, RemoteProtocolError
from kvtier.node.manager import TierManager
from kvtier.node.notes import Hearing, Notes
from kvtier.node.peers import Peers
from kvtier.node.reading import Reading
from kvtier.node.record import Recorder
from kvtier.wire import local
from kvtier.wire.local import Op, Value

HELLO_S: Final = 5.0  # an engine must have said hello by then
MAX_WAIT_S: Final = 60.0
MAX_COST: Final = 10**12  # of computing a block, in us or ns
MAX_UNREAD: Final = 4 << 20  # bytes of answers that an engine leaves unread
MAX_LEASES: Final = 4096  # of one engine at once
LINGER_S: Final = 1.0  # for a refused engine to read why
LAST_NBYTES: Final = 64 << 10  # at once, of what a dead engine had told
LAST_READS: Final = 64  # more than a socket keeps: the engine may be alive
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid: struct ucred

log = logging.getLogger(__name__)
T = TypeVar("T")
_client_ids = itertools.count(1)


class Node(Protocol):
    """What a connection needs of the daemon."""

    name: str
    recorder: Recorder
    peers: Peers

    def open_layout(self, layout: BlockLayout) -> Coroutine[None, None, TierManager]:
        """The tiers of a layout, made at its first use. ConfigError: no room for another."""
        ...


class Connection(asyncio.Protocol):
    """One engine. Its leases end with it, whatever way it goes."""

    def __init__(self, node: Node, allowed: Callable[[int], bool], gate: "Gate") -> None:
        self._node = node
        self._allowed = allowed
        self._gate = gate
        self._client = next(_client_ids)
        self._decoder = local.Decoder()
        self.manager: TierManager | None = None
        self._task: asyncio.Task[None] | None = None
        self._transport: asyncio.Transport
        self._socket: socket.socket
        self._hello_due: asyncio.TimerHandle
        self._leases: set[int] = set()
        self._writes: set[int] = set()
        self._notes: Notes | None = None  # from HELLO on
        self._refused = False
        self.name = "?"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A process has connected: look who it is."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by class
        # asyncio shows a socket that cannot pass descriptors; ours, on the same one, can.
        self._socket = socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno()))
        self._hello_due = asyncio.get_running_loop().call_later(HELLO_S, self._no_hello)
        raw = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        _, uid, _ = _CREDENTIALS.unpack(raw)
        if not self._allowed(uid):
            self._refuse(f"user {uid} may not attach; see node.allow_uids")
        elif not self._gate.enter(self):
            self._refuse(f"{self._gate.limit} engines are attached, the limit node.max_clients")

    def connection_lost(self, exc: Exception | None) -> None:
        """The engine is gone: nothing of it may stay."""
        self._hello_due.cancel()
        self._gate.leave(self)
        if self._task is not None:
            self._task.cancel()
        self.hear()  # what it had ended before it went, it has ended
        self._hear_rest()
        self._gate.hearing.leave(self)
        if self.manager is not None:
            self.manager.disconnect(self._client)
        if self._notes is not None:
            self._notes.close()
        self._socket.close()

    def data_received(self, data: bytes) -> None:
        """Bytes of a request."""
        self._gate.hearing.now()  # of any engine: a block that is committed is there for all
        if not self._refused:
            self._guarded(self._take_requests, data)

    def hear(self) -> None:
        """Act on what the engine has noted."""
        if self._notes is not None and not self._refused:
            self._guarded(self._take_notes, self._notes)

    def _hear_rest(self) -> None:
        """Act on what a dead engine had told that was not read when a word to it failed."""
        with contextlib.suppress(OSError):  # no more is there
            for _ in range(LAST_READS):
                data = self._socket.recv(LAST_NBYTES, socket.MSG_DONTWAIT)
                if not data or self._refused:
                    break
                self._guarded(self._take_requests, data)

    def _take_requests(self, data: bytes) -> None:
        for message in self._decoder.feed(data):
            op, arguments = local.parse_request(message)
            if op not in local.NOTED:
                if self._transport.is_closing():  # nobody is there to have the answer
                    continue
                if self._task is not None and not self._task.done():
                    raise RemoteProtocolError("a second request before the first was answered")
            self._handle(op, arguments)

    def _take_notes(self, notes: Notes) -> None:
        for message in notes.read():
            op, arguments = local.parse_request(message)
            if op not in local.NOTED:
                raise RemoteProtocolError(f"{op.name} has an answer, so it is no note")
            self._handle(op, arguments)

    def _guarded(self, take: Callable[[T], None], what: T) -> None:
        try:
            take(what)
        except RemoteProtocolError as error:
            metrics.PROTOCOL_ERRORS.inc()
            self._refuse(str(error))
        except Exception:
            # A bug of ours must not take the other engines' connections along.
            log.exception("engine %s: request failed", self.name)
            self._refuse("internal error of the node daemon; see its log")

    def close(self) -> None:
        """Hang up, once what was answered is read."""
        self._transport.close()

    def abort(self) -> None:
        """Hang up at once."""
        self._transport.abort()

    def _no_hello(self) -> None:
        if self.manager is None and self._task is None:
            self._refuse(f"no HELLO within {HELLO_S:g} s")

    def _refuse(self, text: str) -> None:
        """Say why, once, and hang up.

        What the engine may still send is read and dropped for a moment: closing on unread bytes
        would reset the connection, and the words with it. One that has had slots may be copying
        into them or out of them just now: they are its own until it hangs up itself, or dies.
        """
        if self._refused or self._transport.is_closing():
            return
        self._refused = True
        self._gate.hearing.leave(self)
        log.warning("engine %s refused: %s", self.name, text)
        self._transport.write(local.encode(False, text[:1000]))
        self._transport.write_eof()
        asyncio.get_running_loop().call_later(LINGER_S, self._close_on_stranger)

    def _close_on_stranger(self) -> None:
        if self.manager is None:
            self._transport.close()

    def _reply(self, *values: Value) -> None:
        self._send(True, *values)

    def _send(self, *values: Value) -> None:
        if self._transport.is_closing() or self._refused:  # its last words are heard, or ours said
            return
        if self._transport.get_write_buffer_size() > MAX_UNREAD:
            raise RemoteProtocolError(f"over {MAX_UNREAD} bytes of answers that were not read")
        self._transport.write(local.encode(*values))

    def _handle(self, op: Op, arguments: list[Value]) -> None:
        if op is Op.HELLO:
            if self.manager is not None:
                raise RemoteProtocolError("HELLO twice")
            self._later(self._hello(*arguments))
            return
        if self.manager is None:
            raise RemoteProtocolError(f"{op.name} before HELLO")
        match op, arguments:
            case Op.MATCH, [bytes(keys)]:
                found = self.manager.match(local.unpack_keys(keys))
                slots = local.pack_numbers(found.slots[: local.MAX_SEEN])
                self._reply(found.blocks, list(found.by_tier), slots, found.turn)
                if slots:
                    self._gate.hearing.noting(self)
            case Op.USED, [bytes(keys), int(request), int(output)]:
                self._used(self.manager, local.unpack_keys(keys), _use(request, output))
            case Op.READ, [bytes(keys), *rest]:
                self._read(self.manager, local.unpack_keys(keys), *rest)
            case Op.PULL, [bytes(keys), str(node), int(first), *rest]:
                reading = self._reading(local.unpack_keys(keys), first, 0, *rest)
                self._later(self._pull(self.manager, reading, node))
            case Op.AWAIT, [int(lease), int(have)]:
                if lease not in self._leases:
                    raise RemoteProtocolError(f"AWAIT of lease {lease}, which is not open")
                self._answer(self.manager.more(lease, have), self._reply_more)
            case Op.WRITE, [bytes(keys), int(first), int(request), int(output)]:
                self._write(self.manager, local.unpack_keys(keys), first, _use(request, output))
            case Op.COMMIT, [int(lease), int(filled)]:
                if lease not in self._writes:
                    raise RemoteProtocolError(f"COMMIT of lease {lease}, which is not open")
                self._ended_lease(lease)
                self.manager.commit(lease, filled)
            case Op.RELEASE, [int(lease)]:
                if lease not in self._leases and lease not in self._writes:
                    raise RemoteProtocolError(f"RELEASE of lease {lease}, which is not open")
                self._ended_lease(lease)
                self.manager.release(lease)
            case Op.CREDIT, [int(wanted)]:
                self._credit(self.manager, wanted)
            case Op.PUT, [bytes(keys), bytes(slots), int(request), int(output)]:
                self._put(self.manager, local.unpack_keys(keys), slots, _use(request, output))

    async def _hello(self, *arguments: Value) -> None:
        version, text, name = arguments
        assert isinstance(text, str)
        self.name = str(name)[:200]
        if version != local.VERSION:
            raise RemoteProtocolError(
                f"protocol version {version!s}, this daemon speaks {local.VERSION}"
            )
        try:
            layout = BlockLayout.parse(text)
        except ValueError as error:
            raise RemoteProtocolError(str(error)) from None
        manager = await self._node.open_layout(layout)
        if self._refused:  # meanwhile: it gets no arena, and so is hung up on
            return
        self.manager = manager
        self._hello_due.cancel()
        reply = local.encode(
            True, self._node.name, manager.epoch, layout.nbytes, manager.arena.slots,
            [int(spec.tier) for spec in manager.specs],
        )  # fmt: skip
        # The first bytes on a new connection: they fit, so this neither waits nor splits.
        self._notes = Notes()
        try:
            socket.send_fds(self._socket, [reply], [manager.arena.fd, self._notes.write_fd])
        finally:
            self._notes.given()

    def _read(self, manager: TierManager, keys: list[BlockKey], *numbers: Value) -> None:
        reading = self._reading(keys, *numbers)
        self._room_for_lease()
        self._node.recorder.tell(keys, reading.use, manager.layout.block_tokens)
        self._answer(manager.read(reading), self._reply_read)

    async def _pull(self, manager: TierManager, asked: Reading, node: str) -> None:
        self._reply(await self._node.peers.pull(manager, asked, node))

    def _reading(self, keys: list[BlockKey], *numbers: Value) -> Reading:
        first, wanted, wait_ms, block_us, growth_ns, request, output = (
            int(cast("int", each)) for each in numbers
        )
        wait_s = wait_ms / 1000
        if not 0 <= first <= len(keys) or not 0 <= wait_s <= MAX_WAIT_S:
            raise RemoteProtocolError(
                f"READ from {first} of {len(keys)} keys, "
                f"waiting {wait_s:g} s (limit {MAX_WAIT_S:g})"
            )
        if not 0 <= block_us <= MAX_COST or not 0 <= growth_ns <= MAX_COST:
            raise RemoteProtocolError(
                f"READ with {block_us} us a block, {growth_ns} ns more each (limit {MAX_COST})"
            )
        compute = ComputeCost(block_us / 1e6, growth_ns / 1e9) if block_us else None
        use = _use(request, output)
        return Reading(self._client, keys, first, wanted, wait_s, compute, use)

    def _answer(
        self, result: Lease | Coroutine[None, None, Lease], reply: Callable[[Lease], None]
    ) -> None:
        """Reply at once, or when the lease has come so far."""

        async def later(coming: Coroutine[None, None, Lease]) -> None:
            reply(await coming)

        if isinstance(result, Lease):
            reply(result)
        else:
            self._later(later(result))

    def _ended_lease(self, lease: int) -> None:
        self._leases.discard(lease)
        self._writes.discard(lease)
        if not self._leases and not self._writes:
            self._gate.hearing.end(self)

    def _room_for_lease(self) -> None:
        if len(self._leases) + len(self._writes) >= MAX_LEASES:
            raise RemoteProtocolError(f"{MAX_LEASES} leases not ended, which is the limit")

    def _reply_read(self, lease: Lease) -> None:
        self._leases.add(lease.id)
        if not self._refused:  # while it loaded
            self._gate.hearing.begin(self)
        slots = local.pack_numbers(lease.slots)
        self._reply(lease.id, slots, bytes(lease.sources), lease.arrived())

    def _reply_more(self, lease: Lease) -> None:
        self._reply(lease.arrived(), len(lease.keys))

    def _write(self, manager: TierManager, keys: list[BlockKey], first: int, use: Use) -> None:
        if not 0 <= first <= len(keys):
            raise RemoteProtocolError(f"WRITE from {first} of {len(keys)} keys")
        self._room_for_lease()
        if use.request is not None:  # else the blocks come by themselves
            self._node.recorder.tell(keys, use, manager.layout.block_tokens)
        lease = manager.write(self._client, keys, first, use)
        self._writes.add(lease.id)
        self._gate.hearing.begin(self)
        self._reply(lease.id, local.pack_numbers(lease.indexes), local.pack_numbers(lease.slots))

    def _credit(self, manager: TierManager, wanted: int) -> None:
        if not 0 < wanted <= local.MAX_KEYS:
            raise RemoteProtocolError(f"CREDIT of {wanted} slots: 1 to {local.MAX_KEYS}")
        slots = manager.credits.give(self._client, wanted)
        if slots:
            self._gate.hearing.noting(self)
        self._send(Op.CREDIT, local.pack_numbers(slots))

    def _put(self, manager: TierManager, keys: list[BlockKey], slots: bytes, use: Use) -> None:
        if use.request is not None:
            self._node.recorder.tell(keys, use, manager.layout.block_tokens)
        filled = cast("list[Slot]", local.unpack_numbers(slots))
        try:
            use = use._replace(now=manager.clock())
            instead = manager.credits.put(self._client, keys, filled, use)
        except ValueError as error:
            raise RemoteProtocolError(f"PUT: {error}") from None
        self._send(Op.CREDIT, local.pack_numbers(instead))

    def _used(self, manager: TierManager, keys: list[BlockKey], use: Use) -> None:
        self._node.recorder.tell(keys, use, manager.layout.block_tokens)
        manager.uses.tell(keys, use)

    def _later(self, work: Coroutine[None, None, None]) -> None:
        self._task = asyncio.get_running_loop().create_task(work)
        self._task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or (error := task.exception()) is None:
            return
        if isinstance(error, KVTierError):
            metrics.PROTOCOL_ERRORS.inc()
            self._refuse(str(error))
            return
        log.error("engine %s: request failed", self.name, exc_info=error)
        self._refuse("internal error of the node daemon; see its log")


def _use(request: int, output: int) -> Use:
    if not 0 <= request <= local.MAX_REQUEST or not -1 <= output <= local.MAX_OUTPUT:
        raise RemoteProtocolError(
            f"request {request} with {output} tokens of output: limits 0 to {local.MAX_REQUEST} "
            f"and -1 to {local.MAX_OUTPUT}"
        )
    return Use(0.0, request or None, None if output < 0 else output)


class Gate:
    """Who is attached, and how many may be."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.inside: set[Connection] = set()
        self.hearing = Hearing()

    def enter(self, connection: Connection) -> bool:
        """Count a connection in; False when it is one too many."""
        if len(self.inside) >= self.limit:
            return False
        self.inside.add(connection)
        metrics.CLIENTS.set(len(self.inside))
        return True

    def leave(self, connection: Connection) -> None:
        """Count it out; one that never entered is ignored."""
        self.inside.discard(connection)
        metrics.CLIENTS.set(len(self.inside))
