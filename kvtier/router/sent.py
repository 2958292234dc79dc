"""What was sent to workers a moment ago and they have not told of yet: blocks, load, and speeds."""

import math
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from kvtier.core.blocks import BlockKey
from kvtier.core.breakeven import as_first
from kvtier.core.learned import Sample
from kvtier.core.tiers import Tier
from kvtier.wire.chains import TO_WIRE
from kvtier.wire.pb import worker_pb2

SPECULATIVE_S: Final = 2.0  # so long a worker counts as holding what was sent to it
MAX_SPECULATED: Final = 1 << 18  # blocks, over all workers
EXPIRED_AT_ONCE: Final = 4  # prompts
MOST_ENDED: Final = 1024  # first tokens of a worker between two words of it

FROM_WIRE: Final = {int(wire): tier for tier, wire in TO_WIRE.items()}


class Speculation:
    """What workers will hold soon: the prompts sent to them a moment ago. Time is passed in."""

    def __init__(self) -> None:
        self._until: dict[str, dict[BlockKey, float]] = defaultdict(dict)
        self._order: deque[tuple[float, str, Sequence[BlockKey]]] = deque()
        self._blocks = 0

    def add(self, worker: str, keys: Sequence[BlockKey], now: float) -> None:
        """`worker` was sent a prompt with these keys; the oldest make room for it."""
        keys = keys[:MAX_SPECULATED]
        self._order.append((now + SPECULATIVE_S, worker, keys))
        self._blocks += len(keys)
        self._until[worker].update(dict.fromkeys(keys, now + SPECULATIVE_S))
        for _ in range(EXPIRED_AT_ONCE):  # the rest is for the next: a crowd may end in a moment
            if self._order[0][0] <= now:
                self._forget_oldest()
        while self._blocks > MAX_SPECULATED:
            self._forget_oldest()

    def blocks(self, worker: str, keys: Sequence[BlockKey], now: float) -> int:
        """How many leading `keys` the worker was sent within the last SPECULATIVE_S."""
        until = self._until.get(worker)
        if until is None:
            return 0
        return next((i for i, key in enumerate(keys) if until.get(key, now) <= now), len(keys))

    def _forget_oldest(self) -> None:
        expires, worker, keys = self._order.popleft()
        self._blocks -= len(keys)
        until = self._until[worker]
        for key in keys:
            if until.get(key) == expires:  # not sent again since
                del until[key]
        if not until:
            del self._until[worker]


class Computed(NamedTuple):
    """Tokens that a worker has computed of prompts whose first token is to come, and when so."""

    tokens: float
    heard_s: float


NOTHING: Final = Computed(0.0, 0.0)


class _Ended:
    """Tokens of prompts whose first token came, the newest MOST_ENDED of them."""

    __slots__ = ("_each", "_sum")

    def __init__(self) -> None:
        self._each: deque[tuple[float, int]] = deque()
        self._sum = 0

    def add(self, now: float, tokens: int) -> None:
        """One more; time goes on."""
        self._each.append((now, tokens))
        self._sum += tokens
        if len(self._each) > MOST_ENDED:
            self._sum -= self._each.popleft()[1]

    def since(self, heard_s: float) -> int:
        """Their sum from `heard_s` on; older ones are forgotten."""
        while self._each and self._each[0][0] <= heard_s:
            self._sum -= self._each.popleft()[1]
        return self._sum


class Load:
    """Prompt tokens sent to workers that no first token has come for yet."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._tokens: dict[str, int] = defaultdict(int)
        self._began: dict[str, float] = {}  # when a prompt had its first token last
        self._ended: dict[str, _Ended] = {}  # prompts that had theirs of late
        self._passing: deque[tuple[float, Sent]] = deque()

    def send(self, worker: str, tokens: int, expires: float | None) -> "Sent":
        """Count `tokens` for `worker` until `Sent.began` or, if given, until `expires`."""
        self._tokens[worker] += tokens
        sent = Sent(self, worker, tokens)
        if expires is not None:
            self._passing.append((expires, sent))
        return sent

    def waiting(self, worker: str, now: float, computed: Computed = NOTHING) -> int:
        """Tokens sent to `worker` that are still to be computed, as far as we know.

        `computed` is what the worker said last. Where a prompt has had its first token since, what
        it said was of that one, as far as we know, and the others are taken to be whole.
        """
        while self._passing and self._passing[0][0] <= now:
            self._passing.popleft()[1].began(seen=False)
        tokens = self._tokens.get(worker, 0)
        if self._began.get(worker, -math.inf) >= computed.heard_s:
            return tokens
        return max(0, tokens - round(computed.tokens))

    def said(self, worker: str, tokens: int, heard_s: float) -> int:
        """What is left of the `tokens` that the worker said at `heard_s` are still to be computed.

        Prompts that had their first token since then are in them no more.
        """
        ended = self._ended.get(worker)
        return max(0, tokens - ended.since(heard_s)) if ended is not None else tokens

    def drop(self, worker: str, tokens: int, *, seen: bool) -> None:
        """Take back what `send` counted; `seen`: its first token was, or its end."""
        self._tokens[worker] -= tokens
        self._began[worker] = now = self._clock()
        if seen:
            self._ended.setdefault(worker, _Ended()).add(now, tokens)
        if not self._tokens[worker]:
            del self._tokens[worker]

    def keep_only(self, workers: Collection[str]) -> None:
        """Forget when prompts of other workers had their first token."""
        self._began = {name: at for name, at in self._began.items() if name in workers}
        self._ended = {name: ended for name, ended in self._ended.items() if name in workers}


@dataclass(slots=True)
class Sent:
    """One prompt that `Load` counts."""

    load: Load
    worker: str
    tokens: int
    teach: Callable[[Sample], None] | None = None

    def told(self, started: worker_pb2.Started, by: worker_pb2.WorkerInfo) -> None:
        """What the worker says of the request at its first token; others are sent by it."""
        if self.teach is not None:
            loaded = tuple(
                (FROM_WIRE[each.tier], each.tokens * by.kv_bytes_per_token)
                for each in started.restored
                if each.tokens
                and not started.pulled_tokens  # its time says nothing of the tier
                and FROM_WIRE.get(each.tier, Tier.VRAM) is not Tier.VRAM
            )
            stop = max(started.prompt_tokens, started.computed_tokens)
            tokens = as_first(stop - started.computed_tokens, stop, by.doubles_at)
            self.teach(Sample(tokens, started.prefill_s, loaded, started.restore_s))

    def began(self, *, seen: bool = True) -> None:
        """Its first token came, or the request ended; only the first call counts.

        One that nobody follows is only thought to have begun: not `seen`.
        """
        tokens, self.tokens = self.tokens, 0
        if tokens:
            self.load.drop(self.worker, tokens, seen=seen)
