"""kvtier as a Ray job, submitted to a real job server, with real node daemons."""

import subprocess
import sys
from pathlib import Path

import pytest

from kvtier.cluster import control, job, launch
from kvtier.cluster.local import LocalCluster
from tests.cluster.support import DEADLINE_S, RAY, nothing_left

pytestmark = RAY


def submit(url: str, *arguments: str) -> subprocess.CompletedProcess:
    ray = str(Path(sys.executable).parent / "ray")
    command = [ray, "job", "submit", "--address", url, "--", sys.executable]
    return subprocess.run(
        [*command, "-m", "kvtier.cluster.job", *arguments],
        capture_output=True, text=True, timeout=2 * DEADLINE_S, check=False,
    )  # fmt: skip


def test_a_submitted_job_brings_the_cluster_up_and_leaves_it_running(tmp_path):
    config = tmp_path / "kvtier.toml"
    config.write_text(
        f'[node]\nsocket = "{tmp_path}/{{node}}.sock"\nlisten = "127.0.0.1:0"\n'
        f'[host]\nbytes = "8MiB"\n[disk]\npath = "{tmp_path}/{{node}}"\n'
    )
    said: list[str] = []
    with nothing_left(), LocalCluster(["solo"], dashboard=True) as cluster:
        done = submit(cluster.jobs_url, "--config", str(config), "--no-workers")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "settled" in done.stdout
        with launch.connected(cluster.address):
            assert [kind for kind, _ in control.agents()] == ["node"], "it outlives its job"
            assert launch.status(say=said.append) == 0
            assert said[1].split()[:3] == ["solo", "node", "ready"]
            assert launch.down(say=said.append) == 0


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--routers", "nowhere"], "routers is 'nowhere'"),
        (["--config", "/missing.toml"], "/missing.toml: No such file or directory"),
        (["--worker-gpus", "-1"], "worker_gpus is -1.0, must be 0 or more"),
    ],
)
def test_a_wrong_setting_is_one_line_and_exit_code_2(tmp_path, capsys, arguments, why):
    config = tmp_path / "kvtier.toml"
    config.write_text("")
    assert job.main(["--config", str(config), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert why in line
