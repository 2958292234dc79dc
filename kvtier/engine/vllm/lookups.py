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

Keys = Callable[[Sequence[bytes]], Sequence[BlockKey]]


class _Asked:
    """One request's questions and answers."""

    def __init__(self, request: str, begun: float, deadline: float) -> None:
        self.use = Use(request=number_of(request))
        self.begun = begun
        self.deadline = deadline
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
        self._answers: deque[tuple[_Asked, Sequence[bytes], list[bool]]] = deque()
        self.late = 0  # blocks that were a miss because the answer was not there

    def lookup(self, request: str, key: bytes) -> bool | None:
        """Whether the block is held; None: not known yet, ask again in a later step."""
        asked = self._asked.get(request)
        if asked is None:
            now = self._clock()
            asked = self._asked[request] = _Asked(request, now, now + self._lookup_s)
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

    def flush(self) -> None:
        """Send off the questions of this step."""
        self._drain()
        some, self._fresh = self._fresh, []
        for asked in some:
            fresh, asked.fresh = asked.fresh, []
            self._line.put(_Question(self, asked, fresh))

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
        if asked is None:
            return {}, 0.0
        return dict(asked.loaded), self._clock() - asked.begun

    def end(self, request: str) -> None:
        """The request asks no more."""
        self._asked.pop(request, None)

    @property
    def waiting(self) -> bool:
        """Whether any question has no answer yet."""
        return any(asked.waiting for asked in self._asked.values())

    def pending(self, request: str) -> bool:
        """Whether a question of this request has no answer yet, and still has time."""
        asked = self._asked.get(request)
        if asked is None or not asked.waiting or self._answers:
            return False
        return self._clock() < asked.deadline

    def _drain(self) -> None:
        while self._answers:
            asked, keys, held = self._answers.popleft()
            for key, answer in zip(keys, held, strict=True):
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

    def __init__(self, lookups: Lookups, asked: _Asked, fresh: Sequence[bytes]) -> None:
        self._lookups = lookups
        self._asked = asked
        self._fresh = fresh

    def __call__(self, attached: Attached | None) -> None:
        self._lookups.answer(attached, self._asked, self._fresh)
