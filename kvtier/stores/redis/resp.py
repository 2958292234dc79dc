"""RESP2, as Redis and Valkey speak it, with payloads that are never copied in between.

Protocol: https://redis.io/docs/latest/develop/reference/protocol-spec/. A command is a list of
buffers for one `sendmsg`; a long reply is received where its bytes will stay. Every length that
a server says is checked against a limit before memory is taken for it.
"""

from collections.abc import Callable, Sequence
from typing import Final, Protocol

from kvtier.errors import RemoteProtocolError

MAX_LINE: Final = 4096  # characters of a status, an error or a length
MAX_BULK: Final = 4 * 2**20  # bytes of one string
MAX_ITEMS: Final = 2**17  # of one array
MAX_DEPTH: Final = 4  # of arrays in arrays
ENVELOPE_NBYTES: Final = 32  # of a string that goes to a sink: what the sink wants to see first
_AHEAD: Final = 16 * 1024  # read beyond what was asked for, so that short replies cost one call
_SHORT: Final = 64 * 1024  # up to here a string is read without a buffer of its own
_CRLF: Final = b"\r\n"

Buffer = bytes | memoryview
Word = Buffer | Sequence[Buffer]  # an argument; several buffers follow each other in it
Command = Sequence[Word]


class ReplyError(Exception):
    """An error that the server answered with; `code` is its first word, such as MOVED or OOM."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.code, _, self.detail = text.partition(" ")


Reply = bytes | int | None | ReplyError | list["Reply"]


class Sink(Protocol):
    """Where the string of one reply goes."""

    def place(self, envelope: bytes, nbytes: int) -> memoryview | None:
        """Room for exactly the `nbytes` after the envelope; None: they are of no use."""
        ...

    def came(self) -> None:
        """All bytes that room was given for are there."""
        ...


# At least one byte of a stream into a buffer, all of it where `whole`; 0 means the stream ended.
Receive = Callable[[memoryview, bool], int]


def encode(command: Command) -> list[Buffer]:
    """The buffers of one command, in order; those of its words are passed on as they are."""
    packed: list[Buffer] = []
    head = b"*%d\r\n" % len(command)
    for word in command:
        if isinstance(word, bytes):
            head += b"$%d\r\n%b\r\n" % (len(word), word)
            continue
        views = [word] if isinstance(word, memoryview) else word
        packed.append(head + b"$%d\r\n" % sum(len(view) for view in views))
        packed.extend(views)
        head = _CRLF
    packed.append(head)
    return packed


class Reader:
    """The replies of one stream, in order.

    Raises:
        RemoteProtocolError: Not RESP2, beyond a limit, or the stream ended inside a reply. The
            stream is of no use after that.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._ahead = memoryview(bytearray(_AHEAD))
        self._start = 0
        self._end = 0

    def reply(self, sink: Sink | None = None) -> Reply:
        """The next reply; an error is returned, not raised.

        A string goes to `sink` where there is one, and is then answered by b"". One that is too
        short for an envelope is answered by itself.
        """
        return self._reply(sink, MAX_DEPTH)

    def _reply(self, sink: Sink | None, depth: int) -> Reply:
        line = self._line()
        kind, rest = line[:1], line[1:]
        if kind == b"+":
            return rest
        if kind == b"-":
            return ReplyError(rest.decode(errors="replace"))
        if kind == b":":
            return _number(rest, -(2**63), 2**63 - 1)
        if kind == b"$":
            nbytes = _number(rest, -1, MAX_BULK)
            return None if nbytes < 0 else self._bulk(nbytes, sink)
        if kind == b"*" and depth:
            items = _number(rest, -1, MAX_ITEMS)
            return None if items < 0 else [self._reply(None, depth - 1) for _ in range(items)]
        raise RemoteProtocolError(f"a reply begins with {line[:16]!r}, which is not RESP2")

    def _bulk(self, nbytes: int, sink: Sink | None) -> bytes:
        if sink is None or nbytes < ENVELOPE_NBYTES:
            text = self._take(nbytes)
            self._end_of_string()
            return text
        view = sink.place(self._take(ENVELOPE_NBYTES), nbytes - ENVELOPE_NBYTES)
        if view is None:
            self._skip(nbytes - ENVELOPE_NBYTES)
            self._end_of_string()
        else:
            assert view.nbytes == nbytes - ENVELOPE_NBYTES, (view.nbytes, nbytes)
            self._fill(view)
            self._end_of_string()
            sink.came()
        return b""

    def _end_of_string(self) -> None:
        if self._take(2) != _CRLF:
            raise RemoteProtocolError("a string is longer than its length")

    def _line(self) -> bytes:
        looked = self._start
        while True:
            found = self._ahead.obj.find(_CRLF, looked, self._end)  # type: ignore[attr-defined]
            if 0 <= found <= self._start + MAX_LINE:
                line = bytes(self._ahead[self._start : found])
                self._start = found + 2
                return line
            if self._end - self._start > MAX_LINE:
                raise RemoteProtocolError(f"a line is longer than {MAX_LINE} bytes")
            searched = max(self._end - self._start - 1, 0)
            self._more()
            looked = self._start + searched

    def _take(self, nbytes: int) -> bytes:
        if nbytes > _SHORT:
            view = room(nbytes)
            self._fill(view)
            return bytes(view)
        taken = b""
        while True:
            part = self._ahead[self._start : min(self._end, self._start + nbytes - len(taken))]
            taken += part
            self._start += len(part)
            if len(taken) == nbytes:
                return taken
            self._more()

    def _fill(self, view: memoryview) -> None:
        ready = min(self._end - self._start, view.nbytes)
        view[:ready] = self._ahead[self._start : self._start + ready]
        self._start += ready
        while ready < view.nbytes:
            ready += self._got(self._receive(view[ready:], True))

    def _skip(self, nbytes: int) -> None:
        while nbytes:
            if self._start == self._end:
                self._more()
            step = min(nbytes, self._end - self._start)
            self._start += step
            nbytes -= step

    def _more(self) -> None:
        if self._start:
            left = self._end - self._start
            self._ahead[:left] = self._ahead[self._start : self._end]
            self._start, self._end = 0, left
        self._end += self._got(self._receive(self._ahead[self._end :], False))

    @staticmethod
    def _got(nbytes: int) -> int:
        if not nbytes:
            raise RemoteProtocolError("the server hung up")
        return nbytes


def room(nbytes: int) -> memoryview:
    """Memory for so many bytes, with anything in it: clearing it would cost as much as a copy.

    numpy is the one that gives such memory; it is loaded here, so that a daemon without this
    tier never pays for it.
    """
    import numpy as np

    return np.empty(nbytes, np.uint8).data


def _number(text: bytes, low: int, high: int) -> int:
    if not text.removeprefix(b"-").isdigit() or len(text) > 20 or not low <= int(text) <= high:
        raise RemoteProtocolError(f"a reply says {text[:24]!r}, must be {low} to {high}")
    return int(text)
