"""TLS and tokens on the OpenAI-compatible front and on metrics pages."""

import http.client
import socket
import ssl
from collections.abc import Iterator
from contextlib import closing

import pytest

from tests.access.conftest import OTHER, TOKEN, Keys
from tests.launching import Process, fixed_ports, node_toml


class Front:
    """A router with an HTTP front at `port`."""

    def __init__(self, keys: Keys, more: str) -> None:
        self.keys = keys
        self.port, self.metrics = fixed_ports(2)
        toml = f"""
[router]
listen = "127.0.0.1:0"
http = "127.0.0.1:{self.port}"
metrics_port = {self.metrics}
{more}
"""
        self.process = Process("router", toml, keys.folder)

    def get(
        self, path: str, token: str = "", *, tls: str = "", method: str = "GET", port: int = 0
    ) -> tuple[int, str]:
        """Status and body; `tls` is the authority to trust."""
        port = port or self.port
        if tls:
            context = ssl.create_default_context(cafile=str(self.keys.path(f"{tls}.pem")))
            client: http.client.HTTPConnection = http.client.HTTPSConnection(
                "127.0.0.1", port, timeout=60, context=context
            )
        else:
            client = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        with closing(client):
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            client.request(method, path, headers=headers)
            with closing(client.getresponse()) as answer:
                return answer.status, answer.read().decode()


@pytest.fixture
def front(keys: Keys) -> Iterator[Front]:
    front = Front(keys, keys.tls() + keys.auth())
    with front.process:
        yield front


def test_openais_clients_show_their_key(front: Front) -> None:
    assert front.get("/v1/models", TOKEN, tls="ca")[0] == 200
    for token, said in (
        ("", "no bearer token in the header 'authorization'"),
        (OTHER, "the bearer token is none that is accepted here"),
    ):
        for path, method in (
            ("/v1/models", "GET"), ("/v1/chat/completions", "POST"), ("/nothing", "GET"),
        ):  # fmt: skip
            status, body = front.get(path, token, tls="ca", method=method)
            assert status == 401
            assert f'"message":"{said}"' in body
            assert '"type":"authentication_error"' in body
    log = front.process.log.read_text()
    assert TOKEN not in log
    assert OTHER not in log


def test_probes_and_scrapers_need_none(front: Front) -> None:
    assert front.get("/health", tls="ca") == (503, '{"status":"no worker is ready"}')
    for port in (front.port, front.metrics):
        status, body = front.get("/metrics", tls="ca", port=port)
        assert status == 200
        assert "kvtier_unauthenticated_total" in body


def test_plain_text_and_strangers_get_nothing(front: Front) -> None:
    for port in (front.port, front.metrics):
        with pytest.raises((http.client.HTTPException, OSError)):
            front.get("/health", port=port)
        with pytest.raises(ssl.SSLCertVerificationError):
            front.get("/health", tls="stranger", port=port)
        with socket.create_connection(("127.0.0.1", port)) as idle:  # holds up nobody
            assert front.get("/metrics", tls="ca", port=port)[0] == 200
            idle.close()
    assert "Traceback" not in front.process.log.read_text()


def test_metrics_can_be_closed(keys: Keys) -> None:
    front = Front(keys, keys.auth(more="open_metrics = false"))
    with front.process:
        for port in (front.port, front.metrics):
            assert front.get("/metrics", port=port)[0] == 401
            assert front.get("/metrics", OTHER, port=port)[0] == 401
            status, body = front.get("/metrics", TOKEN, port=port)
            assert status == 200
            assert 'kvtier_unauthenticated_total{why="missing"}' in body
        assert front.get("/health")[0] == 503


def test_a_new_certificate_is_used_at_the_next_connection(front: Front, keys: Keys) -> None:
    for end in ("key", "pem"):  # of another authority
        keys.path(f"server.{end}").write_bytes(keys.path(f"strange.{end}").read_bytes())
    for port in (front.port, front.metrics):
        assert front.get("/metrics", tls="stranger", port=port)[0] == 200


def test_a_daemons_page_is_plain_without_tls(keys: Keys) -> None:
    (port,) = fixed_ports(1)
    toml = node_toml(keys.folder).replace("[node]", f"[node]\nmetrics_port = {port}")
    with (
        Process("node", toml, keys.folder) as node,
        closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as client,
    ):
        client.request("GET", "/metrics")
        with closing(client.getresponse()) as answer:
            assert answer.status == 200
            assert "kvtier_clients 0.0" in answer.read().decode()
        (warning,) = [each for each in node.log.read_text().splitlines() if "WARNING" in each]
        assert f"node.metrics_port: 0.0.0.0:{port} has no TLS and no token" in warning
