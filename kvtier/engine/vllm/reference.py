"""vLLM without kvtier, to compare with: `python -m kvtier.engine.vllm.reference`.

A line on standard input is JSON, and so is its answer on standard output: first the settings, then
a request each. What vLLM itself says goes to standard error.
"""

import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from kvtier.config import WorkerConfig, vllm_speaks_on_stderr

vllm_speaks_on_stderr()

from vllm import SamplingParams  # noqa: E402 - after the line above
from vllm.inputs import TokensPrompt  # noqa: E402
from vllm.sampling_params import RequestOutputKind  # noqa: E402
from vllm.v1.engine.async_llm import AsyncLLM  # noqa: E402

from kvtier.engine.vllm.inprocess import engine_arguments  # noqa: E402


class Reference:
    """An engine with a worker's settings and vLLM's own prefix cache, and nothing else.

    Asked for what a worker was asked for, in that order, it finds in its cache what the worker
    found there or had restored. Where it finds another part of a prompt, that part is computed
    first and by itself: then both go on from the same boundary, which decides the last bits of
    every sum.
    """

    def __init__(self, engine: AsyncLLM) -> None:
        self._engine = engine
        self._count = 0

    async def greedy(
        self, prompt_ids: Sequence[int], hit_tokens: int, tokens: int
    ) -> tuple[list[int], int]:
        """A greedy answer of so many tokens, and how many of the prompt's were not computed."""
        found, cached = await self._generate(prompt_ids, tokens)
        if cached == hit_tokens:
            return found, cached
        await self._engine.reset_prefix_cache()
        if hit_tokens:
            await self._generate(prompt_ids[:hit_tokens], 1)
        return await self._generate(prompt_ids, tokens)

    async def _generate(self, ids: Sequence[int], tokens: int) -> tuple[list[int], int]:
        self._count += 1
        params = SamplingParams(
            temperature=0.0, max_tokens=tokens, ignore_eos=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        prompt = TokensPrompt(prompt_token_ids=list(ids))
        async for output in self._engine.generate(prompt, params, str(self._count)):
            return list(output.outputs[0].token_ids), output.num_cached_tokens or 0
        raise RuntimeError("vLLM gave no answer")


async def main() -> None:
    """Serve standard input."""
    settings = json.loads(sys.stdin.readline())
    worker = WorkerConfig(**settings["worker"])
    arguments = engine_arguments(worker, Path(settings["model"]))
    engine = AsyncLLM.from_engine_args(arguments)
    try:
        reference = Reference(engine)
        for line in iter(sys.stdin.readline, ""):
            asked = json.loads(line)
            answer = await reference.greedy(asked["prompt"], asked["hit"], asked["tokens"])
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()
    finally:
        engine.shutdown()


if __name__ == "__main__":
    asyncio.run(main())
