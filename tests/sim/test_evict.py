"""Replay, the bound, the workloads, and the commands around them."""

import json
from itertools import combinations
from pathlib import Path

import pytest

from kvtier.cli import main
from kvtier.core.phd import PHD
from kvtier.core.policies import POLICIES
from kvtier.core.policy import LRU
from kvtier.errors import ConfigError
from kvtier.sim import tiers
from kvtier.sim.belady import optimum
from kvtier.sim.evict import Workload, replay
from kvtier.sim.trace import Request, read_trace
from kvtier.sim.workloads import KINDS, generate


def asked(*paths: str, block_tokens: int = 4) -> Workload:
    """Prompts named by their blocks, a second apart; a capital is a partly filled block."""
    requests = []
    for at, path in enumerate(paths):
        tokens = sum(block_tokens - each.isupper() for each in path)
        requests.append(Request(float(at), tokens, 1, tuple(map(ord, path)), block_tokens))
    return Workload(requests)


@pytest.mark.parametrize("kind", KINDS)
def test_phd_is_not_under_lru_on_made_up_traffic(kind: str) -> None:
    """By more than half a point, from the first prompts on; the benchmark `evict` has more."""
    for requests, seed in ((400, 1), (400, 2), (2500, 3)):
        workload = Workload(generate(kind, seed, requests))
        for share in (0.02, 0.1, 0.35):
            phd, lru = (
                100 * replay(workload, each, workload.capacity(share)).hits.token_ratio
                for each in (PHD, LRU)
            )
            assert phd >= lru - 0.5, f"{requests} requests, seed {seed}, {share:.0%}"


class TestReplay:
    def test_counts_leading_blocks_only(self) -> None:
        workload = asked("abc", "abX", "abd", "xbc")
        result = replay(workload, LRU, 100)
        # abX: two blocks of 11 tokens; abd: two of 12; xbc: b and c are others below x.
        assert result.hits.hit_tokens == 8 + 8
        assert result.hits.tokens == 12 + 11 + 12 + 12
        assert result.hits.hit_blocks == 4
        assert workload.footprint == 8  # with X

    def test_the_partly_filled_block_is_never_kept(self) -> None:
        assert replay(asked("aX", "aX"), LRU, 100).hits.hit_blocks == 1

    def test_a_small_cache_forgets_the_oldest_and_deepest(self) -> None:
        assert replay(asked("abc", "xy", "abc"), LRU, 4).hits.hit_blocks == 2
        assert replay(asked("abc", "xy", "abc"), LRU, 5).hits.hit_blocks == 3

    def test_a_prompt_larger_than_the_cache_keeps_its_beginning(self) -> None:
        for policy in POLICIES.values():
            assert replay(asked("abcdef", "abcdef"), policy, 3).hits.hit_blocks <= 3

    def test_a_trace_without_a_full_block_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="no request has a full block"):
            asked("A", "B")


class TestTiers:
    def test_what_one_tier_gives_up_the_next_one_has(self) -> None:
        workload = asked("ab", "cd", "ef", "ab", "ab", "cd")
        found = tiers.replay(workload, LRU, (2, 2, 2))
        # ab comes back from disk, is in VRAM then; cd sank to disk, below ef and ab's copy.
        assert [round(share * 12) for share in found.by_tier] == [2, 0, 4]
        assert found.hits.token_ratio == 6 / 12

    def test_a_prefix_may_lie_in_several_tiers(self) -> None:
        workload = asked("abcd", "abcd")
        found = tiers.replay(workload, LRU, (1, 2, 1))
        assert [round(share * 8) for share in found.by_tier] == [1, 2, 1]

    @pytest.mark.parametrize("name", POLICIES)
    def test_no_tier_finds_more_than_it_could(self, name: str) -> None:
        workload = Workload(generate("chat", 3, 400))
        sizes = [workload.capacity(0.02 * n) for n in (1, 4, 10)]
        found = tiers.replay(workload, POLICIES[name], sizes)
        assert sum(found.by_tier) == pytest.approx(found.hits.token_ratio)
        alone = replay(workload, POLICIES[name], sizes[0]).hits
        assert found.by_tier[0] == pytest.approx(alone.token_ratio)
        assert found.hits.hit_blocks <= optimum(workload, sum(sizes)).hits.hit_blocks
        assert all(found.by_tier)

    def test_disk_takes_only_what_was_asked_for_twice_if_told_to(self) -> None:
        workload = asked("ab", "cd", "ef", "gh", "ab", "cd", "ef", "gh", "ab")
        every = tiers.replay(workload, LRU, (2, 2, 9))
        assert every.disk_writes == 8
        assert every.hits.hit_blocks == 10
        few = tiers.replay(workload, LRU, (2, 2, 9), second_use=True)
        # The second "ab" is computed again, as it had gone, and sinks to disk then, as cd and ef.
        assert few.hits.hit_blocks == 2
        assert few.disk_writes == 6

    def test_without_a_disk_nothing_is_refused(self) -> None:
        workload = asked("ab", "cd", "ef", "ab")
        assert tiers.replay(workload, LRU, (2, 4), second_use=True).hits.hit_blocks == 2

    def test_one_tier_is_no_cascade(self) -> None:
        workload = Workload(generate("chat", 3, 300))
        capacity = workload.capacity(0.1)
        assert tiers.replay(workload, PHD, [capacity]).hits.hit_tokens == (
            replay(workload, PHD, capacity).hits.hit_tokens
        )


class TestOptimum:
    def test_nothing_beats_it_and_it_can_be_reached(self) -> None:
        """On tiny workloads, against every choice that there is."""
        paths = ["ab", "ac", "xy", "ab", "xy", "ac", "z", "ab", "x"]
        for capacity in range(1, 6):
            assert optimum(asked(*paths), capacity).hits.hit_blocks == _best(paths, capacity)

    @pytest.mark.parametrize("kind", KINDS)
    def test_it_bounds_every_policy(self, kind: str) -> None:
        workload = Workload(generate(kind, 3, 600))
        for fraction in (0.01, 0.1, 1.0):
            capacity = workload.capacity(fraction)
            bound = optimum(workload, capacity).hits
            for policy in POLICIES.values():
                assert replay(workload, policy, capacity).hits.hit_blocks <= bound.hit_blocks
        assert bound.hit_blocks == replay(workload, LRU, capacity).hits.hit_blocks  # all fits


def _best(paths: list[str], capacity: int) -> int:
    """The most hits by trying every content of the cache after every request."""
    states: dict[frozenset[str], int] = {frozenset(): 0}
    for path in paths:
        after: dict[frozenset[str], int] = {}
        prefixes = [path[: n + 1] for n in range(len(path))]
        for kept, hits in states.items():
            found = next((n for n, each in enumerate(prefixes) if each not in kept), len(path))
            there = sorted(kept | {*prefixes})
            for size in range(min(capacity, len(there)) + 1):
                for chosen in combinations(there, size):
                    state = frozenset(chosen)
                    after[state] = max(after.get(state, 0), hits + found)
        states = after
    return max(states.values())


class TestWorkloads:
    @pytest.mark.parametrize("kind", KINDS)
    def test_a_seed_means_the_same_traffic_again(self, kind: str) -> None:
        first, again, other = (list(generate(kind, seed, 200)) for seed in (1, 1, 2))
        assert first == again != other
        assert list(generate(kind, 1, 50)) == first[:50]
        times = [request.at_s for request in first]
        assert times == sorted(times)

    @pytest.mark.parametrize("kind", KINDS)
    def test_equal_ids_mean_equal_beginnings(self, kind: str) -> None:
        parents: dict[int, int | None] = {}
        for request in generate(kind, 4, 500, block_tokens=128):
            assert len(request.blocks) == -(-request.input_tokens // 128)
            for above, block in zip([None, *request.blocks], request.blocks, strict=False):
                assert parents.setdefault(block, above) == above

    @pytest.mark.parametrize("kind", KINDS)
    def test_phd_is_not_behind_lru(self, kind: str) -> None:
        workload = Workload(generate(kind, 5, 2500))
        for fraction in (0.01, 0.05, 0.2):
            capacity = workload.capacity(fraction)
            phd, lru = (replay(workload, each, capacity).hits.token_ratio for each in (PHD, LRU))
            assert phd >= lru - 0.005


class TestCommands:
    def test_a_generated_trace_is_replayed(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        trace, out, png = (tmp_path / name for name in ("t.jsonl.gz", "out.json", "p.png"))
        arguments = ["trace", "generate", "chat", "--seed", "3", "--requests", "300"]
        assert main([*arguments, "--out", str(trace)]) == 0
        assert len([*read_trace(trace)]) == 300
        assert main(["trace", "show", str(trace)]) == 0
        assert "300 requests" in capsys.readouterr().out
        arguments = ["simulate", "evict", "--trace", str(trace), "--capacity", "0.01,0.1"]
        assert main([*arguments, "--policy", "all", "--json", str(out), "--plot", str(png)]) == 0
        assert "tokens found" in capsys.readouterr().out
        figures = json.loads(out.read_text())
        assert figures["trace"] == "t.jsonl.gz"
        assert figures["footprint_blocks"] > 300
        by_name = {(r["policy"], r["capacity_fraction"]): r for r in figures["results"]}
        assert {name for name, _ in by_name} == {*POLICIES, "opt"}
        for row in by_name.values():
            assert 0 <= row["flop_saved"] <= row["token_hit_ratio"] <= 1
            best = by_name["opt", row["capacity_fraction"]]["token_hit_ratio"]
            assert row["token_hit_ratio"] <= best + 0.01  # the bound is in blocks
        assert png.read_bytes().startswith(b"\x89PNG")

    def test_tiers_are_told_apart(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        trace, out = tmp_path / "t.jsonl", tmp_path / "out.json"
        arguments = ["trace", "generate", "chat", "--seed", "3", "--requests", "300"]
        assert main([*arguments, "--out", str(trace)]) == 0
        arguments = ["simulate", "evict", "--trace", str(trace), "--capacity", "0.01"]
        arguments += ["--policy", "lru,sieve,opt", "--json", str(out)]
        assert main([*arguments, "--tiers", "1:4:40"]) == 0
        printed = capsys.readouterr().out
        assert all(word in printed for word in ("VRAM", "host", "disk"))
        for row in json.loads(out.read_text())["results"]:
            assert len(row["by_tier"]) == 3
            assert sum(row["by_tier"]) == pytest.approx(row["token_hit_ratio"])
        assert main(arguments) == 0
        assert "by_tier" not in json.loads(out.read_text())["results"][0]

    def test_a_disk_that_takes_nothing_has_no_writes(self, tmp_path: Path) -> None:
        """What it can say of that is a number; of the optimum's, and without a disk, nothing."""
        trace, out = tmp_path / "t.jsonl", tmp_path / "out.json"
        lines = [
            f'{{"timestamp": {n}, "input_length": 512, "output_length": 1, "hash_ids": [{n}]}}\n'
            for n in range(40)
        ]
        trace.write_text("".join(lines))
        arguments = ["simulate", "evict", "--trace", str(trace), "--capacity", "0.1"]
        arguments += ["--policy", "lru,opt", "--json", str(out)]
        assert main([*arguments, "--tiers", "1:1:9", "--admission", "second-use"]) == 0
        lru, opt = json.loads(out.read_text())["results"]
        assert lru["disk_writes"] == 0
        assert "disk_writes" not in opt
        assert main([*arguments, "--tiers", "1:1"]) == 0
        assert "disk_writes" not in json.loads(out.read_text())["results"][0]

    def test_a_cache_may_keep_the_books_of_production(self, tmp_path: Path) -> None:
        """To LRU it is all the same where every prompt has room."""
        trace, out = tmp_path / "t.jsonl", tmp_path / "out.json"
        arguments = ["trace", "generate", "chat", "--seed", "3", "--requests", "300"]
        assert main([*arguments, "--out", str(trace)]) == 0
        arguments = ["simulate", "evict", "--trace", str(trace), "--capacity", "0.1,0.2"]
        arguments += ["--policy", "lru", "--json", str(out)]
        found = {}
        for cache in ("bare", "host", "vram"):
            assert main([*arguments, "--cache", cache]) == 0
            rows = json.loads(out.read_text())["results"]
            found[cache] = [row["token_hit_ratio"] for row in rows]
        assert found["bare"] == found["host"] == found["vram"]

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--capacity", "0.1,2"], "--capacity '2': must be a share above 0 and up to 1"),
            (["--capacity", "x"], "--capacity 'x'"),
            (["--policy", "fifo"], "--policy 'fifo': must be of phd, lru"),
            (["--tiers", "1:0"], "--tiers '1:0': must be 1 to 3 numbers above 0"),
            (["--tiers", "1:2:3:4"], "--tiers '1:2:3:4'"),
            (["--tiers", "1:x"], "--tiers '1:x'"),
            (["--tiers", "1:4", "--cache", "host"], "--cache host is one tier alone"),
            (["--block-tokens", "0"], "--block-tokens 0: must be 1 to 1048576"),
            (["--json", "/nowhere/out.json"], "--json /nowhere/out.json: there is no folder"),
            (["--plot", "/nowhere/out.png"], "--plot /nowhere/out.png: there is no folder"),
            (["--plot", "out.nothing"], "--plot out.nothing: must end in one of ."),
            (["--plot", "."], "--plot .: is a folder"),
        ],
    )
    def test_a_mistake_is_one_line(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
    ) -> None:
        trace = tmp_path / "t.jsonl"
        trace.write_text('{"timestamp": 0, "input_length": 512, "hash_ids": [1]}\n')
        assert main(["simulate", "evict", "--trace", str(trace), *arguments]) == 2
        errors = capsys.readouterr().err
        assert said in errors
        assert "Traceback" not in errors

    def test_a_missing_trace_is_named(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["simulate", "evict", "--trace", "/nowhere.jsonl"]) == 2
        assert "trace /nowhere.jsonl: No such file" in capsys.readouterr().err
