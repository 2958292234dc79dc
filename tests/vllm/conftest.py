"""The model, the prompts, a node daemon with every tier, and nothing left behind."""

import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from kvtier.config import cache_dir
from kvtier.testing.valkey import ValkeyServer
from kvtier.wire.pb import feed_pb2, node_pb2, node_pb2_grpc
from tests.launching import Process, disk_toml, fixed_ports, node_toml, redis_toml, wait_for

collect_ignore = ["engine_main.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Starting an engine takes long where others compute too; only a hang takes longer."""
    for item in items:
        item.add_marker(pytest.mark.timeout(900))


# Text, since random tokens have answers that hang on the last bit of a sum.
STORIES = [
    "The lighthouse keeper wrote in his book every evening what the sea had been like that day. ",
    "To bake bread one needs flour, water, salt and time, and time is what most bakers lack. ",
    "The first trains ran between the harbour and the mill, and people came to see them pass. ",
    "In spring the garden is dug over, the paths are weeded, and beans are laid into the soil. ",
]


@pytest.fixture(scope="session")
def model() -> Path:
    """The folder of SmolLM2-135M, converted once."""
    code = "from kvtier.engine import smollm2; from kvtier.config import cache_dir; import sys;"
    code += "print(smollm2.folder(cache_dir(), lambda line: print(line, file=sys.stderr)))"
    folder = cache_dir() / "smollm2-135m-instruct"
    if not folder.is_dir():
        subprocess.run([sys.executable, "-c", code], check=True, timeout=250)
    return folder


@pytest.fixture(scope="session")
def prompts(model: Path) -> list[list[int]]:
    """Four prompts of 300 to 700 tokens."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    rng = random.Random(3)
    found = []
    for number, story in enumerate(STORIES):
        text = "".join(f"{rng.randrange(1000)}. {story}" for _ in range(40))
        found.append(tokenizer.encode(text).ids[: 300 + 130 * number])
    return found


@dataclass
class Node:
    """A node daemon with a disk and a Redis tier."""

    process: Process
    folder: Path
    valkey: ValkeyServer

    @property
    def socket(self) -> Path:
        return self.folder / "node.sock"

    def call(self, ask: Callable[[node_pb2_grpc.NodeStub], object]) -> object:
        with grpc.insecure_channel(self.process.address) as channel:
            return ask(node_pb2_grpc.NodeStub(channel))

    def status(self) -> node_pb2.NodeStatus:
        found = self.call(lambda stub: stub.Status(node_pb2.NodeStatusRequest(), timeout=20))
        assert isinstance(found, node_pb2.NodeStatus)
        return found

    def blocks(self, tier: int) -> int:
        """Blocks that a tier holds, over all layouts."""
        layouts = self.status().layouts
        return sum(each.blocks for one in layouts for each in one.tiers if each.tier == tier)

    def clear(self, *tiers: int) -> None:
        """Empty these tiers; what moves at the time of a call stays, so more than once."""
        request = node_pb2.NodeClearRequest(tiers=tiers)

        def empty() -> bool:
            self.call(lambda stub: stub.Clear(request, timeout=20))
            return not any(self.blocks(tier) for tier in tiers)

        wait_for(f"tiers {tiers} to be empty", empty)

    def replace(self, more: str) -> None:
        """End the daemon and start another at its place, with these lower tiers."""
        self.process.terminate()
        toml = node_toml(self.folder, host="192MiB", more=more)
        self.process = Process("node", toml, self.folder)

    def settled(self, blocks: int) -> None:
        """Return when host memory has so many blocks, and the disk and Redis all that it has.

        What an engine still has to hand over is known to nobody: hence the number.
        """

        def done() -> bool:
            host = self.blocks(feed_pb2.TIER_HOST)
            lower = min(self.blocks(feed_pb2.TIER_DISK), self.blocks(feed_pb2.TIER_SHARED))
            moving = sum(each.moves + each.leases for each in self.status().layouts)
            return host >= blocks and lower >= host and not moving

        wait_for("blocks to be in every tier", done)


def start_node(folder: Path, valkey: ValkeyServer, host: str = "192MiB") -> Node:
    more = disk_toml(folder, "1GiB") + redis_toml(valkey.url)
    return Node(Process("node", node_toml(folder, host=host, more=more), folder), folder, valkey)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kv")


@pytest.fixture(scope="module")
def node(folder: Path) -> Iterator[Node]:
    (port,) = fixed_ports(1)
    with ValkeyServer(port, folder / "valkey") as valkey:
        node = start_node(folder, valkey)
        yield node
        if node.process.process.poll() is None:
            node.process.terminate()
