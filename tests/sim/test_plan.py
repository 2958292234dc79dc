"""`kvtier plan`: the replay against a slow one, and the command as a person uses it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.sim import plan, shapes
from kvtier.sim.evict import Prompt, Workload
from kvtier.sim.shapes import KV_BITS
from kvtier.sim.trace import Request, write_trace

SHAPE = shapes.load("smollm2-135m")
BLOCK = 16  # tokens
MACHINE = plan.Machine(1e12)
# At 1 byte a token a tier of 16 bytes holds one block.
BYTES = 1.0


def prompts(draws: list[list[int]]) -> list[Request]:
    """Prompts whose block ids are the path so far, as in a real trace."""
    requests = []
    for n, steps in enumerate(draws):
        blocks = tuple(hash(tuple(steps[: i + 1])) for i in range(len(steps)))
        requests.append(Request(float(n), BLOCK * len(steps) + 1, 1, blocks, BLOCK))
    return requests


def played(requests: list[Request]) -> list[Prompt]:
    return Workload(requests).prompts


def tiers(*blocks: int) -> list[plan.TierSize]:
    speeds = (0.0, 4e9, 2e9, 1e9)
    return [plan.TierSize(str(n), b * BLOCK, speeds[n]) for n, b in enumerate(blocks)]


def slow_hits(requests: list[Request], capacities: list[int]) -> list[int]:
    """Tokens found by tier, by the definition of LRU: a list in order of last use."""
    order: list[int] = []  # warmest first
    hits = [0] * len(capacities)
    for request in requests:
        for block in request.full_blocks:
            depth = order.index(block) if block in order else 10**9
            found = [n for n, capacity in enumerate(capacities) if depth < capacity]
            if not found:
                break
            hits[found[0]] += BLOCK
        for block in reversed(request.full_blocks):
            if block in order:
                order.remove(block)
            order.insert(0, block)
    return hits


paths = st.lists(st.integers(0, 2), min_size=1, max_size=5)


@settings(deadline=None, max_examples=150)
@given(
    st.lists(paths, min_size=1, max_size=25), st.lists(st.integers(0, 30), min_size=1, max_size=4)
)
def test_hits_are_those_of_the_definition(draws: list[list[int]], capacities: list[int]) -> None:
    requests = prompts(draws)
    outcome = plan.replay(played(requests), tiers(*capacities), SHAPE, BYTES, MACHINE)
    expected = slow_hits(requests, capacities)
    assert outcome.hits == pytest.approx([tokens / outcome.tokens for tokens in expected])


@settings(deadline=None, max_examples=60)
@given(st.lists(paths, min_size=1, max_size=25), st.integers(0, 9), st.integers(0, 9))
def test_more_memory_never_makes_it_worse(draws: list[list[int]], small: int, more: int) -> None:
    requests = prompts(draws)
    before = plan.replay(played(requests), tiers(2, small), SHAPE, BYTES, MACHINE)
    after = plan.replay(played(requests), tiers(2, small + more), SHAPE, BYTES, MACHINE)
    assert after.hit_ratio >= before.hit_ratio - 1e-12
    assert after.mean_s <= before.mean_s + 1e-12
    assert before.mean_s <= before.cold_mean_s


def test_a_load_slower_than_computing_is_not_made() -> None:
    requests = prompts([[1, 2, 3]] * 2)
    slow = [plan.TierSize("vram", 0, 0.0), plan.TierSize("disk", 10**6, 1e-3)]
    outcome = plan.replay(played(requests), slow, SHAPE, BYTES, MACHINE)
    assert outcome.mean_s == pytest.approx(outcome.cold_mean_s)


def test_ranks_that_share_a_head_each_keep_it() -> None:
    assert plan.replication(shapes.load("llama-3-8b"), 8) == 1
    assert plan.replication(shapes.load("llama-3-8b"), 16) == 2
    assert plan.replication(shapes.load("deepseek-v3"), 8) == 8


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvtier.cli", "plan", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_command_says_what_tiers_hold_and_what_more_would_buy(tmp_path: Path) -> None:
    trace, out = tmp_path / "trace.jsonl", tmp_path / "out.json"
    write_trace(trace, prompts([[1, 2, 3], [4, 5], [1, 2, 3, 6], [4, 5, 7]]))
    done = run(
        "--model", "llama-3-8b", "--gpu", "80GB", "--host", "100GB", "--disk", "1TB",
        "--trace", str(trace), "--json", str(out),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "128 KiB of KV a token" in done.stdout
    assert "100 GB more of" in done.stdout
    result = json.loads(out.read_text())
    assert result["kv_bytes_per_token"] == 128 * 1024
    assert [tier["tier"] for tier in result["tiers"]] == ["vram", "host", "disk", "redis"]
    assert result["tiers"][1]["tokens"] == 100 * 10**9 // (128 * 1024)
    assert result["tiers"][0]["token_hit_ratio"] == pytest.approx(5 * BLOCK / (12 * BLOCK + 4))
    assert set(result["plus_100_gb"]) == {"host", "disk", "redis"}


def test_made_up_traffic_and_a_policy_will_do() -> None:
    done = run("--model", "llama-3-8b", "--host", "50GB", "--workload", "chat:300")
    assert done.returncode == 0, done.stderr
    assert "300 requests" in done.stdout
    assert "-0.0" not in done.stdout, "what changes nothing has no sign"
    assert "+0.00%" in done.stdout


def test_a_block_size_that_the_trace_contradicts_is_refused(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    write_trace(trace, prompts([[1, 2, 3], [4, 5]]))
    done = run("--model", "llama-3-8b", "--trace", str(trace), "--block-tokens", str(2 * BLOCK))
    assert done.returncode == 2
    assert f"trace {trace}, line 1: block_size is {BLOCK}, not {2 * BLOCK}" in done.stderr


def test_every_kind_of_kv_is_in_the_help() -> None:
    text = " ".join(run("--help").stdout.split())
    (told,) = re.findall(r"what KV is kept in: (.*?) \(default", text)
    assert set(re.split(r", | or ", told)) == set(KV_BITS)


def test_without_a_trace_it_still_says_what_fits() -> None:
    done = run("--model", "llama-3-70b", "--gpus", "4", "--host", "320KiB")
    assert done.returncode == 0
    assert "320 KiB of KV a token" in done.stdout
    assert "give --trace FILE or --workload" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "llama-3-70b"), "141 GB of weights at 16 bits"),
        (("--model", "llama-3-8b", "--kv", "fp12"), "--kv is 'fp12', must be one of"),
        (("--model", "llama-3-8b", "--host", "many"), "--host: 'many' is not a size"),
        (("--model", "llama-3-8b", "--gpus", "0"), "--gpus is 0, must be 1 to 1024"),
        (("--model", "llama-3-8b", "--gpu", "0"), "--gpu is '0', must be at least 1000000 bytes"),
        (("--model", "llama-3-8b", "--policy", "mru"), "--policy is 'mru', must be one of phd"),
        (("--model", "llama-3-8b", "--workload", "chat:0"), "--workload is 'chat:0', must be"),
        (("--model", "llama-3-8b", "--workload", "mail"), "must be one of chat, agents, shared"),
        (("--model", "llama-3-8b", "--trace", "/no/such"), "trace /no/such: No such file"),
        (("--model", "nothing"), "no such file, and none of the known"),
        (("--model", "/"), "--model /: the folder has no config.json"),
        (("--model", "llama-3-8b", "--json", "/no/out"), "--json /no/out: there is no folder /no"),
    ],
)
def test_a_mistake_is_one_clear_line(arguments: tuple[str, ...], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
