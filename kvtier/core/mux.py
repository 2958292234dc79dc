"""Many requests over one stream: ids, credits and ends, for both of its sides. Pure: no I/O.

Each request has a window of its own, as a stream of HTTP/2 has (RFC 9113, 5.2): the answering side
sends no more tokens than the asking side has room for, so that one slow reader holds up nobody
else. Tokens that wait are merged, and none is ever held twice.

Memory: a request's answer takes at most WINDOW tokens on the asking side and MAX_HELD on the
answering one, besides one start and one end.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

from kvtier.errors import LocalProtocolError, Overloaded, RemoteProtocolError, WorkerLost

WINDOW: Final = 1024  # tokens of one answer that may be on their way or wait for its reader
MAX_HELD: Final = 256  # tokens of one answer that wait to be sent, before its source has to wait
MAX_OPEN: Final = 4096  # requests of one stream at once
MAX_PARTS: Final = 512  # of one message
MAX_CREDIT: Final = 1 << 20  # tokens, whatever the other side grants

S = TypeVar("S")  # what starts an answer
E = TypeVar("E")  # what ends one


@dataclass(slots=True)
class Part(Generic[S, E]):
    """More of one answer, in this order: its start, tokens, its end."""

    id: int
    started: S | None = None
    token_ids: list[int] = field(default_factory=list)
    end: E | None = None

    def __bool__(self) -> bool:
        return bool(self.token_ids) or self.started is not None or self.end is not None


@dataclass(slots=True)
class _Asked(Generic[S, E]):
    """One request on the asking side: what came and was not taken yet."""

    part: Part[S, E]
    window: int = WINDOW  # tokens that the other side may still send
    taken: int = 0  # tokens that were taken and are not granted anew yet
    begun: bool = False
    ended: bool = False


class Asking(Generic[S, E]):
    """The side that opens requests. After `hello` it is open, until it is `broken` or `retired`."""

    def __init__(self) -> None:
        self.max_open = 0  # nothing before the other side's hello
        self.draining = False
        self._calls: dict[int, _Asked[S, E]] = {}
        self._last = 0
        self._credits: dict[int, int] = {}
        self._cancels: list[int] = []

    def __len__(self) -> int:
        return len(self._calls)

    @property
    def open(self) -> bool:
        """Whether a request may be opened, unless too many are."""
        return self.max_open > 0 and not self.draining

    def hello(self, max_open: int) -> None:
        """The other side is there and takes so many requests at once.

        Raises:
            RemoteProtocolError: It said so before, or takes none.
        """
        if self.max_open or max_open < 1:
            raise RemoteProtocolError(f"hello with max_open {max_open} after {self.max_open}")
        self.max_open = min(max_open, MAX_OPEN)

    def ask(self) -> int:
        """The number of a new request, whose credit is WINDOW.

        Raises:
            WorkerLost: Not open.
            Overloaded: `max_open` are.
        """
        if not self.open:
            raise WorkerLost("the worker is stopping" if self.draining else "not connected")
        if len(self._calls) >= self.max_open:
            raise Overloaded(f"{self.max_open} requests are open, the worker's limit")
        self._last += 1
        self._calls[self._last] = _Asked(Part(self._last))
        return self._last

    def receive(self, part: Part[S, E]) -> bool:
        """More came; False: of a request that is over here, as one that was just cancelled.

        Raises:
            RemoteProtocolError: It was never opened, has ended, or sends out of order or more than
                it may.
        """
        if not 1 <= part.id <= self._last:
            raise RemoteProtocolError(f"an answer to request {part.id}, opened: {self._last}")
        call = self._calls.get(part.id)
        if call is None:
            return False
        if call.ended:
            raise RemoteProtocolError(f"more of request {part.id} after its end")
        if part.started is not None:
            if call.begun:
                raise RemoteProtocolError(f"request {part.id} starts after it began")
            call.part.started = part.started
        if len(part.token_ids) > call.window:
            raise RemoteProtocolError(
                f"request {part.id}: {len(part.token_ids)} tokens, allowed {call.window}"
            )
        call.begun = call.begun or part.started is not None or bool(part.token_ids)
        call.window -= len(part.token_ids)
        call.part.token_ids += part.token_ids
        call.part.end = part.end
        call.ended = part.end is not None
        return True

    def take(self, number: int) -> Part[S, E]:
        """All that came of a request since the last time; false where nothing did.

        With its end the request is over.
        """
        call = self._calls.get(number)
        if call is None:
            raise LocalProtocolError(f"request {number} is not open")
        part, call.part = call.part, Part(number)
        if part.end is not None:
            del self._calls[number]
            self._credits.pop(number, None)
            return part
        call.taken += len(part.token_ids)
        if 2 * call.taken >= WINDOW:  # seldom, and before the other side has to wait
            call.window += call.taken
            self._credits[number] = self._credits.get(number, 0) + call.taken
            call.taken = 0
        return part

    def cancel(self, number: int, *, sent: bool = True) -> bool:
        """Want no more of a request; whether it was open. Not `sent` yet: nobody is told."""
        call = self._calls.pop(number, None)
        self._credits.pop(number, None)
        if call is None:
            return False
        if sent and not call.ended:
            self._cancels.append(number)
        return True

    @property
    def owes(self) -> bool:
        """Whether `outgoing` has anything."""
        return bool(self._credits or self._cancels)

    def outgoing(self) -> tuple[dict[int, int], list[int]]:
        """Credits by request, and cancels, that the other side must be told, once."""
        granted, self._credits = self._credits, {}
        cancels, self._cancels = self._cancels, []
        return granted, cancels

    def drain(self) -> None:
        """The other side takes no more; what is open goes on."""
        self.draining = True

    def broken(self, end: E) -> list[int]:
        """The stream is lost: all that is open ends with `end`; which requests heard of it."""
        self.max_open = 0
        told = [number for number, call in self._calls.items() if not call.ended]
        for number in told:
            self._calls[number].ended = True
            self._calls[number].part.end = end
        self._credits.clear()
        self._cancels.clear()
        return told


@dataclass(slots=True)
class _Answered(Generic[S, E]):
    """One request on the answering side: what is to be sent."""

    part: Part[S, E]
    credit: int

    @property
    def sendable(self) -> bool:
        part = self.part
        return part.started is not None or (
            self.credit > 0 if part.token_ids else part.end is not None
        )


class Answering(Generic[S, E]):
    """The side that answers. What may be sent is handed out in turn, request by request."""

    def __init__(self, max_open: int = MAX_OPEN) -> None:
        self.max_open = max_open
        self._calls: dict[int, _Answered[S, E]] = {}
        self._last = 0
        self._ready: dict[int, None] = {}  # in order; each has something that may be sent

    def __len__(self) -> int:
        return len(self._calls)

    def __contains__(self, number: int) -> bool:
        return number in self._calls

    def opened(self, number: int, credit: int) -> None:
        """A request came.

        Raises:
            RemoteProtocolError: Its number is not higher than all before it, or more are open than
                the other side was told.
        """
        if number <= self._last:
            raise RemoteProtocolError(f"request {number} after {self._last}")
        if len(self._calls) >= self.max_open:
            raise RemoteProtocolError(f"more than {self.max_open} requests are open")
        self._last = number
        self._calls[number] = _Answered(Part(number), credit)

    def credit(self, number: int, tokens: int) -> None:
        """More may be sent of a request; of one that is over it means nothing.

        Raises:
            RemoteProtocolError: It was never opened, or has more credit than any window.
        """
        if not 1 <= number <= self._last:
            raise RemoteProtocolError(f"credit for request {number}, opened: {self._last}")
        call = self._calls.get(number)
        if call is None:
            return
        call.credit += tokens
        if call.credit > MAX_CREDIT:
            raise RemoteProtocolError(f"request {number} has credit {call.credit}")
        self._look(number, call)

    def cancelled(self, number: int) -> bool:
        """Nobody wants more of a request; whether it was open.

        Raises:
            RemoteProtocolError: It was never opened.
        """
        if not 1 <= number <= self._last:
            raise RemoteProtocolError(f"cancel of request {number}, opened: {self._last}")
        self._ready.pop(number, None)
        return self._calls.pop(number, None) is not None

    def start(self, number: int, started: S) -> None:
        """An answer begins; this, `tokens` and `end` are for requests that are in here."""
        call = self._calls[number]
        call.part.started = started
        self._look(number, call)

    def tokens(self, number: int, token_ids: Iterable[int]) -> bool:
        """More of it; whether there is `room` for yet more."""
        call = self._calls[number]
        call.part.token_ids += token_ids
        self._look(number, call)
        return len(call.part.token_ids) < MAX_HELD

    def room(self, number: int) -> bool:
        """Whether there is room for more tokens; True where nobody wants any."""
        call = self._calls.get(number)
        return call is None or len(call.part.token_ids) < MAX_HELD

    def ending(self, number: int) -> bool:
        """Whether its end is told, or nobody wants it."""
        call = self._calls.get(number)
        return call is None or call.part.end is not None

    def end(self, number: int, end: E) -> None:
        """An answer ends, once what is before it was sent."""
        call = self._calls[number]
        call.part.end = end
        self._look(number, call)

    def take(self, most: int = MAX_PARTS) -> Sequence[Part[S, E]]:
        """What may be sent now, of at most `most` requests, those first that wait longest."""
        parts: list[Part[S, E]] = []
        while self._ready and len(parts) < most:
            number = next(iter(self._ready))
            del self._ready[number]
            call = self._calls[number]
            parts.append(_sendable(call))
            if parts[-1].end is not None:
                del self._calls[number]
        return parts

    def _look(self, number: int, call: _Answered[S, E]) -> None:
        if call.sendable:
            self._ready[number] = None


def _sendable(call: _Answered[S, E]) -> Part[S, E]:
    """All of a request that may be sent; what may not stays."""
    part, allowed = call.part, call.credit
    if len(part.token_ids) <= allowed:
        call.part = Part(part.id)
        call.credit -= len(part.token_ids)
        return part
    now = Part[S, E](part.id, part.started, part.token_ids[:allowed])
    call.part = Part(part.id, None, part.token_ids[allowed:], part.end)
    call.credit = 0
    return now
