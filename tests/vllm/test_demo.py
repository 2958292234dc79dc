"""The main job on vLLM, whole: two Ray nodes, kills, every tier, every answer checked."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.vllm.driver import ROOT


def test_the_demo_on_vllm_keeps_its_promises_and_leaves_nothing(model, tmp_path):
    out = tmp_path / "demo.json"
    command = [sys.executable, "-m", "kvtier.cli", "demo", "--engine", "vllm", "--json", str(out)]
    with tempfile.TemporaryDirectory(prefix="kvt-", dir="/tmp") as folder:  # Ray's sockets
        environment = {**os.environ, "TMPDIR": folder, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, timeout=800, env=environment)
        left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
        assert not list(Path(folder).glob("kvtier-*")), "sockets and folders are gone"
    assert done.returncode == 0, done.stdout + done.stderr
    assert folder not in left.stdout, "no process of the demo is left"
    assert "Traceback" not in done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert all(result["verdicts"].values())
    assert {tier for tier, row in result["by_kind"].items() if row["hit_tokens"]} == {
        "vram", "host", "disk", "shared",
    }  # fmt: skip
    requests = result["requests"]
    assert all(each["identical"] for each in requests if each["ids"])
    (cut,) = [each for each in requests if each["error"]]
    assert cut["act"] == "kill"
    assert cut["error"].startswith("UNAVAILABLE: worker")
    after = requests[requests.index(cut) + 1]
    assert after["node"] != cut["node"], "served at once, by the other node"
    assert sum(after["restored"].values()) > after["computed"], "and not from the start"
