"""The whole service under load: two nodes with a worker each, one Valkey, one router, all killed.

Prompts go through the router by gRPC. Every answer must be the one that plain Transformers
gives; whatever dies, a request ends with its answer or with one clear error.
"""

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import grpc
import numpy as np

from kvtier.config import WorkerConfig
from kvtier.core.tiers import Tier
from kvtier.engine.model import load
from kvtier.engine.reference import Reference
from kvtier.testing.valkey import ValkeyServer
from kvtier.wire.chains import TO_WIRE
from kvtier.wire.pb import (
    feed_pb2,
    node_pb2,
    node_pb2_grpc,
    router_pb2,
    router_pb2_grpc,
    worker_pb2,
)
from tests.launching import Process, disk_toml, fixed_ports, node_toml, redis_toml, wait_for
from tests.processes.conftest import VOCAB

CLIENTS = 4
PROMPTS = 20
MAX_TOKENS = 6
PREFILL_TOKENS = 64
REQUEST_S = 60.0
FROM_WIRE = {wire: tier for tier, wire in TO_WIRE.items()}


@dataclass(frozen=True)
class Question:
    """A prompt and what plain Transformers answers."""

    prompt: list[int]
    logits: np.ndarray
    answer: list[int]


@dataclass
class Log:
    """How requests ended, as the clients saw it; `faults` is to stay empty."""

    answers: Counter[str] = field(default_factory=Counter)  # by the worker's address
    answered: Counter[int] = field(default_factory=Counter)  # the same by the client
    tokens: Counter[Tier] = field(default_factory=Counter)  # of prompts, by the tier they came from
    asked: Counter[int] = field(default_factory=Counter)  # requests begun, by the client
    errors: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, client: int, address: str, restored: Iterable[worker_pb2.TierTokens]) -> None:
        with self._lock:
            self.answers[address] += 1
            self.answered[client] += 1
            for each in restored:
                self.tokens[FROM_WIRE[each.tier]] += each.tokens


def questions(folder: Path) -> list[Question]:
    """Prompts of 100 to 300 tokens in three families that begin alike.

    The same passages, a block each, come after different beginnings: their KV is not the same.
    """
    loaded = load(WorkerConfig(model=str(folder), device="cpu", block_tokens=16))
    rng = random.Random(5)

    def words(count: int) -> list[int]:
        return [rng.randrange(3, VOCAB) for _ in range(count)]

    families = [words(96) for _ in range(3)]
    passages = [words(16) for _ in range(6)]
    found = []
    for number in range(PROMPTS):
        middle = rng.choices(passages, k=rng.randint(0, 11))
        prompt = [*families[number % 3], *chain(*middle), *words(rng.randint(4, 20))]
        reference = Reference(loaded.model, PREFILL_TOKENS)
        logits, answer = reference.next_token_logits_and_greedy(prompt, 0, MAX_TOKENS)
        found.append(Question(prompt, logits.numpy(), answer))
    return found


class Client:
    """One caller: asks, checks the answer, asks again, until told to stop."""

    def __init__(self, address: str, asked: Sequence[Question], log: Log, number: int) -> None:
        self._address = address
        self._asked = asked
        self._log = log
        self._number = number
        self._rng = random.Random(number)

    def run(self, stop: threading.Event) -> None:
        # A new connection must not wait longer than a router takes to come back.
        options = [("grpc.max_reconnect_backoff_ms", 500), ("grpc.enable_http_proxy", 0)]
        with grpc.insecure_channel(self._address, options=options) as channel:
            stub = router_pb2_grpc.RouterStub(channel)
            while not stop.is_set():
                question = self._rng.choice(self._asked)
                if not self._ask(stub, question):
                    stop.wait(0.1)

    def _ask(self, stub: router_pb2_grpc.RouterStub, question: Question) -> bool:
        """One request; whether it was answered."""
        request = router_pb2.GenerateRequest(
            prompt=router_pb2.Prompt(tokens=router_pb2.TokenIds(ids=question.prompt)),
            max_tokens=MAX_TOKENS,
            ignore_eos=True,
            return_first_logits=True,
        )
        address, ids = "", list[int]()
        started: worker_pb2.Started | None = None
        self._log.asked[self._number] += 1
        try:
            for part in stub.Generate(request, timeout=REQUEST_S):
                body = part.WhichOneof("body")
                if body == "routed":
                    address = part.routed.choice.address
                elif body == "started":
                    started = part.started
                elif body == "chunk":
                    ids += part.chunk.ids
        except grpc.RpcError as error:
            self._ended(error.code(), error.details() or "")
            if ids != question.answer[: len(ids)]:
                self._log.faults.append(f"a broken answer began with {ids}: {question.answer}")
            return False
        self._check(question, started, ids, address)
        return True

    def _ended(self, code: grpc.StatusCode, details: str) -> None:
        line = f"{code.name}: {details}"
        clear = code is grpc.StatusCode.UNAVAILABLE and details and "\n" not in details
        (self._log.errors if clear else self._log.faults).append(line)

    def _check(
        self, question: Question, started: worker_pb2.Started | None, ids: list[int], address: str
    ) -> None:
        if started is None or ids != question.answer:
            self._log.faults.append(f"{ids} instead of {question.answer}: {started}")
            return
        logits = np.frombuffer(started.first_logits, np.float32)
        if not np.abs(logits - question.logits).max() < 1e-3:
            self._log.faults.append(f"other logits than those of {question.answer}: {started}")
        self._log.count(self._number, address, started.restored)


@dataclass
class Service:
    """The processes, at addresses that outlive them, and what clients of the router saw."""

    daemons: list[Process]
    workers: list[Process]
    router: Process
    valkey: ValkeyServer
    log: Log

    def wait_for(self, what: str, condition: Callable[[], object]) -> None:
        def checked() -> object:
            assert not self.log.faults, self.log.faults
            return condition()

        wait_for(what, checked)

    def wait_for_answers(self, workers: Sequence[Process], count: int = 5) -> None:
        """Until each of these workers has answered so many requests more."""
        before = {each.address: self.log.answers[each.address] for each in workers}
        self.wait_for(
            f"{count} answers of each of {list(before)}",
            lambda: all(self.log.answers[at] >= had + count for at, had in before.items()),
        )

    def status(self, daemon: Process) -> node_pb2.NodeStatus:
        with grpc.insecure_channel(daemon.address) as channel:
            request = node_pb2.NodeStatusRequest()
            return node_pb2_grpc.NodeStub(channel).Status(request, timeout=30)

    def shared_available(self, daemon: Process) -> bool:
        tiers = self.status(daemon).layouts[0].tiers
        return all(each.available for each in tiers if each.tier == feed_pb2.TIER_SHARED)

    @contextmanager
    def unnoticed(self) -> Iterator[None]:
        """No request that ended meanwhile ended with an error."""
        before = len(self.log.errors)
        yield
        assert self.log.errors[before:] == []

    def kill_worker(self, which: int) -> None:
        worker, other = self.workers[which], self.workers[1 - which]
        worker.kill()
        asked = self.log.asked.copy()
        self.wait_for(
            "the requests that were cut off to end",
            lambda: all(self.log.asked[c] > asked[c] for c in range(CLIENTS)),
        )
        self.wait_for_answers([other], 20)
        with self.unnoticed():
            worker.restart()
            self.wait_for_answers([worker, other])

    def kill_daemon(self, which: int) -> None:
        daemon = self.daemons[which]
        with self.unnoticed():
            daemon.kill()
            self.wait_for_answers(self.workers)
            daemon.restart()
            self.wait_for("the worker to attach again", lambda: self.status(daemon).clients == 1)
            self.wait_for_answers(self.workers)

    def kill_valkey(self) -> None:
        with self.unnoticed():
            self.valkey.kill()
            for each in self.daemons:
                self.wait_for("the loss to be noticed", lambda d=each: not self.shared_available(d))
            self.wait_for_answers(self.workers)
            self.valkey.start()
            for each in self.daemons:
                self.wait_for("the shared tier again", lambda d=each: self.shared_available(d))
            self.wait_for_answers(self.workers)

    def kill_router(self) -> None:
        before = len(self.log.errors)
        self.router.kill()
        self.wait_for("callers to hear of it", lambda: len(self.log.errors) > before)
        self.router.restart()
        answered = self.log.answered.copy()
        for client in range(CLIENTS):
            self.wait_for(
                f"an answer for client {client}",
                lambda c=client: self.log.answered[c] > answered[c],
            )
        self.wait_for_answers(self.workers)

    def stop_node(self, which: int) -> None:
        """As an operator does it: whoever asks never notices."""
        with self.unnoticed():
            assert self.workers[which].terminate() == 0
            assert self.daemons[which].terminate() == 0
            self.wait_for_answers([self.workers[1 - which]])


def worker_toml(folder: Path, model: Path, node: str, port: int) -> str:
    return f"""
[worker]
model = "{model}"
node = "{node}"
socket = "{folder}/node.sock"
listen = "127.0.0.1:{port}"
device = "cpu"
block_tokens = 16
loads = "always"  # so small a model computes faster than any disk loads
prefill_tokens = {PREFILL_TOKENS}
vram_bytes = "1MiB"
threads = 1
"""


@contextmanager
def service(folder: Path, model: Path, valkey: ValkeyServer) -> Iterator[Service]:
    router_port, *ports = fixed_ports(5)
    daemons, workers, members = [], [], ""
    with ExitStack() as stack, ThreadPoolExecutor() as starters:
        for name, daemon_port, worker_port in (("a", *ports[:2]), ("b", *ports[2:])):
            home = folder / name
            home.mkdir()
            more = disk_toml(home, "2MiB") + redis_toml(valkey.url)
            node = node_toml(home, host="1MiB", more=more)
            node = node.replace('"n"', f'"{name}"').replace(
                "127.0.0.1:0", f"127.0.0.1:{daemon_port}"
            )
            daemons.append(starters.submit(Process, "node", node, home))
            worker = worker_toml(home, model, name, worker_port)
            workers.append(starters.submit(Process, "worker", worker, home))
            members += f"""
[[router.members]]
node = "{name}"
daemon = "127.0.0.1:{daemon_port}"
worker = "127.0.0.1:{worker_port}"
"""
        # Nothing counts more than who is free: a worker that once was slow gets requests, too.
        toml = f'[router]\nlisten = "127.0.0.1:{router_port}"\nbehind = 0.0\n{members}'
        router = starters.submit(Process, "router", toml, folder)
        started = [
            [stack.enter_context(each.result()) for each in kind] for kind in (daemons, workers)
        ]
        yield Service(*started, stack.enter_context(router.result()), valkey, Log())


@contextmanager
def load_on(running: Service, asked: Sequence[Question]) -> Iterator[None]:
    """Clients that ask all the time; at the end their last requests have ended too."""
    stop = threading.Event()
    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [Client(running.router.address, asked, running.log, n) for n in range(CLIENTS)]
        running_clients = [pool.submit(client.run, stop) for client in clients]
        try:
            yield
        finally:
            stop.set()
        for each in running_clients:
            each.result(REQUEST_S)


def test_every_answer_is_right_whatever_dies(
    tmp_path: Path, tiny_folder: Path, valkey: ValkeyServer
) -> None:
    with service(tmp_path, tiny_folder, valkey) as running:
        asked = questions(tiny_folder)
        with load_on(running, asked):
            running.wait_for_answers(running.workers)
            for tier in Tier:
                running.wait_for(f"hits in {tier.label}", lambda t=tier: running.log.tokens[t])
            running.kill_worker(0)
            running.kill_daemon(0)
            running.kill_valkey()
            running.kill_worker(1)
            running.kill_daemon(1)
            running.kill_router()
            running.stop_node(0)
        assert running.workers[1].terminate() == 0
        assert running.router.terminate() == 0
        assert running.daemons[1].terminate() == 0
        assert not running.log.faults
        assert not list(tmp_path.rglob("*.sock"))
        for process in (*running.daemons, *running.workers, running.router):
            assert "Traceback" not in process.log.read_text()
