"""Text to token ids and back, with the files that a worker hands out. Knows no network."""

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from hashlib import sha256
from typing import Final, NamedTuple, NoReturn, TypeVar

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from kvtier.errors import InvalidRequest, Overloaded, RemoteProtocolError

MAX_TEXT_BYTES: Final = 8 << 20  # of one prompt, and of one chat rendered
MAX_MESSAGES: Final = 4096  # of one chat
THREADS: Final = 2
MAX_JOBS: Final = 512  # that run or wait for a thread
SHORT: Final = 2048  # bytes of a text that is read sooner (in 0.5 ms at most) than a thread wakes
_PARTIAL = "\N{REPLACEMENT CHARACTER}"  # what a decoder writes for bytes that are no character
_KEEP: Final = 8  # tokens of context that decoding the next one needs
_TRIM_AT: Final = 32  # tokens of context at which the front is dropped
_HOLD: Final = 8  # tokens that may wait for the rest of a character
_CHARACTER: Final = 4  # bytes, so at most so many tokens, of one character

_MAX_REASON: Final = 500  # characters of a template's own words
# What a template, which is a program, ends with when it meets messages that it wasn't made for.
_REFUSALS: Final = (
    jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError,
    RecursionError,
)  # fmt: skip

Now = Callable[[], datetime]
T = TypeVar("T")


class Message(NamedTuple):
    """One turn of a chat."""

    role: str
    content: str


class Text:
    """One model's tokenizer and chat template. Safe to use from many threads at once.

    Raises:
        RemoteProtocolError: The files are no tokenizer, or the template is no template.
    """

    def __init__(self, files: Mapping[str, bytes], now: Now = datetime.now) -> None:
        self.digest = digest(files)
        try:
            self._tokenizer = Tokenizer.from_buffer(files["tokenizer.json"])
        except KeyError:
            raise RemoteProtocolError("the worker gives no tokenizer.json") from None
        except ValueError as error:
            raise RemoteProtocolError(f"the worker's tokenizer.json: {error}") from None
        # A folder's tokenizer.json may ask to cut or fill prompts; a prompt is taken as it is.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        config = _config(files)
        self._special = {name: _token(config.get(name)) for name in ("bos_token", "eos_token")}
        self._template = _template(files, config, now)

    def encode(self, text: str) -> list[int]:
        """Token ids of a plain prompt, with the special tokens that the model puts around it."""
        return self._encode(text, special=True)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a chat, ready for the model's turn; all special tokens are the template's.

        Raises:
            InvalidRequest: There is no template, or it refuses these messages.
        """
        return self._encode(self.render(messages), special=False)

    def _encode(self, text: str, special: bool) -> list[int]:
        # A batch of one: unlike `encode` this lets other threads run meanwhile.
        batch = self._tokenizer.encode_batch_fast([text], add_special_tokens=special)
        return list(batch[0].ids)

    def render(self, messages: Sequence[Message]) -> str:
        """The chat as the one text that the model was trained on; see `encode_chat`."""
        if self._template is None:
            raise InvalidRequest("chat: this model has no chat template, send text or token ids")
        turns = [each._asdict() for each in messages]
        pieces: list[str] = []
        room = MAX_TEXT_BYTES
        try:
            for piece in self._template.generate(
                messages=turns, add_generation_prompt=True, tools=None, documents=None,
                **self._special,
            ):  # fmt: skip
                room -= len(piece)
                if room < 0:
                    raise InvalidRequest(f"chat: more than {MAX_TEXT_BYTES} characters rendered")
                pieces.append(piece)
        except _REFUSALS as error:
            reason = str(error)[:_MAX_REASON]
            raise InvalidRequest(f"chat: the model's template refuses it: {reason}") from None
        return "".join(pieces)

    def decoder(self) -> "Decoder":
        """A decoder for one answer."""
        return Decoder(self.decode)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without special tokens; U+FFFD for bytes that are no character."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))


class Decoder:
    """Turns an answer's token ids into text as they come, whole characters only.

    A token's text depends on those before it (spaces, characters cut into bytes), so each step
    decodes the last few tokens again and gives what is new; the window, and so the work of a
    step, is bounded. An incomplete character at the end is held back until the rest comes, at
    most `_HOLD` tokens long: by then the bytes are wrong and are given as U+FFFD.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._given = 0  # characters of the window's text that were given already
        self._waiting = 0  # tokens since text was last given

    def push(self, ids: Sequence[int]) -> str:
        """The text that `ids` complete, perhaps none."""
        return "".join(self._push(each) for each in ids)

    def _push(self, token: int) -> str:
        self._window.append(token)
        self._waiting += 1
        text = self._decode(self._window)
        whole = text.rstrip(_PARTIAL)
        if len(whole) > self._given:
            new, self._given, self._waiting = whole[self._given :], len(whole), 0
            self._trim(text)
            return new
        if whole == text:  # a special token, or one that writes nothing: nobody waits for a rest
            self._waiting = 0
            self._trim(text)
            return ""
        return self._give_up() if self._waiting >= _HOLD else ""

    def _give_up(self) -> str:
        """Gives bad bytes as they are, but for those that may yet become a character."""
        bad, self._window = self._window[: 1 - _CHARACTER], self._window[1 - _CHARACTER :]
        new = self._decode(bad)[self._given :]
        self._given, self._waiting = 0, len(self._window)
        return new

    def _trim(self, text: str) -> None:
        """Drops the window's front where the rest's text does not hang on it."""
        if len(self._window) < _TRIM_AT:
            return
        for keep in range(_KEEP, _KEEP + _CHARACTER):
            rest = self._decode(self._window[-keep:])
            if text.endswith(rest) or len(self._window) >= 2 * _TRIM_AT:
                self._window, self._given = self._window[-keep:], len(rest.rstrip(_PARTIAL))
                return


class TextPool:
    """Runs text work in a few threads, so that a long prompt never holds up the loop."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="kvtier-text")
        self._texts: dict[str, Text] = {}
        self.running = 0  # jobs handed to the threads and not done

    async def load(self, files: Mapping[str, bytes]) -> Text:
        """The `Text` of these files; equal files share one.

        Raises:
            RemoteProtocolError: See `Text`.
        """
        name = digest(files)
        if name in self._texts:
            return self._texts[name]
        # Two workers may bring equal files at the same time; the first to be done is kept.
        # Never refused: without it its worker serves nobody, and there is one of it a worker.
        return self._texts.setdefault(name, await self._run(lambda: Text(files)))

    def keep_only(self, digests: set[str]) -> None:
        """Forget the texts that no worker uses any more."""
        self._texts = {name: text for name, text in self._texts.items() if name in digests}

    async def encode(self, text: Text, prompt: str) -> list[int]:
        """`text.encode(prompt)`; all but SHORT ones in one of the threads.

        Raises:
            Overloaded: See `run`.
        """
        if len(prompt.encode()) <= SHORT:
            return text.encode(prompt)
        return await self.run(lambda: text.encode(prompt))

    async def run(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises, run in one of the threads.

        Raises:
            Overloaded: MAX_JOBS wait already.
        """
        if self.running >= MAX_JOBS:
            raise Overloaded(f"router: {MAX_JOBS} prompts are being read, which is the limit")
        return await self._run(work)

    async def _run(self, work: Callable[[], T]) -> T:
        self.running += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        finally:
            self.running -= 1

    def close(self) -> None:
        """Ends the threads; what is queued is dropped, what runs is not waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def digest(files: Mapping[str, bytes]) -> str:
    """A fingerprint of a worker's tokenizer files."""
    parts = [part for name in sorted(files) for part in (name.encode(), files[name])]
    return sha256(b"".join(sha256(part).digest() for part in parts)).hexdigest()


def check_text(text: str, name: str) -> None:
    """Refuse more than MAX_TEXT_BYTES.

    Raises:
        InvalidRequest: Too long; the message begins with `name`.
    """
    nbytes = len(text.encode())
    if nbytes > MAX_TEXT_BYTES:
        raise InvalidRequest(f"{name} is {nbytes} bytes long, limit {MAX_TEXT_BYTES}")


def check_chat(messages: Sequence[Message]) -> None:
    """Refuse a chat of no or more than MAX_MESSAGES messages, or of too much text.

    Raises:
        InvalidRequest: As said.
    """
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise InvalidRequest(f"chat: {len(messages)} messages, must be 1 to {MAX_MESSAGES}")
    nbytes = sum(len(part.encode()) for message in messages for part in message)
    if nbytes > MAX_TEXT_BYTES:
        raise InvalidRequest(f"chat is {nbytes} bytes long, limit {MAX_TEXT_BYTES}")


def _config(files: Mapping[str, bytes]) -> dict[str, object]:
    try:
        config = json.loads(files.get("tokenizer_config.json", b"{}"))
    except (ValueError, RecursionError) as error:
        raise RemoteProtocolError(f"the worker's tokenizer_config.json: {error}") from None
    if not isinstance(config, dict):
        raise RemoteProtocolError("the worker's tokenizer_config.json is no table")
    return config


def _token(value: object) -> str:
    """A special token's text: written as text, or as a table with its `content`."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else ""


def _template(
    files: Mapping[str, bytes], config: dict[str, object], now: Now
) -> jinja2.Template | None:
    """The chat template as Transformers compiles it: chat_template.jinja, else the config's."""
    source: object = config.get("chat_template")
    if isinstance(source, list):  # several, by name
        tables = [each for each in source if isinstance(each, dict)]
        source = next((t.get("template") for t in tables if t.get("name") == "default"), None)
    if "chat_template.jinja" in files:
        source = files["chat_template.jinja"].decode(errors="replace")
    if not isinstance(source, str):
        return None
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: now().strftime(form)
    try:
        return environment.from_string(source)
    except (jinja2.TemplateError, SyntaxError, RecursionError, ValueError, MemoryError) as error:
        raise RemoteProtocolError(f"the worker's chat template: {error}") from None


def _tojson(value: object, ensure_ascii: bool = False, indent: int | None = None) -> str:
    # Jinja's own filter escapes for HTML, which models were not trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
