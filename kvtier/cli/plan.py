"""`kvtier plan`: what tiers of given sizes would do for a model and its traffic."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from kvtier.cli.parser import JSON_HELP, check_outputs
from kvtier.config import parse_size
from kvtier.errors import ConfigError

if TYPE_CHECKING:
    from kvtier.sim.evict import Workload
    from kvtier.sim.plan import Outcome, TierSize
    from kvtier.sim.shapes import Shape

_KINDS = ("chat", "agents", "shared", "rag")
_REQUESTS, _MAX_REQUESTS = 10_000, 1_000_000
_LEAST_GPU = 10**6  # bytes
_MORE = 100 * 10**9  # bytes: the step that "what would more memory buy" is answered for
_TEXT = """how many tokens each tier would hold, what it would save, and what more would buy

Sizes are of one node, and of Redis as a whole. The traffic is a trace in Mooncake's format
(`kvtier trace record` and `kvtier trace generate` write it)."""


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the parser of `kvtier plan`."""
    plan = commands.add_parser(
        "plan",
        help="size the tiers for a model and its traffic",
        description=_TEXT,
    )
    plan.add_argument(
        "--model",
        required=True,
        metavar="NAME|FILE|DIR",
        help="whose KV it is; `list` names those that are known",
    )
    traffic = plan.add_mutually_exclusive_group()
    traffic.add_argument(
        "--trace", metavar="FILE", help="requests to replay (default: none, sizes alone)"
    )
    traffic.add_argument(
        "--workload", metavar="KIND[:N]",
        help="made-up traffic instead: chat, agents, shared or rag; N requests, 10000 where it is "
        "left out (default: none)",
    )  # fmt: skip
    plan.add_argument(
        "--policy", default="phd", metavar="NAME", help="what leaves VRAM and host memory first"
    )
    plan.add_argument(
        "--block-tokens", type=int, metavar="N",
        help="tokens a block of the trace (default: as the trace says, else 512)",
    )  # fmt: skip
    _add_machine(plan)
    plan.add_argument("--json", metavar="FILE", help=JSON_HELP)
    plan.set_defaults(run=_run)


def _add_machine(plan: argparse.ArgumentParser) -> None:
    """What the nodes are made of."""
    plan.add_argument("--gpu", default="80GB", metavar="SIZE", help="memory of one GPU")
    plan.add_argument(
        "--gpus", type=int, default=1, metavar="N", help="GPUs of one engine (TP ranks)"
    )
    plan.add_argument(
        "--nodes", type=int, default=1, metavar="N", help="nodes with one engine each"
    )
    for tier in ("host", "disk", "redis"):
        plan.add_argument(f"--{tier}", default="0", metavar="SIZE", help=f"size of the {tier} tier")
    plan.add_argument(
        "--kv",
        default="fp16",
        metavar="TYPE",
        help="what KV is kept in: fp32, fp16, bf16, fp8, int8 or int4",
    )
    plan.add_argument(
        "--weights", type=int, default=16, metavar="BITS", help="bits of one parameter"
    )
    plan.add_argument(
        "--utilization", type=float, default=0.9, metavar="SHARE", help="of GPU memory, 0.01 to 1"
    )
    plan.add_argument(
        "--tflops", type=float, default=400.0, metavar="N",
        help="TFLOP/s that prefill reaches on one GPU",
    )  # fmt: skip
    for tier, speed in (("host", 40.0), ("disk", 5.0), ("redis", 2.5)):
        plan.add_argument(
            f"--{tier}-gbs",
            type=float,
            default=speed,
            metavar="N",
            help=f"GB/s from {tier} to VRAM",
        )


def _run(options: argparse.Namespace) -> int:
    from kvtier.core.policies import POLICIES
    from kvtier.sim import plan, shapes

    if options.model == "list":
        print("\n".join(shapes.known()))
        return 0
    _check(options)
    check_outputs(options)
    shape = shapes.load(options.model)
    bits = shapes.KV_BITS[options.kv]
    token_nbytes = float(shape.token_nbytes(bits)) * plan.replication(shape, options.gpus)
    try:
        tiers = _tiers(options, shape)
    except ValueError as error:
        raise ConfigError(f"--gpus: {error}") from None
    workload = _workload(options)
    machine = plan.Machine(options.tflops * 1e12 * options.gpus)

    def outcome(tiers: "list[TierSize]") -> "Outcome | None":
        if workload is None:
            return None
        policy = POLICIES[options.policy]
        return plan.replay(workload.prompts, tiers, shape, token_nbytes, machine, policy)

    present = outcome(tiers)
    more = {
        tier.name: outcome([*tiers[:n], _larger(tier), *tiers[n + 1 :]])
        for n, tier in enumerate(tiers)
        if n and present
    }
    result = _figures(options, shape, token_nbytes, tiers, present, more)
    if options.json:
        _write(options.json, result)
    from kvtier.cli import plan_report

    plan_report.show(shape, token_nbytes, tiers, present, more)
    return 0


def _check(options: argparse.Namespace) -> None:
    from kvtier.core.policies import POLICIES
    from kvtier.sim.shapes import KV_BITS

    if options.policy not in POLICIES:
        raise ConfigError(f"--policy is {options.policy!r}, must be one of {', '.join(POLICIES)}")
    if options.block_tokens is not None and not 1 <= options.block_tokens <= 2**20:
        raise ConfigError(f"--block-tokens is {options.block_tokens}, must be 1 to {2**20}")
    if options.kv not in KV_BITS:
        raise ConfigError(f"--kv is {options.kv!r}, must be one of {', '.join(KV_BITS)}")
    for name, low, high in (
        ("gpus", 1, 1024),
        ("nodes", 1, 100_000),
        ("weights", 1, 32),
        ("utilization", 0.01, 1.0),
        ("tflops", 1e-6, 1e9),
        ("host_gbs", 1e-6, 1e6),
        ("disk_gbs", 1e-6, 1e6),
        ("redis_gbs", 1e-6, 1e6),
    ):
        value = getattr(options, name)
        if not low <= value <= high:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}, must be {low} to {high}")


def _size(options: argparse.Namespace, name: str) -> int:
    try:
        return parse_size(getattr(options, name))
    except ValueError as error:
        raise ConfigError(f"--{name}: {error}") from None


def _tiers(options: argparse.Namespace, shape: "Shape") -> "list[TierSize]":
    from kvtier.sim.plan import TierSize, vram_nbytes

    gpu = _size(options, "gpu")
    if gpu < _LEAST_GPU:
        raise ConfigError(f"--gpu is {options.gpu!r}, must be at least {_LEAST_GPU} bytes")
    vram = vram_nbytes(shape, gpu, options.gpus, options.weights, options.utilization)
    return [
        TierSize("vram", vram * options.nodes, 0.0),
        TierSize("host", _size(options, "host") * options.nodes, options.host_gbs * 1e9),
        TierSize("disk", _size(options, "disk") * options.nodes, options.disk_gbs * 1e9),
        TierSize("redis", _size(options, "redis"), options.redis_gbs * 1e9),
    ]


def _larger(tier: "TierSize") -> "TierSize":
    from kvtier.sim.plan import TierSize

    return TierSize(tier.name, tier.nbytes + _MORE, tier.bytes_per_s)


def _workload(options: argparse.Namespace) -> "Workload | None":
    from kvtier.sim.evict import Workload
    from kvtier.sim.trace import load_trace
    from kvtier.sim.workloads import generate

    if options.trace:
        return Workload(load_trace(options.trace, options.block_tokens), f"trace {options.trace}")
    if not options.workload:
        return None
    kind, _, count = options.workload.partition(":")
    requests = int(count) if count.isdigit() else 0 if count else _REQUESTS
    if kind not in _KINDS or not 1 <= requests <= _MAX_REQUESTS:
        raise ConfigError(
            f"--workload is {options.workload!r}, must be one of {', '.join(_KINDS)}, "
            f"and after a colon 1 to {_MAX_REQUESTS} requests"
        )
    return Workload(generate(kind, 0, requests, options.block_tokens or 512), kind)


def _figures(
    options: argparse.Namespace,
    shape: "Shape",
    token_nbytes: float,
    tiers: "list[TierSize]",
    present: "Outcome | None",
    more: "dict[str, Outcome | None]",
) -> dict[str, object]:
    hits = present.hits if present else [None] * len(tiers)
    return {
        "model": shape.name,
        "kv": options.kv,
        "policy": options.policy,
        "kv_bytes_per_token": token_nbytes,
        "weights": shape.weights,
        "tiers": [
            {
                "tier": tier.name,
                "bytes": tier.nbytes,
                "tokens": int(tier.nbytes / token_nbytes),
                "token_hit_ratio": ratio,
            }
            for tier, ratio in zip(tiers, hits, strict=True)
        ],
        "traffic": _times(present),
        "plus_100_gb": {name: _times(outcome) for name, outcome in more.items()},
    }


def _times(outcome: "Outcome | None") -> dict[str, object] | None:
    if outcome is None:
        return None
    return {
        "requests": outcome.requests,
        "prompt_tokens": outcome.tokens,
        "token_hit_ratio": outcome.hit_ratio,
        "ttft_cold_s": {
            "mean": outcome.cold_mean_s, "p50": outcome.cold_p50_s, "p99": outcome.cold_p99_s
        },
        "ttft_s": {"mean": outcome.mean_s, "p50": outcome.p50_s, "p99": outcome.p99_s},
    }  # fmt: skip


def _write(path: str, result: dict[str, object]) -> None:
    try:
        Path(path).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--json {path}: {error.strerror}") from None
