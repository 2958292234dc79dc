"""One accepted TCP connection on the daemon's loop: its handshake, and short messages."""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable
from typing import Final

from kvtier.errors import RemoteProtocolError
from kvtier.node.stream import cut
from kvtier.wire import local

_READ_NBYTES: Final = 64 << 10


class Caller:
    """Never blocks: what takes long goes to a thread, which may have the socket meanwhile.

    Raises:
        OSError: The connection broke; SSLError is one.
    """

    def __init__(self, sock: socket.socket, host: str) -> None:
        self.socket = sock
        self.host = host
        self.known = False  # it has said who it is
        self.token = ""  # by this one
        self.decoder = local.Decoder()
        sock.setblocking(False)

    async def shake_hands(self, context: ssl.SSLContext) -> None:
        """Go over to TLS. The arithmetic of it, a millisecond, is done in a thread."""
        secure = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self.socket = secure
        while True:
            try:
                # Nobody may close it under the thread: the number could be another's by then.
                step = asyncio.create_task(asyncio.to_thread(secure.do_handshake))
                await to_its_end(step, self.cut)
            except ssl.SSLWantReadError:
                wants = asyncio.get_running_loop().add_reader
            except ssl.SSLWantWriteError:
                wants = asyncio.get_running_loop().add_writer
            else:
                return
            await self._ready(wants)

    async def message(self) -> list[local.Value] | None:
        """The next message; None: it hung up.

        Raises:
            RemoteProtocolError: What came is none, or more than one.
        """
        while True:
            try:
                data = self.socket.recv(_READ_NBYTES)
            except (BlockingIOError, ssl.SSLWantReadError):
                await self._ready(asyncio.get_running_loop().add_reader)
                continue
            if not data:
                return None
            messages = self.decoder.feed(data)
            if len(messages) > 1:
                raise RemoteProtocolError("a second request before the first was answered")
            if messages:
                return messages[0]

    def say(self, data: bytes) -> None:
        """Send something short, for which there is always room on a connection in step."""
        if self.socket.send(data) != len(data):
            raise ConnectionResetError("it does not read what it is told")

    def cut(self) -> None:
        """End what a thread does with the socket; it is still to be closed."""
        cut(self.socket)

    def close(self) -> None:
        """Hang up."""
        self.socket.close()

    async def _ready(self, add: Callable[..., None]) -> None:
        loop, number = asyncio.get_running_loop(), self.socket.fileno()
        ready: asyncio.Future[None] = loop.create_future()
        add(number, _set, ready)
        try:
            await ready
        finally:
            loop.remove_reader(number)
            loop.remove_writer(number)


async def to_its_end(work: asyncio.Future[None], cut_off: Callable[[], None]) -> None:
    """Wait for what a thread does; who is cancelled meanwhile cuts it off, and still waits."""
    try:
        await asyncio.shield(work)
    except asyncio.CancelledError:
        cut_off()
        while not work.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([work])
        if not work.cancelled():
            work.exception()  # what it ended with is no news
        raise


def _set(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)
