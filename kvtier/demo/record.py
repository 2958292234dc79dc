"""What one request of the demo did, and asking for it through the router."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Final

import grpc

from kvtier.core.tiers import Tier
from kvtier.errors import one_line
from kvtier.wire.chains import TO_WIRE
from kvtier.wire.pb import router_pb2, router_pb2_grpc, worker_pb2

EQUAL_S: Final = 0.001  # waits that differ by less are equal
ALIKE: Final = 1.25  # as are nodes of which none is so many times as fast as the other
ANSWER_S: Final = 300.0  # for one answer; seconds, unless the machine is very busy


@dataclass(slots=True)
class Record:
    """One request: where it went and why, what was restored and computed, and how fast."""

    name: str  # for people: conversation and turn
    conversation: str
    prompt_ids: list[int]
    act: str = ""
    node: str = ""
    why: str = ""
    attempts: int = 0
    candidates: list[dict[str, object]] = field(default_factory=list)  # every term of each score
    equal_loads: bool = False  # nobody waited, and both were about as fast
    picked_warmest: bool = False  # nobody else had as much as warm, or warmer
    cut: bool = False  # its worker was killed while it was answered
    restored: dict[str, int] = field(default_factory=dict)  # prompt tokens by tier
    computed: int = 0
    ttft_s: float = 0.0
    queue_s: float = 0.0
    restore_s: float = 0.0
    prefill_s: float = 0.0
    ids: list[int] = field(default_factory=list)
    text: str = ""
    first_logits: bytes = b""
    error: str = ""
    identical: bool | None = None
    logits_difference: float = 0.0

    @property
    def hit_tokens(self) -> int:
        """Prompt tokens that were not computed."""
        return sum(self.restored.values())

    @property
    def kind(self) -> str:
        """`cold`, or the tier that most of the hit came from."""
        if not self.restored:
            return "cold"
        return max(self.restored, key=lambda tier: (self.restored[tier], tier))

    def public(self) -> dict[str, object]:
        """For the JSON file: all but the raw logits and the prompt's ids."""
        shown = {name: getattr(self, name) for name in self.__slots__}
        del shown["first_logits"], shown["prompt_ids"]
        return {**shown, "kind": self.kind, "prompt_tokens": len(self.prompt_ids)}


async def ask(
    stub: router_pb2_grpc.RouterStub,
    record: Record,
    prompt: router_pb2.Prompt,
    max_tokens: int,
    on_text: Callable[[Record], None] | None = None,
    *,
    ignore_eos: bool = False,
    logits: bool = True,
) -> Record:
    """Send one request through the router and fill in `record` from its stream."""
    request = router_pb2.GenerateRequest(
        request_id=record.name,
        prompt=prompt,
        max_tokens=max_tokens,
        ignore_eos=ignore_eos,
        return_first_logits=logits,
    )
    begin = time.perf_counter()
    try:
        async for response in stub.Generate(request, timeout=ANSWER_S):
            match response.WhichOneof("body"):
                case "routed":
                    _routed(record, response.routed)
                case "started":
                    _started(record, response.started)
                case "chunk":
                    record.ttft_s = record.ttft_s or time.perf_counter() - begin
                    record.ids += response.chunk.ids
                    record.text += response.chunk.text
                    if on_text is not None:
                        on_text(record)
    except grpc.aio.AioRpcError as error:
        record.error = one_line(f"{error.code().name}: {error.details()}")
    return record


def _routed(record: Record, routed: router_pb2.Routed) -> None:
    choice = routed.choice
    record.node, record.why, record.attempts = choice.node, choice.why, routed.attempt
    record.candidates = [_terms(each) for each in (choice, *routed.others)]
    others = [each for each in routed.others if not each.draining]
    waits = [each.wait_s for each in (choice, *others)]
    paces = [_pace(each, len(record.prompt_ids)) for each in (choice, *others)]
    record.equal_loads = max(waits) - min(waits) < EQUAL_S and max(paces) < ALIKE * min(paces)
    record.picked_warmest = not any(is_warmer(warm(each), warm(choice)) for each in others)


def warm(choice: router_pb2.Choice) -> list[int]:
    """Warm tokens in each tier or a warmer one, for every tier from VRAM on."""
    held = {each.tier: each.tokens for each in choice.warm}
    return [*accumulate(held.get(TO_WIRE[tier], 0) for tier in Tier)]


def is_warmer(one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether `one` has at least as much in each tier or warmer ones, and somewhere more."""
    return one != other and all(a >= b for a, b in zip(one, other, strict=True))


def _pace(choice: router_pb2.Choice, tokens: int) -> float:
    """Seconds that the router thinks a token takes there to be computed."""
    pulled = 0 if choice.source in ("", Tier.SHARED.label) else choice.source_tokens
    return choice.prefill_s / max(1, tokens - warm(choice)[-1] - pulled)


def _terms(choice: router_pb2.Choice) -> dict[str, object]:
    names = ("node", "draining", "seconds", "wait_s", "load_s", "prefill_s", "why")
    return {name: getattr(choice, name) for name in names} | {"warm": warm(choice)}


def _started(record: Record, started: worker_pb2.Started) -> None:
    names = {tier.value + 1: tier.label for tier in Tier}
    record.restored = {names[each.tier]: each.tokens for each in started.restored if each.tokens}
    record.computed = started.computed_tokens
    record.queue_s, record.restore_s = started.queue_s, started.restore_s
    record.prefill_s = started.prefill_s
    record.first_logits = started.first_logits
