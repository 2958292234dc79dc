"""A connected TCP socket, plain or TLS, for one thread: whole transfers, each with a deadline."""

import select
import socket
import ssl
import struct
import time
from collections import deque
from collections.abc import Sequence
from typing import Final

Buffer = bytes | bytearray | memoryview
_IOV_MAX: Final = 1024  # buffers that one sendmsg takes
_TLS_NBYTES: Final = 256 << 10  # that one call sends: OpenSSL sends all, or its time is over
_KEEPALIVE: Final = ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3))


class HungUp(ConnectionError):
    """The other side has closed the connection."""


def prepare(sock: socket.socket) -> None:
    """Set what both ends of such a connection have.

    Sizes of buffers are left to the kernel: it gives a connection some MiB where it is fast, and
    a program that asks for a size gets `net.core.rmem_max` at most, often less, and for good.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE:  # a host that lost its power says nothing
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


class Stream:
    """The socket as its thread uses it, in blocking mode.

    Deadlines are on the monotonic clock. No byte is copied here: what is sent goes from the
    caller's memory to the kernel, what is received into the caller's.

    Raises:
        TimeoutError: The deadline has passed; how much went through before is not told.
        HungUp: The other side did, in the middle.
        OSError: The connection broke.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._tls = isinstance(sock, ssl.SSLSocket)

    def send(
        self, buffers: Sequence[Buffer], deadline: float, stall_s: float = float("inf")
    ) -> None:
        """Send all of them, one after the other; the other side takes some in each `stall_s`."""
        if self._tls:
            for each in buffers:
                rest = memoryview(each).cast("B")
                while rest:
                    self._socket.settimeout(min(_left(deadline), stall_s))
                    rest = rest[self._socket.send(rest[:_TLS_NBYTES]) :]
            return
        # The kernel's own timeout bounds a transfer, so that it takes one call, however large.
        self._socket.settimeout(None)
        left = deque(buffers)
        while left:
            self._bound(socket.SO_SNDTIMEO, deadline, stall_s)
            try:
                sent = self._socket.sendmsg([left[n] for n in range(min(len(left), _IOV_MAX))])
            except BlockingIOError:
                raise TimeoutError("not taken in time") from None
            while left and sent >= len(left[0]):
                sent -= len(left.popleft())
            if sent:
                left[0] = memoryview(left[0])[sent:]

    def receive(self, view: memoryview | bytearray, deadline: float) -> None:
        """Fill the whole of `view`."""
        rest = memoryview(view)
        if not self._tls:
            self._socket.settimeout(None)
        while rest:
            if self._tls:
                self._socket.settimeout(_left(deadline))
                got = self._socket.recv_into(rest)
            else:
                got = self._receive_all(rest, deadline)
            if not got:
                raise HungUp("it hung up")
            rest = rest[got:]

    def in_step(self) -> bool:
        """Whether it is idle as it should be: not hung up, and no stray bytes have come."""
        if isinstance(self._socket, ssl.SSLSocket) and self._socket.pending():
            return False
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return not poll.poll(0)

    def cut(self) -> None:
        """From any thread: end the transfer that is under way, and all later ones."""
        cut(self._socket)

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def _receive_all(self, view: memoryview, deadline: float) -> int:
        self._bound(socket.SO_RCVTIMEO, deadline)
        try:
            return self._socket.recv_into(view, 0, socket.MSG_WAITALL)
        except BlockingIOError:
            raise TimeoutError("no answer in time") from None

    def _bound(self, option: int, deadline: float, most_s: float = float("inf")) -> None:
        left_us = max(int(min(_left(deadline), most_s) * 1e6), 1000)
        packed = struct.pack("@ll", *divmod(left_us, 10**6))
        self._socket.setsockopt(socket.SOL_SOCKET, option, packed)


def cut(sock: socket.socket) -> None:
    """End all transfers of a socket, whoever waits in them; it is still to be closed."""
    try:
        socket.socket.shutdown(sock, socket.SHUT_RDWR)  # of TLS the socket below
    except OSError:  # it has ended already
        return


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("no answer in time")
    return left
