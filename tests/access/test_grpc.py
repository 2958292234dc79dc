"""TLS and tokens on gRPC, with real daemons, routers and command lines."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvtier import config
from kvtier.wire.access import Access
from kvtier.wire.pb import (
    feed_pb2,
    feed_pb2_grpc,
    node_pb2,
    node_pb2_grpc,
    router_pb2,
    router_pb2_grpc,
)
from tests.access.conftest import NAME, OTHER, TOKEN, Keys
from tests.launching import DEADLINE_S, Process, node_toml, wait_for


def inspect(node: Process, folder: Path, toml: str) -> tuple[int, str]:
    """`kvtier inspect` with those settings: its status, and its last line."""
    path = folder / "client.toml"
    path.write_text(toml)
    done = subprocess.run(
        [sys.executable, "-m", "kvtier.cli", "inspect", node.address, "--config", str(path)],
        capture_output=True, text=True, timeout=DEADLINE_S,
    )  # fmt: skip
    assert len(done.stderr.splitlines()) == (done.returncode != 0), done.stderr
    return done.returncode, (done.stdout + done.stderr).splitlines()[-1]


def access(folder: Path, toml: str) -> Access:
    path = folder / "client.toml"
    path.write_text(toml)
    return Access(config.load(path), serving=False)


@pytest.fixture
def node(keys: Keys) -> Iterator[Process]:
    toml = node_toml(keys.folder, more=keys.tls("server") + keys.auth())
    with Process("node", toml, keys.folder) as process:
        yield process


def test_who_trusts_and_is_trusted_is_served(node: Process, keys: Keys) -> None:
    good = keys.tls(cert="") + keys.auth()
    assert inspect(node, keys.folder, good) == (0, "node n, serving, 0 engines attached")
    assert "WARNING" not in node.log.read_text()
    assert TOKEN not in node.log.read_text()


STRANGER = (
    "the certificate of {at} is not accepted by tls.ca_file {f}/stranger.pem: "
    "unable to get local issuer certificate"
)
NO_TOKEN = "{at} refuses us (no [auth] is set): no bearer token in the header 'authorization'"
WRONG = (
    "{at} refuses us (auth.token_file {f}/other): the bearer token is none that is accepted here"
)


@pytest.mark.parametrize(
    ("tls", "auth", "said"),
    [
        ("", "token", "{at} speaks TLS, and no [tls] is set here"),
        ("stranger", "token", STRANGER),
        ("ca", "", NO_TOKEN),
        ("ca", "other", WRONG),
    ],
)
def test_who_does_not_is_told_in_one_line_what_to_change(
    node: Process, keys: Keys, tls: str, auth: str, said: str
) -> None:
    toml = keys.tls(cert="", ca=tls) if tls else ""
    toml += keys.auth(auth) if auth else ""
    status, line = inspect(node, keys.folder, toml)
    expected = said.format(at=node.address, f=keys.folder)
    assert status == 2
    assert line.removeprefix(f"kvtier: no node daemon at {node.address}: ") in (
        expected, f"kvtier: {expected}",
    )  # fmt: skip


def test_a_plain_router_says_in_its_log_that_a_member_speaks_tls(node: Process, keys: Keys) -> None:
    toml = f"""
        [router]
        listen = "127.0.0.1:0"
        members = [{{ node = "a", worker = "{node.address}" }}]
    """
    with Process("router", toml, keys.folder) as router:
        said = f"worker at {node.address}: {node.address} speaks TLS, and no [tls] is set here"
        wait_for("the reason", lambda: said in router.log.read_text())


def test_a_certificate_with_another_name_needs_server_name(keys: Keys) -> None:
    toml = node_toml(keys.folder, more=keys.tls("elsewhere"))
    with Process("node", toml, keys.folder) as node:
        status, line = inspect(node, keys.folder, keys.tls(cert=""))
        assert status == 2
        assert line.endswith(
            f"the certificate of {node.address} is not for '127.0.0.1'; see tls.server_name"
        )
        assert inspect(node, keys.folder, keys.tls(cert="", name=NAME))[0] == 0


def test_callers_without_the_right_certificate_are_refused(keys: Keys) -> None:
    toml = node_toml(keys.folder, more=keys.tls("server", client_ca="ca"))
    with Process("node", toml, keys.folder) as node:
        assert inspect(node, keys.folder, keys.tls("client"))[0] == 0
        for cert, shown in (("", "no tls.cert_file is set"), ("strange", "tls.cert_file ")):
            status, line = inspect(node, keys.folder, keys.tls(cert))
            assert status == 2
            assert f"{node.address} takes no connection of ours: {shown}" in line
        assert inspect(node, keys.folder, keys.tls("client"))[0] == 0


def test_a_token_goes_without_tls_too(keys: Keys) -> None:
    """As behind a mesh that encrypts; and both ways to call it show it."""
    toml = node_toml(keys.folder, more=keys.auth())
    with Process("node", toml, keys.folder) as node:
        assert inspect(node, keys.folder, keys.auth())[0] == 0
        with access(keys.folder, keys.auth()).blocking_channel(node.address) as channel:
            stub = node_pb2_grpc.NodeStub(channel)
            assert stub.Status(node_pb2.NodeStatusRequest(), timeout=60).node == "n"
        assert "refuses us" in inspect(node, keys.folder, "")[1]


def test_health_needs_no_token(node: Process, keys: Keys) -> None:
    nobody = access(keys.folder, keys.tls(cert=""))
    with nobody.blocking_channel(node.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=60)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_each_kind_of_call_is_refused_and_counted(keys: Keys) -> None:
    toml = '[router]\nlisten = "127.0.0.1:0"\n' + keys.auth()
    node = node_toml(keys.folder, more=keys.auth())
    refused = grpc.StatusCode.UNAUTHENTICATED
    with (
        Process("router", toml, keys.folder) as router,
        Process("node", node, keys.folder) as daemon,
        grpc.insecure_channel(router.address) as to_router,
        grpc.insecure_channel(daemon.address) as to_daemon,
    ):
        route = router_pb2_grpc.RouterStub(to_router)
        calls = [
            lambda **how: route.Route(router_pb2.RouteRequest(), **how),
            lambda **how: list(route.Watch(router_pb2.WatchMembersRequest(), **how)),
            lambda **how: list(route.RouteStream(iter([router_pb2.RouteRequest()]), **how)),
            lambda **how: list(
                feed_pb2_grpc.FeedStub(to_daemon).Watch(feed_pb2.WatchRequest(), **how)
            ),
        ]
        for call in calls:
            for shown in (
                [],
                [("authorization", f"Bearer {OTHER}")],
                [("authorization", f"Basic {TOKEN}")],
                [("authorization", f"Bearer {TOKEN}"), ("authorization", f"Bearer {OTHER}")],
            ):
                with pytest.raises(grpc.RpcError) as caught:
                    call(metadata=shown, timeout=60)
                assert caught.value.code() is refused
                assert "\n" not in caught.value.details()
                assert TOKEN not in caught.value.details()
        mine = [("authorization", f"bearer {TOKEN}")]
        status = node_pb2_grpc.NodeStub(to_daemon).Status(
            node_pb2.NodeStatusRequest(), metadata=mine, timeout=60
        )
        assert status.counters["kvtier_unauthenticated_total_missing"] == 3
        assert status.counters["kvtier_unauthenticated_total_wrong"] == 1


def test_tokens_and_certificates_are_renewed_without_a_restart(node: Process, keys: Keys) -> None:
    def answers(toml: str) -> bool:
        return inspect(node, keys.folder, toml)[0] == 0

    old, new = keys.tls(cert="") + keys.auth(), keys.tls(cert="") + keys.auth("other")
    assert answers(old)
    assert not answers(new)
    keys.path("both").write_text(f"{OTHER}\n{TOKEN}\n")
    keys.path("both").replace(keys.path("token"))
    keys.path("old-token").write_text(f"{TOKEN}\n")
    assert answers(new)
    assert answers(keys.tls(cert="") + keys.auth("old-token")), "until it is taken out"
    keys.path("token").write_text(f"{OTHER}\n")
    assert not answers(keys.tls(cert="") + keys.auth("old-token"))
    keys.path("token").write_text("short\n")
    assert answers(new), "a bad file leaves what was there"
    wait_for("a warning", lambda: "has 5 characters" in node.log.read_text())
    for end in ("key", "pem"):  # of another authority
        keys.path(f"server.{end}").write_bytes(keys.path(f"strange.{end}").read_bytes())
    assert answers(keys.tls(cert="", ca="stranger") + keys.auth("other"))


def test_a_listener_that_others_can_reach_is_warned_of_once(keys: Keys) -> None:
    def warnings(more: str) -> list[str]:
        toml = node_toml(keys.folder, more=more).replace("127.0.0.1:0", "0.0.0.0:0")
        with Process("node", toml, keys.folder) as node:
            lines = node.log.read_text().splitlines()
        return [line.rpartition(": node.listen: ")[2] for line in lines if "WARNING" in line]

    (open_,) = warnings("")
    assert open_.startswith("0.0.0.0:")
    assert open_.endswith(" has no TLS and no token; see docs/security.md")
    (no_token,) = warnings(keys.tls("server"))
    assert no_token.endswith(" has no token; see docs/security.md")
    (no_tls,) = warnings(keys.auth())
    assert no_tls.endswith(" has no TLS; see docs/security.md")
    assert warnings(keys.tls("server") + keys.auth()) == []
    assert warnings(keys.tls("server", client_ca="ca")) == []
