from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.cluster.plan import (
    AgentView,
    Create,
    Kill,
    Placed,
    RayNode,
    Retire,
    names,
    plan,
    table,
    wanted,
)
from kvtier.cluster.settings import ClusterSettings

A = RayNode(id="a" * 56, ip="10.0.0.1", label="alpha", tier=True, head=True)
B = RayNode(id="b" * 56, ip="10.0.0.2", label="beta", tier=True)
PLAIN = RayNode(id="c" * 56, ip="10.0.0.3")
DAEMONS = ClusterSettings(workers=False)
BOTH = ClusterSettings()


def agent(node, kind="node", **facts):
    facts = {"condition": "ready", "address": f"{node.ip}:1", "digest": "now"} | facts
    return AgentView(kind=kind, node_id=node.id, **facts)


def test_every_node_that_carries_the_resource_gets_each_wanted_agent_once():
    assert plan([A, B, PLAIN], [], BOTH, "now") == [
        Create("node", A.id),
        Create("worker", A.id),
        Create("node", B.id),
        Create("worker", B.id),
    ]
    assert plan([A, B], [agent(A), agent(B)], DAEMONS, "now") == []


def test_everywhere_means_nodes_without_the_resource_too():
    settings = ClusterSettings(everywhere=True, workers=False)
    assert plan([A, PLAIN], [agent(A)], settings, "now") == [Create("node", PLAIN.id)]


def test_a_router_is_wanted_on_the_head_alone_even_if_that_has_no_tier():
    settings = ClusterSettings(workers=False, router=True)
    head = replace(A, tier=False)
    assert plan([head, B], [agent(B)], settings, "now") == [Create("router", head.id)]


def test_the_agent_of_a_node_that_is_gone_is_ended():
    assert plan([A], [agent(A), agent(B)], DAEMONS, "now") == [
        Kill("node", B.id, "its node is gone")
    ]


@pytest.mark.parametrize("condition", ["lost", "stopped"])
def test_a_dead_agent_is_ended_and_only_then_made_anew(condition):
    dead = agent(A, condition=condition)
    assert plan([A], [dead], DAEMONS, "now") == [Kill("node", A.id, f"it is {condition}")]
    assert plan([A], [], DAEMONS, "now") == [Create("node", A.id)]


def test_a_silent_agent_is_ended_after_the_limit_but_one_that_still_starts_is_left_alone():
    (action,) = plan([A], [agent(A, silent_s=61)], DAEMONS, "now", hung_s=60)
    assert isinstance(action, Kill)
    assert "silent for 61 s" in action.why
    assert plan([A], [agent(A, silent_s=59)], DAEMONS, "now", hung_s=60) == []
    loading = agent(A, condition="starting", silent_s=600)
    assert plan([A], [loading], DAEMONS, "now", hung_s=60) == []


def test_what_is_no_longer_wanted_ends_in_order():
    assert plan([A], [agent(A), agent(A, "worker")], DAEMONS, "now") == [
        Retire("worker", A.id, "not wanted on this node")
    ]


def test_a_draining_node_gets_nothing_new_and_keeps_what_it_has():
    draining = replace(A, draining=True)
    assert plan([draining], [], BOTH, "now") == []
    assert plan([draining], [agent(A, digest="before")], DAEMONS, "now") == []


def test_new_settings_replace_one_agent_at_a_time_and_only_while_the_others_are_ready():
    old = [agent(A, digest="before"), agent(B, digest="before")]
    assert plan([A, B], old, DAEMONS, "now") == [Retire("node", A.id, "the settings changed")]
    # A is under replacement: B waits until A is ready again.
    assert plan([A, B], old[1:], DAEMONS, "now") == [Create("node", A.id)]
    assert plan([A, B], [agent(A, condition="starting"), old[1]], DAEMONS, "now") == []
    assert plan([A, B], [agent(A), old[1]], DAEMONS, "now") == [
        Retire("node", B.id, "the settings changed")
    ]


def test_a_broken_agent_with_old_settings_goes_first_so_that_a_fix_gets_through():
    broken = agent(B, condition="starting", digest="before")
    (action,) = plan([A, B], [agent(A, digest="before"), broken], DAEMONS, "now")
    assert action == Retire("node", B.id, "the settings changed")


def test_an_agent_that_has_not_told_its_settings_is_not_replaced():
    assert plan([A], [agent(A, condition="starting", digest="")], DAEMONS, "now") == []


def test_names_are_labels_or_pieces_of_the_id():
    assert names([A, PLAIN]) == {A.id: "alpha", PLAIN.id: "c" * 12}


@pytest.mark.parametrize("label", ["../etc", "a b", "", "-x", "x" * 64, "a/b", "ä"])
def test_a_label_that_is_no_safe_part_of_a_path_is_not_used(label):
    assert names([replace(A, label=label)]) == {A.id: "a" * 12}


def test_two_nodes_with_one_label_get_different_names():
    called = names([replace(A, label="same"), replace(B, label="same")])
    assert called == {A.id: "same-aaaaaa", B.id: "same-bbbbbb"}


def test_the_table_holds_what_serves_by_name():
    agents = [
        agent(B),
        agent(B, "worker", address="10.0.0.2:9"),
        agent(A, "worker", condition="starting"),
        agent(A),
    ]
    assert table([B, A, PLAIN], agents) == (
        Placed("alpha", "10.0.0.1:1", "", draining=False),
        Placed("beta", "10.0.0.2:1", "10.0.0.2:9", draining=False),
    )
    assert table([replace(A, draining=True)], agents)[0].draining
    assert table([A], [agent(B)]) == ()


nodes_ = st.lists(
    st.builds(
        RayNode,
        id=st.sampled_from("abcd"),
        ip=st.just("10.0.0.1"),
        tier=st.booleans(),
        head=st.booleans(),
        draining=st.booleans(),
    ),
    unique_by=lambda n: n.id,
    max_size=4,
)
agents_ = st.lists(
    st.builds(
        AgentView,
        kind=st.sampled_from(["node", "worker", "router"]),
        node_id=st.sampled_from("abcd"),
        condition=st.sampled_from(["starting", "ready", "stopped", "lost"]),
        digest=st.sampled_from(["", "now", "before"]),
        silent_s=st.sampled_from([0.0, 100.0]),
    ),
    unique_by=lambda a: (a.kind, a.node_id),
    max_size=8,
)
settings_ = st.builds(
    ClusterSettings, everywhere=st.booleans(), workers=st.booleans(), router=st.booleans()
)


@given(nodes_, agents_, settings_)
def test_whatever_is_there_the_cluster_comes_to_rest_as_wanted(nodes, agents, settings):
    """Each action is carried out as asked, new agents become ready: at the end nothing is to do."""
    there = {(a.kind, a.node_id): a for a in agents}
    for _ in range(30):
        actions = plan(nodes, list(there.values()), settings, "now")
        places = [(a.kind, a.node_id) for a in actions]
        assert len(set(places)) == len(places), "two actions for one agent"
        if not actions and all(a.condition == "ready" and a.digest for a in there.values()):
            break
        for action, place in zip(actions, places, strict=True):
            if isinstance(action, Create):
                assert place not in there
                there[place] = AgentView(kind=place[0], node_id=place[1], condition="ready",
                                         digest="now")  # fmt: skip
            else:
                del there[place]
        # What was starting is up by the next round.
        there = {
            p: replace(a, condition="ready", digest=a.digest or "before", silent_s=0.0)
            if a.condition == "starting" or not a.digest else a
            for p, a in there.items()
        }  # fmt: skip
    else:
        raise AssertionError("never at rest")
    steady = {(kind, n.id) for n in nodes if not n.draining for kind in wanted(n, settings)}
    draining = {n.id for n in nodes if n.draining}
    assert steady <= there.keys()
    assert {p for p in there if p[1] not in draining} == steady
    assert all(there[p].digest == "now" for p in steady)
