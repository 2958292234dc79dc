"""What every way in does alike: limits of number and time, then routing, then an answer."""

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeVar

from kvtier import metrics
from kvtier.config import RouterConfig
from kvtier.errors import DeadlinePassed, InvalidRequest, RequestError
from kvtier.router.admission import Admission
from kvtier.router.generate import Job, Write, generate
from kvtier.router.link import Link
from kvtier.router.placement import Placement, Prompt
from kvtier.router.prompts import Prompts, digest, fits
from kvtier.router.record import Recorder
from kvtier.wire.pb import router_pb2

MAX_TEMPERATURE: Final = 100.0
MAX_REQUEST_ID: Final = 128  # characters

MAX_FALLBACKS: Final = 16  # named behind the best; more would cost time and help nobody

T = TypeVar("T")


class Front:
    """Serves requests whichever protocol brought them. Lives on one loop."""

    def __init__(
        self, config: RouterConfig, placement: Placement, prompts: Prompts, rng: random.Random,
        clock: Callable[[], float],
    ) -> None:  # fmt: skip
        self.prompts = prompts
        self.recorder = Recorder()
        self._config = config
        self._placement = placement
        self._rng = rng
        self._clock = clock
        self._admission = Admission(config.max_requests, config.max_waiting, clock)

    async def within(
        self, limit_s: float | None, work: Callable[[float], Awaitable[T]], *, wait: bool,
        counted: bool = True,
    ) -> T:  # fmt: skip
        """What `work` returns, which is given its deadline, within the limits of time and number.

        Args:
            limit_s: The caller's; None: the configured one.
            work: Cancelled at the deadline.
            wait: Whether to queue for a place rather than be refused at once.
            counted: Whether the end is counted in the metrics.

        Raises:
            RequestError: Overloaded, DeadlinePassed, or what `work` raises.
        """
        limit_s = self._config.timeout_s if limit_s is None else limit_s
        deadline = self._clock() + limit_s
        status = "CANCELLED"
        try:
            async with asyncio.timeout_at(deadline), self._admission.place(deadline, wait=wait):
                answer = await work(deadline)
                status = "OK"
                return answer
        except RequestError as error:
            status = error.grpc_status
            raise
        except TimeoutError:
            status = DeadlinePassed.grpc_status
            raise DeadlinePassed(f"not finished within {limit_s:g} s") from None
        finally:
            if counted:
                metrics.REQUESTS.labels(status).inc()

    async def route(self, request: router_pb2.RouteRequest) -> router_pb2.RouteResponse:
        """The best worker and those after it; remembers that the prompt goes there."""
        prompt, links = await self.prompts.read(request)
        most = 1 + MAX_FALLBACKS
        ranked = self._placement.rank(prompt, links, self._rng.random, prompt.ready_at, most)
        best, *others = ranked
        self._placement.sent(prompt, best, followed=False)
        self.recorder.tell(prompt, best.info, best.root, time.time(), 0)
        return router_pb2.RouteResponse(
            choice=best.proto(), fallbacks=[each.proto() for each in others],
            prompt_tokens=len(prompt.ids),
        )  # fmt: skip

    async def explain(self, request: router_pb2.RouteRequest) -> router_pb2.ExplainResponse:
        """Every candidate; remembers nothing."""
        # Every router must say the same, so nothing is left to chance or to its own history.
        prompt, links = await self.prompts.read(request)
        ranked = self._placement.rank(prompt, links, None)
        choices = [each.explained(self._placement.behind) for each in ranked]
        return router_pb2.ExplainResponse(choices=choices, prompt_tokens=len(prompt.ids))

    async def generate(
        self, request: router_pb2.GenerateRequest, deadline: float, write: Write, *,
        fill: bool = False, fallbacks: int | None = MAX_FALLBACKS, apart: bool = False,
    ) -> None:  # fmt: skip
        """Route and pass on the answer to `write`; see `generate.generate` for what it raises.

        Args:
            request: What is asked.
            deadline: On the clock.
            write: Takes the messages.
            fill: Without `max_tokens` it may take all the room that the model has.
            fallbacks: How many workers behind the best each Routed names; None: no Routed.
            apart: Whether each token gets a Chunk of its own.
        """
        _check(request)
        prompt, links = await self.prompts.read(request)
        readers = {digest(link) for link in links}

        def candidates(longer: Prompt) -> list[Link]:
            found = self._placement.candidates(longer.model, *longer.space)
            return [each for each in found if digest(each) in readers and fits(longer, each)]

        job = Job(request, prompt, candidates, deadline, fill, fallbacks, apart)
        attempts = self._config.max_attempts
        root = links[0].roots[prompt.space]
        with self.recorder.recorded(prompt, links[0].info, root) as seen:

            async def recorded(ready: Sequence[router_pb2.GenerateResponse]) -> None:
                seen(sum(len(each.chunk.ids) for each in ready))
                await write(ready)

            await generate(job, self._placement, attempts, self._rng, recorded)


def _check(request: router_pb2.GenerateRequest) -> None:
    if not (math.isfinite(request.temperature) and 0 <= request.temperature <= MAX_TEMPERATURE):
        raise InvalidRequest(
            f"temperature is {request.temperature:g}, must be 0 to {MAX_TEMPERATURE:g}"
        )
    if request.HasField("max_tokens") and not request.max_tokens:
        raise InvalidRequest("max_tokens is 0, must be at least 1; not set it is the default")
    if len(request.request_id) > MAX_REQUEST_ID:
        raise InvalidRequest(
            f"request_id has {len(request.request_id)} characters, limit {MAX_REQUEST_ID}"
        )
    kind = request.prompt.WhichOneof("kind")
    if kind == "keys":
        raise InvalidRequest("prompt: nothing can be generated from keys; send text or token ids")
    if request.resume and kind != "tokens":
        raise InvalidRequest("resume: only with a prompt in token ids")
