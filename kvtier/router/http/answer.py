"""One request's answer: its choices side by side, as pieces or as a whole."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from kvtier.router.front import Front
from kvtier.router.http.openai import Asked, Stops, Writer, finish_reason
from kvtier.wire.pb import router_pb2

Emit = Callable[[Sequence[dict[str, object]]], Awaitable[None]]  # chunks that are ready together


@dataclass(slots=True)
class _Choice:
    stops: Stops
    text: list[str] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    begun: bool = False
    reason: str = ""  # set when it has ended


class _Stopped(Exception):
    """A choice has met one of its stops: the rest of its answer is not wanted."""


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

    async def whole(self) -> dict[str, object]:
        """The answer in one body.

        Raises:
            RequestError: A choice could not be had.
        """
        await self._run_all(None)
        answers = [("".join(choice.text), choice.reason) for choice in self._choices]
        return self._writer.whole(answers, self._usage())

    async def stream(self, emit: Emit) -> None:
        """Give `emit` the answer's chunks as they come.

        Nothing is kept for a slow client: while `emit` waits, no more is read of the worker.

        Raises:
            RequestError: A choice could not be had, or not to its end.
        """
        await self._run_all(emit)
        if self._asked.include_usage:
            await emit([self._writer.usage(self._usage())])

    async def _run_all(self, emit: Emit | None) -> None:
        if len(self._choices) == 1:  # as nearly always: it needs no task of its own
            await self._run(0, emit)
            return
        try:
            async with asyncio.TaskGroup() as group:
                for index in range(len(self._choices)):
                    group.create_task(self._run(index, emit))
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None

    async def _run(self, index: int, emit: Emit | None) -> None:
        async def write(ready: Sequence[router_pb2.GenerateResponse]) -> None:
            pieces: list[dict[str, object]] = []
            for message in ready:
                if not self._choices[index].stops.met:
                    pieces += self._take(index, message)
            if pieces and emit is not None:
                await emit(pieces)
            if self._choices[index].stops.met:
                raise _Stopped

        async def work(deadline: float) -> None:
            request, fill = self._asked.requests[index], self._asked.fill
            apart = bool(self._asked.stops)  # or tokens behind a stop would count as the answer's
            with suppress(_Stopped):
                await self._front.generate(
                    request, deadline, write, fill=fill, fallbacks=None, apart=apart
                )

        await self._front.within(self._limit_s, work, wait=True)

    def _take(self, index: int, message: router_pb2.GenerateResponse) -> list[dict[str, object]]:
        """The chunks that one message of a worker makes."""
        choice, writer = self._choices[index], self._writer
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
