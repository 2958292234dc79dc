"""Made-up traffic of odd kinds, on which a policy that learns may go wrong. By seed."""

from collections.abc import Callable, Iterator
from itertools import count
from random import Random

from kvtier.sim.trace import BLOCK_TOKENS, Request
from kvtier.sim.workloads import generate


class _Blocks:
    """Ids that nobody has."""

    def __init__(self, rng: Random) -> None:
        self._rng, self._ids = rng, count()

    def new(self, least: int, most: int) -> tuple[int, ...]:
        return tuple(next(self._ids) for _ in range(self._rng.randint(least, most)))


def _request(at_s: float, blocks: tuple[int, ...]) -> Request:
    return Request(at_s, len(blocks) * BLOCK_TOKENS, 100, blocks)


def uniform(seed: int, requests: int) -> Iterator[Request]:
    """Any of a hundred documents, whatever was asked for before: all that is learned is chance."""
    rng, at = Random(seed), 0.0
    blocks = _Blocks(rng)
    documents = [blocks.new(1, 60) for _ in range(20)]
    for _ in range(requests):
        at += rng.expovariate(0.3)
        yield _request(at, rng.choice(documents))


def by_recency(seed: int, requests: int) -> Iterator[Request]:
    """What was asked for last is asked for again, whatever the time: LRU is right."""
    rng, at = Random(seed), 0.0
    blocks = _Blocks(rng)
    stack = [blocks.new(2, 10) for _ in range(200)]
    for _ in range(requests):
        at += rng.expovariate(0.06 if rng.random() < 0.05 else 3)
        place = min(len(stack) - 1, int(rng.paretovariate(0.7)) - 1)
        path = stack.pop(place)
        if rng.random() < 0.4:
            path = blocks.new(2, 10)
        stack = [path, *stack][:200]
        yield _request(at, path)


def growing(seed: int, requests: int) -> Iterator[Request]:
    """Thirty conversations at a time, each as likely to go on as any other."""
    rng, at = Random(seed), 0.0
    blocks, going = _Blocks(rng), list[tuple[int, ...]]()
    for _ in range(requests):
        at += rng.expovariate(5)
        if len(going) < 30:
            going.append(blocks.new(1, 16))
        n = rng.randrange(len(going))
        going[n] += blocks.new(1, 8)
        yield _request(at, going[n])
        if rng.random() < 0.1:
            going.pop(n)


def twice(seed: int, requests: int) -> Iterator[Request]:
    """Programs, and the same once more."""
    first = [*generate("agents", seed, requests // 2)]
    yield from first
    for request in first:
        yield request._replace(at_s=request.at_s + first[-1].at_s)


def change_of_kind(seed: int, requests: int) -> Iterator[Request]:
    """People first, then programs, whose blocks come back at once or never."""
    first = [*generate("chat", seed, requests // 2)]
    yield from first
    for request in generate("agents", seed, requests // 2):
        ids = tuple(block + 10_000_000 for block in request.blocks)
        yield request._replace(at_s=request.at_s + first[-1].at_s, blocks=ids)


def at_pace(factor: float) -> Callable[[int, int], Iterator[Request]]:
    """Chat, so many times as fast."""

    def paced(seed: int, requests: int) -> Iterator[Request]:
        for request in generate("chat", seed, requests):
            yield request._replace(at_s=request.at_s / factor)

    return paced


KINDS: dict[str, Callable[[int, int], Iterator[Request]]] = {
    "uniform": uniform,
    "by recency": by_recency,
    "growing": growing,
    "twice": twice,
    "change of kind": change_of_kind,
    "slow": at_pace(1 / 30),
    "fast": at_pace(50),
}
