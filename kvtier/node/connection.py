"""One engine's connection to the node's Unix socket: one request at a time on it."""

import asyncio
import contextlib
import itertools
import logging
import os
import socket
import struct
from collections.abc import Callable, Coroutine, Mapping
from typing import Final, Protocol, cast

from kvtier import metrics
from kvtier.core.blocks import BlockLayout, Slot
from kvtier.core.ledger import Lease
from kvtier.errors import KVTierError, RemoteProtocolError
from kvtier.node.gate import Gate
from kvtier.node.manager import TierManager
from kvtier.node.notes import Notes
from kvtier.node.peers import Peers
from kvtier.node.reading import Paths, Reading, use_of
from kvtier.node.record import Recorder
from kvtier.node.soon import Soon
from kvtier.wire import local
from kvtier.wire.local import Op, Value

HELLO_S: Final = 5.0  # an engine must have said hello by then
MAX_UNREAD: Final = 4 << 20  # bytes of answers that an engine leaves unread
MAX_LEASES: Final = 4096  # of one engine at once
LINGER_S: Final = 1.0  # for a refused engine to read why
LAST_NBYTES: Final = 64 << 10  # at once, of what a dead engine had told
LAST_READS: Final = 64  # more than a socket keeps: the engine may be alive
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid: struct ucred

log = logging.getLogger(__name__)
_client_ids = itertools.count(1)


class Node(Protocol):
    """What a connection needs of the daemon."""

    name: str
    recorder: Recorder
    peers: Peers
    soon: Soon

    def open_layout(self, layout: BlockLayout) -> Coroutine[None, None, TierManager]:
        """The tiers of a layout, made at its first use. ConfigError: no room for another."""
        ...


class Connection(asyncio.BufferedProtocol):
    """One engine. Its leases end with it, whatever way it goes."""

    def __init__(
        self, node: Node, allowed: Callable[[int], bool], gate: "Gate[Connection]"
    ) -> None:
        self._node = node
        self._allowed = allowed
        self._gate = gate
        self._client = next(_client_ids)
        self._decoder = local.Decoder()
        self._paths = Paths()
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

    def get_buffer(self, _: int) -> memoryview:
        """Where to put bytes of requests."""
        return self._gate.received

    def buffer_updated(self, nbytes: int) -> None:
        """Bytes of requests have come."""
        self._node.soon.hold()
        try:
            self._gate.hearing.now()  # of any engine: a block that is committed is there for all
            self._take(self._decoder, self._gate.received[:nbytes])
        finally:
            self._carry_on()

    def _carry_on(self) -> None:
        """Do what waited for answers. A bug in it may be of any layout, and ends no connection."""
        done = False
        while not done:
            try:
                self._node.soon.now()
                done = True
            except Exception:
                log.exception("what waited for an answer failed")

    def hear(self) -> None:
        """Act on what the engine has noted."""
        if self._notes is not None and not self._refused:
            self._take(self._notes.decoder, self._notes.read(), noted=True)

    def _hear_rest(self) -> None:
        """Act on what a dead engine had told that was not read when a word to it failed."""
        with contextlib.suppress(OSError):  # no more is there
            for _ in range(LAST_READS):
                data = self._socket.recv(LAST_NBYTES, socket.MSG_DONTWAIT)
                if not data or self._refused:
                    break
                self._take(self._decoder, data)

    def _take(
        self, decoder: local.Decoder, data: bytes | memoryview, *, noted: bool = False
    ) -> None:
        """Act on the requests that `data` completes; raises nothing."""
        if self._refused:
            return
        try:
            for message in decoder.feed(data):
                op, arguments = local.parse_request(message)
                if op not in local.NOTED:
                    if noted:
                        raise RemoteProtocolError(f"{op.name} has an answer, so it is no note")
                    if self._transport.is_closing():  # nobody is there to have the answer
                        continue
                    if self._task is not None and not self._task.done():
                        raise RemoteProtocolError("a second request before the first was answered")
                if op is Op.HELLO or self.manager is None:
                    self._begin(op, arguments)
                else:
                    _ACTS[op](self, self.manager, *arguments)
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

    def _send(self, *values: Value) -> None:
        if self._transport.is_closing() or self._refused:  # its last words are heard, or ours said
            return
        if self._transport.get_write_buffer_size() > MAX_UNREAD:
            raise RemoteProtocolError(f"over {MAX_UNREAD} bytes of answers that were not read")
        self._transport.write(local.encode(*values))

    def _begin(self, op: Op, arguments: list[Value]) -> None:
        if op is not Op.HELLO:
            raise RemoteProtocolError(f"{op.name} before HELLO")
        if self.manager is not None:
            raise RemoteProtocolError("HELLO twice")
        self._later(self._hello(*arguments))

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
        self._gate.hearing.listen(self._notes.fd, self)
        try:
            socket.send_fds(self._socket, [reply], [manager.arena.fd, self._notes.write_fd])
        finally:
            self._notes.given()

    def _match(self, manager: TierManager, path: bytes) -> None:
        keys = self._paths.keys(path)
        found = manager.match(keys)
        slots = local.pack_numbers(found.slots[: local.MAX_SEEN])
        self._send(True, found.blocks, list(found.by_tier), slots, found.turn)
        manager.arena.index.hint(keys, found.slots)  # or it would have found them by itself

    def _used(self, manager: TierManager, path: bytes, request: int, output: int) -> None:
        keys, use = self._paths.keys(path), use_of(request, output)
        self._node.recorder.tell(keys, use, manager.layout.block_tokens)
        manager.uses.tell(keys, use)

    def _read(self, manager: TierManager, path: bytes, *numbers: int) -> None:
        reading = Reading.of(self._client, self._paths.keys(path), *numbers)
        self._room_for_lease()
        self._node.recorder.tell(reading.keys, reading.use, manager.layout.block_tokens)
        self._answer(manager.read(reading), self._reply_read)

    def _pull(
        self, manager: TierManager, path: bytes, node: str, first: int, *numbers: int
    ) -> None:
        reading = Reading.of(self._client, self._paths.keys(path), first, 0, *numbers)
        self._later(self._pulled(manager, reading, node))

    async def _pulled(self, manager: TierManager, asked: Reading, node: str) -> None:
        self._send(True, await self._node.peers.pull(manager, asked, node))

    def _await(self, manager: TierManager, lease: int, have: int) -> None:
        if lease not in self._leases:
            raise RemoteProtocolError(f"AWAIT of lease {lease}, which is not open")
        self._answer(manager.more(lease, have), self._reply_more)

    def _commit(self, manager: TierManager, lease: int, filled: int) -> None:
        if lease not in self._writes:
            raise RemoteProtocolError(f"COMMIT of lease {lease}, which is not open")
        self._ended_lease(lease)
        manager.commit(lease, filled)

    def _release(self, manager: TierManager, lease: int) -> None:
        if lease not in self._leases and lease not in self._writes:
            raise RemoteProtocolError(f"RELEASE of lease {lease}, which is not open")
        self._ended_lease(lease)
        manager.release(lease)

    def _answer(
        self, result: Lease | Coroutine[None, None, Lease], reply: Callable[[Lease], None]
    ) -> None:
        """Reply at once, or when the lease has come so far."""
        if isinstance(result, Lease):
            reply(result)
        else:
            self._later(_then(result, reply))

    def _ended_lease(self, lease: int) -> None:
        self._leases.discard(lease)
        self._writes.discard(lease)

    def _room_for_lease(self) -> None:
        if len(self._leases) + len(self._writes) >= MAX_LEASES:
            raise RemoteProtocolError(f"{MAX_LEASES} leases not ended, which is the limit")

    def _reply_read(self, lease: Lease) -> None:
        self._leases.add(lease.id)
        slots = local.pack_numbers(lease.slots)
        self._send(True, lease.id, slots, bytes(lease.sources), lease.arrived())

    def _reply_more(self, lease: Lease) -> None:
        self._send(True, lease.arrived(), len(lease.keys))

    def _write(
        self, manager: TierManager, path: bytes, first: int, request: int, output: int
    ) -> None:
        keys, use = self._paths.keys(path), use_of(request, output)
        if not 0 <= first <= len(keys):
            raise RemoteProtocolError(f"WRITE from {first} of {len(keys)} keys")
        self._room_for_lease()
        if use.request is not None:  # else the blocks come by themselves
            self._node.recorder.tell(keys, use, manager.layout.block_tokens)
        lease = manager.write(self._client, keys, first, use)
        self._writes.add(lease.id)
        self._send(
            True, lease.id, local.pack_numbers(lease.indexes), local.pack_numbers(lease.slots)
        )

    def _credit(self, manager: TierManager, wanted: int) -> None:
        if not 0 < wanted <= local.MAX_KEYS:
            raise RemoteProtocolError(f"CREDIT of {wanted} slots: 1 to {local.MAX_KEYS}")
        slots = manager.credits.give(self._client, wanted)
        self._send(Op.CREDIT, local.pack_numbers(slots))

    def _put(
        self, manager: TierManager, path: bytes, slots: bytes, request: int, output: int
    ) -> None:
        keys, use = self._paths.keys(path), use_of(request, output, manager.clock())
        if use.request is not None:
            self._node.recorder.tell(keys, use, manager.layout.block_tokens)
        filled = cast("list[Slot]", local.unpack_numbers(slots))
        try:
            instead = manager.credits.put(self._client, keys, filled, use)
        except ValueError as error:
            raise RemoteProtocolError(f"PUT: {error}") from None
        self._send(Op.CREDIT, local.pack_numbers(instead))

    def _later(self, work: Coroutine[None, None, None]) -> None:
        self._task = asyncio.get_running_loop().create_task(work)
        self._task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if self._task is task:  # its error's frames refer to us, and nothing here looks for cycles
            self._task = None
        if task.cancelled() or (error := task.exception()) is None:
            return
        if isinstance(error, KVTierError):
            metrics.PROTOCOL_ERRORS.inc()
            self._refuse(str(error))
            return
        log.error("engine %s: request failed", self.name, exc_info=error)
        self._refuse("internal error of the node daemon; see its log")


async def _then(coming: Coroutine[None, None, Lease], reply: Callable[[Lease], None]) -> None:
    reply(await coming)


# What `parse_request` gives has the arguments that each of these takes.
_ACTS: Final[Mapping[Op, Callable[..., None]]] = {
    Op.MATCH: Connection._match,
    Op.READ: Connection._read,
    Op.WRITE: Connection._write,
    Op.COMMIT: Connection._commit,
    Op.RELEASE: Connection._release,
    Op.AWAIT: Connection._await,
    Op.PULL: Connection._pull,
    Op.CREDIT: Connection._credit,
    Op.PUT: Connection._put,
    Op.USED: Connection._used,
}
