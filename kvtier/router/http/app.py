"""The HTTP paths: what a request is, and which status its end has."""

import asyncio
import json
import random
import time
from collections.abc import Coroutine, Sequence
from typing import Final, TypeVar, cast

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from kvtier.errors import DeadlinePassed, Overloaded, RequestError, UnknownModel
from kvtier.metrics import REGISTRY
from kvtier.router.front import MAX_REQUEST_ID, Front
from kvtier.router.http.answer import Answer
from kvtier.router.http.openai import (
    LONG_BODY,
    SESSION_HEADER,
    TENANT_HEADER,
    BadRequest,
    Writer,
    error_body,
    read,
    retry_after,
    session_of,
    status_of,
    tenant_of,
)
from kvtier.router.members import Members
from kvtier.wire.rpc import MAX_MESSAGE

MAX_BODY: Final = MAX_MESSAGE
MAX_BODIES: Final = 256 << 20  # of all bodies that are being read
BODY_S: Final = 60.0  # for a body to arrive in
_MAX_MS: Final = 86_400_000
CLIENT_GONE: Final = 499  # nginx's number for it; nobody reads this answer
TIMEOUT_HEADER: Final = "x-envoy-expected-rq-timeout-ms"  # how long Envoy will wait for us

T = TypeVar("T")


def make_app(front: Front, members: Members, rng: random.Random) -> Starlette:
    """The ASGI application over `front`, on the loop that `front` lives on."""
    paths = _Paths(front, members, rng)
    return Starlette(
        routes=[
            Route("/v1/completions", paths.completions, methods=["POST"]),
            Route("/v1/chat/completions", paths.chat, methods=["POST"]),
            Route("/v1/models", paths.models),
            Route("/v1/models/{name:path}", paths.one_model),
            Route("/health", paths.health),
            Route("/metrics", paths.metrics),
        ],
        exception_handlers={HTTPException: _http_error},
    )


class _Paths:
    """One method a path."""

    def __init__(self, front: Front, members: Members, rng: random.Random) -> None:
        self._front = front
        self._members = members
        self._rng = rng
        self._bodies = _Bodies()
        self._started = int(time.time())

    async def completions(self, request: Request) -> Response:
        return await self._generate(request, chat=False)

    async def chat(self, request: Request) -> Response:
        return await self._generate(request, chat=True)

    async def models(self, _request: Request) -> Response:
        prompts = self._front.prompts
        models = [self._model(name) for name in prompts.models()]
        models += [self._model(name, model) for name, model in prompts.adapters()]
        return JSONResponse({"object": "list", "data": models})

    async def one_model(self, request: Request) -> Response:
        try:
            space = self._front.prompts.served(str(request.path_params["name"]))
        except RequestError as error:
            return _error(error)
        return JSONResponse(self._model(space.name, space.model if space.adapter else ""))

    async def health(self, _request: Request) -> Response:
        if self._members.serving():
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "no worker is ready"}, 503, {"Retry-After": "1"})

    async def metrics(self, _request: Request) -> Response:
        return Response(generate_latest(REGISTRY), media_type=CONTENT_TYPE_LATEST)

    def _name(self) -> str:
        """As long as a UUID and as seldom the same, in a tenth of the time."""
        return f"{self._rng.getrandbits(128):032x}"

    def _model(self, name: str, parent: str = "") -> dict[str, object]:
        model: dict[str, object] = {
            "id": name, "object": "model", "created": self._started, "owned_by": "kvtier",
        }  # fmt: skip
        return {**model, "parent": parent} if parent else model

    async def _generate(self, request: Request, *, chat: bool) -> Response:
        request_id = request.headers.get("x-request-id", "")[:MAX_REQUEST_ID] or self._name()
        headers = {"x-request-id": request_id}
        try:
            body = await self._bodies.read(request, _limit_s(request))
            seed = self._rng.getrandbits(63)
            tenant = tenant_of(request.headers.getlist(TENANT_HEADER))
            asked = read(
                body, chat=chat, request_id=request_id, luck=lambda: seed, tenant=tenant,
                session=session_of(request.headers.getlist(SESSION_HEADER)),
            )  # fmt: skip
            model = self._front.prompts.space(asked.model, tenant=tenant).name
            answer_id = f"{'chatcmpl' if chat else 'cmpl'}-{self._name()}"
            writer = Writer(asked, answer_id, model, int(time.time()))
            answer = Answer(self._front, asked, writer, _limit_s(request))
            if not asked.stream:
                whole = await _unless_gone(request.receive, answer.whole())
                return JSONResponse(whole, headers=headers)
            return _Events(answer, headers)
        except RequestError as error:
            return _error(error, headers)
        except ClientDisconnect:
            return Response(status_code=CLIENT_GONE)


class _Events(StreamingResponse):
    """An answer as server-sent events, made while it is sent."""

    def __init__(self, answer: Answer, headers: dict[str, str]) -> None:
        self._answer = answer
        self._told = headers
        super().__init__(
            iter(()), media_type="text/event-stream",
            headers={**headers, "cache-control": "no-cache", "x-accel-buffering": "no"},
        )  # fmt: skip

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def body(text: bytes, *, more: bool) -> None:
            nonlocal begun
            if not begun:  # the status is known once the first piece is there
                begun = True
                start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
                await send(start)
            await send({"type": "http.response.body", "body": text, "more_body": more})

        async def emit(pieces: Sequence[dict[str, object]]) -> None:
            await body(b"".join(map(_event, pieces)), more=True)

        try:
            await _unless_gone(receive, self._answer.stream(emit))
            await body(b"data: [DONE]\n\n", more=False)
        except RequestError as error:
            if begun:
                await body(_event(error_body(error)), more=False)
            else:
                await _error(error, self._told)(scope, receive, send)
        except ClientDisconnect:
            pass


def _event(body: dict[str, object]) -> bytes:
    text = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    return b"data: " + text.encode() + b"\n\n"


async def _unless_gone(receive: Receive, work: Coroutine[None, None, T]) -> T:
    """What `work` gives; it is cancelled when the client hangs up.

    Raises:
        ClientDisconnect: It did.
    """
    task, gone = asyncio.current_task(), False
    assert task is not None

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        task.cancel()

    watching = asyncio.ensure_future(watch())
    try:
        return await work
    except asyncio.CancelledError:
        if gone and not task.uncancel():
            raise ClientDisconnect from None
        raise
    finally:
        watching.cancel()  # as in asyncio.timeout: from here on it cancels nothing


class _Bodies:
    """Reads bodies within limits of size, time, and memory for all together."""

    def __init__(self) -> None:
        self._held = 0  # bytes of bodies that are not whole yet

    async def read(self, request: Request, limit_s: float | None) -> object:
        """The parsed body.

        Raises:
            BadRequest: Too long, or no JSON.
            DeadlinePassed: The client took too long.
            Overloaded: Too much of other bodies is held already.
            ClientDisconnect: The client hung up.
        """
        wait_s = min(BODY_S, limit_s or BODY_S)
        try:
            async with asyncio.timeout(wait_s):
                raw = await self._raw(request)
        except TimeoutError:
            raise DeadlinePassed(f"body: not read within {wait_s:g} s") from None
        if len(raw) > LONG_BODY:
            return await asyncio.to_thread(_parsed, raw)
        return _parsed(raw)

    async def _raw(self, request: Request) -> bytes:
        length = request.headers.get("content-length", "")
        long = BadRequest(f"body: more than {MAX_BODY} bytes, which is the limit", status=413)
        if length.isdecimal() and (len(length) > 20 or int(length) > MAX_BODY):
            raise long
        parts: list[bytes] = []
        held = 0
        try:
            async for part in request.stream():
                parts.append(part)
                held += len(part)
                self._held += len(part)
                if held > MAX_BODY:
                    raise long
                if self._held > MAX_BODIES:
                    raise Overloaded(f"bodies: {MAX_BODIES} bytes are being read, the limit")
        finally:
            self._held -= held
        return b"".join(parts)


def _parsed(raw: bytes) -> object:
    try:
        body = json.loads(raw.decode())  # strictly: json.loads lets half surrogates pass
        if b"\\ud" in raw.lower():  # half a surrogate pair is no text
            json.dumps(body, ensure_ascii=False).encode()
        return cast("object", body)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"body: not JSON: {error}") from None


def _limit_s(request: Request) -> float | None:
    """The caller's time, where a proxy tells it."""
    told = request.headers.get(TIMEOUT_HEADER, "")
    if not told.isdecimal():
        return None
    return min(int(told[:12]), _MAX_MS) / 1000 or None


def _error(error: RequestError, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse(
        error_body(error), status_of(error), {**(headers or {}), **retry_after(error)}
    )


async def _http_error(request: Request, error: Exception) -> Response:
    """An unknown path or method, in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    line = f"{request.method} {request.url.path}: {error.detail}"
    told = UnknownModel(line) if error.status_code == 404 else BadRequest(line)
    body = {"message": str(told), "type": "invalid_request_error", "param": None, "code": None}
    return JSONResponse({"error": body}, error.status_code, dict(error.headers or {}))
