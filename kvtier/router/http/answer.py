"""One request's answer: its choices side by side, as pieces or as a whole."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Final

from kvtier.errors import RequestError
from kvtier.router.front import Front
from kvtier.router.http.openai import Asked, Stops, Writer, finish_reason
from kvtier.wire.pb import router_pb2

MAX_AHEAD: Final = 64  # messages of the workers that a slow client has not taken yet

_Event = tuple[int, router_pb2.GenerateResponse | RequestError | None]


@dataclass(slots=True)
class _Choice:
    stops: Stops
    text: list[str] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    begun: bool = False
    reason: str = ""  # set when it has ended


class Answer:
    """Runs a request's choices and writes what comes.

    Args:
        front: Who serves it.
        asked: What is asked.
        writer: Writes the bodies.
        limit_s: The caller's time; None: the configured one.
    """

    def __init__(self, front: Front, asked: Asked, writer: Writer, limit_s: float | None) -> None:
        self._front = front
        self._asked = asked
        self._writer = writer
        self._limit_s = limit_s
        self._choices = [_Choice(Stops(asked.stops)) for _ in asked.requests]
        self._events: asyncio.Queue[_Event] = asyncio.Queue()  # never more than `_room` gives
        self._room = asyncio.Semaphore(MAX_AHEAD)

    async def whole(self) -> dict[str, object]:
        """The answer in one body.

        Raises:
            RequestError: A choice could not be had.
        """
        async for _ in self.pieces():
            pass
        answers = [("".join(choice.text), choice.reason) for choice in self._choices]
        return self._writer.whole(answers, self._usage())

    async def pieces(self) -> AsyncIterator[dict[str, object]]:
        """The answer's chunks as they come; ending the iteration cancels the rest.

        Raises:
            RequestError: A choice could not be had, or not to its end.
        """
        tasks = [
            asyncio.ensure_future(self._run(i, each)) for i, each in enumerate(self._asked.requests)
        ]
        try:
            left = len(tasks)
            while left:
                index, event = await self._events.get()
                if isinstance(event, RequestError):
                    raise event
                if event is None:
                    left -= 1
                    continue
                self._room.release()
                for piece in self._take(index, event):
                    yield piece
                if self._choices[index].stops.met:
                    tasks[index].cancel()
            if self._asked.include_usage:
                yield self._writer.usage(self._usage())
        finally:
            for task in tasks:
                task.cancel()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
        for end in ends:
            if isinstance(end, BaseException) and not isinstance(end, asyncio.CancelledError):
                raise end  # a bug of ours

    async def _run(self, index: int, request: router_pb2.GenerateRequest) -> None:
        async def write(message: router_pb2.GenerateResponse) -> None:
            if message.WhichOneof("body") != "routed":
                await self._room.acquire()
                self._events.put_nowait((index, message))

        async def work(deadline: float) -> None:
            fill = self._asked.fill
            await self._front.generate(request, deadline, write, fill=fill, fallbacks=0)

        end: RequestError | None = None
        try:
            await self._front.within(self._limit_s, work, wait=True)
        except RequestError as error:
            end = error
        finally:
            self._events.put_nowait((index, end))

    def _take(self, index: int, message: router_pb2.GenerateResponse) -> list[dict[str, object]]:
        """The chunks that one message of a worker makes."""
        choice, writer = self._choices[index], self._writer
        if choice.reason:
            return []
        body = message.WhichOneof("body")
        if body == "started":
            choice.prompt_tokens = message.started.prompt_tokens
            choice.cached_tokens = sum(each.tokens for each in message.started.restored)
            return []
        pieces: list[dict[str, object]] = []
        if not choice.begun:
            choice.begun = True
            begin = writer.begin(index)
            pieces += [begin] if begin is not None else []
        text = ""
        if body == "chunk":
            choice.tokens += len(message.chunk.ids)
            text = choice.stops.push(message.chunk.text)
            choice.reason = "stop" if choice.stops.met else ""
        elif body == "finished":
            text = choice.stops.rest()
            choice.reason = finish_reason(message.finished)
        if text:
            choice.text.append(text)
            pieces.append(writer.text(index, text))
        if choice.reason:
            pieces.append(writer.end(index, choice.reason))
        return pieces

    def _usage(self) -> dict[str, object]:
        firsts = self._choices[:: self._asked.n]  # a prompt is counted once
        prompt = sum(choice.prompt_tokens for choice in firsts)
        answer = sum(choice.tokens for choice in self._choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": answer,
            "total_tokens": prompt + answer,
            "prompt_tokens_details": {"cached_tokens": sum(c.cached_tokens for c in firsts)},
        }
