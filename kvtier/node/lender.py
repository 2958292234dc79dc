"""Blocks of this node for other nodes' daemons: pinned, framed, sent from where they lie.

    daemon's loop    accepts, checks the token, reads requests, leases blocks
    lends' threads   send them: one thread for each node that is being served

What is said on the stream is in `wire/lending.py`.
"""

import asyncio
import contextlib
import logging
import socket
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from typing import Concatenate, Final, NamedTuple, ParamSpec

from kvtier import metrics
from kvtier.codec import frame
from kvtier.codec.codecs import RAW
from kvtier.config import PeersConfig
from kvtier.core.blocks import BEGINS, BlockKey, BlockLayout
from kvtier.core.fidelity import Fidelity
from kvtier.core.lease import Lease
from kvtier.errors import ConfigError, RemoteProtocolError, Unauthenticated
from kvtier.node.caller import Caller, to_its_end
from kvtier.node.manager import TierManager
from kvtier.node.reading import Reading
from kvtier.node.stream import Buffer, Stream, prepare
from kvtier.wire import lending, local
from kvtier.wire.access import Access
from kvtier.wire.lending import Kind, Wanted
from kvtier.wire.rpc import bind_tcp

MOST_S: Final = 30.0  # that one request may take, however slowly the other side reads
HELLO_S: Final = 5.0  # in which a caller must have said who it is
GRACE_S: Final = 0.25  # longer than asked for, so that who asked is the one to give up
IDLE_S: Final = 600.0  # after which one that asks nothing is hung up on
MAX_CALLERS: Final = 512  # connections; a process has 1024 descriptors by default
MAX_OF_HOST: Final = 128  # of these
MAX_STRANGERS: Final = 64  # of these that have not said yet who they are; then the oldest goes
STALL_S: Final = 5.0  # in which an asker must take something of what it is sent
RECHECK_S: Final = 1.0  # between looks at whether the tokens of who is connected still count
PAUSE_S: Final = 1.0  # where the process has no descriptor left
MAX_PINNED: Final = 256 << 20  # bytes of blocks that one request has pinned at a time
SENT_AT_ONCE: Final = 1 << 20  # bytes of small blocks that go out in one call
BACKLOG: Final = 64

log = logging.getLogger(__name__)
P = ParamSpec("P")


class _Block(NamedTuple):
    """A block as it is to be sent."""

    key: BlockKey
    before: BlockKey
    place: memoryview
    fidelity: Fidelity


class Lender:
    """Serves other nodes' daemons. Lives on the daemon's loop.

    Args:
        config: How many at once, and where; None: nobody gets anything.
        node: Our name, which callers are told.
        layouts: What the daemon has, by layout.
        access: Who may call.
        hear: Acts on what engines have told up to now: what they have saved is there.
    """

    def __init__(
        self, config: PeersConfig | None, node: str, layouts: Mapping[str, TierManager],
        access: Access, hear: Callable[[], None],
    ) -> None:  # fmt: skip
        self._hear = hear
        self._any_port = config is not None and config.any_port
        self._most = config.lends if config else 0
        self._node = node
        self._layouts = layouts
        self._access = access
        self._clients = count(-2, -1)  # of the ledgers; engines' numbers begin at 1
        self._serving = 0
        self._strangers: dict[str, list[Caller]] = {}  # by host, the oldest first
        self._hosts: Counter[str] = Counter()
        self._callers: dict[asyncio.Task[None], Caller] = {}
        self._tasks: list[asyncio.Task[None]] = []  # that run as long as it serves
        self._pool: ThreadPoolExecutor | None = None
        self.address = ""  # while it serves

    @property
    def lends(self) -> bool:
        """Whether anybody gets anything."""
        return bool(self.address) and self._most > 0

    def refuse_taken(self, listen: str) -> None:
        """Say early what `start` would say; that decides.

        Raises:
            ConfigError: As `start`.
        """
        if self._most and not self._any_port:
            bind_tcp(listen, "peers.listen").close()

    async def start(self, listen: str) -> None:
        """Listen at host:port and serve, where anybody is to get anything.

        Raises:
            ConfigError: The address is not this machine's, or taken without `peers.any_port`.
        """
        if not self._most:
            return
        host, _, _ = listen.rpartition(":")
        try:
            listener = bind_tcp(listen, "peers.listen")
        except ConfigError as error:
            if not self._any_port:
                raise
            listener = bind_tcp(f"{host}:0", "peers.listen")
            log.warning("%s; at port %d instead", error, listener.getsockname()[1])
        listener.listen(BACKLOG)
        listener.setblocking(False)
        self.address = f"{host}:{listener.getsockname()[1]}"
        self._access.warn_if_open("peers.listen", self.address)
        self._pool = ThreadPoolExecutor(self._most, thread_name_prefix="lend")
        self._tasks.append(asyncio.create_task(self._accept(listener)))
        if self._access.tokens is not None:
            self._tasks.append(asyncio.create_task(self._watch_tokens()))

    async def close(self) -> None:
        """Serve nobody any more, and wait until no slot is read for anybody."""
        self._most, self.address = 0, ""
        tasks = [*self._callers, *self._tasks]
        for each in tasks:
            each.cancel()
        if tasks:
            await asyncio.wait(tasks)
        if self._pool is not None:
            self._pool.shutdown()

    # --- callers --------------------------------------------------------------------------

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with listener:
            while True:
                try:
                    sock, where = await loop.sock_accept(listener)
                except OSError as error:
                    log.warning("peers.listen: %s", error)
                    await asyncio.sleep(PAUSE_S)
                    continue
                self._admit(sock, where[0])

    def _admit(self, sock: socket.socket, host: str) -> None:
        if len(self._callers) >= MAX_CALLERS or self._hosts[host] >= MAX_OF_HOST:
            metrics.LENDS_REFUSED.labels("connections").inc()
            sock.close()
            return
        if sum(map(len, self._strangers.values())) >= MAX_STRANGERS:
            # Of the host with most of them, so that who is silent takes the place of its own.
            metrics.LENDS_REFUSED.labels("connections").inc()
            oldest = max(self._strangers.values(), key=len)[0]
            self._is_met(oldest)
            oldest.cut()
        caller = Caller(sock, host)
        self._hosts[host] += 1
        self._strangers.setdefault(host, []).append(caller)
        task = asyncio.create_task(self._meet(caller))
        self._callers[task] = caller
        task.add_done_callback(self._left)

    def _is_met(self, caller: Caller) -> None:
        """It is no stranger any more: it has said who it is, or has gone."""
        of_host = self._strangers.get(caller.host, [])
        if caller in of_host:
            of_host.remove(caller)
            if not of_host:
                del self._strangers[caller.host]

    def _left(self, task: asyncio.Task[None]) -> None:
        caller = self._callers.pop(task)
        self._is_met(caller)
        self._hosts[caller.host] -= 1
        if not self._hosts[caller.host]:
            del self._hosts[caller.host]
        caller.close()
        if not task.cancelled() and (error := task.exception()):
            log.error("lending to %s: a bug of ours", caller.host, exc_info=error)

    async def _meet(self, caller: Caller) -> None:
        """One connection, to its end."""
        try:
            async with asyncio.timeout(HELLO_S):
                await self._greet(caller)
            while (request := await self._next(caller)) and self._counts(caller.token):
                await self._serve(caller, lending.parse_wanted(request))
        except (RemoteProtocolError, Unauthenticated) as error:
            metrics.LENDS_REFUSED.labels(
                "token" if isinstance(error, Unauthenticated) else "protocol"
            ).inc()
            log.warning("another node at %s refused: %s", caller.host, error)
            refusal = (
                lending.pack_end(Kind.REFUSED, str(error))
                if caller.known
                else local.encode(False, str(error)[: lending.MAX_TEXT])
            )
            with contextlib.suppress(OSError):
                caller.say(refusal)
        except (OSError, TimeoutError) as error:
            log.info("another node at %s: %s", caller.host, error or type(error).__name__)

    async def _greet(self, caller: Caller) -> None:
        if (contexts := self._access.contexts) is not None:
            await caller.shake_hands(contexts.serving())
        prepare(caller.socket)
        caller.decoder.limit = lending.MAX_HELLO
        hello = await caller.message()
        if hello is None:
            raise ConnectionResetError("hung up before its hello")
        token = lending.parse_hello(hello)
        self._access.check_token(token)
        caller.token = token
        caller.decoder.limit = local.MAX_MESSAGE
        caller.known = True
        self._is_met(caller)
        caller.say(local.encode(True, lending.VERSION, self._node))

    def _counts(self, token: str) -> bool:
        """Whether a token that once was one of ours still is."""
        return self._access.tokens is None or self._access.tokens.accepts(token)

    async def _watch_tokens(self) -> None:
        """Hang up on whoever showed a token that is none of ours any more, in whatever it is at.

        Without a word: one that has a new token comes again, and who has none is told then.
        """
        while True:
            await asyncio.sleep(RECHECK_S)
            there = [each for each in self._callers.values() if each.known]
            accepted = {token: self._counts(token) for token in {each.token for each in there}}
            for caller in there:
                if not accepted[caller.token]:
                    caller.known = False
                    metrics.LENDS_REFUSED.labels("token").inc()
                    log.info("another node at %s: its token is gone; hung up on", caller.host)
                    caller.cut()

    @staticmethod
    async def _next(caller: Caller) -> list[local.Value] | None:
        try:
            async with asyncio.timeout(IDLE_S):
                return await caller.message()
        except TimeoutError:
            return None

    # --- blocks ---------------------------------------------------------------------------

    async def _serve(self, caller: Caller, wanted: Wanted) -> None:
        if self._serving >= self._most:
            metrics.LENDS_REFUSED.labels("busy").inc()
            text = f"{self._most} other nodes are being served, the limit peers.lends"
            caller.say(lending.pack_end(Kind.BUSY, text))
            return
        self._hear()
        manager = self._layouts.get(wanted.layout)
        held = wanted.first
        if manager is not None:
            held += _owned(manager, wanted.keys[wanted.first :])
        if manager is None or held == wanted.first:
            caller.say(lending.pack_end())
            return
        self._serving += 1
        try:
            deadline = time.monotonic() + min(MOST_S, wanted.wait_s)
            # Whoever asked is gone by then; what was loaded in time may still be sent.
            async with asyncio.timeout(deadline - time.monotonic() + GRACE_S):
                await self._lend(
                    caller, manager, wanted._replace(keys=wanted.keys[:held]), deadline
                )
        finally:
            self._serving -= 1

    async def _lend(
        self, caller: Caller, manager: TierManager, wanted: Wanted, deadline: float
    ) -> None:
        """Send keys[first:], which are held, some of them at a time; then the end."""
        at, end = wanted.first, len(wanted.keys)
        step = max(1, MAX_PINNED // manager.layout.nbytes)
        while at < end:
            keys = wanted.keys[: min(at + step, end)]
            sent, said = await self._lend_some(
                caller, manager, keys, at, deadline, len(keys) == end
            )
            if said:
                return
            at += sent
            if at < len(keys):
                break
        await self._in_thread(caller, Stream.send, [lending.pack_end()], deadline + GRACE_S)

    async def _lend_some(
        self, caller: Caller, manager: TierManager, keys: list[BlockKey], first: int,
        deadline: float, last: bool,
    ) -> tuple[int, bool]:  # fmt: skip
        """Pin keys[first:] and send them as they come to memory.

        How many there were; and whether the end was said, which it is with the last of them where
        these are the `last`: it costs no way of its own then.
        """
        client, sent, end = next(self._clients), 0, b""
        reading = Reading(client, keys, first, 1, max(0.0, deadline - time.monotonic()))
        lease: Lease | None = None
        try:
            lease = await _now(manager.read(reading))
            while sent < (here := lease.arrived()):
                blocks = [
                    _Block(
                        key,
                        keys[first + n - 1] if first + n else BEGINS,
                        manager.arena.slot(lease.slots[n]),
                        manager.lineage.of(key),
                    )
                    for n, key in enumerate(lease.keys[sent:here], sent)
                ]
                end = lending.pack_end() if last and here == len(lease.keys) else b""
                until = deadline + GRACE_S
                await self._in_thread(caller, _send, manager.layout, blocks, end, until)
                sent = here
                if sent < len(lease.keys):
                    lease = await _now(manager.more(lease.id, sent))
        finally:
            metrics.LENT_BLOCKS.inc(sent)
            if lease is not None:
                manager.release(lease.id)
            else:
                manager.disconnect(client)
        return sent, bool(end)

    async def _in_thread(
        self, caller: Caller, work: Callable[Concatenate[Stream, P], None], *args: P.args,
        **more: P.kwargs,
    ) -> None:  # fmt: skip
        """Have a thread do `work`: it reads from slots, so nothing ends before it has."""
        assert self._pool is not None, "before start"
        run = partial(work, Stream(caller.socket), *args, **more)
        await to_its_end(asyncio.get_running_loop().run_in_executor(self._pool, run), caller.cut)
        caller.socket.setblocking(False)


def _send(
    stream: Stream, layout: BlockLayout, blocks: Sequence[_Block], end: bytes, deadline: float
) -> None:
    """Send the blocks, and then `end`; small ones several at a time."""
    buffers: list[Buffer] = []
    nbytes = 0
    for key, before, place, fidelity in blocks:
        header, payload = frame.encode(key, before, place, layout, RAW, fidelity)
        buffers += [lending.pack_block(header, place.nbytes), payload]
        nbytes += place.nbytes
        if nbytes >= SENT_AT_ONCE:
            stream.send(buffers, deadline, STALL_S)
            buffers, nbytes = [], 0
    if end:
        buffers.append(end)
    if buffers:
        stream.send(buffers, deadline, STALL_S)


def _owned(manager: TierManager, keys: list[BlockKey]) -> int:
    """How many of `keys`, from the first on, lie here: the shared store is the other's to ask."""

    def reaches_shared(count: int) -> bool:
        by_tier = manager.match(keys[:count]).by_tier
        found = zip(manager.specs, by_tier, strict=True)
        return any(blocks for spec, blocks in found if spec.shared)

    held = manager.match(keys).blocks
    return bisect_left(range(1, held + 1), True, key=reaches_shared)


async def _now(lease: Lease | Coroutine[None, None, Lease]) -> Lease:
    return lease if isinstance(lease, Lease) else await lease
