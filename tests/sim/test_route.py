"""The routing simulator: what it adds up, and that its router is the one of production."""

import json
from random import Random

import pytest

from kvtier.cli import main
from kvtier.errors import ConfigError
from kvtier.sim.route import compare, simulate, time_factor
from kvtier.sim.route_cluster import Setup
from kvtier.sim.route_policies import policy
from kvtier.sim.trace import Request, write_trace
from kvtier.sim.workloads import generate

PLAIN = Setup(prefill_tokens_per_s=1000.0, doubles_at=1e12)


def talks(count=400, seed=1):
    """Conversations over one system prompt: each turn repeats all before it."""
    rng = Random(seed)
    open_talks, requests, fresh = [], [], 1
    for number in range(count):
        on = open_talks and rng.random() < 0.6
        start = open_talks.pop(rng.randrange(len(open_talks))) if on else (0,)
        more = rng.randint(1, 8)
        blocks = start + tuple(range(fresh, fresh + more))
        fresh += more
        open_talks.append(blocks)
        requests.append(Request(2.0 * (number // 8), 512 * len(blocks), 100, blocks))
    return requests


def once(requests, name="kvtier", nodes=4, setup=PLAIN, factor=1.0, seed=1):
    return simulate(requests, name, nodes, setup, factor=factor, seed=seed)


def test_a_first_token_waits_for_its_queue_and_its_own_service():
    same = (1, 2)
    requests = [Request(0.0, 1024, 10, same), Request(0.0, 1024, 10, same)]
    outcome = once(requests, nodes=1)
    # The second finds both blocks, computes one token, and waits for the first.
    assert outcome.ttfts == pytest.approx([1.024, 1.025])
    assert outcome.token_hit_ratio == pytest.approx(0.5)
    assert outcome.busy_s == pytest.approx(1.025)
    assert outcome.imbalance == 1


def test_blocks_come_back_from_host_and_pool_at_their_speed():
    nbytes = PLAIN.kv_bytes_per_token * 512
    fields = {"vram_blocks": 2, "host_bytes_per_s": nbytes * 10.0, "pool_bytes_per_s": nbytes * 2.0}
    first, other = Request(0.0, 1024, 0, (1, 2)), Request(10.0, 1024, 0, (8, 9))
    again = Request(20.0, 1100, 0, (1, 2, 3))  # the partly filled third block is in no cache
    for extra, load_s in (({}, None), ({"host_blocks": 9}, 0.2), ({"pool_blocks": 9}, 1.0)):
        setup = Setup(prefill_tokens_per_s=1000.0, doubles_at=1e12, **fields, **extra)
        ttft = once([first, other, again], nodes=1, setup=setup).ttfts[-1]
        expected = 1.1 if load_s is None else load_s + 0.076
        assert ttft == pytest.approx(expected)


def test_the_factor_makes_the_reference_as_busy_as_asked():
    requests = talks()
    span = requests[-1].at_s
    factor = time_factor(requests, 4, 0.5, PLAIN)
    busy = once(requests, "dynamo").busy_s
    assert busy / (4 * span / factor) == pytest.approx(0.5)


def test_the_ranking_of_production_beats_those_that_see_less():
    (results,) = [compare(talks(), ["kvtier", "least-loaded", "random"], [4], [0.9], PLAIN, [1, 2])]
    mean = {each.policy: each.ttft_mean_s for each in results}
    hits = {each.policy: each.token_hit_ratio for each in results}
    assert mean["kvtier"] < mean["least-loaded"] < mean["random"]
    assert hits["kvtier"] > hits["least-loaded"]


@pytest.mark.parametrize(("kind", "load"), [("agents", 0.4), ("agents", 0.95), ("shared", 0.4)])
def test_no_load_makes_it_cling_to_warm_nodes(kind, load):
    """With one lambda for all loads it lost these to a Dynamo-like cost."""
    requests = list(generate(kind, 7, 1500))
    names = ["kvtier", "dynamo", "dynamo:4", "least-loaded"]
    ours, *theirs = compare(requests, names, [16], [load], Setup(), [1])
    assert all(ours.ttft_mean_s < each.ttft_mean_s for each in theirs)


def test_the_same_seed_gives_the_same_and_every_policy_answers_all():
    requests = talks(100)
    for name in ("kvtier", "kvtier:4", "kvtier-untaught", "dynamo", "dynamo:4", "least-loaded",
                 "round-robin", "random", "prefix", "consistent-hash"):  # fmt: skip
        one, two = once(requests, name, seed=7), once(requests, name, seed=7)
        assert one == two
        assert len(one.ttfts) == 100
        assert min(one.ttfts) > 0
        assert 0 <= one.token_hit_ratio < 1 <= one.imbalance


def test_what_waits_on_a_lost_node_is_served_elsewhere():
    requests = talks()
    outcome = once(requests, setup=Setup(prefill_tokens_per_s=300.0, doubles_at=1e12, lose_at=0.5))
    kept = once(requests, setup=Setup(prefill_tokens_per_s=300.0, doubles_at=1e12))
    assert min(outcome.ttfts) > 0
    assert sum(outcome.ttfts) > sum(kept.ttfts)
    joined = once(requests, setup=Setup(prefill_tokens_per_s=300.0, doubles_at=1e12, join_at=0.5))
    assert sum(joined.ttfts) < sum(kept.ttfts)


def test_a_router_that_learns_late_still_beats_one_that_learns_nothing():
    setup = Setup(prefill_tokens_per_s=1000.0, doubles_at=1e12, stale_s=1.0, host_blocks=50,
                  vram_blocks=100)  # fmt: skip
    results = compare(talks(), ["kvtier", "least-loaded"], [4], [0.8], setup, [1])
    ours, blind = results
    assert ours.ttft_mean_s < blind.ttft_mean_s


def test_slow_nodes_get_less():
    setup = Setup(prefill_tokens_per_s=1000.0, doubles_at=1e12, slow_nodes=0.5)
    results = compare(talks(), ["kvtier", "round-robin"], [4], [0.6], setup, [1])
    assert results[0].ttft_mean_s < results[1].ttft_mean_s / 2


def test_what_first_tokens_teach_of_slow_queues_pays():
    setup = Setup(prefill_tokens_per_s=1000.0, doubles_at=1e12, slow_queues=0.5)
    names = ["kvtier", "kvtier-untaught", "least-loaded"]
    runs = [compare(talks(1000, seed), names, [4], [0.7], setup, [1, 2]) for seed in (1, 2, 3)]
    learned, untaught, blind = (
        sum(each.ttft_mean_s for each in of) for of in zip(*runs, strict=True)
    )
    assert learned < 0.96 * untaught
    assert learned < blind / 2


def test_queues_that_are_as_believed_are_left_as_they_are():
    """Waits and speeds are what the nodes say, so there is nothing to learn."""
    requests = talks(300)
    taught, untaught = (once(requests, name) for name in ("kvtier", "kvtier-untaught"))
    assert sum(taught.ttfts) == pytest.approx(sum(untaught.ttfts), rel=0.05)


@pytest.mark.parametrize("name", ["best", "kvtier:x", "random:1", "dynamo:-1", "kvtier:nan", ""])
def test_an_unknown_policy_is_refused(name):
    with pytest.raises(ConfigError, match="unknown; known: kvtier, dynamo"):
        policy(name, PLAIN, Random(1))


def test_the_command_writes_what_it_found(tmp_path, capsys):
    trace, out, plot = tmp_path / "t.jsonl", tmp_path / "out.json", tmp_path / "out.png"
    write_trace(trace, talks(60))
    arguments = ["simulate", "route", "--trace", str(trace), "--nodes", "2,3", "--seeds", "1",
                 "--utilization", "0.7,0.95", "--policy", "kvtier,dynamo:4",
                 "--json", str(out), "--plot", str(plot)]  # fmt: skip
    assert main(arguments) == 0
    results = json.loads(out.read_text())["results"]
    assert [(r["nodes"], r["utilization"], r["policy"]) for r in results] == [
        (n, u, p) for n in (2, 3) for u in (0.7, 0.95) for p in ("kvtier", "dynamo:4")
    ]
    assert set(results[0]) == {
        "policy", "nodes", "utilization", "ttft_mean_s", "ttft_p50_s", "ttft_p99_s",
        "token_hit_ratio", "imbalance",
    }  # fmt: skip
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "dynamo:4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nodes", "0"], "--nodes has '0', must be 1 to 4096"),
        (["--nodes", "2.5"], "--nodes has '2.5'"),
        (["--utilization", "hot"], "--utilization has 'hot'"),
        (["--policy", "best"], "policy 'best' is unknown"),
        (["--seeds", "0"], "--seeds is 0"),
        (["--stale-s", "-1"], "--stale-s is -1"),
        (["--nodes", "1", "--lose-at", "0.5"], "--lose-at: one node"),
        (["--json", "/nowhere/out.json"], "--json /nowhere/out.json: there is no folder /nowhere"),
        (["--plot", "a.xyz"], "--plot a.xyz: must end in one of ."),
        (["--block-tokens", "16"], "tokens, the block size given"),
        (["--trace", "/nowhere.jsonl"], "trace /nowhere.jsonl: No such file"),
    ],
)
def test_mistakes_get_one_line(tmp_path, capsys, arguments, words):
    trace = tmp_path / "t.jsonl"
    write_trace(trace, talks(20))
    assert main(["simulate", "route", "--trace", str(trace), "--seeds", "1", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
