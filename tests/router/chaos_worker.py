"""A worker in a process of its own that answers what can be checked: `python -m ... NAME PORT`.

Its answer to a prompt is `expected(ids)`, a few tokens at a time; it holds the last prompts in VRAM
and tells of them in its feed.
"""

import asyncio
import sys

from kvtier.core.tiers import Tier
from tests.router.stub_engine import StubWorker, done, keys, started, tokens

TOKENS = 12  # of an answer
HELD = 8  # prompts
PAUSE_S = 0.01


def expected(prompt: list[int]) -> list[int]:
    """The whole answer; each token hangs on those before it, so that a resume can be checked."""
    answer: list[int] = []
    while len(answer) < TOKENS:
        answer.append(following([*prompt, *answer]))
    return answer


def following(ids: list[int]) -> int:
    return 33 + (sum(ids[-5:]) * 31 + len(ids)) % 90


async def main(name: str, port: int) -> None:
    worker = StubWorker(name)
    held: list[list[bytes]] = []

    async def script(request):
        ids = list(request.token_ids)
        yield started(request)
        for _ in range(request.max_tokens):
            ids.append(following(ids))
            yield tokens(ids[-1])
            await asyncio.sleep(PAUSE_S)
        yield done(request.max_tokens)
        new = keys(list(request.token_ids))
        have = {key for each in held for key in each}
        worker.tell(added={Tier.VRAM: [key for key in new if key not in have]})
        held.append(new)
        if len(held) > HELD:
            old = held.pop(0)
            kept = {key for each in held for key in each}
            worker.tell(removed={Tier.VRAM: [key for key in old if key not in kept]})

    worker.script = script
    worker.epoch = asyncio.get_running_loop().time().__hash__() & 0xFFFFFFFF
    await worker.start(f"127.0.0.1:{port}")
    print(worker.address, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
