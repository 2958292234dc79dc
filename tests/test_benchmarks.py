"""Each benchmark runs at a tiny size and writes the figures it promises."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "name",
    [
        "evict",
        "ledger",
        "match",
        "host_path",
        "disk",
        "redis",
        "peer",
        "route",
        "route_growth",
        "index",
        "route_sim",
        "cascade",
        pytest.param("codec", marks=pytest.mark.model),
        pytest.param("restore", marks=pytest.mark.model),
    ],
)
def test_a_benchmark_writes_its_figures_and_bars(name: str, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = subprocess.run(
        [sys.executable, "benchmarks/run.py", name, "--tiny", "--json", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["benchmark"] == name
    assert result["machine"]["cores"] >= 1
    assert result["bars"]
    for bar in result["bars"]:
        (limit,) = bar.keys() & {"at_least", "at_most"}
        value, bound = bar["value"], bar[limit]
        assert bar["holds"] == (value >= bound if limit == "at_least" else value <= bound)
        assert bar["name"] in done.stdout
    for times in flatten(result["times"]):
        assert 0 < times["min_s"] <= times["median_s"] <= times["p99_s"]


def flatten(times: dict) -> list[dict]:
    if "median_s" in times:
        return [times]
    return [each for part in times.values() for each in flatten(part)]
