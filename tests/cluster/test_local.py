"""`kvtier cluster up --local`: real node daemons on two Ray nodes that live as long as we wait."""

from contextlib import ExitStack, closing

import grpc
import pytest

from kvtier.cluster import launch, local
from kvtier.cluster.settings import ClusterSettings
from kvtier.config import from_dict
from kvtier.engine.client import TierClient
from kvtier.wire.pb import node_pb2, node_pb2_grpc
from tests.cluster.support import DEADLINE_S, RAY, nothing_left
from tests.node.conftest import LAYOUT, new_keys, restore, save
from tests.node.nodes import WAIT_S

DAEMONS = ClusterSettings(workers=False)


def test_several_nodes_on_one_machine_share_nothing(tmp_path):
    config = local.local_config(
        from_dict(
            {
                "node": {"listen": "0.0.0.0:7460"},
                "worker": {"socket": ""},
                "disk": {"path": "/cache"},
            }
        ),
        tmp_path,
    )
    assert config.node.socket == f"{tmp_path}/{{node}}.sock"
    assert config.node.listen == config.worker.listen == "127.0.0.1:0"
    assert config.disk.path == "/cache/{node}"
    assert config.worker.socket == "", "a worker without tiers stays without"
    given = from_dict({"node": {"socket": "/run/{node}"}, "disk": {"path": "/d-{node}"}})
    assert local.local_config(given, tmp_path).node.socket == "/run/{node}"
    assert local.local_config(given, tmp_path).disk.path == "/d-{node}"


def test_the_ray_settings_must_come_before_ray(monkeypatch):
    monkeypatch.delenv("RAY_AUTH_MODE")
    with pytest.raises(RuntimeError, match="ray was imported before"):
        local.prepare_environment()


class TestUp:
    pytestmark = RAY

    def test_real_daemons_serve_until_the_wait_is_over(self, tmp_path):
        said: list[str] = []
        served: dict[str, str] = {}
        pulled: list[int] = []

        def wait() -> None:
            address = said[0].removeprefix("Ray at ")
            assert launch.status(say=said.append, ray_address=address) == 0
            rows = [line.split() for line in said if line.startswith("node-")]
            for row in rows:
                with grpc.insecure_channel(row[3]) as channel:
                    stub = node_pb2_grpc.NodeStub(channel)
                    status = stub.Status(node_pb2.NodeStatusRequest(), timeout=DEADLINE_S)
                    served[row[0]] = status.node
            with ExitStack() as stack:
                one, two = (
                    stack.enter_context(closing(TierClient(f"{tmp_path}/{node}.sock", LAYOUT)))
                    for node in served
                )
                keys = new_keys(4)
                assert save(one, keys) == 4
                pulled.append(two.pull(keys, 0, "node-1", wait_s=WAIT_S))
                assert len(restore(two, keys)) == 4

        config = from_dict(
            {
                "node": {"socket": f"{tmp_path}/{{node}}.sock"},
                "host": {"bytes": "8MiB"},
                "disk": {"path": str(tmp_path / "disk")},
            }
        )
        with nothing_left():
            code = local.up(config, nodes=2, say=said.append, wait=wait, settings=DAEMONS)
        assert code == 0, said
        assert served == {"node-1": "node-1", "node-2": "node-2"}
        assert pulled == [4], "though nobody has set where the other one is"
        assert said[-1] == "2 agents ended"
