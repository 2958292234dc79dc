"""Which engine's own HTTP address a gateway's request goes to."""

import asyncio
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Final

from kvtier import metrics
from kvtier.config import RouterConfig, parse_address
from kvtier.errors import ConfigError, InvalidRequest, Overloaded, UnknownTenant, WorkerLost
from kvtier.router.http.openai import LONG_BODY, BadRequest, prompt_of
from kvtier.router.link import Link
from kvtier.router.placement import Placement, Prompt
from kvtier.router.prompts import KeyedPrompt, Prompts, Space, some
from kvtier.router.sent import Sent
from kvtier.wire.pb import router_pb2

READ_S: Final = 1.0  # for a prompt to become token ids; then it goes by load alone
BYTES_PER_TOKEN: Final = 4  # of a body that was not read
# Paths whose body is known: one that is no JSON is refused here.
_KNOWN: Final = ("/v1/completions", "/v1/chat/completions")


@dataclass(frozen=True, slots=True)
class Picked:
    """Where to, best first, and what is to be told when its answer begins."""

    endpoints: list[str]
    sent: Sent


class Picker:
    """Picks among the workers whose engines have an HTTP address. Lives on one loop.

    The address is that of the worker's entry in router.members, else what the worker says of
    itself; one without a host is at the host of the worker's own address.
    """

    def __init__(
        self, config: RouterConfig, prompts: Prompts, placement: Placement,
        luck: Callable[[], float],
    ) -> None:  # fmt: skip
        self._count = config.epp_endpoints
        self._fixed = {member.worker: member.http for member in config.members if member.http}
        for worker, http in self._fixed.items():
            parse_address(_with_host(http, worker), "router.members.http")
        self._prompts = prompts
        self._placement = placement
        self._luck = luck

    async def pick(
        self, path: str, body: bytes, subset: Collection[str] | None, tenant: str = "",
        session: str = "",
    ) -> Picked:  # fmt: skip
        """The endpoints for a request.

        Args:
            path: Of the request, perhaps with a query.
            body: All of it; empty where there is none.
            subset: The endpoints that may be picked; None: all.
            tenant: Whose blocks may be used; only workers that know it are asked.
            session: The conversation that it is of; at most MAX_SESSION bytes.

        Raises:
            InvalidRequest: The body of a known path is no JSON.
            UnknownModel: Nobody serves the model, or adapter, that it names.
            UnknownTenant: No worker of the model knows the tenant.
            WorkerLost: No endpoint is ready, or none in `subset`.
        """
        if len(body) > LONG_BODY:
            model, asked = await asyncio.to_thread(_parse, path, body)
        else:
            model, asked = _parse(path, body)
        by, prompt, links = await self._read(model, tenant, asked, body)
        found = self._among(links, subset)
        if not found and by == "prompt":  # those with another tokenizer may be in the subset
            by, prompt = "load", _by_length(Space(prompt.model, *prompt.space), body)
            found = self._among(self._placement.candidates(prompt.model, *prompt.space), subset)
        if not found:
            limit = "" if subset is None else f" among the {len(subset)} of the subset"
            of = f" of {prompt.model!r}" if prompt.model else ""
            raise WorkerLost(f"no endpoint{of} is ready{limit}")
        prompt.session = session  # however it was read
        links = list(found.values())
        ranked = self._placement.rank(prompt, links, self._luck, most=self._count)
        endpoints = {link.address: endpoint for endpoint, link in found.items()}
        metrics.PICKS.labels(by).inc()
        return Picked(
            [endpoints[each.link.address] for each in ranked],
            self._placement.sent(prompt, ranked[0], followed=True),
        )

    def endpoint(self, link: Link) -> str:
        """Where this worker's engine answers HTTP; empty: nowhere."""
        said = link.info.http_address if link.info is not None else ""
        http = self._fixed.get(link.address) or said
        return _with_host(http, link.address) if http else ""

    async def _read(
        self, model: str, tenant: str, asked: router_pb2.Prompt | None, body: bytes
    ) -> tuple[str, Prompt, list[Link]]:
        """How the prompt was read, and it, and who may take it."""
        if asked is not None:
            try:
                async with asyncio.timeout(READ_S):
                    request = router_pb2.RouteRequest(model=model, prompt=asked, tenant=tenant)
                    return "prompt", *await self._prompts.read(request)
            except (InvalidRequest, Overloaded, TimeoutError):
                pass  # what we cannot read the engine perhaps can, and if not, it says so itself
        names = self._prompts.models()
        if not model and len(names) != 1:
            if names and tenant and not self._prompts.knows(tenant):
                raise UnknownTenant(
                    f"tenant {tenant[:200]!r} is not known to any worker, and the request names no "
                    f"model; served: {some(names)}"
                )
            spaces = [Space(name, "", tenant) for name in names]
            space = Space("", "", tenant)
        else:
            spaces = [space := self._prompts.space(model, tenant=tenant)]
        links = [link for each in spaces for link in self._placement.candidates(*each)]
        return "load", _by_length(space, body), links

    def _among(self, links: Sequence[Link], subset: Collection[str] | None) -> dict[str, Link]:
        found = {self.endpoint(link): link for link in links}
        found.pop("", None)
        return {at: link for at, link in found.items() if subset is None or at in subset}


def _parse(path: str, body: bytes) -> tuple[str, router_pb2.Prompt | None]:
    if not body:
        return "", None
    try:
        model, prompt = prompt_of(json.loads(body))
        model.encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        if path.partition("?")[0] in _KNOWN:
            raise BadRequest(f"body: not JSON: {error}") from None
        return "", None
    return model, prompt


def _by_length(space: Space, body: bytes) -> Prompt:
    """A prompt of which only the length is known, more or less."""
    length = range(1 + len(body) // BYTES_PER_TOKEN)
    return KeyedPrompt(space.model, length, space.adapter, space.tenant)


def _with_host(http: str, worker: str) -> str:
    return f"{worker.rpartition(':')[0]}{http}" if http.startswith(":") else http


def check_endpoints(config: RouterConfig) -> None:
    """Refuse `http` addresses in router.members without a worker.

    Raises:
        ConfigError: As said.
    """
    for i, member in enumerate(config.members):
        if member.http and not member.worker:
            raise ConfigError(f"router.members[{i}].http: only with a worker")
