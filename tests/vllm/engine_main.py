"""A real vLLM engine as a process: a JSON line on stdin is a command, one on fd 3 its answer."""

import json
import os
import sys

from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt


def main() -> None:
    answers = os.fdopen(3, "w")
    llm = LLM(**json.loads(sys.stdin.readline()))

    def answer(value: object) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    answer("ready")
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        if command == "generate":
            prompts, max_tokens = arguments
            done = llm.generate(
                [TokensPrompt(prompt_token_ids=p["ids"], **p["more"]) for p in prompts],
                SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True),
                use_tqdm=False,
            )
            answer([[list(o.outputs[0].token_ids), o.num_cached_tokens] for o in done])
        elif command == "reset":
            answer(llm.reset_prefix_cache(reset_connector=arguments[0]))
        elif command == "metrics":
            answer([[m.name, getattr(m, "labels", {}), m.value] for m in llm.get_metrics()
                    if hasattr(m, "value") and "kv" in m.name])  # fmt: skip


if __name__ == "__main__":
    main()
