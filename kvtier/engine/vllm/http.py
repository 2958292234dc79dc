"""`kvtier worker --engine vllm-http`: a plain `vllm serve`, reached over its OpenAI HTTP API."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Final

import aiohttp

from kvtier.config import Config, cache_dir
from kvtier.core.tiers import Tier
from kvtier.engine import smollm2
from kvtier.engine.sequence import Done, FinishReason, Request, Started, Tokens
from kvtier.engine.vllm import gateway
from kvtier.engine.vllm.announced import read_announced
from kvtier.engine.vllm.gateway import Answer
from kvtier.engine.vllm.served import alone, describe
from kvtier.engine.vllm.spaces import spaces_of
from kvtier.errors import ConfigError, InvalidRequest, Overloaded, RequestError, WorkerLost

ANSWER_S: Final = 5.0  # for anything but an answer
MAX_LINE: Final = 1 << 20  # bytes of one event
_GONE: Final = (aiohttp.ClientError, TimeoutError, OSError)

log = logging.getLogger(__name__)


class Http:
    """A `gateway.Backend` over one vLLM server."""

    def __init__(self, url: str, served: gateway.Served) -> None:
        self.served = served
        self._session = aiohttp.ClientSession(
            url, timeout=aiohttp.ClientTimeout(total=None, sock_connect=ANSWER_S),
            connector=aiohttp.TCPConnector(limit=0), read_bufsize=MAX_LINE,
        )  # fmt: skip

    async def answer(self, request: Request) -> Answer:
        """See `gateway.Backend`."""
        body = {
            "model": self.served.model, "prompt": list(request.token_ids),
            "max_tokens": request.max_tokens, "temperature": request.temperature, "stream": True,
            "ignore_eos": request.ignore_eos, "return_token_ids": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }  # fmt: skip
        spaces = self.served.spaces
        if request.adapter:
            body["model"] = request.adapter
        if request.tenant:
            body["cache_salt"] = spaces.salts[request.tenant]
        if request.temperature:
            body["seed"] = request.seed % 2**63
        begun, told, spoke = time.monotonic(), 0, False
        reason: FinishReason | None = None
        try:
            async with self._session.post("/v1/completions", json=body) as response:
                if response.status != 200:
                    raise _refusal(response.status, await response.text())
                async for message in _events(response):
                    choices = message.get("choices")
                    for choice in choices if isinstance(choices, list) else ():
                        ids = tuple(choice.get("token_ids") or ())
                        spoke = spoke or bool(choice.get("text"))
                        if not told and ids:
                            yield _started(len(request.token_ids), message.get("usage"), begun)
                        if ids:
                            told += len(ids)
                            yield Tokens(ids)
                        if choice.get("finish_reason") in tuple(FinishReason):
                            reason = FinishReason(choice["finish_reason"])
        except _GONE as error:
            raise WorkerLost(f"vLLM gives no answer: {error}") from None
        if reason is None or (spoke and not told):  # aborted, cut off, or it tells no token ids
            raise WorkerLost(f"vLLM's answer has no end after {told} tokens")
        yield Done(finish_reason=reason, completion_tokens=told, saved_tokens=0)

    async def clear(self) -> None:
        """See `gateway.Backend`; vLLM has this only with VLLM_SERVER_DEV_MODE=1."""
        try:
            async with asyncio.timeout(ANSWER_S):
                where = "/reset_prefix_cache?reset_external=true"
                async with self._session.post(where) as response:
                    if response.status != 200:
                        raise InvalidRequest("vLLM was started without VLLM_SERVER_DEV_MODE=1")
        except _GONE as error:
            raise WorkerLost(f"vLLM gives no answer: {error}") from None

    async def alive(self) -> bool:
        """See `gateway.Backend`."""
        try:
            async with asyncio.timeout(ANSWER_S), self._session.get("/health") as response:
                return response.status == 200
        except _GONE:
            return False

    async def close(self) -> None:
        """See `gateway.Backend`."""
        await self._session.close()


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, object]]:
    """The messages of a stream of server-sent events."""
    try:
        async for line in response.content:
            data = line.strip().removeprefix(b"data:").strip()
            if not line.startswith(b"data:") or data == b"[DONE]":
                continue
            message = json.loads(data)
            if not isinstance(message, dict):
                raise ValueError("an event is no table")  # noqa: TRY004 - as bad as bad JSON
            if "error" in message:
                raise WorkerLost(f"vLLM: {str(message['error'])[:500]}")
            yield message
    except ValueError as error:  # no JSON, or a line that is too long
        raise WorkerLost(f"vLLM's answer makes no sense: {error}") from None


def _refusal(status: int, text: str) -> RequestError:
    line = text[:500]
    if status in (429, 503):
        return Overloaded(f"vLLM: {line}")
    if 400 <= status < 500:
        return InvalidRequest(f"vLLM: {line}")
    return WorkerLost(f"vLLM: HTTP {status}: {line}")


def _started(prompt: int, usage: object, begun: float) -> Started:
    details = usage.get("prompt_tokens_details") if isinstance(usage, dict) else None
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    known = cached if isinstance(cached, int) else 0  # vLLM: --enable-prompt-tokens-details
    return Started(
        prompt_tokens=prompt,
        restored={Tier.VRAM: known} if known else {},
        computed_tokens=prompt - known,
        queue_s=0.0,
        restore_s=0.0,
        prefill_s=time.monotonic() - begun,
    )


async def _model(session: aiohttp.ClientSession, name: str) -> tuple[str, int]:
    """What the server calls its model, and how many tokens that takes."""
    try:
        async with asyncio.timeout(ANSWER_S), session.get("/v1/models") as response:
            models = (await response.json())["data"]
            one = next(each for each in models if name in ("", each["id"]))
            return str(one["id"]), int(one["max_model_len"])
    except StopIteration:
        raise ConfigError(f"worker.name is {name!r}, which that vLLM does not serve") from None
    except (*_GONE, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"worker.url: no vLLM answers there: {error!r}") from None


async def serve(config: Config, *, started: Callable[[str], None], stop: asyncio.Event) -> None:
    """Run a worker in front of the vLLM at `worker.url` until `stop`.

    Raises:
        ConfigError: No vLLM answers there, or a setting is wrong.
    """
    worker = config.worker
    if not worker.url:
        raise ConfigError("worker.url must say where vLLM's HTTP API is")
    folder = Path(worker.model)
    if worker.model == "smollm2":
        folder = await asyncio.to_thread(smollm2.folder, cache_dir(), log.info)
    async with aiohttp.ClientSession(worker.url) as session:
        name, max_tokens = await _model(session, worker.name)
    said = alone(folder)
    if worker.announced:
        said = read_announced(Path(worker.announced), worker.block_tokens)
    served = describe(
        folder, name, said, block_tokens=worker.block_tokens, max_tokens=max_tokens,
        events=worker.events, replay=worker.replay, spaces=spaces_of(worker, said.root),
    )  # fmt: skip
    await gateway.serve(config, Http(worker.url, served), started=started, stop=stop)
