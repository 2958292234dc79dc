"""Fields of a request that would change its answer, and that nothing here can act on."""

from collections.abc import Mapping
from typing import Final

# What is taken only at the value that changes nothing.
_NEUTRAL: Final[Mapping[str, tuple[object, ...]]] = {
    "top_p": (1,), "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},),
    "logprobs": (False,), "top_logprobs": (0,), "echo": (False,), "suffix": ("",),
    "tools": ([],), "functions": ([],), "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (),
    "prediction": (), "web_search_options": (), "moderation": (),
    # vLLM's and SGLang's own, which clients send as `extra_body`.
    "top_k": (0, -1), "min_p": (0,), "repetition_penalty": (1,), "length_penalty": (1,),
    "min_tokens": (0,), "stop_token_ids": ([],), "bad_words": ([],), "allowed_token_ids": ([],),
    "use_beam_search": (False,), "prompt_logprobs": (), "logits_processors": ([],),
    "skip_special_tokens": (True,), "include_stop_str_in_output": (False,),
    "truncate_prompt_tokens": (), "prompt_embeds": (), "chat_template": (),
    "chat_template_kwargs": ({},), "documents": ([],), "add_generation_prompt": (True,),
    "continue_final_message": (False,), "structured_outputs": ({},), "guided_json": (),
    "guided_regex": ("",), "guided_choice": ([],), "guided_grammar": ("",),
    "regex": ("",), "ebnf": ("",), "json_schema": (),
}  # fmt: skip


def unsupported(table: Mapping[str, object]) -> str:
    """The first such field that asks for a change, or ''."""
    for name, neutral in _NEUTRAL.items():
        value = table.get(name)
        if value is not None and not any(_same(value, each) for each in neutral):
            return name
    return ""


def _same(value: object, neutral: object) -> bool:
    """Equal, and no number where a flag is meant: `logprobs` of 0 asks for one of each token."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
