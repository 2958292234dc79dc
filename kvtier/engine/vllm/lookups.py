"""What the node holds of the prompts that wait: asked in batches, answered by a deadline."""

from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Final

from kvtier.core.blocks import BlockKey
from kvtier.core.policy import Use
from kvtier.core.tiers import Tier
from kvtier.engine.requests import number_of
from kvtier.engine.vllm.line import Attached, Line, News

FIRST_GROUP: Final = bytes(4)  # the end of its blocks' names
MAX_APART: Final = 256  # blocks of a hybrid model that are asked for one by one
MAX_AHEAD: Final = 16  # requests of a step that are asked for before they are looked up

Keys = Callable[[Sequence[bytes]], Sequence[BlockKey]]


class _Asked:
    """One request's questions and answers."""

    def __init__(self, request: str) -> None:
        self.use = Use(request=number_of(request))
        self.begun: float | None = None  # when it was first looked up
        self.deadline = float("inf")  # from then on nobody waits for an answer
        self.ahead = False  # its first answer is still to come, and was asked for ahead
        self.turn = False  # the engine had it in hand: what it has not looked up it did not need
        self.answers: dict[bytes, bool] = {}
        self.fresh: list[bytes] = []  # to be asked at the end of this step
        self.waiting: set[bytes] = set()
        self.sources: dict[bytes, Tier] = {}  # where blocks were that the question has fetched
        self.loaded: Counter[Tier] = Counter()  # blocks of the first group of layers


class Lookups:
    """The scheduler's side of lookups: every method returns at once, and none raises.

    A question is put in one step and answered in a later one; what has no answer by the request's
    deadline is a miss. An answer stays the same for the rest of the request, or a load that fails
    would be tried for ever.
    """

    def __init__(
        self, line: Line, keys: Keys, lookup_s: float, news: News, clock: Callable[[], float]
    ) -> None:
        self._line = line
        self._keys = keys
        self._lookup_s = lookup_s
        self._news = news
        self._clock = clock
        self._asked: dict[str, _Asked] = {}
        self._fresh: list[_Asked] = []  # with questions of this step
        self._ahead: list[str] = []  # requests that were asked for ahead in this step,
        self._most_ahead = MAX_AHEAD  # at most so many: fewer where some had no place in it
        self._answers: deque[tuple[_Asked, Sequence[bytes], Sequence[bool | None]]] = deque()
        self.late = 0  # blocks that were a miss because the answer was not there

    def lookup(self, request: str, key: bytes) -> bool | None:
        """Whether the block is held; None: not known yet, ask again in a later step."""
        asked = self._asked.get(request)
        if asked is None:
            asked = self._asked[request] = _Asked(request)
        if asked.begun is None:
            asked.begun = self._clock()
            asked.deadline = asked.begun + self._lookup_s
        if not asked.ahead:  # or the answer, which leaves some open, would come in mid-prompt
            self._drain()
        answer = asked.answers.get(key)
        if answer is not None:
            return answer
        if self._clock() >= asked.deadline:
            self.late += 1
            asked.answers[key] = False
            return False
        if key not in asked.waiting:
            asked.waiting.add(key)
            if not asked.fresh:
                self._fresh.append(asked)
            asked.fresh.append(key)
        return None

    def ahead(self, request: str, keys: Sequence[bytes]) -> bool:
        """A request has come that is likely to be looked up in this step, by some of these blocks.

        So the answers to requests that come at once are on their way together, not each behind
        the one before. Only of models with one group of layers. False: it was not asked for.
        """
        if len(self._ahead) >= self._most_ahead or request in self._asked:
            return False
        if not keys or keys[0][-4:] != keys[-1][-4:]:
            return False
        asked = self._asked[request] = _Asked(request)
        asked.deadline = self._clock() + self._lookup_s
        asked.ahead = True
        asked.waiting.update(keys)
        self._ahead.append(request)
        self._line.put(_Question(self, asked, keys, ahead=True))
        return True

    def turn(self, request: str) -> None:
        """A request has its turn in the schedule: it is looked up now, or all of it is there."""
        if (asked := self._asked.get(request)) is not None:
            asked.turn = True

    def flush(self) -> None:
        """Send off the questions of this step."""
        self._drain()
        some, self._fresh = self._fresh, []
        for asked in some:
            fresh, asked.fresh = asked.fresh, []
            self._line.put(_Question(self, asked, fresh))

    def step_ends(self) -> None:
        """What was asked ahead and not looked up is asked anew when it is: it could be outdated."""
        if ahead := self._ahead:
            self._ahead, self._most_ahead = [], min(2 * self._most_ahead, MAX_AHEAD)
        for request in ahead:
            if (unused := self._asked.get(request)) is not None and unused.begun is None:
                self.end(request)
                if not unused.turn:
                    self._most_ahead = 1
        self.flush()

    def failed(self, keys: Sequence[bytes]) -> None:
        """A load of these blocks failed: for every request of now they are a miss."""
        for asked in self._asked.values():
            for key in keys:
                if key in asked.answers:
                    asked.answers[key] = False

    def loaded(self, request: str, keys: Sequence[bytes], sources: Sequence[Tier]) -> None:
        """These blocks were loaded for a request; `sources` is where the load found them."""
        asked = self._asked.get(request)
        if asked is not None:
            asked.loaded.update(
                asked.sources.get(key, source)
                for key, source in zip(keys, sources, strict=True)
                if key.endswith(FIRST_GROUP)
            )

    def restored(self, request: str) -> tuple[dict[Tier, int], float]:
        """Blocks that were loaded for a request, by where they were, and the seconds it took."""
        asked = self._asked.get(request)
        if asked is None or asked.begun is None:
            return {}, 0.0
        return dict(asked.loaded), self._clock() - asked.begun

    def end(self, request: str) -> None:
        """The request asks no more."""
        if (asked := self._asked.pop(request, None)) is not None:
            asked.deadline = float("-inf")

    @property
    def waiting(self) -> bool:
        """Whether any question has no answer yet."""
        return any(asked.waiting for asked in self._asked.values())

    def open(self, request: str) -> bool:
        """Whether a look-up of this request was told to ask again, and no answer heeded since."""
        asked = self._asked.get(request)
        return asked is not None and asked.begun is not None and bool(asked.waiting)

    def pending(self, request: str) -> bool:
        """Whether a question of this request has no answer yet, and still has time."""
        self._drain()
        asked = self._asked.get(request)
        if asked is None or not asked.waiting or asked.begun is None:
            return False
        return self._clock() < asked.deadline

    def _drain(self) -> None:
        while self._answers:
            asked, keys, held = self._answers.popleft()
            asked.ahead = False
            for key, answer in zip(keys, held, strict=True):
                if answer is not None:
                    asked.answers.setdefault(key, answer)
                asked.waiting.discard(key)

    # --- on the line's thread ---------------------------------------------------------

    def answer(self, attached: Attached | None, asked: _Asked, fresh: Sequence[bytes]) -> None:
        """Ask the daemon; whatever happens, there is an answer."""
        held = [False] * len(fresh)
        try:
            if attached is not None and self._clock() < asked.deadline:
                held = self._ask(attached, asked, fresh)
        finally:
            self._answers.append((asked, fresh, held))
            self._news.tell()

    def answer_ahead(self, attached: Attached | None, asked: _Asked, keys: Sequence[bytes]) -> None:
        """Ask the daemon as far as that costs no store a question; None is left to ask.

        VRAM may have a part of the prompt that nobody else has: only the first miss is sure to be
        one for a look-up that begins deeper.
        """
        held: list[bool | None] = [None] * len(keys)
        try:
            if attached is None:
                held = [False] * len(keys)
            elif self._clock() < asked.deadline:
                found = attached.client.match(self._keys(keys)).blocks
                held[:found] = [True] * found
                if found < len(keys) and Tier.SHARED not in attached.client.tiers:
                    held[found] = False
        finally:
            self._answers.append((asked, keys, held))
            self._news.tell()

    def _ask(self, attached: Attached, asked: _Asked, fresh: Sequence[bytes]) -> list[bool]:
        groups: dict[bytes, list[int]] = {}
        for index, key in enumerate(fresh):
            groups.setdefault(key[-4:], []).append(index)
        held = [False] * len(fresh)
        for indexes in groups.values():
            keys = self._keys([fresh[index] for index in indexes])
            found = self._leading(attached, keys, asked, [fresh[index] for index in indexes])
            for index in indexes[:found]:
                held[index] = True
            if len(groups) > 1:  # a sliding window is asked for from its end, with gaps
                for index, key in list(zip(indexes, keys, strict=True))[found:MAX_APART]:
                    held[index] = attached.client.match([key]).blocks == 1
        return held

    def _leading(
        self, attached: Attached, keys: Sequence[BlockKey], asked: _Asked, names: Sequence[bytes]
    ) -> int:
        client = attached.client
        found = client.match(keys).blocks
        if found == len(keys) or Tier.SHARED not in client.tiers:
            return found
        # MATCH asks no store. A read does, and what it finds is on its way before it is wanted.
        wait_s = max(0.0, asked.deadline - self._clock()) / 2
        with client.read(keys, found, wait_s=wait_s, use=asked.use) as lease:
            asked.sources.update(zip(names[found:], lease.sources, strict=False))
            return max(found + len(lease.slots), client.match(keys).blocks)


class _Question:
    """One request's new questions, as work for a line."""

    def __init__(
        self, lookups: Lookups, asked: _Asked, fresh: Sequence[bytes], *, ahead: bool = False
    ) -> None:
        self._answer = lookups.answer_ahead if ahead else lookups.answer
        self._asked = asked
        self._fresh = fresh

    def __call__(self, attached: Attached | None) -> None:
        self._answer(attached, self._asked, self._fresh)
