"""The command line as a person meets it."""

import subprocess
import sys
from pathlib import Path

import pytest

import kvtier
from kvtier.cli import main


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvtier.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_version_and_help() -> None:
    assert run("--version").stdout == f"kvtier {kvtier.__version__}\n"
    text = run("--help").stdout
    for command in ("node", "worker", "router", "cluster", "demo", "inspect", "plan"):
        assert f"\n    {command} " in text


@pytest.mark.parametrize(
    "arguments",
    [
        ("cluster", "status", "--ray", "127.0.0.1:1"),
        ("cluster", "down", "--ray", "127.0.0.1:1"),
        ("cluster", "up", "--ray", "127.0.0.1:1"),
    ],
)
def test_a_ray_cluster_that_is_not_there_is_said_at_once(arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("kvtier: no Ray cluster at 127.0.0.1:1: ")
    assert len(done.stderr.splitlines()) == 1


def test_the_demo_refuses_a_folder_that_is_not_there_before_it_starts_anything() -> None:
    done = run("demo", "--json", "/no/such/folder/out.json")
    assert done.returncode == 2
    assert done.stderr == "kvtier: --json: there is no folder /no/such/folder\n"


def test_a_server_stops_when_its_parent_goes_away(tmp_path: Path) -> None:
    config = tmp_path / "kvtier.toml"
    config.write_text('[router]\nlisten = "127.0.0.1:0"\n')
    command = [sys.executable, "-m", "kvtier.cli", "router", "--until-eof", "--config", str(config)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()  # as the kernel does when the parent is killed
    assert "kvtier router: stopped" in process.stdout.read()
    assert process.wait(60) == 0
    process.stdout.close()


def test_a_missing_extra_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "kvtier.router.http.server", raising=False)
    config = tmp_path / "kvtier.toml"
    config.write_text('[router]\nlisten = "127.0.0.1:0"\nhttp = "127.0.0.1:0"\n')
    assert main(["router", "--config", str(config)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "kvtier: uvicorn is missing: pip install 'kvtier[http]'"
