"""`kvtier trace generate` makes up a trace, `kvtier trace show` looks at one."""

import argparse
from pathlib import Path

from kvtier.errors import ConfigError

_KINDS = ("chat", "agents", "shared", "rag")
_MAX_REQUESTS = 10_000_000


def add(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the parsers of `kvtier trace generate` and `kvtier trace show`."""
    text = "make up traffic: people who chat, agents in tool loops, shared system prompts, RAG"
    make = actions.add_parser("generate", help=text, description=text)
    make.add_argument("kind", choices=_KINDS, help="of traffic")
    make.add_argument("--seed", type=int, default=0, metavar="N", help="of the random numbers")
    make.add_argument("--requests", type=int, default=10_000, metavar="N", help="how many")
    make.add_argument("--block-tokens", type=int, default=512, metavar="N", help="tokens a block")
    make.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="where it goes; a .gz is packed"
    )
    make.set_defaults(run=_generate)
    text = "say what is in a trace"
    show = actions.add_parser("show", help=text, description=text)
    show.add_argument("trace", type=Path, metavar="FILE", help="in Mooncake's format")
    show.add_argument(
        "--block-tokens", type=int, metavar="N",
        help="tokens a block (default: as the trace says, else 512)",
    )  # fmt: skip
    show.set_defaults(run=_show)


def _generate(options: argparse.Namespace) -> int:
    from kvtier.sim.trace import write_trace
    from kvtier.sim.workloads import generate

    limits = (
        ("requests", options.requests, _MAX_REQUESTS),
        ("block-tokens", options.block_tokens, 2**20),
    )
    for name, value, most in limits:
        if not 1 <= value <= most:
            raise ConfigError(f"--{name} {value}: must be 1 to {most}")
    made = generate(options.kind, options.seed, options.requests, options.block_tokens)
    count = write_trace(options.out, made)
    print(f"{options.out}: {count} requests")
    return 0


def _show(options: argparse.Namespace) -> int:
    from kvtier.sim.evict import Hits, Workload
    from kvtier.sim.trace import load_trace

    if options.block_tokens is not None and not 1 <= options.block_tokens <= 2**20:
        raise ConfigError(f"--block-tokens {options.block_tokens}: must be 1 to {2**20}")
    workload = Workload(load_trace(options.trace, options.block_tokens), options.trace.name)
    prompts, seen, hits = workload.prompts, set[bytes](), Hits()
    for prompt in prompts:
        known = next((i for i, key in enumerate(prompt.keys) if key not in seen), len(prompt.keys))
        hits.count(prompt, known)
        seen.update(prompt.keys)
    lengths = sorted(prompt.input_tokens for prompt in prompts)
    output = sum(prompt.output_tokens for prompt in prompts)
    span = prompts[-1].at_s - prompts[0].at_s
    print(f"{workload.name}: {len(prompts)} requests in {span:.0f} s")
    print(
        f"input tokens: {sum(lengths)}, median {lengths[len(lengths) // 2]}, "
        f"most {lengths[-1]}; output tokens: {output}"
    )
    print(
        f"blocks: {workload.footprint} of {prompts[-1].block_tokens} tokens, "
        f"{len(seen)} of them full; {hits.blocks} full ones asked for"
    )
    print(f"a cache without end would find {100 * hits.token_ratio:.2f}% of the input tokens")
    return 0
