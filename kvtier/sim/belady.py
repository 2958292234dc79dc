"""The offline optimum: nobody can keep more hits than who knows the future.

Belady's rule (IBM Systems Journal 5(2), 1966) on prefix trees, with bypass: give up the block
whose next use is farthest, the deepest of those. A block is used whenever one below it is, so
what is kept has no gaps by itself.
"""

from heapq import heappop, heappush

from kvtier.core.blocks import BlockKey
from kvtier.sim.evict import Hits, Progress, Result, Workload


def optimum(workload: Workload, capacity: int, progress: Progress | None = None) -> Result:
    """The most block hits that any policy can have in `capacity` blocks; costs no time."""
    never = len(workload.prompts)
    coming: dict[BlockKey, int] = {}
    following: list[list[int]] = []  # by prompt: when each of its blocks is used next
    for at in range(never - 1, -1, -1):
        keys = workload.prompts[at].keys
        following.append([coming.get(key, never) for key in keys])
        for key in keys:
            coming[key] = at
    following.reverse()
    kept: dict[BlockKey, int] = {}  # when each is used next
    farthest: list[tuple[int, int, BlockKey]] = []
    hits = Hits()
    for at, prompt in enumerate(workload.prompts):
        found = next((i for i, key in enumerate(prompt.keys) if key not in kept), len(prompt.keys))
        hits.count(prompt, found)
        for depth, (key, then) in enumerate(zip(prompt.keys, following[at], strict=True)):
            if then == never:
                kept.pop(key, None)
                continue
            kept[key] = then
            heappush(farthest, (-then, -depth, key))
        while len(kept) > capacity:
            then, _, key = heappop(farthest)
            if kept.get(key) == -then:  # else it was used since, and pushed again
                del kept[key]
        if progress is not None:
            progress(1)
    return Result(hits, 0.0)
