"""What a person does wrong, at the command line and over gRPC: one clear line, no traceback."""

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from kvtier.wire.pb import router_pb2, router_pb2_grpc
from tests.launching import (
    DEADLINE_S,
    Process,
    disk_toml,
    fixed_ports,
    node_toml,
    redis_toml,
    wait_for,
)
from tests.processes.conftest import VOCAB, processes_in

GRPC = [("grpc.max_send_message_length", -1), ("grpc.enable_http_proxy", 0)]


def started(*arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "kvtier.cli", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def refusal(process: "subprocess.Popen[str]") -> str:
    """What it says as it ends; it must be one line, the status 2."""
    try:
        out, text = process.communicate(timeout=DEADLINE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        out, text = process.communicate()
    *before, last = text.splitlines()
    assert process.returncode == 2, text
    assert last.startswith("kvtier: ")
    assert all(" INFO " in line for line in before), text
    assert "ready" not in out
    return last.removeprefix("kvtier: ")


def refused(name: str, toml: str, folder: Path) -> str:
    path = folder / f"{name}.toml"
    path.write_text(toml)
    return refusal(started(name, "--config", str(path)))


@dataclass
class Mistakes:
    """A node's configuration, ready to be spoilt; `taken` is a port that somebody listens at."""

    folder: Path
    taken: int

    def good(self, more: str = "") -> str:
        return node_toml(self.folder, more=more)

    def replaced(self, old: str, new: str) -> str:
        text = self.good()
        assert old in text
        return text.replace(old, new)

    def file(self) -> Path:
        path = self.folder / "a-file"
        path.write_text("precious")
        return path


@pytest.fixture
def mistakes(tmp_path: Path) -> Iterator[Mistakes]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield Mistakes(tmp_path, listener.getsockname()[1])


NODE: dict[str, tuple[Callable[[Mistakes], str], str]] = {
    "taken port": (
        lambda m: m.replaced("127.0.0.1:0", f"127.0.0.1:{m.taken}"),
        "node.listen: cannot listen on 127.0.0.1:{m.taken}: Address already in use",
    ),
    "taken metrics port": (
        lambda m: m.replaced("[node]", f"[node]\nmetrics_port = {m.taken}"),
        "node.metrics_port is {m.taken}: Address already in use",
    ),
    "no metrics host": (
        lambda m: m.replaced("[node]", '[node]\nmetrics_port = 1\nmetrics_host = ""'),
        "node.metrics_host is empty; 0.0.0.0 is every address",
    ),
    "another's metrics host": (
        lambda m: m.replaced("[node]", '[node]\nmetrics_port = 1\nmetrics_host = "192.0.2.1"'),
        "node.metrics_host is '192.0.2.1': Cannot assign requested address",
    ),
    "no name of a host": (
        lambda m: m.replaced('"127.0.0.1:0"', '"a..b:0"'),
        "node.listen: cannot listen on a..b:0: no name of a host",
    ),
    "no address": (lambda m: m.replaced("127.0.0.1:0", "here"), "node.listen is 'here', must be"),
    "socket that is a file": (
        lambda m: m.replaced(f"{m.folder}/node.sock", str(m.file())),
        "node.socket: {m.folder}/a-file is there already and is no socket",
    ),
    "socket in no folder": (
        lambda m: m.replaced("node.sock", "a/b/node.sock"),
        "node.socket: there is no folder {m.folder}/a to make {m.folder}/a/b in",
    ),
    "disk that is a file": (
        lambda m: m.good(disk_toml(m.folder).replace(f"{m.folder}/disk", str(m.file()))),
        "disk.path {m.folder}/a-file: not a folder",
    ),
    "disk below a file": (
        lambda m: m.good(disk_toml(m.file())),
        "disk.path {m.folder}/a-file/disk: Not a directory",
    ),
    "disk without a folder": (
        lambda m: m.good(disk_toml(m.folder).replace(f"{m.folder}/disk", "")),
        "disk.path is empty, must be a folder",
    ),
    "disk that takes no files": (
        lambda m: m.good(disk_toml(m.folder).replace(f"{m.folder}/disk", "/proc")),
        "disk.path /proc: ",
    ),
    "no URL of Redis": (lambda m: m.good(redis_toml("localhost")), "redis.url is not redis://"),
    "no port of Redis": (
        lambda m: m.good(redis_toml("redis://:secret@localhost:many")),
        "redis.url is not redis://",
    ),
    "no password file": (
        lambda m: m.good(redis_toml("redis://localhost") + 'password_file = "/nowhere"\n'),
        "redis.password_file: [Errno 2] No such file",
    ),
    "unknown key": (
        lambda m: m.good("[disc]\npath = 'x'\n"),
        "disc: no such setting; known here: node, host, disk,",
    ),
    "wrong type": (
        lambda m: m.replaced("drain_at = 0.0", "drain_at = 'much'"),
        "host.drain_at is 'much', must be of type float",
    ),
    "not TOML": (lambda m: m.good("[disk\n"), "config {m.folder}/node.toml: not TOML: Expected"),
}


@pytest.mark.parametrize(("spoilt", "said"), NODE.values(), ids=NODE.keys())
def test_a_node_is_refused_in_one_line(
    mistakes: Mistakes, spoilt: Callable[[Mistakes], str], said: str
) -> None:
    line = refused("node", spoilt(mistakes), mistakes.folder)
    assert line.startswith(said.format(m=mistakes))
    assert "secret" not in line
    assert not (mistakes.folder / "node.sock").exists()
    assert not (mistakes.folder / "a").exists()
    file = mistakes.folder / "a-file"
    assert not file.exists() or file.read_text() == "precious"


def test_a_config_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    def said(path: Path) -> str:
        return refusal(started("router", "--config", str(path)))

    assert said(tmp_path / "none.toml") == f"config {tmp_path}/none.toml: No such file or directory"
    assert said(tmp_path) == f"config {tmp_path}: Is a directory"
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe[\0n\0")
    assert said(binary).startswith(f"config {binary}: not TOML: 'utf-8' codec can't decode")


def test_a_router_is_refused_in_one_line(mistakes: Mistakes) -> None:
    listen = f'[router]\nlisten = "127.0.0.1:{mistakes.taken}"\n'
    line = refused("router", listen, mistakes.folder)
    assert (
        line
        == f"router.listen: cannot listen on 127.0.0.1:{mistakes.taken}: Address already in use"
    )
    member = '[[router.members]]\nnode = "a"\nworker = "nowhere"\n'
    line = refused("router", member, mistakes.folder)
    assert line.startswith("router.members[0].worker is 'nowhere', must be host:port")


def test_a_worker_is_refused_in_one_line(mistakes: Mistakes, tiny_folder: Path) -> None:
    empty = mistakes.folder / "empty"
    empty.mkdir()
    said = {
        (tiny_folder, mistakes.taken): (
            f"worker.listen: cannot listen on 127.0.0.1:{mistakes.taken}: Address already in use"
        ),
        (empty, 0): f"worker.model {empty}: no config.json, so not a Transformers model",
        (empty / "x", 0): f"worker.model {empty}/x: no such folder (nor the built-in 'smollm2')",
    }
    processes = []  # together: each loads torch first
    for number, (model, port) in enumerate(said):
        path = mistakes.folder / f"{number}.toml"
        path.write_text(worker_toml(mistakes.folder, model, port))
        processes.append(started("worker", "--config", str(path)))
    assert [refusal(each) for each in processes] == list(said.values())


@pytest.mark.parametrize("engine", ["transformers", "vllm", "vllm-http"])
def test_a_workers_taken_port_is_said_before_anything_is_loaded(
    mistakes: Mistakes, engine: str
) -> None:
    """A model takes minutes; here there is none, nor what would load it."""
    path = mistakes.folder / "worker.toml"
    path.write_text(worker_toml(mistakes.folder, mistakes.folder / "none", mistakes.taken))
    hidden = "import sys; sys.modules.update(torch=None, vllm=None, transformers=None);"
    program = f"{hidden} from kvtier.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "worker", "--engine", engine, "--config", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert refusal(process) == (
        f"worker.listen: cannot listen on 127.0.0.1:{mistakes.taken}: Address already in use"
    )


def test_inspect_says_that_nobody_answers() -> None:
    (port,) = fixed_ports(1)
    line = refusal(started("inspect", f"127.0.0.1:{port}"))
    assert line.startswith(f"no node daemon at 127.0.0.1:{port}: ")
    assert refusal(started("inspect", "here")).startswith("address is 'here', must be host:port")


def worker_toml(folder: Path, model: Path, port: int = 0) -> str:
    return f"""
[worker]
model = "{model}"
socket = "{folder}/node.sock"
listen = "127.0.0.1:{port}"
device = "cpu"
block_tokens = 16
vram_bytes = "1MiB"
threads = 1
"""


@dataclass
class Service:
    """A router with one worker that works, where everything else that it was told of is dead."""

    worker: Process
    stub: router_pb2_grpc.RouterStub

    def ask(self, prompt: router_pb2.Prompt, model: str = "") -> list[int]:
        request = router_pb2.GenerateRequest(prompt=prompt, model=model, max_tokens=3)
        parts = self.stub.Generate(request, timeout=60)
        return [each for part in parts for each in part.chunk.ids]

    def refused(self, prompt: router_pb2.Prompt, model: str = "") -> tuple[grpc.StatusCode, str]:
        with pytest.raises(grpc.RpcError) as caught:
            self.ask(prompt, model)
        return caught.value.code(), caught.value.details()


def tokens(*ids: int) -> router_pb2.Prompt:
    return router_pb2.Prompt(tokens=router_pb2.TokenIds(ids=ids))


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    dead = [f"127.0.0.1:{port}" for port in fixed_ports(2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVTIER_CACHE", str(folder / "cache"))
        patch.setenv("OMP_NUM_THREADS", "1")
        with Process("worker", worker_toml(folder, tiny_folder), folder) as worker:
            toml = f"""
[router]
listen = "127.0.0.1:0"
members = [
    {{ node = "a", worker = "{worker.address}", daemon = "{dead[0]}" }},
    {{ node = "b", worker = "{dead[1]}" }},
]
"""
            with (
                Process("router", toml, folder) as router,
                grpc.insecure_channel(router.address, options=GRPC) as channel,
            ):
                stub = router_pb2_grpc.RouterStub(channel)
                request = router_pb2.WatchMembersRequest()
                for table in stub.Watch(request, timeout=DEADLINE_S):
                    if [each.state for each in table.members] == ["ready", "connecting"]:
                        break
                yield Service(worker, stub)
    assert not processes_in(folder)


def test_what_is_dead_keeps_nobody_from_serving(service: Service) -> None:
    assert len(service.ask(tokens(*range(3, 103)))) == 3
    assert len(service.ask(router_pb2.Prompt(text="w4 w5 w6"))) == 3
    wait_for("a warning", lambda: "WARNING" in service.worker.log.read_text())
    log = service.worker.log.read_text()
    (warning,) = [line for line in log.splitlines() if " WARNING " in line]
    assert "kvtier is away" in warning
    assert "no node daemon at" in warning
    assert "Traceback" not in log


def test_a_bad_request_is_refused_in_one_line(service: Service) -> None:
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    assert service.refused(tokens(*[5] * 512)) == (
        invalid,
        "prompt: 512 tokens, and one more for the answer, but model 'tiny-llama' takes 512 in all",
    )
    assert service.refused(tokens(5, VOCAB, 6)) == (
        invalid,
        f"prompt: token id {VOCAB}, but model 'tiny-llama' has {VOCAB} tokens",
    )
    assert service.refused(tokens()) == (invalid, "prompt: no tokens")
    assert service.refused(router_pb2.Prompt(text="")) == (invalid, "prompt: no tokens")
    assert service.refused(router_pb2.Prompt()) == (
        invalid,
        "prompt: must be text, chat, tokens or keys",
    )
    assert service.refused(tokens(5), model="gpt-7") == (
        grpc.StatusCode.NOT_FOUND,
        "model 'gpt-7' is not served; served: tiny-llama",
    )
    code, line = service.refused(router_pb2.Prompt(text="x" * 100_000_000))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in line
    assert "\n" not in line
    assert len(service.ask(tokens(3, 4, 5))) == 3, "the router goes on"
