"""What a request means by its model and prompt: token ids, and the workers that read them so."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from kvtier.core.blocks import KEY_NBYTES, MAX_BLOCK_TOKENS, BlockKey
from kvtier.core.sessions import MAX_SESSION
from kvtier.errors import InvalidRequest, PromptTooLong, UnknownModel, UnknownTenant, WorkerLost
from kvtier.router.link import Link
from kvtier.router.members import Members
from kvtier.router.placement import Placement, Prompt
from kvtier.router.text import Message, Text, TextPool, check_chat, check_text
from kvtier.wire.pb import router_pb2, worker_pb2

LONG: Final = 4096  # tokens from which on keys are computed off the loop
NAMED: Final = 8  # of a list in an error


class Asked(Protocol):
    """What a RouteRequest and a GenerateRequest have in common."""

    model: str
    adapter: str
    tenant: str
    session: str

    @property
    def prompt(self) -> router_pb2.Prompt:
        """What is to be read."""
        ...


class Space(NamedTuple):
    """Whose blocks a request may use: those of one model, adapter and tenant."""

    model: str
    adapter: str
    tenant: str

    @property
    def name(self) -> str:
        """What callers know the model by."""
        return self.adapter or self.model


@dataclass(slots=True)
class KeyedPrompt(Prompt):
    """A prompt of which only the block keys are known; `ids` tells no more than how many."""

    given: Sequence[BlockKey] = ()

    @property
    def highest(self) -> int:
        """No token id is known, so none is too high."""
        return 0

    def keys(self, info: worker_pb2.WorkerInfo, root: bytes) -> list[BlockKey]:
        """The caller's keys."""
        return list(self.given)


class Prompts:
    """Reads prompts with the tokenizers that the workers brought."""

    def __init__(self, members: Members, placement: Placement, texts: TextPool) -> None:
        self._members = members
        self._placement = placement
        self._texts = texts

    async def read(self, request: Asked) -> tuple[Prompt, list[Link]]:
        """The prompt in token ids, and the workers that read these ids alike and can take it.

        Raises:
            InvalidRequest, UnknownModel, UnknownTenant, WorkerLost, Overloaded: See the messages.
        """
        if (nbytes := len(request.session.encode())) > MAX_SESSION:
            raise InvalidRequest(f"session has {nbytes} bytes, limit {MAX_SESSION}")
        asked = request.prompt
        space = self.space(request.model, request.adapter, request.tenant)
        model = space.model
        links = self._placement.candidates(*space)
        if not links:
            raise none_ready(space)
        kind = asked.WhichOneof("kind")
        if kind == "keys":
            prompt, links = _keyed(model, asked.keys, links)
        elif kind == "tokens":
            prompt = Prompt(model, asked.tokens.ids)
        else:
            text = _shared_text(links)
            links = [link for link in links if digest(link) == text.digest]
            prompt = Prompt(model, await self._encode(text, asked))
        if not prompt.ids:
            raise InvalidRequest("prompt: no tokens")
        prompt.adapter, prompt.tenant = space.adapter, space.tenant
        prompt.session = request.session
        prompt.ready_at = time.monotonic()
        if len(prompt.ids) >= LONG and kind != "keys":
            roots = [(link.info, link.roots.get(prompt.space)) for link in links]
            await self._texts.run(lambda: _compute(prompt, roots))
        return prompt, _fitting(prompt, links)

    def space(self, model: str, adapter: str = "", tenant: str = "") -> Space:
        """What a request means; `model` may be left out, or name an adapter.

        Raises:
            UnknownModel, UnknownTenant, InvalidRequest, WorkerLost: See the messages.
        """
        links = self._known()
        model = model or self._only_model()
        if not links:
            raise self._nobody()
        if model not in _models(links):
            model, adapter = self._by_adapter(model, adapter)
        if not adapter and not tenant:
            return Space(model, adapter, tenant)
        spaces = {
            at for each in links if each.info and each.info.model == model for at in each.roots
        }
        adapters = sorted({name for name, _ in spaces if name})
        if adapter and adapter not in adapters:
            raise UnknownModel(
                f"adapter {adapter[:200]!r} of {model!r} is not served; "
                f"served: {some(adapters) or 'none'}"
            )
        if (adapter, tenant) not in spaces:
            raise UnknownTenant(
                f"tenant {tenant[:200]!r} is not known to any worker of {adapter or model!r}"
            )
        return Space(model, adapter, tenant)

    def knows(self, tenant: str) -> bool:
        """Whether some worker, of whichever model, knows this tenant."""
        return any(tenant == each for link in self._known() for _, each in link.roots)

    def adapters(self) -> list[tuple[str, str]]:
        """Every adapter of the `models`, as of the same workers, and its model."""
        return _adapters(self._expected())

    def _only_model(self) -> str:
        """What a request means that names none."""
        served = self.models()
        if not served:
            raise self._nobody()
        if len(served) > 1:
            raise InvalidRequest(f"model: must be one of {some(served)}")
        return served[0]

    def _nobody(self) -> WorkerLost:
        return WorkerLost(f"no worker is ready; {len(self._members.workers())} connecting")

    def _by_adapter(self, name: str, adapter: str) -> tuple[str, str]:
        """The model of the adapter that a request names as its model."""
        models = [model for each, model in _adapters(self._known()) if each == name]
        if not models or adapter:
            names = [*self.models(), *(each for each, _ in self.adapters())]
            told = some(names) or "none"
            raise UnknownModel(f"model {name[:200]!r} is not served; served: {told}")
        if len(models) > 1:
            raise InvalidRequest(
                f"model: {name!r} is an adapter of {some(models)}; name the model, and the adapter "
                "as `adapter`"
            )
        return models[0], name

    def models(self) -> list[str]:
        """Every model that some worker serves, or did so until a moment ago.

        One whose workers are away for longer is known still: who asks for it hears that none is
        ready, and may come again.
        """
        return _models(self._expected())

    def served(self, name: str) -> Space:
        """One of the `models` or `adapters`.

        Raises:
            UnknownModel, InvalidRequest: There is none of that name.
            WorkerLost: All its workers are away.
        """
        space = self.space(name)
        if space.name not in {*self.models(), *(each for each, _ in self.adapters())}:
            raise none_ready(space)
        return space

    def _known(self) -> list[Link]:
        """The workers that have said who they are, be they away now."""
        return [link for link in self._members.workers() if link.info is not None]

    def _expected(self) -> list[Link]:
        return [link for link in self._known() if link.expected]

    async def _encode(self, text: Text, asked: router_pb2.Prompt) -> list[int]:
        kind = asked.WhichOneof("kind")
        if kind == "text":
            check_text(asked.text, "prompt.text")
            return await self._texts.encode(text, asked.text)
        if kind == "chat":
            messages = [Message(each.role, each.content) for each in asked.chat.messages]
            check_chat(messages)
            return await self._texts.run(lambda: text.encode_chat(messages))
        raise InvalidRequest("prompt: must be text, chat, tokens or keys")


def none_ready(space: Space) -> WorkerLost:
    """What a request for it gets while all its workers are away."""
    return WorkerLost(f"no worker of {space.name!r} is ready")


def _models(links: Sequence[Link]) -> list[str]:
    return sorted({link.info.model for link in links if link.info is not None})


def _adapters(links: Sequence[Link]) -> list[tuple[str, str]]:
    found = [(link.info.model, link.roots) for link in links if link.info is not None]
    return sorted({(name, model) for model, roots in found for name, _ in roots if name})


def some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


def digest(link: Link) -> str | None:
    """Which tokenizer this worker uses."""
    return link.text.digest if link.text is not None else None


def fits(prompt: Prompt, link: Link) -> bool:
    """Whether this worker can take the prompt."""
    there = link.info is not None and prompt.space in link.roots
    return there and link.info is not None and _misfit(prompt, link.info) is None


def _compute(
    prompt: Prompt, workers: Sequence[tuple[worker_pb2.WorkerInfo | None, bytes | None]]
) -> None:
    """All of a long prompt that takes time."""
    _ = prompt.highest
    for info, root in workers:
        if info is not None and root is not None:
            prompt.keys(info, root)
    prompt.ready_at = time.monotonic()  # from here on the loop is awaited


def _keyed(model: str, asked: router_pb2.BlockKeys, links: list[Link]) -> tuple[Prompt, list[Link]]:
    """A prompt of block keys, and the workers with blocks of that size."""
    if len(asked.keys) % KEY_NBYTES:
        raise InvalidRequest(
            f"prompt.keys has {len(asked.keys)} bytes, must be a multiple of {KEY_NBYTES}"
        )
    if not 1 <= asked.block_tokens <= MAX_BLOCK_TOKENS:
        raise InvalidRequest(
            f"prompt.block_tokens is {asked.block_tokens}, must be 1 to {MAX_BLOCK_TOKENS}"
        )
    count = len(asked.keys) // KEY_NBYTES
    tokens = asked.prompt_tokens or count * asked.block_tokens
    if tokens < count * asked.block_tokens:
        raise InvalidRequest(
            f"prompt.prompt_tokens is {tokens}, but {count} keys of {asked.block_tokens} tokens "
            f"are {count * asked.block_tokens}"
        )
    sizes = {link.info.block_tokens for link in links if link.info is not None}
    found = [link for link in links if link.info and link.info.block_tokens == asked.block_tokens]
    if not found:
        raise InvalidRequest(
            f"prompt.block_tokens is {asked.block_tokens}, but the workers of {model!r} have "
            f"{some([str(size) for size in sorted(sizes)])}"
        )
    packed = asked.keys  # once: each look at it is a copy
    starts = range(0, len(packed), KEY_NBYTES)
    given = [BlockKey(packed[start : start + KEY_NBYTES]) for start in starts]
    return KeyedPrompt(model, range(tokens), given=given), found


def _shared_text(links: list[Link]) -> Text:
    """The tokenizer that most of these workers use; among equals the first by digest."""
    texts = {link.text.digest: link.text for link in links if link.text is not None}
    if not texts:
        raise WorkerLost("no worker is ready")
    counts = Counter(digest(link) for link in links)
    return texts[min(texts, key=lambda each: (-counts[each], each))]


def _too_long(prompt: Prompt, info: worker_pb2.WorkerInfo) -> bool:
    return len(prompt.ids) + 1 > info.max_tokens


def _misfit(prompt: Prompt, info: worker_pb2.WorkerInfo) -> str | None:
    """Why this worker can't take the prompt, or None."""
    if _too_long(prompt, info):
        return (
            f"prompt: {len(prompt.ids)} tokens, and one more for the answer, but model "
            f"{info.model!r} takes {info.max_tokens} in all"
        )
    if prompt.highest >= info.vocab_size:
        return (
            f"prompt: token id {prompt.highest}, but model {info.model!r} has "
            f"{info.vocab_size} tokens"
        )
    return None


def _fitting(prompt: Prompt, links: list[Link]) -> list[Link]:
    """The workers that can take the prompt.

    Raises:
        PromptTooLong, InvalidRequest: None can; the numbers are those of the widest.
        WorkerLost: None was left while the text was read.
    """
    found = [link for link in links if fits(prompt, link)]
    if found:
        return found
    infos = [link.info for link in links if link.info is not None and prompt.space in link.roots]
    if not infos:
        raise WorkerLost(f"no worker of {prompt.model!r} is ready")
    widest = max(infos, key=lambda info: (info.max_tokens, info.vocab_size))
    told = _misfit(prompt, widest) or "prompt: fits no worker"
    raise (PromptTooLong if _too_long(prompt, widest) else InvalidRequest)(told)
