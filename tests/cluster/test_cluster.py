"""The control plane on a real Ray cluster of two nodes, with routers that only keep notes."""

import json
import os
import signal
import time
from concurrent import futures
from pathlib import Path

import grpc
import pytest
import ray

from kvtier.cluster import control, launch
from kvtier.cluster.local import LocalCluster
from kvtier.cluster.settings import COORDINATOR, NAMESPACE, ClusterSettings
from kvtier.config import Config, DiskConfig, NodeConfig
from kvtier.wire.pb import router_pb2, router_pb2_grpc
from tests.cluster.support import DEADLINE_S, RAY, nothing_left, until

pytestmark = RAY

ROOMS = (
    ("node", "tests.cluster.rooms:serve"),
    ("worker", "tests.cluster.rooms:worker"),
    ("router", "tests.cluster.rooms:router"),
)


class Notes(router_pb2_grpc.RouterServicer):
    """A router's front door that writes down each table it is told."""

    def __init__(self) -> None:
        self.told: list[router_pb2.Members] = []
        self.address = "127.0.0.1:0"
        self.start()

    def start(self) -> None:
        self.server = grpc.server(futures.ThreadPoolExecutor(2), options=[("grpc.so_reuseport", 0)])
        router_pb2_grpc.add_RouterServicer_to_server(self, self.server)
        port = self.server.add_insecure_port(self.address)
        self.address = f"127.0.0.1:{port}"
        self.server.start()

    def SetMembers(self, request, context):
        self.told.append(request)
        return router_pb2.SetMembersResponse(applied=True)

    def nodes(self) -> dict[str, router_pb2.Member]:
        return {m.node: m for m in self.told[-1].members} if self.told else {}


class Running:
    """The cluster under test and how to look at it."""

    def __init__(self, ray_nodes: LocalCluster, folder: Path) -> None:
        self.ray_nodes = ray_nodes
        self.folder = folder
        self.notes = Notes()
        self.said: list[str] = []
        self.config = Config(
            node=NodeConfig(socket=f"{folder}/{{node}}.sock", listen="127.0.0.1:0"),
            disk=DiskConfig(path=f"{folder}/{{node}}"),
        )
        self.settings = ClusterSettings(routers=(self.notes.address,), rooms=ROOMS)

    def up(self) -> int:
        return launch.up(
            self.config, say=self.said.append, settings=self.settings, deadline_s=DEADLINE_S
        )

    def status(self) -> dict:
        coordinator = ray.get_actor(COORDINATOR, namespace=NAMESPACE)
        return ray.get(coordinator.status.remote(), timeout=DEADLINE_S)

    def settled(self) -> bool:
        try:
            return self.status()["settled"]
        except (ValueError, ray.exceptions.RayError):
            return False

    def agent(self, kind: str, node: str) -> dict:
        (row,) = (a for a in self.status()["agents"] if (a["kind"], a["node"]) == (kind, node))
        return row

    def heard(self, kind: str, node: str, *, unlike: int) -> bool:
        """Whether a Coordinator other than `unlike` has heard that agent."""
        try:
            return self.status()["pid"] != unlike and self.agent(kind, node)["state"] == "ready"
        except (ValueError, ray.exceptions.RayError):
            return False

    def peers(self, node: str) -> dict[str, str]:
        """Where other nodes lend blocks, as a node's daemon can read it."""
        return {e["node"]: e["address"] for e in json.loads(self.peers_file(node).read_text())}

    def peers_file(self, node: str) -> Path:
        return self.folder / f"{node}.sock.peers"

    def lends(self, *nodes: str) -> dict[str, str]:
        """Where they do: our rooms say the same port as of gRPC."""
        ports = {n: self.agent("node", n)["address"].rpartition(":")[2] for n in nodes}
        return {node: f"{node}.invalid:{port}" for node, port in ports.items()}

    def node(self, name: str) -> dict:
        (row,) = (n for n in self.status()["nodes"] if n["name"] == name)
        return row


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    folder = tmp_path_factory.mktemp("k")
    with (
        nothing_left(),
        LocalCluster(["a", "b"]) as ray_nodes,
        launch.connected(ray_nodes.address),
    ):
        cluster = Running(ray_nodes, folder)
        try:
            assert cluster.up() == 0, cluster.said
            yield cluster
        finally:
            cluster.notes.server.stop(None)


def test_every_node_has_one_agent_of_each_kind_and_routers_know(running):
    status = running.status()
    assert sorted((a["node"], a["kind"], a["state"]) for a in status["agents"]) == [
        ("a", "node", "ready"),
        ("a", "worker", "ready"),
        ("b", "node", "ready"),
        ("b", "worker", "ready"),
    ]
    # Each agent runs on its node, in a process of its own, with that node's settings.
    pids = {a["pid"] for a in status["agents"]}
    assert len(pids) == 4
    for node in "ab":
        pid, ray_node = (running.folder / node / "placed").read_text().split()
        assert int(pid) == running.agent("node", node)["pid"]
        assert ray_node == running.node(node)["id"]
    members = running.notes.nodes()
    assert set(members) == {"a", "b"}
    assert members["a"].daemon_address == running.agent("node", "a")["address"]
    assert members["b"].worker_address == f"b.invalid:{os.cpu_count()}"
    assert any("settled" in line for line in running.said)
    for node in "ab":
        assert running.peers(node) == running.lends("a", "b")


def test_up_again_changes_nothing(running):
    before = running.status()
    assert running.up() == 0
    after = running.status()
    assert after["pid"] == before["pid"]
    assert [a["pid"] for a in after["agents"]] == [a["pid"] for a in before["agents"]]
    assert after["version"] == before["version"]


def test_a_killed_agent_comes_back_and_the_routers_learn_its_new_address(running):
    before = running.agent("node", "b")
    other = running.agent("node", "a")
    os.kill(before["pid"], signal.SIGKILL)
    until(lambda: running.agent("node", "b")["restarts"] == 1, "the agent is restarted")
    until(running.settled, "all is well again")
    after = running.agent("node", "b")
    assert after["pid"] != before["pid"]
    assert after["address"] != before["address"]
    assert running.agent("node", "a") == other
    assert running.notes.nodes()["b"].daemon_address == after["address"]
    for node in "ab":
        until(lambda node=node: running.peers(node) == running.lends("a", "b"), "daemons, too")


def test_a_router_that_restarts_is_told_again(running):
    told = running.notes.told[-1]
    running.notes.server.stop(0).wait(DEADLINE_S)
    running.notes.told.clear()
    until(lambda: not running.settled(), "the Coordinator notices")
    running.notes.start()
    until(running.settled, "all is well again")
    assert running.notes.told == [told], "once, and the same"


def test_a_killed_coordinator_comes_back_and_finds_everything_as_it_was(running):
    before, known = running.status(), running.notes.told[-1]
    slow = running.agent("node", "b")["pid"]
    os.kill(slow, signal.SIGSTOP)  # so that it is not heard in the first round
    try:
        os.kill(before["pid"], signal.SIGKILL)
        until(lambda: running.heard("node", "a", unlike=before["pid"]), "it is back")
    finally:
        os.kill(slow, signal.SIGCONT)
    until(running.settled, "all is well again")
    after = running.status()
    assert [(a["kind"], a["node"], a["pid"], a["address"]) for a in after["agents"]] == [
        (a["kind"], a["node"], a["pid"], a["address"]) for a in before["agents"]
    ]
    assert after["version"] > before["version"], "else routers would take it for old news"
    # At no moment were routers told less than there was.
    since = [m for m in running.notes.told if m.version > before["version"]]
    assert since
    assert all(told.members == known.members for told in since)


def test_other_settings_replace_the_coordinator_and_then_every_agent(running):
    before = running.status()
    running.settings = ClusterSettings(
        routers=(running.notes.address,), rooms=ROOMS, workers=False, router=True
    )
    running.config = Config(
        node=NodeConfig(socket=running.config.node.socket, listen="127.0.0.1:0", max_clients=3),
        disk=running.config.disk,
    )
    assert running.up() == 0, running.said
    after = running.status()
    assert [(a["kind"], a["node"]) for a in after["agents"]] == [
        ("node", "a"),
        ("router", "a"),
        ("node", "b"),
    ]
    assert {r["address"] for r in after["routers"]} == {
        running.notes.address,
        running.agent("router", "a")["address"],
    }
    assert (running.folder / "members").read_text() == "a b"
    assert not {a["pid"] for a in after["agents"]} & {a["pid"] for a in before["agents"]}
    for node in "ab":
        assert (running.folder / node / "stopped").read_text() == node, "it ended in order"
    assert running.notes.nodes()["a"].worker_address == ""


def test_a_node_that_ray_takes_away_is_drained_and_marked(running):
    begin_drain(running, "b")
    until(lambda: running.notes.nodes()["b"].draining, "routers know")
    until(lambda: (running.folder / "b" / "drained").exists(), "its daemon was told")
    seconds, stay = (running.folder / "b" / "drained").read_text().split()
    assert 0 < float(seconds) <= 60
    assert stay == "True"

    def note() -> str:
        return running.node("b")["drain"]

    until(lambda: note() == "drained, 3 blocks left behind", "the outcome is in the status")
    assert not running.notes.nodes()["a"].draining
    assert not (running.folder / "a" / "drained").exists()


def test_a_node_that_is_gone_is_no_member_and_its_agents_are_forgotten(running):
    gone = running.node("b")["id"]
    running.ray_nodes.remove("b")
    until(lambda: set(running.notes.nodes()) == {"a"}, "routers know")
    until(lambda: gone not in {node for _, node in control.agents()}, "its agents are gone")
    until(running.settled, "the rest is well")
    until(lambda: running.peers("a") == running.lends("a"), "its daemon is asked no more")


def test_down_leaves_no_actor_and_no_process_of_ours(running):
    pids = [running.status()["pid"], *(a["pid"] for a in running.status()["agents"])]
    (running.folder / "a" / "stopped").unlink()
    assert launch.down(say=running.said.append) == 0
    assert running.said[-1] == "2 agents ended"
    assert control.agents() == []
    assert ray.util.list_named_actors(all_namespaces=True) == []
    assert (running.folder / "a" / "stopped").exists(), "its room ended in order"
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "processes ended")
    assert launch.status(say=running.said.append) == 1
    assert running.said[-1].startswith("not up")


def begin_drain(running: Running, node: str) -> None:
    """What an autoscaler or a spot instance's notice does: Ray has no public call for it."""
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    node_id = running.node(node)["id"]
    client = GcsClient(address=running.ray_nodes.address)
    deadline_ms = time.time_ns() // 1_000_000 + 300_000
    reason = autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
    accepted, why = client.drain_node(node_id, reason, "test", deadline_ms)
    assert accepted, why
