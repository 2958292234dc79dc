import dataclasses

import pytest

from kvtier.cluster.settings import (
    ClusterSettings,
    Place,
    check_reachable,
    config_for,
    digest,
)
from kvtier.config import from_dict, peers_listen
from kvtier.errors import ConfigError

SHARED = from_dict(
    {
        "node": {"socket": "/run/kvtier/{node}.sock", "listen": "0.0.0.0:7460"},
        "worker": {"socket": "/run/kvtier/{node}.sock", "listen": "127.0.0.1:7470"},
        "disk": {"path": "/cache/{node}/blocks"},
    }
)
PLACE = Place(name="alpha", ip="10.0.0.7", cpus=3)


def test_one_file_serves_every_node():
    mine = config_for(SHARED, PLACE)
    assert mine.node.name == mine.worker.node == "alpha"
    assert mine.node.socket == mine.worker.socket == "/run/kvtier/alpha.sock"
    assert mine.disk.path == "/cache/alpha/blocks"
    assert config_for(from_dict({}), PLACE).disk is None


def test_listeners_get_the_nodes_own_address_unless_they_are_loopback():
    mine = config_for(SHARED, PLACE)
    assert mine.node.listen == "10.0.0.7:7460"
    assert mine.worker.listen == "127.0.0.1:7470"


def test_nodes_that_share_an_address_do_not_fight_for_a_port():
    mine = config_for(SHARED, dataclasses.replace(PLACE, shared_ip=True))
    assert mine.node.listen == "10.0.0.7:0"
    assert mine.worker.listen == "127.0.0.1:0"


def test_blocks_are_lent_beside_the_daemon_and_the_coordinator_says_by_whom():
    mine = config_for(SHARED, PLACE)
    assert mine.peers.file == "/run/kvtier/alpha.sock.peers"
    assert mine.peers.any_port, "the others are told which"
    assert peers_listen(mine) == "10.0.0.7:7461"
    shared = config_for(SHARED, dataclasses.replace(PLACE, shared_ip=True))
    assert peers_listen(shared) == "10.0.0.7:0"
    own = {"peers": {"listen": "0.0.0.0:9", "members": [{"node": "b", "address": "h:1"}]}}
    told = config_for(from_dict(own), PLACE)
    assert (told.peers.listen, told.peers.file) == ("10.0.0.7:9", ""), "whom it may ask is said"
    assert not told.peers.any_port, "the others ask there"
    kept = config_for(from_dict({"peers": {"file": "/run/{node}.json", "lends": 0}}), PLACE)
    assert (kept.peers.file, kept.peers.lends) == ("/run/alpha.json", 0)


def test_a_workers_threads_are_the_nodes_cpus_unless_configured():
    assert config_for(SHARED, PLACE).worker.threads == 3
    two = from_dict({"worker": {"threads": 2}})
    assert config_for(two, PLACE).worker.threads == 2


def test_a_socket_that_gets_too_long_is_refused_with_its_limit():
    long = from_dict({"node": {"socket": "/" + "x" * 91 + "/{node}"}})
    assert config_for(long, Place(name="a", ip="10.0.0.7"))
    with pytest.raises(ConfigError, match=r"node\.socket is 101 characters long, limit 100"):
        config_for(long, Place(name="alphabet", ip="10.0.0.7"))


def test_loopback_listeners_are_refused_where_there_are_several_hosts():
    settings = ClusterSettings()
    check_reachable(SHARED, settings, {"a": "10.0.0.1", "b": "10.0.0.1"})
    with pytest.raises(ConfigError, match=r"worker\.listen is 127\.0\.0\.1:7470.*1 hosts"):
        check_reachable(SHARED, settings, {"a": "10.0.0.1", "b": "10.0.0.2"})
    daemons = ClusterSettings(workers=False)
    check_reachable(SHARED, daemons, {"a": "10.0.0.1", "b": "10.0.0.2"})


def test_the_digest_follows_what_agents_run_with_and_nothing_else():
    base = digest(SHARED, ClusterSettings())
    assert base == digest(SHARED, ClusterSettings(routers=("r:1",)))
    assert base != digest(SHARED, ClusterSettings(worker_gpus=1))
    assert base != digest(from_dict({}), ClusterSettings())


def test_a_router_must_have_a_port():
    with pytest.raises(ConfigError, match="routers is 'somewhere'"):
        ClusterSettings(routers=("somewhere",))
