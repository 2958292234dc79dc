"""Clusters, Sentinels, TLS, Unix sockets and users: real servers, and what a store does."""

import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from kvtier.cli import main
from kvtier.config import RedisConfig
from kvtier.errors import ConfigError, StoreUnavailable
from kvtier.stores.base import Store
from kvtier.stores.redis.purge import purge
from kvtier.stores.redis.servers import slot
from kvtier.testing.stores import StoreTests, content, frames, key
from kvtier.testing.valkey import ValkeyCluster, ValkeyServer
from tests.launching import fixed_ports
from tests.stores.redis_support import (
    MIB,
    all_fail,
    answers,
    name_of,
    store_at,
    takes,
    wait_until,
)

# A cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[ValkeyCluster]:
    with ValkeyCluster() as cluster:
        yield cluster


@pytest.fixture
def empty(cluster: ValkeyCluster) -> ValkeyCluster:
    for server in cluster.servers:
        server.call("FLUSHALL")
    return cluster


class TestCluster(StoreTests):
    shared = True

    @pytest.fixture
    def store(self, empty: ValkeyCluster) -> Iterator[Store]:
        with closing(store_at(empty.url)) as store:
            yield store


def test_blocks_are_spread_and_the_parts_of_each_lie_together(empty: ValkeyCluster) -> None:
    with closing(store_at(empty.url)) as store:
        assert store.write(frames(range(30), 5 * MIB)) == [True] * 30
        held = [server.call("KEYS", "*") for server in empty.servers]
        assert all(isinstance(each, list) and each for each in held)
        for names in held:
            heads = {name.partition(b"}")[0] for name in names}
            assert len(names) == 3 * len(heads)


def test_one_seed_is_enough(empty: ValkeyCluster) -> None:
    with closing(store_at(f"redis+cluster://127.0.0.1:{empty.servers[2].port}")) as store:
        store.write(frames(range(20)))
        assert store.count([key(n) for n in range(20)]) == 20


def test_a_slot_that_moves_loses_nothing(empty: ValkeyCluster) -> None:
    """Before, in between (ASK; its keys on both sides, too), and after (MOVED)."""
    with closing(store_at(empty.url)) as store:
        assert store.write(frames(["a"], 5 * MIB)) == [True]
        number = slot(name_of("a").encode())
        (source,) = [each for each in empty.servers if each.call("KEYS", "*")]
        target = next(each for each in empty.servers if each is not source)
        ids = [each.call("CLUSTER", "MYID").decode() for each in (source, target)]
        target.call("CLUSTER", "SETSLOT", number, "IMPORTING", ids[0])
        source.call("CLUSTER", "SETSLOT", number, "MIGRATING", ids[1])
        for part in (1, 0, 2):
            moved = source.call("MIGRATE", "127.0.0.1", target.port, name_of("a", part), 0, 10_000)
            assert moved == b"OK"
            assert store.read([key("a")]) == [content("a", 5 * MIB)]
            assert store.write(frames(["a"], 5 * MIB)) == [True]
            assert store.count([key("a")]) == 1
        for server in (target, source):
            assert server.call("CLUSTER", "SETSLOT", number, "NODE", ids[1]) == b"OK"
        assert store.read([key("a")]) == [content("a", 5 * MIB)]
        assert store.write(frames(["a"])) == [True]
        assert store.read([key("a")]) == [content("a", 1000)]
    for server in (source, target):  # back, for the tests after this one
        server.call("FLUSHALL")
        assert server.call("CLUSTER", "SETSLOT", number, "NODE", ids[0]) == b"OK"


def test_a_replica_takes_over() -> None:
    with (
        ValkeyCluster(replicas=3, node_timeout_ms=1000) as cluster,
        closing(store_at(cluster.url)) as store,
    ):
        names = [*range(30)]
        store.write(frames(names))
        # What a replica has not got yet would be lost.
        wait_until(lambda: sum(each.call("DBSIZE") for each in cluster.servers) == 60)
        cluster.servers[1].kill()
        wait_until(lambda: all(takes(store, ("new", n)) for n in range(30)))
        wait_until(lambda: answers(store))
        assert store.read([key(n) for n in names]) == [content(n, 1000) for n in names]


def test_a_cluster_without_one_of_its_shares_gives_no_answer_and_comes_back() -> None:
    with ValkeyCluster() as cluster, closing(store_at(cluster.url)) as patient:
        patient.write(frames(range(30)))
        cluster.servers[0].pause()
        with (
            closing(store_at(cluster.url, timeout_s=0.3)) as store,
            pytest.raises(StoreUnavailable),
        ):
            store.read([key(n) for n in range(30)])
        cluster.servers[0].resume()
        wait_until(lambda: all(takes(patient, n) for n in range(30)))
        assert patient.count([key(n) for n in range(30)]) == 30


# Sentinels


def sentinels_of(
    primary: ValkeyServer, stack: ExitStack, folder: Path, password: str
) -> tuple[ValkeyServer, str]:
    """A Sentinel that is slow to give the primary up, and the URL of the service."""
    settings = (
        f"sentinel monitor blocks 127.0.0.1 {primary.port} 1\n"
        "sentinel down-after-milliseconds blocks 60000\n"  # a slow one is not down
        "sentinel failover-timeout blocks 2000\n"
    )
    sentinel = ValkeyServer(folder=folder, settings=settings, sentinel=True, password=password)
    stack.enter_context(sentinel)
    (dead,) = fixed_ports(1)
    return sentinel, f"redis+sentinel://127.0.0.1:{dead},127.0.0.1:{sentinel.port}/blocks"


def test_the_sentinels_name_a_new_primary(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("s3cret\n")
    with ExitStack() as stack:
        primary = stack.enter_context(ValkeyServer())
        follow = f"replicaof 127.0.0.1 {primary.port}\nrepl-diskless-sync-delay 0"
        replica = stack.enter_context(ValkeyServer(settings=follow))
        wait_until(lambda: b"master_link_status:up" in replica.call("INFO", "replication"))
        sentinel, url = sentinels_of(primary, stack, tmp_path / "sentinel", "s3cret")
        with closing(store_at(url)) as stranger:
            all_fail(stranger, "NOAUTH")
        secret = str(tmp_path / "password")
        store = stack.enter_context(closing(store_at(url, sentinel_password_file=secret)))
        assert store.write(frames(["a", "b"], 5 * MIB)) == [True, True]
        wait_until(lambda: replica.call("DBSIZE") == 6)
        primary.kill()
        told = sentinel.call("SENTINEL", "SET", "blocks", "down-after-milliseconds", 500)
        assert told == b"OK"
        wait_until(lambda: takes(store, "new"))
        assert store.read([key("a"), key("b")]) == [content("a", 5 * MIB), content("b", 5 * MIB)]
        assert replica.call("GET", name_of("new"))


def test_a_primary_that_became_a_replica_is_left_for_the_new_one() -> None:
    """The connection holds, but the answer is READONLY.

    A real Sentinel takes 10 s to make a replica of an old primary; this one only names servers.
    """
    with ExitStack() as stack:
        old, new = (stack.enter_context(ValkeyServer()) for _ in range(2))
        named = [old.port]
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

        def name_them() -> None:
            with suppress(OSError):
                while True:
                    asking, _ = listener.accept()
                    with asking:
                        while asking.recv(1000):
                            port = b"%d" % named[0]
                            asking.sendall(
                                b"*2\r\n$9\r\n127.0.0.1\r\n$%d\r\n%b\r\n" % (len(port), port)
                            )

        thread = threading.Thread(target=name_them)
        thread.start()
        stack.callback(thread.join)
        stack.callback(lambda: listener.shutdown(socket.SHUT_RDWR))
        url = f"redis+sentinel://127.0.0.1:{listener.getsockname()[1]}/blocks"
        store = stack.enter_context(closing(store_at(url)))
        assert store.write(frames(["a"])) == [True]
        old.call("REPLICAOF", "127.0.0.1", new.port)
        with pytest.raises(StoreUnavailable, match="READONLY"):
            store.write(frames(["b"]))
        named[0] = new.port
        assert store.write(frames(["b"])) == [True]
        assert new.call("GET", name_of("b"))


def test_sentinels_that_know_no_such_service(tmp_path: Path) -> None:
    with ExitStack() as stack:
        primary = stack.enter_context(ValkeyServer())
        _, url = sentinels_of(primary, stack, tmp_path, "")
        url = url.replace("/blocks", "/other")
        all_fail(stack.enter_context(closing(store_at(url))), "names no server")


# TLS: this build of the server has none, so a proxy ends it


class TLSProxy:
    """Ends TLS before a server, one thread a direction. A context manager."""

    def __init__(self, port: int, context: ssl.SSLContext) -> None:
        self._port = port
        self._context = context
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept)]
        self._open: list[socket.socket] = []

    def __enter__(self) -> "TLSProxy":
        self._threads[0].start()
        return self

    def __exit__(self, *error: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._threads[0].join()
        for each in self._open:
            each.close()
        for each in self._threads:
            each.join()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(near,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, near: socket.socket) -> None:
        """One connection; one thread reads the server, this one the client."""
        with near, socket.create_connection(("127.0.0.1", self._port)) as far:
            try:
                tls = self._context.wrap_socket(near, server_side=True)
            except OSError:
                return
            with tls:
                back = threading.Thread(target=_pump, args=(far, tls))
                back.start()
                _pump(tls, far)
                back.join()


def _pump(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(1 << 16):
            target.sendall(data)
    except OSError:
        pass
    finally:
        with suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)


def certificate(folder: Path, name: str) -> tuple[str, str]:
    """A self-signed certificate for `name` and its key, as files."""
    private = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    day = timedelta(days=1)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.now(UTC) - day)
        .not_valid_after(datetime.now(UTC) + day)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(private, hashes.SHA256())
    )
    paths = folder / f"{name}.crt", folder / f"{name}.key"
    paths[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return str(paths[0]), str(paths[1])


@pytest.fixture(scope="module")
def server() -> Iterator[ValkeyServer]:
    with ValkeyServer(password="s3cret") as server:
        yield server


@pytest.fixture
def proxy(server: ValkeyServer, tmp_path: Path) -> Iterator[TLSProxy]:
    """Wants a certificate of its clients, too."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*certificate(tmp_path, "localhost"))
    context.load_verify_locations(certificate(tmp_path, "client")[0])
    context.verify_mode = ssl.CERT_REQUIRED
    server.call("FLUSHALL")
    with TLSProxy(server.port, context) as proxy:
        yield proxy


def tls_store(proxy: TLSProxy, folder: Path, host: str = "localhost", **more: str) -> Store:
    files = {
        "ca_file": str(folder / "localhost.crt"),
        "cert_file": str(folder / "client.crt"),
        "key_file": str(folder / "client.key"),
        **more,
    }
    return store_at(f"rediss://:s3cret@{host}:{proxy.port}", **files)


class TestTLS(StoreTests):
    shared = True

    @pytest.fixture
    def store(self, proxy: TLSProxy, tmp_path: Path) -> Iterator[Store]:
        with closing(tls_store(proxy, tmp_path)) as store:
            yield store


def test_a_server_that_is_not_who_it_should_be_gets_nothing(
    proxy: TLSProxy, tmp_path: Path
) -> None:
    for doubtful in (
        tls_store(proxy, tmp_path, ca_file=str(tmp_path / "client.crt")),
        tls_store(proxy, tmp_path, ca_file=""),
        tls_store(proxy, tmp_path, host="127.0.0.1"),
    ):
        with closing(doubtful):
            all_fail(doubtful, "CERTIFICATE_VERIFY_FAILED")


def test_bad_files_of_tls_are_refused_at_the_start(proxy: TLSProxy, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for bad in ("ca_file", "cert_file"):
        for path in ("empty", "missing"):
            with pytest.raises(ConfigError, match=f"redis.{bad} .*{path}"):
                tls_store(proxy, tmp_path, **{bad: str(tmp_path / path)})


# A Unix socket, and a user who may do no more than docs/redis.md says


def test_a_unix_socket_and_a_database(tmp_path: Path) -> None:
    path = tmp_path / "valkey.sock"
    with (
        ValkeyServer(settings=f"unixsocket {path}", password="s3c/ret") as server,
        closing(store_at(f"unix://:s3c%2Fret@{path}?db=3")) as store,
    ):
        assert store.write(frames(["a"], 5 * MIB)) == [True]
        assert store.read([key("a")]) == [content("a", 5 * MIB)]
        keyspace = server.call("INFO", "keyspace")
        assert b"db3:keys=3" in keyspace
        assert b"db0" not in keyspace


def test_the_documented_rules_are_enough_for_a_user(server: ValkeyServer) -> None:
    """And a node's may not delete: not even a fault of ours could."""
    text = (Path(__file__).parents[2] / "docs" / "redis.md").read_text()
    rules = [line for line in text.splitlines() if line.strip().startswith("ACL SETUSER")]
    for rule in rules:
        server.call(*rule.replace("PASSWORD", "hers").split())
    url, purging = (server.url.replace(":s3cret@", f"{rule.split()[2]}:hers@") for rule in rules)
    with closing(store_at(url)) as store:
        assert store.write(frames(["a", "b"], 5 * MIB)) == [True, True]
        assert store.read([key("a")]) == [content("a", 5 * MIB)]
        assert store.count([key("a")]) == 1
        with pytest.raises(StoreUnavailable, match="NOPERM"):
            [*purge(RedisConfig(url=url), "main", remove=True)]
        assert store.count([key("a"), key("b")]) == 2
        found = [*purge(RedisConfig(url=purging), "main", remove=True)]
        assert sum(each.values for each in found) == 6
        assert store.count([key("a")]) == 0
    with closing(store_at(url, prefix="other")) as store:
        all_fail(store, "NOPERM")


# kvtier purge


def purged(config: Path, *more: str) -> str:
    command = [sys.executable, "-m", "kvtier.cli", "purge", "--config", str(config), *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_purge_tells_first_and_removes_one_namespace_only(
    empty: ValkeyCluster, tmp_path: Path
) -> None:
    config = tmp_path / "kvtier.toml"
    config.write_text(f'[redis]\nurl = "{empty.url}"\n')
    with (
        closing(store_at(empty.url, namespace="old")) as old,
        closing(store_at(empty.url, namespace="older")) as older,
    ):
        old.write([*frames(range(600), 100), *frames(["large"], 5 * MIB)])
        older.write(frames(range(5)))
        assert any(each.call("SET", "somebody's", "own") == b"OK" for each in empty.servers)
        told = purged(config, "--namespace", "old")
        assert "would remove 603 values, 5.1 MiB" in told
        assert "add --yes" in told
        assert old.count([key(n) for n in range(600)]) == 600
        assert "removed 603 values, 5.1 MiB" in purged(config, "--namespace", "old", "--yes")
        assert old.read([key("large"), key(1)]) == [None, None]
        assert older.count([key(n) for n in range(5)]) == 5
        assert sum(each.call("DBSIZE") for each in empty.servers) == 6
        assert "removed 0 values" in purged(config, "--namespace", "old", "--yes")


@pytest.mark.parametrize(
    ("toml", "namespace", "error"),
    [
        ("", "main", "has no [redis] table"),
        ('[redis]\nurl = "redis://127.0.0.1:1"', "*", "redis.namespace is '*', must be"),
        ('[redis]\nurl = "redis://127.0.0.1:1"', "main", "redis 127.0.0.1:1: "),
    ],
)
def test_a_purge_that_cannot_be_done_says_why_in_a_line(
    tmp_path: Path, toml: str, namespace: str, error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "kvtier.toml"
    config.write_text(toml)
    assert main(["purge", "--config", str(config), "--namespace", namespace, "--yes"]) == 2
    assert error in capsys.readouterr().err


# The official images, where Docker runs


def docker_runs() -> bool:
    try:
        return subprocess.run(["docker", "info"], capture_output=True, timeout=20).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


@pytest.mark.docker
@pytest.mark.parametrize("image", ["redis:6.2-alpine", "redis:8-alpine", "valkey/valkey:8-alpine"])
def test_official_images(image: str) -> None:
    if not docker_runs():
        pytest.skip("no Docker daemon")
    from testcontainers.core.container import DockerContainer

    with DockerContainer(image).with_exposed_ports(6379) as container:
        at = f"{container.get_container_host_ip()}:{container.get_exposed_port(6379)}"
        with closing(store_at(f"redis://{at}")) as store:
            wait_until(lambda: answers(store))
            assert store.write(frames(["a", "b"], 5 * MIB)) == [True, True]
            assert store.read([key("b"), key("c"), key("a")]) == [
                content("b", 5 * MIB), None, content("a", 5 * MIB),
            ]  # fmt: skip
            assert store.count([key("a"), key("b"), key("c")]) == 2
