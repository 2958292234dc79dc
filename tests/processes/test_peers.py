"""Two nodes and a router: what one node computed, the other loads from it and goes on with."""

import os
import random
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import pytest

from kvtier.config import WorkerConfig
from kvtier.engine.client import TierClient
from kvtier.engine.model import load
from kvtier.engine.reference import Reference
from kvtier.wire.pb import node_pb2, node_pb2_grpc, router_pb2, router_pb2_grpc, worker_pb2
from tests.access.conftest import Keys
from tests.launching import DEADLINE_S, Process, node_toml, wait_for
from tests.node.conftest import LAYOUT, new_keys, restore, save
from tests.processes.conftest import VOCAB

BLOCK = 16
MAX_TOKENS = 4
MODEL_PREFILL = 512


def node(folder: Path, name: str, more: str) -> Process:
    home = folder / name
    home.mkdir()
    toml = node_toml(home, host="8MiB", more=more).replace('name = "n"', f'name = "{name}"')
    return Process("node", toml, home)


def worker(folder: Path, name: str, model: Path) -> Process:
    toml = f"""
[worker]
model = "{model}"
node = "{name}"
socket = "{folder}/{name}/node.sock"
listen = "127.0.0.1:0"
device = "cpu"
block_tokens = {BLOCK}
vram_bytes = "1MiB"
wait_s = 30.0
threads = 1
"""
    return Process("worker", toml, folder / name)


def peers(**nodes: str) -> str:
    listed = ", ".join(f'{{ node = "{node}", address = "{at}" }}' for node, at in nodes.items())
    return f"[peers]\nmembers = [{listed}]\n"


@dataclass
class Answer:
    choice: router_pb2.Choice
    started: worker_pb2.Started
    ids: list[int]


class Fleet:
    """Node b may load from node a; requests go where `only` says."""

    def __init__(self, folder: Path, model: Path, stack: ExitStack) -> None:
        enter = stack.enter_context
        self.nodes = {"a": enter(node(folder, "a", "[peers]\n"))}
        self.nodes["b"] = enter(node(folder, "b", peers(a=self.nodes["a"].lends_at())))
        with ThreadPoolExecutor() as at_once:
            starting = [at_once.submit(worker, folder, name, model) for name in "ab"]
            loaded = load(WorkerConfig(model=str(model), device="cpu", block_tokens=BLOCK))
        self.workers = {
            name: enter(each.result()) for name, each in zip("ab", starting, strict=True)
        }
        # So that pulling is named whatever this machine computes in a second.
        toml = '[router]\nlisten = "127.0.0.1:0"\npeer_bytes_per_s = "1000TB"\nstale_s = 60.0\n'
        router = enter(Process("router", toml, folder))
        self.stub = router_pb2_grpc.RouterStub(enter(grpc.insecure_channel(router.address)))
        self.reference = Reference(loaded.model, MODEL_PREFILL)

    def only(self, wanted: str) -> None:
        """New requests go to this node's worker: the other one is draining."""
        members = [
            router_pb2.Member(
                node=name, daemon_address=self.nodes[name].address,
                worker_address=self.workers[name].address, draining=name != wanted,
            )
            for name in "ab"
        ]  # fmt: skip
        self.stub.SetMembers(router_pb2.Members(members=members), timeout=DEADLINE_S)
        for table in self.stub.Watch(router_pb2.WatchMembersRequest(), timeout=DEADLINE_S):
            if [each.state for each in table.members] == ["ready", "ready"]:
                return

    def best(self, prompt: list[int]) -> router_pb2.Choice:
        ask = router_pb2.RouteRequest(prompt=router_pb2.Prompt(tokens=ids_of(prompt)))
        return self.stub.Explain(ask, timeout=DEADLINE_S).choices[0]

    def generate(self, prompt: list[int]) -> Answer:
        request = router_pb2.GenerateRequest(
            prompt=router_pb2.Prompt(tokens=ids_of(prompt)), max_tokens=MAX_TOKENS,
            ignore_eos=True, return_first_logits=True,
        )  # fmt: skip
        answer = Answer(router_pb2.Choice(), worker_pb2.Started(), [])
        for part in self.stub.Generate(request, timeout=DEADLINE_S):
            match part.WhichOneof("body"):
                case "routed":
                    answer.choice = part.routed.choice
                case "started":
                    answer.started = part.started
                case "chunk":
                    answer.ids += part.chunk.ids
        return answer

    def check(self, prompt: list[int], answer: Answer) -> None:
        """It is what plain Transformers answers."""
        logits, ids = self.reference.next_token_logits_and_greedy(prompt, 0, MAX_TOKENS)
        got = np.frombuffer(answer.started.first_logits, np.float32)
        np.testing.assert_allclose(got, logits.numpy(), rtol=0, atol=1e-3)
        assert answer.ids == ids

    def computed_on_a(self, prompt: list[int]) -> None:
        """A has all full blocks of it in its host tier, and the router knows."""
        self.only("a")
        answer = self.generate(prompt)
        assert answer.choice.node == "a"
        self.check(prompt, answer)
        self.only("b")

        def named() -> bool:
            best = self.best(prompt)
            return (best.node, best.source, best.source_tokens) == ("b", "a", full(prompt))

        wait_for("the router to name A for what B lacks", named)


def ids_of(prompt: list[int]) -> router_pb2.TokenIds:
    return router_pb2.TokenIds(ids=prompt)


def full(prompt: list[int]) -> int:
    return len(prompt) // BLOCK * BLOCK


def prompt_of(tokens: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(3, VOCAB) for _ in range(tokens)]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_a_request_that_goes_elsewhere_takes_its_blocks_along(
    tmp_path: Path, tiny_folder: Path, stack: ExitStack
) -> None:
    fleet = Fleet(tmp_path, tiny_folder, stack)
    prompt = prompt_of(330, 1)
    fleet.computed_on_a(prompt)
    answer = fleet.generate(prompt)
    fleet.check(prompt, answer)
    assert answer.choice.node == "b"
    assert answer.choice.source == "a"
    assert answer.started.pulled_tokens == full(prompt)
    assert [(each.tier, each.tokens) for each in answer.started.restored] == [(2, full(prompt))]
    assert answer.started.computed_tokens == len(prompt) - full(prompt)


def test_a_node_that_is_killed_while_it_is_asked_costs_a_miss(
    tmp_path: Path, tiny_folder: Path, stack: ExitStack
) -> None:
    fleet = Fleet(tmp_path, tiny_folder, stack)
    prompt = prompt_of(330, 2)
    fleet.computed_on_a(prompt)
    a = fleet.nodes["a"]
    os.kill(a.pid, signal.SIGSTOP)
    with (
        ThreadPoolExecutor(1) as beside,
        grpc.insecure_channel(fleet.nodes["b"].address) as channel,
    ):
        stub = node_pb2_grpc.NodeStub(channel)
        asked = beside.submit(fleet.generate, prompt)
        wait_for(
            "B to ask, or to answer without",  # had the router missed a heartbeat of A
            lambda: (
                asked.done()
                or any(e.leases for e in stub.Status(node_pb2.NodeStatusRequest()).layouts)
            ),
        )
        a.kill()
        answer = asked.result(DEADLINE_S)
    fleet.check(prompt, answer)
    assert answer.choice.node == "b"
    assert answer.started.pulled_tokens == 0
    assert answer.started.computed_tokens == len(prompt)


def test_nodes_that_only_trust_each_other_hand_blocks_on(tmp_path: Path, stack: ExitStack) -> None:
    keys = Keys(tmp_path)
    mine = keys.tls("server", client_ca="ca") + keys.auth()
    a = stack.enter_context(node(tmp_path, "a", "[peers]\n" + mine))
    at = a.lends_at()
    stack.enter_context(node(tmp_path, "b", peers(a=at) + mine))
    stack.enter_context(node(tmp_path, "c", peers(a=at)))  # has nothing to show
    clients = {name: TierClient(f"{tmp_path}/{name}/node.sock", LAYOUT) for name in "abc"}
    try:
        wanted = new_keys(6)
        assert save(clients["a"], wanted) == 6
        assert clients["c"].pull(wanted, 0, "a", wait_s=60.0) == 0
        assert clients["b"].pull(wanted, 0, "a", wait_s=60.0) == 6
        assert len(restore(clients["b"], wanted)) == 6
    finally:
        for client in clients.values():
            client.close()
