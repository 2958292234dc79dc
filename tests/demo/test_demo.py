"""The main job, whole: two Ray nodes, the real model, kills, and every answer checked."""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.demo import play


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder with a short path: Ray puts sockets into it."""
    with tempfile.TemporaryDirectory(prefix="kvt-", dir="/tmp") as folder:
        yield Path(folder)


@pytest.mark.model
@pytest.mark.cluster
@pytest.mark.timeout(900)
def test_the_demo_keeps_its_promises_and_leaves_nothing(scratch: Path) -> None:
    played = play({**os.environ, "TMPDIR": str(scratch)})  # as the benchmark does
    done, result = played.done, played.result
    assert done.returncode == 0, done.stdout + done.stderr
    assert played.nbytes > 0
    assert played.seconds > result["seconds"] / 2
    assert all(result["verdicts"].values())
    assert {tier for tier, row in result["by_kind"].items() if row["hit_tokens"]} == {
        "vram", "host", "disk", "shared",
    }  # fmt: skip
    assert result["by_kind"]["cold"]["share_of_cold"] == 1
    assert all(row["share_of_cold"] > 0 for row in result["by_kind"].values())
    assert "bit-identical logits" in result["compared"]
    events = [(each["act"], each["text"].split()[0]) for each in result["events"]]
    assert events == [
        ("turns", "VRAM"), ("kill", "killed"), ("kill", "Ray"), ("daemon", "Ray"),
        ("daemon", "VRAM"),
    ]  # fmt: skip
    for line in ("loading the model", "starting Ray with two nodes", "the workers load the model"):
        assert line in done.stdout, "progress is told where there is no terminal, too"
    requests = result["requests"]
    assert all(each["identical"] for each in requests if each["ids"])
    cut = [each for each in requests if each["error"]]
    assert [each["act"] for each in cut] == ["kill"]
    assert cut[0]["error"].startswith("UNAVAILABLE: worker")
    after = requests[requests.index(cut[0]) + 1]
    assert after["node"] != cut[0]["node"], "served at once, by the other node"
    assert sum(after["restored"].values()) > after["computed"], "and not from the start"
    assert "Traceback" not in done.stdout + done.stderr
    assert not list(scratch.glob("kvtier-*")), "sockets and folders are gone"
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(scratch) not in left, "no process of the demo is left"
