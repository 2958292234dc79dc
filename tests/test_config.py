import os
from pathlib import Path

import pytest

from kvtier import config
from kvtier.errors import ConfigError


def test_a_file_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "kvtier.toml"
    path.write_text(
        """
[node]
name = "a"
max_clients = 3
allow_uids = [1000]
[host]
bytes = "1.5 GiB"
drain_at = 1
[disk]
path = "/data"
bytes = 1048576
[redis]
url = "redis://r:6379/1"
[router]
members = [{ node = "a", daemon = "h:1", worker = "h:2" }]
"""
    )
    read = config.load(path)
    assert (read.node.name, read.node.max_clients, read.node.allow_uids) == ("a", 3, (1000,))
    assert (read.host.bytes, read.host.drain_at) == (3 << 29, 1.0)
    assert read.disk is not None
    assert (read.disk.path, read.disk.bytes) == ("/data", 1 << 20)
    assert read.redis is not None
    assert read.redis.url == "redis://r:6379/1"
    assert read.router.members == (config.MemberConfig(node="a", daemon="h:1", worker="h:2"),)
    assert read.worker == config.WorkerConfig()


def test_no_file_means_defaults_and_no_lower_tiers() -> None:
    defaults = config.load(None)
    assert defaults.disk is None
    assert defaults.redis is None


@pytest.mark.parametrize(
    ("tables", "line"),
    [
        ({"nod": {}}, "nod: no such setting; known here: node, host, disk, redis, worker, router"),
        ({"node": {"sockets": "x"}}, "node.sockets: no such setting; known here: name, socket,"),
        ({"node": 3}, "node must be a table"),
        ({"host": {"bytes": "2 GiBi"}}, "host.bytes: '2 GiBi' is not a size"),
        ({"host": {"bytes": True}}, "host.bytes: True is not a size"),
        ({"host": {"bytes": 5}}, "host.bytes is 5, must be 1048576 to"),
        ({"host": {"drain_at": 1.5}}, "host.drain_at is 1.5, must be 0.0 to 1.0"),
        ({"disk": {"bytes": "1GiB"}}, "disk.path must be set"),
        ({"disk": {"path": "/d", "codec": "zip"}}, "disk.codec is 'zip', must be one of raw, lz4"),
        ({"redis": {"url": 5}}, "redis.url is 5, must be of type str"),
        ({"worker": {"max_running": 1.0}}, "worker.max_running is 1.0, must be of type int"),
        ({"worker": {"listen": "7000"}}, "worker.listen is '7000', must be host:port"),
        ({"node": {"listen": "h:70000"}}, "node.listen is 'h:70000', must be host:port"),
        ({"node": {"socket": "/" + "x" * 100}}, "node.socket is 101 characters long, limit 100"),
        ({"router": {"members": [{"node": 1}]}}, r"router.members[0].node is 1, must be of type"),
        ({"router": {"members": {}}}, "router.members must be a list"),
        ({"peers": {"lends": 65}}, "peers.lends is 65, must be 0 to 64"),
        ({"peers": {"members": [{"node": "a"}]}}, "peers.members[0].address must be set"),
        (
            {"peers": {"members": [{"node": "a", "address": "h"}]}},
            "peers.members[0].address is 'h', must be host:port",
        ),
        (
            {"peers": {"members": [{"node": "", "address": "h:1"}]}},
            "peers.members[0].node has 0 characters, must have 1 to 253",
        ),
        (
            {"peers": {"members": [{"node": "a", "address": "h:1"}] * 2}},
            "peers.members[1].node is a, which another member has too",
        ),
    ],
)
def test_a_mistake_gives_one_line_with_key_value_and_limit(
    tables: dict[str, object], line: str
) -> None:
    with pytest.raises(ConfigError) as error:
        config.from_dict(tables)
    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)


def test_tenants_secrets_are_read_from_their_files(tmp_path: Path) -> None:
    (tmp_path / "red").write_text("0123456789abcdef\n")
    (tmp_path / "short").write_text("0123")

    def secrets(*tenants: tuple[str, str]) -> dict[str, bytes]:
        entries = [{"name": n, "secret_file": str(tmp_path / file)} for n, file in tenants]
        tables: dict[str, object] = {"worker": {"tenants": entries}}
        return config.tenant_secrets(config.from_dict(tables).worker)

    assert secrets() == {}
    assert secrets(("red", "red")) == {"red": b"0123456789abcdef"}
    for wrong, line in (
        ([("red", "red"), ("red", "red")], r"tenants\[1\].name is 'red', which another"),
        ([("", "red")], r"tenants\[0\].name has 0 characters, must have 1 to 253"),
        ([("red", "short")], r"tenants\[0\].secret_file holds 4 bytes, must hold at least 16"),
        ([("red", "none")], r"tenants\[0\].secret_file: .*No such file"),
    ):
        with pytest.raises(ConfigError, match=rf"^worker.{line}"):
            secrets(*wrong)


def test_a_file_that_is_not_there_or_not_toml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: No such file or directory"):
        config.load(tmp_path / "none.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("[node\n")
    with pytest.raises(ConfigError, match=r"broken\.toml: not TOML"):
        config.load(broken)


def test_converted_models_are_kept_where_the_user_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KVTIER_CACHE", str(tmp_path))
    assert config.cache_dir() == tmp_path
    monkeypatch.delenv("KVTIER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    assert config.cache_dir() == Path("/c/kvtier")


MIB = 2**20
V2 = {
    "memory.max": f"{512 * MIB}\n",
    "memory.current": f"{100 * MIB}\n",
    "memory.stat": f"anon {60 * MIB}\nfile {40 * MIB}\ninactive_file {30 * MIB}\n",
}
V1 = {
    "memory/memory.limit_in_bytes": V2["memory.max"],
    "memory/memory.usage_in_bytes": V2["memory.current"],
    "memory/memory.stat": f"inactive_file 0\ntotal_inactive_file {30 * MIB}\n",
}


@pytest.mark.parametrize(
    ("files", "left"),
    [
        (V2, 442 * MIB),
        (V1, 442 * MIB),
        ({**V2, "memory.max": "max\n"}, None),
        ({**V1, "memory/memory.limit_in_bytes": "9223372036854771712\n"}, None),
        ({**V2, "memory.current": f"{600 * MIB}\n"}, 0),
        ({**V2, "memory.max": "nonsense\n"}, None),
        ({}, None),
    ],
)
def test_a_container_has_what_its_limit_leaves(
    tmp_path: Path, files: dict[str, str], left: int | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert total > 512 * MIB
    available = config.memory_available(tmp_path)
    if left is None:
        assert 0 < available <= total
    else:
        assert available == left
