"""Made-up traffic with a seed, for tests and for whoever has no trace yet.

Four kinds, each of sessions that begin at random times and then ask several times:

    chat    people talk to a model: read, think, type; some leave early
    agents  programs in tool loops: short gaps, many turns, long growing prompts; now and then a
            person looks at the result first
    shared  one-off questions under a few system prompts of several thousand tokens
    rag     questions over documents, some asked often; the documents stand before the question
"""

import math
from collections.abc import Callable, Iterator
from heapq import heappop, heappush
from itertools import count
from random import Random
from typing import Final, NamedTuple

from kvtier.sim.trace import BLOCK_TOKENS, Request


class _Turn(NamedTuple):
    wait_s: float  # since the turn before
    added: int  # tokens of the prompt that are new since the answer before
    output: int  # tokens generated


class _Session(NamedTuple):
    head: list[tuple[int, int]]  # (what, tokens) that other sessions may share, in order
    turns: list[_Turn]


def generate(
    kind: str, seed: int, requests: int, block_tokens: int = BLOCK_TOKENS
) -> Iterator[Request]:
    """`requests` requests of a kind of `KINDS`, in order of time.

    Raises:
        KeyError: There is no such kind.
    """
    make, per_s = KINDS[kind]
    # The sessions' own randomness does not hang on how many requests are wanted.
    rng, ids = Random(f"{kind} {seed}"), _Ids(block_tokens)
    due: list[tuple[float, int, Iterator[tuple[float, Request]]]] = []
    at, number, made = 0.0, 0, 0
    while made < requests:
        if not due or at <= due[0][0]:
            heappush(due, (at, number, _play(make(rng), ids, at, number)))
            number += 1
            at += rng.expovariate(per_s)
            continue
        _, session, playing = heappop(due)
        turn = next(playing, None)
        if turn is None:
            continue
        again, request = turn
        yield request
        made += 1
        heappush(due, (again, session, playing))


class _Ids:
    """Ids of blocks, by the whole text before them."""

    def __init__(self, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self._known: dict[tuple[int, ...], int] = {}
        self._fresh = count()

    def fresh(self) -> int:
        return next(self._fresh)

    def shared(self, *what: int) -> int:
        if what not in self._known:
            self._known[what] = self.fresh()
        return self._known[what]


def _play(session: _Session, ids: _Ids, at: float, number: int) -> Iterator[tuple[float, Request]]:
    """Each request of a session, with the time of the next one."""
    size, tokens, path = ids.block_tokens, 0, tuple[int, ...]()
    blocks: list[int] = []
    for what, length in session.head:
        whole = (tokens + length) // size
        path = (*path, what, length)
        blocks += [ids.shared(*path, i) for i in range(len(blocks), whole)]
        tokens += length
    for i, turn in enumerate(session.turns):
        tokens += turn.added
        while len(blocks) < tokens // size:
            blocks.append(ids.fresh())
        partly = [ids.fresh()] if tokens % size else []
        then = at + session.turns[i + 1].wait_s if i + 1 < len(session.turns) else at
        yield then, Request(at, tokens, turn.output, (*blocks, *partly), size)
        tokens += turn.output
        at = then


def _long_tailed(rng: Random, median: float, spread: float, most: float) -> int:
    """A log-normal number of at least 1."""
    return max(1, round(min(most, median * math.exp(rng.gauss(0, spread)))))


def _popular(rng: Random, choices: int) -> int:
    """One of `choices`, the n-th about 1/n as often as the first (Zipf)."""
    return min(choices - 1, int(math.exp(rng.random() * math.log(choices + 1))) - 1)


def _chat(rng: Random) -> _Session:
    turns, wait = [], 0.0
    while True:
        output = _long_tailed(rng, 250, 0.9, 4000)
        turns.append(_Turn(wait, _long_tailed(rng, 400, 1.4, 60_000), output))
        # Reading takes as long as the answer, then they think and type.
        wait = output / 20 + _long_tailed(rng, 45, 1.1, 3000)
        if rng.random() < 0.3:
            return _Session([(0, 700)], turns)


def _agents(rng: Random) -> _Session:
    turns, wait = [], 0.0
    for _ in range(_long_tailed(rng, 12, 0.8, 80)):
        added, output = _long_tailed(rng, 900, 1.2, 30_000), _long_tailed(rng, 120, 0.8, 3000)
        turns.append(_Turn(wait, added, output))
        looked_at = rng.random() < 0.1
        wait = _long_tailed(rng, 240, 1.0, 3600) if looked_at else 2 + rng.expovariate(1 / 6)
    return _Session([(1, 9000), (100 + _popular(rng, 40), 3000)], turns)


def _shared(rng: Random) -> _Session:
    head = [(2, 600), (1000 + _popular(rng, 60), 4000)]
    turns = [_Turn(0.0, _long_tailed(rng, 500, 1.0, 8000), _long_tailed(rng, 150, 0.8, 2000))]
    while rng.random() < 0.25:
        wait = _long_tailed(rng, 60, 1.0, 1800)
        turns.append(_Turn(wait, _long_tailed(rng, 200, 0.8, 4000), 150))
    return _Session(head, turns)


def _rag(rng: Random) -> _Session:
    documents = sorted({10_000 + _popular(rng, 4000) for _ in range(rng.randint(1, 3))})
    head = [(3, 500), *((n, 1500 + 37 * (n % 100)) for n in documents)]
    turns = [_Turn(0.0, _long_tailed(rng, 60, 0.7, 1000), _long_tailed(rng, 200, 0.6, 1500))]
    while rng.random() < 0.4:
        wait = _long_tailed(rng, 40, 1.0, 1200)
        turns.append(_Turn(wait, _long_tailed(rng, 60, 0.7, 1000), 200))
    return _Session(head, turns)


KINDS: Final[dict[str, tuple[Callable[[Random], _Session], float]]] = {
    "chat": (_chat, 1.0),  # new sessions a second
    "agents": (_agents, 0.1),
    "shared": (_shared, 2.0),
    "rag": (_rag, 2.0),
}
