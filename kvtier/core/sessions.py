"""Where each conversation went last: a hint for its next request, never a rule.

What a worker holds is known from its feed, so a conversation finds its blocks without this. The
hint settles what the score leaves open: blocks that nobody has told of yet, prompts that could not
be read, workers that are as good as equal.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Final, NamedTuple

from kvtier.core.score import tied

MAX_SESSION: Final = 256  # bytes of a name
MAX_SESSIONS: Final = 1 << 16  # 260 bytes each; the longest unused make room
SESSION_S: Final = 1800.0  # after its last request a session is forgotten
HINT_SHARE: Final = 0.05  # of the best score: what following a hint may cost
HINT_S: Final = 0.005  # or that, where it is more
FORGOTTEN_AT_ONCE: Final = 4


class Sessions:
    """The worker that each session was last sent to. Time is passed in."""

    def __init__(self, most: int = MAX_SESSIONS) -> None:
        self._most = most
        # By hash: names may be long, and one mistaken for another costs no more than a hint does.
        self._last: OrderedDict[int, tuple[str, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._last)

    def place(self, session: Hashable, worker: str, now: float) -> None:
        """`session` was sent to `worker`."""
        key = hash(session)
        self._last[key] = worker, now
        self._last.move_to_end(key)
        for _ in range(FORGOTTEN_AT_ONCE):  # the rest is for the next: a crowd may end in a moment
            _, at = next(iter(self._last.values()))
            if len(self._last) <= self._most and now - at < SESSION_S:
                break
            self._last.popitem(last=False)

    def last(self, session: Hashable, now: float) -> str:
        """Where `session` was sent to within the last SESSION_S; empty: nobody knows."""
        worker, at = self._last.get(hash(session), ("", now))
        return worker if now - at < SESSION_S else ""


class Standing(NamedTuple):
    """What a hint has to know of one candidate."""

    name: str
    draining: bool
    seconds: float  # its score


class Hint(NamedTuple):
    """Which candidate may come first, and whether it would have come first anyway."""

    at: int
    decided: bool


def hint(order: Sequence[Standing], worker: str) -> Hint | None:
    """Whether `worker` may be put first of `order`, which has the best first.

    Only where that costs next to nothing: it is not draining, and its score is at most HINT_SHARE
    or HINT_S above the best.
    """
    at = next((i for i, each in enumerate(order) if each.name == worker), None)
    if at is None or order[at].draining:
        return None
    scores = sorted(each.seconds for each in order if not each.draining)
    if not order[at].seconds <= scores[0] + max(HINT_S, HINT_SHARE * scores[0]):
        return None
    return Hint(at, at > 0 or (len(scores) > 1 and tied(scores[1], scores[0])))
