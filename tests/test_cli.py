"""The command line as a person meets it."""

import argparse
import importlib.metadata
import importlib.util
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvtier
from kvtier.cli import _parser, _remedy, main
from kvtier.cli.parser import Parser, takes_value
from kvtier.demo.preflight import check_redis
from kvtier.errors import ConfigError
from kvtier.testing.valkey import ValkeyServer


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvtier.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_version_and_help() -> None:
    assert run("--version").stdout == f"kvtier {kvtier.__version__}\n"
    text = run("--help").stdout
    assert "exit status:" in text
    for command in ("node", "worker", "router", "cluster", "demo", "inspect", "plan"):
        assert f"\n    {command} " in text


@pytest.mark.parametrize(("arguments", "status"), [(["plan", "--model", "list"], 0), (["x"], 2)])
def test_a_closed_standard_output_changes_no_exit_status(arguments: list[str], status: int) -> None:
    """As a service that was started with `>&-` has it."""
    code = "import os, sys; os.close(1); os.execv(sys.executable, sys.argv[1:])"
    command = [sys.executable, "-m", "kvtier.cli", *arguments]
    done = subprocess.run(
        [sys.executable, "-c", code, *command], stderr=subprocess.PIPE, text=True, timeout=120
    )
    assert done.returncode == status
    assert "Traceback" not in done.stderr


def parsers(parser: Parser) -> Iterator[Parser]:
    """This one and all below it."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                yield from parsers(each)


ALL = {each.prog.replace("kvtier ", ""): each for each in parsers(_parser())}


@pytest.mark.parametrize("parser", ALL.values(), ids=ALL.keys())
def test_each_option_says_what_it_is_and_what_it_is_left_at(parser: Parser) -> None:
    assert parser.description
    text = "".join(parser.format_help().split())
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each in action._choices_actions:
                assert each.help, each.dest
            continue
        assert action.help, f"{action.dest} says nothing of itself"
        if takes_value(action):
            said = parser._get_formatter()._expand_help(action)
            assert ("(required)" if action.required else "(default: ") in said, said
            assert "".join(said.split()) in text
            assert action.metavar or action.choices, f"{action.dest} names no form or unit"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("nod",),
            "kvtier: argument COMMAND: invalid choice: 'nod' (choose from 'node', 'worker',",
        ),
        ((), "kvtier: the following arguments are required: COMMAND; see `kvtier --help`"),
        (("cluster", "upp"), "kvtier cluster: argument ACTION: invalid choice: 'upp'"),
        (("node", "--conf", "x"), "kvtier: unrecognized arguments: --conf x"),
        (
            ("simulate", "evict", "--trace", "x", "--block-size", "16"),
            "kvtier: unrecognized arguments: --block-size 16",
        ),
        (("trace", "show"), "kvtier trace show: the following arguments are required: FILE"),
        (
            ("trace", "show", "x", "--block-tokens", "many"),
            "kvtier trace show: argument --block-tokens: invalid int value: 'many'",
        ),
        (
            ("trace", "show", "x", "two\nlines\x1b[2J"),
            "kvtier: unrecognized arguments: two lines [2J",
        ),
    ],
)
def test_what_is_no_command_is_told_in_one_line(
    arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert err.startswith(said)
    assert err.endswith(" --help`\n")
    assert err.count("\n") == 1
    assert not out


@pytest.mark.parametrize("name", ["two\nlines", "bell\a", "n" * 200 + "\n" * 20_000], ids=len)
def test_a_mistake_in_the_settings_is_told_in_one_line(name: str) -> None:
    done = run("router", "--config", name)
    assert done.returncode == 2
    line = done.stderr.removesuffix("\n")
    assert line.startswith(f"kvtier: config {name[:3]}")
    assert line.isprintable()
    assert len(line) < 2100


@pytest.mark.parametrize(
    "arguments",
    [("plan", "--model", "list"), ("plan", "--model", "llama-3-8b"),
     ("simulate", "route", "--nodes", "1", "--seeds", "1", "--policy", "random", "--trace", "t")],
    ids=lambda arguments: " ".join(arguments[:2]),
)  # fmt: skip
def test_who_has_read_enough_may_close_the_pipe(
    tmp_path: Path, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("t").write_text('{"timestamp": 0, "input_length": 512, "hash_ids": [1]}\n')
    command = [sys.executable, "-m", "kvtier.cli", *arguments]
    read, write = os.pipe()
    os.close(read)  # before there is anybody to write
    process = subprocess.Popen(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert process.stderr is not None
    with process.stderr as file:
        assert file.read() == ""
    assert process.wait(60) == 1


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


def test_a_router_that_is_not_there_costs_no_older_trace(tmp_path: Path) -> None:
    older = tmp_path / "older.jsonl"
    older.write_text("kept\n")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = run("trace", "record", address, "--out", str(older), "--seconds", "5")
    assert done.returncode == 2
    assert "no recording from" in done.stderr
    assert older.read_text() == "kept\n"


def test_the_demo_refuses_a_folder_that_is_not_there_before_it_starts_anything() -> None:
    done = run("demo", "--json", "/no/such/folder/out.json")
    assert done.returncode == 2
    assert done.stderr == "kvtier: --json: there is no folder /no/such/folder\n"


def test_the_demo_refuses_a_shared_store_that_is_none_before_it_starts_anything() -> None:
    with socket.create_server(("127.0.0.1", 0)) as somebody:
        free = somebody.getsockname()[1]
    for url, said in {
        "localhost": "kvtier: --redis: redis.url is not redis://",
        "redis://:s3cret@localhost:many": "kvtier: --redis: redis.url is not redis://",
        f"redis://127.0.0.1:{free}": f"kvtier: --redis: redis 127.0.0.1:{free}: ",
        "redis://no.such.host.invalid": "kvtier: --redis: redis no.such.host.invalid:6379: ",
    }.items():
        done = run("demo", "--redis", url)
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith(said)
        assert done.stderr.count("\n") == 1
        assert "s3cret" not in done.stderr
        assert not done.stdout


def test_the_demo_refuses_a_shared_store_that_it_may_not_write_to() -> None:
    with ValkeyServer(password="right") as server:
        wrong = server.url.replace("right", "wrong")
        for url in (wrong, f"redis://127.0.0.1:{server.port}"):
            done = run("demo", "--redis", url)
            assert done.returncode == 2, done.stderr
            assert done.stderr.startswith(f"kvtier: --redis: redis 127.0.0.1:{server.port}: ")
            assert done.stderr.count("\n") == 1
        check_redis(server.url)
        (left,) = server.call("KEYS", "*")
        assert 0 < server.call("TTL", left.decode()) <= 60, "nothing stays for long"
        server.call("CONFIG", "SET", "maxmemory", 1)
        with pytest.raises(ConfigError, match=r"^--redis: the server has no room"):
            check_redis(server.url)
        server.call("CONFIG", "SET", "maxmemory", 0)
        server.call("REPLICAOF", "127.0.0.1", 1)
        with pytest.raises(ConfigError, match=r"^--redis: redis 127.0.0.1:\d+: "):
            check_redis(server.url)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is here")
def test_the_demo_on_vllm_needs_vllm() -> None:
    done = run("demo", "--engine", "vllm")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("kvtier: --engine vllm: vLLM is not installed in this Python")


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


@pytest.mark.parametrize("name", ["uvicorn", "starlette", "httptools"])
def test_a_missing_extra_is_named_with_what_brings_it(tmp_path, monkeypatch, capsys, name):
    for each in [*sys.modules]:
        if each.startswith(("kvtier.router.http", "uvicorn", "starlette", "httptools")):
            monkeypatch.delitem(sys.modules, each)
    monkeypatch.setitem(sys.modules, name, None)
    config = tmp_path / "kvtier.toml"
    config.write_text('[router]\nlisten = "127.0.0.1:0"\nhttp = "127.0.0.1:0"\n')
    assert main(["router", "--config", str(config)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"kvtier: {name} is missing: pip install '")
    assert " 'uvicorn>=" in line
    assert line.endswith(", or pip install '.[http]' in the repository")


def test_a_bare_tree_knows_the_way_of_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", none)
    assert _remedy("http") == "pip install '.[http]' in the repository"
