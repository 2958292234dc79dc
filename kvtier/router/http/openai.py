"""OpenAI's requests read and its answers written: shapes only, no network.

Fields and their meaning follow https://platform.openai.com/docs/api-reference (completions and
chat). What would change an answer and is not supported is refused, never ignored.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from kvtier.core.sessions import MAX_SESSION
from kvtier.errors import Overloaded, PromptTooLong, RequestError
from kvtier.router.http.unsupported import unsupported
from kvtier.wire.pb import router_pb2, worker_pb2

TENANT_HEADER: Final = "x-kvtier-tenant"  # for a proxy that knows who asks; see docs/router.md
SESSION_HEADER: Final = "x-kvtier-session"
LONG_BODY: Final = 1 << 20  # bytes from which on JSON is parsed off the loop
MAX_CHOICES: Final = 16  # of one request, over all its prompts
MAX_STOPS: Final = 4
MAX_STOP: Final = 256  # characters
COMPLETION_TOKENS: Final = 16  # OpenAI's default for /v1/completions
_U32: Final = 2**32 - 1

_HTTP: Final = {
    "INVALID_ARGUMENT": 400, "OUT_OF_RANGE": 400, "FAILED_PRECONDITION": 400,
    "UNAUTHENTICATED": 401, "PERMISSION_DENIED": 403, "NOT_FOUND": 404,
    "RESOURCE_EXHAUSTED": 429, "UNIMPLEMENTED": 501, "UNAVAILABLE": 503, "DEADLINE_EXCEEDED": 504,
}  # fmt: skip
_TYPES: Final = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error",
                 404: "invalid_request_error", 413: "invalid_request_error",
                 429: "rate_limit_error"}  # fmt: skip
Table = Mapping[str, object]


class BadRequest(RequestError):
    """A request that OpenAI's API would refuse too; `param` names the field, `status` the code."""

    grpc_status = "INVALID_ARGUMENT"

    def __init__(self, message: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param = param
        self.status = status


@dataclass(frozen=True, slots=True)
class Asked:
    """A request: one `GenerateRequest` a choice, and how the answer is to be given."""

    chat: bool
    model: str
    requests: list[router_pb2.GenerateRequest]
    stream: bool
    include_usage: bool
    stops: tuple[str, ...]
    fill: bool  # no limit was given: all the room that the model has
    n: int  # choices a prompt


def read(
    body: object, *, chat: bool, request_id: str, luck: Callable[[], int], tenant: str = "",
    session: str = "",
) -> Asked:  # fmt: skip
    """The request in a parsed body; one that names no seed takes `luck`.

    Raises:
        BadRequest: A field is missing, wrong, or asks for what there is not.
    """
    table = _table(body)
    if name := unsupported(table):
        raise BadRequest(f"{name}: not supported", name)
    prompts = [_chat(table)] if chat else _prompts(table)
    model = _string(table, "model")
    n = _whole(table, "n", 1, 1, MAX_CHOICES)
    if _whole(table, "best_of", n, 1, MAX_CHOICES) != n:
        raise BadRequest("best_of must equal n", "best_of")
    if len(prompts) * n > MAX_CHOICES:
        raise BadRequest(f"{len(prompts)} prompts x n={n}, limit {MAX_CHOICES} choices", "n")
    limit = _limit(table, chat)
    seed = _whole(table, "seed", luck(), -(2**63), 2**63 - 1) % 2**64
    temperature = _number(table, "temperature", 1.0, 0.0, 2.0)
    stream = _flag(table, "stream")
    options = table.get("stream_options") or {}
    if options and not stream:
        raise BadRequest("stream_options: only with stream", "stream_options")
    requests = [
        router_pb2.GenerateRequest(
            request_id=request_id, model=model, prompt=prompt, max_tokens=limit,
            temperature=temperature, seed=(seed + i) % 2**64,
            ignore_eos=_flag(table, "ignore_eos"), tenant=tenant, session=session,
        )
        for prompt in prompts
        for i in range(n)
    ]  # fmt: skip
    usage = _flag(_table(options, "stream_options"), "include_usage")
    return Asked(chat, model, requests, stream, usage, _stops(table), limit is None, n)


def prompt_of(body: object) -> tuple[str, router_pb2.Prompt | None]:
    """The model and the (first) prompt of a request that somebody else will answer.

    Asks no more of it than that; None where there is no prompt that can be read.
    """
    if not isinstance(body, dict):
        return "", None
    model = body.get("model")
    try:
        prompt = _chat(body) if "messages" in body else _prompts(body)[0]
    except BadRequest:
        prompt = None
    return model if isinstance(model, str) else "", prompt


def tenant_of(given: Sequence[str]) -> str:
    """Whom a proxy says that a request is for, in its TENANT_HEADER; empty: nobody in particular.

    Raises:
        BadRequest: It says so twice: a client's own header must not win over the proxy's.
    """
    if len(given) > 1:
        raise BadRequest(f"{TENANT_HEADER}: {len(given)} of them; a proxy must overwrite it")
    return given[0] if given else ""


def session_of(given: Sequence[str]) -> str:
    """The conversation that a request is of, by its SESSION_HEADER; empty: none is named.

    Raises:
        BadRequest: There are two, or it is too long.
    """
    if len(given) > 1:
        raise BadRequest(f"{SESSION_HEADER}: {len(given)} of them, limit 1")
    session = given[0] if given else ""
    if (nbytes := len(session.encode())) > MAX_SESSION:
        raise BadRequest(f"{SESSION_HEADER} has {nbytes} bytes, limit {MAX_SESSION}")
    return session


def status_of(error: RequestError) -> int:
    """The HTTP status that tells this error."""
    if isinstance(error, BadRequest):
        return error.status
    return _HTTP.get(error.grpc_status, 500)


def error_body(error: RequestError) -> dict[str, object]:
    """The error as OpenAI's clients read it."""
    status = status_of(error)
    code = "model_not_found" if status == 404 and not isinstance(error, BadRequest) else None
    if isinstance(error, PromptTooLong):
        code = "context_length_exceeded"  # clients cut or sum up their prompt at this word
    return {
        "error": {
            "message": str(error),
            "type": _TYPES.get(status, "server_error"),
            "param": error.param if isinstance(error, BadRequest) else None,
            "code": code,
        }
    }


def retry_after(error: RequestError) -> dict[str, str]:
    """The header that says when to come again, where that can help."""
    if isinstance(error, Overloaded):
        return {"Retry-After": str(max(1, math.ceil(error.retry_s)))}
    return {"Retry-After": "1"} if status_of(error) == 503 else {}


class Stops:
    """Ends an answer's text before the first of some strings, which may come in pieces."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""  # the beginning of a stop, perhaps
        self.met = False

    def push(self, text: str) -> str:
        """The text that may be shown now; none once a stop was `met`."""
        if not self._stops or self.met:
            return "" if self.met else text
        text = self._held + text
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.met, self._held = True, ""
            return text[: min(found)]
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        """What was held back, when the answer has ended."""
        held, self._held = self._held, ""
        return held


class Writer:
    """Writes the answer's bodies: whole, or as chunks."""

    def __init__(self, asked: Asked, answer_id: str, model: str, created: int) -> None:
        self._asked = asked
        kind = "chat.completion" if asked.chat else "text_completion"
        if asked.chat and asked.stream:
            kind = "chat.completion.chunk"
        self._head: dict[str, object] = {
            "id": answer_id, "object": kind, "created": created, "model": model,
        }  # fmt: skip

    def begin(self, index: int) -> dict[str, object] | None:
        """The first chunk of a choice, if it has one of its own."""
        if not self._asked.chat:
            return None
        return self._chunk(index, {"delta": {"role": "assistant", "content": ""}}, None)

    def text(self, index: int, text: str) -> dict[str, object]:
        """A piece of the answer."""
        return self._chunk(index, {"delta": {"content": text}} if self._asked.chat
                           else {"text": text}, None)  # fmt: skip

    def end(self, index: int, reason: str) -> dict[str, object]:
        """The last chunk of a choice."""
        return self._chunk(index, {"delta": {}} if self._asked.chat else {"text": ""}, reason)

    def usage(self, usage: dict[str, object]) -> dict[str, object]:
        """The chunk behind all others that `include_usage` asks for."""
        return {**self._head, "choices": [], "usage": usage}

    def whole(self, answers: list[tuple[str, str]], usage: dict[str, object]) -> dict[str, object]:
        """The answer in one body, from the text and the finish reason of each choice."""
        choices = []
        for index, (text, reason) in enumerate(answers):
            shown: dict[str, object] = (
                {"message": {"role": "assistant", "content": text, "refusal": None}}
                if self._asked.chat
                else {"text": text}
            )
            choices.append({"index": index, **shown, "logprobs": None, "finish_reason": reason})
        return {**self._head, "choices": choices, "usage": usage}

    def _chunk(self, index: int, part: dict[str, object], reason: str | None) -> dict[str, object]:
        choice = {"index": index, **part, "logprobs": None, "finish_reason": reason}
        body = {**self._head, "choices": [choice]}
        return {**body, "usage": None} if self._asked.include_usage else body


def finish_reason(done: worker_pb2.Done) -> str:
    """OpenAI's name for why an answer ended."""
    return "length" if done.finish_reason == worker_pb2.FINISH_REASON_LENGTH else "stop"


def _overlap(text: str, stop: str) -> int:
    """How much of the end of `text` is the beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def _prompts(table: Table) -> list[router_pb2.Prompt]:
    """One prompt, or several: texts or lists of token ids."""
    given = table.get("prompt")
    if isinstance(given, str) or (isinstance(given, list) and given and _is_whole(given[0])):
        given = [given]
    if not isinstance(given, list) or not 1 <= len(given) <= MAX_CHOICES:
        raise BadRequest(
            f"prompt: must be a text or token ids, or a list of 1 to {MAX_CHOICES} of them",
            "prompt",
        )
    return [_prompt(each) for each in given]


def _prompt(given: object) -> router_pb2.Prompt:
    if isinstance(given, str):
        return router_pb2.Prompt(text=given)
    ids = isinstance(given, list) and given and all(_is_whole(each) for each in given)
    if ids and isinstance(given, list) and min(given) >= 0 and max(given) <= _U32:
        return router_pb2.Prompt(tokens=router_pb2.TokenIds(ids=given))
    raise BadRequest("prompt: must be a text or a list of token ids", "prompt")


def _chat(table: Table) -> router_pb2.Prompt:
    given = table.get("messages")
    if not isinstance(given, list) or not given:
        raise BadRequest("messages: must be a list of at least one message", "messages")
    turns = [_message(each, f"messages[{i}]") for i, each in enumerate(given)]
    return router_pb2.Prompt(chat=router_pb2.Chat(messages=turns))


def _message(given: object, name: str) -> router_pb2.ChatMessage:
    table = _table(given, name)
    for key in ("tool_calls", "function_call", "audio"):
        if table.get(key):
            raise BadRequest(f"{name}.{key}: not supported", "messages")
    role, content = table.get("role"), table.get("content")
    if not isinstance(role, str) or not role:
        raise BadRequest(f"{name}.role: must be a text", "messages")
    if isinstance(content, list):
        content = "".join(_part(each, f"{name}.content[{i}]") for i, each in enumerate(content))
    if not isinstance(content, str):
        raise BadRequest(f"{name}.content: must be a text or a list of parts", "messages")
    return router_pb2.ChatMessage(role=role, content=content)


def _part(given: object, name: str) -> str:
    table = _table(given, name)
    text = table.get("text")
    if table.get("type") != "text" or not isinstance(text, str):
        raise BadRequest(f"{name}: only parts of type text are supported", "messages")
    return text


def _limit(table: Table, chat: bool) -> int | None:
    """The most tokens of an answer; None: as many as the model has room for."""
    for name in ("max_completion_tokens", "max_tokens") if chat else ("max_tokens",):
        if table.get(name) is not None:
            return _whole(table, name, 0, 1, 2**31)
    return None if chat else COMPLETION_TOKENS


def _stops(table: Table) -> tuple[str, ...]:
    given = table.get("stop")
    stops = [] if given is None else [given] if isinstance(given, str) else given
    if (
        not isinstance(stops, list)
        or len(stops) > MAX_STOPS
        or not all(isinstance(stop, str) and 1 <= len(stop) <= MAX_STOP for stop in stops)
    ):
        raise BadRequest(
            f"stop: must be a text of 1 to {MAX_STOP} characters, or a list of up to "
            f"{MAX_STOPS} of them", "stop",
        )  # fmt: skip
    return tuple(stops)


def _table(given: object, name: str = "body") -> Table:
    if not isinstance(given, dict):
        raise BadRequest(f"{name}: must be a JSON object", None if name == "body" else name)
    return given


def _string(table: Table, name: str) -> str:
    value = table.get(name)
    if value is not None and not isinstance(value, str):
        raise BadRequest(f"{name}: must be a text", name)
    return value or ""


def _flag(table: Table, name: str) -> bool:
    value = table.get(name)
    if value is not None and not isinstance(value, bool):
        raise BadRequest(f"{name}: must be true or false", name)
    return bool(value)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _whole(table: Table, name: str, default: int, low: int, high: int) -> int:
    return int(_bounded(table, name, default, low, high, _is_whole, "a whole number"))


def _number(table: Table, name: str, default: float, low: float, high: float) -> float:
    def check(value: object) -> bool:
        return _is_whole(value) or isinstance(value, float)

    return float(_bounded(table, name, default, low, high, check, "a number"))


def _bounded(
    table: Table, name: str, default: float, low: float, high: float,
    check: Callable[[object], bool], what: str,
) -> float:  # fmt: skip
    value = table.get(name)
    if value is None:
        return default
    if not check(value) or not isinstance(value, int | float) or not low <= value <= high:
        raise BadRequest(f"{name} is {str(value)[:40]}, must be {what} of {low} to {high}", name)
    return value
