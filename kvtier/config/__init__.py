"""Every setting, its default and its limits: one TOML file, read here and nowhere else.

A table that is absent keeps its defaults; `[disk]` and `[redis]` that are absent mean no such
tier. Sizes are bytes or text such as "512MiB". Unknown keys and bad values are refused in one
line that names the key, the value and the limit.
"""

import tomllib
from pathlib import Path

from kvtier.config.credentials import Tokens, Watched, check_tls
from kvtier.config.host import (
    cache_dir,
    cores_available,
    memory_available,
    node_name,
    redis_url,
    sentinel_password,
    tenant_secrets,
    vllm_speaks_on_stderr,
)
from kvtier.config.roster import (
    MAX_NAME,
    check_peers,
    parse_peers,
    peers_listen,
    write_peers,
)
from kvtier.config.settings import (
    AdapterConfig,
    AuthConfig,
    Config,
    DiskConfig,
    HostConfig,
    MemberConfig,
    NodeConfig,
    PeerConfig,
    PeersConfig,
    RedisConfig,
    RouterConfig,
    TenantConfig,
    TlsConfig,
    WorkerConfig,
)
from kvtier.config.values import (
    Size,
    build,
    is_loopback,
    limits,
    one_of,
    parse_address,
    parse_size,
)
from kvtier.errors import ConfigError

__all__ = [
    "MAX_NAME",
    "AdapterConfig",
    "AuthConfig",
    "Config",
    "DiskConfig",
    "HostConfig",
    "MemberConfig",
    "NodeConfig",
    "PeerConfig",
    "PeersConfig",
    "RedisConfig",
    "RouterConfig",
    "Size",
    "TenantConfig",
    "TlsConfig",
    "Tokens",
    "Watched",
    "WorkerConfig",
    "cache_dir",
    "check_tls",
    "cores_available",
    "from_dict",
    "is_loopback",
    "limits",
    "load",
    "memory_available",
    "node_name",
    "one_of",
    "parse_address",
    "parse_peers",
    "parse_size",
    "peers_listen",
    "redis_url",
    "sentinel_password",
    "tenant_secrets",
    "vllm_speaks_on_stderr",
    "write_peers",
]


def load(path: str | Path | None) -> Config:
    """The settings of the TOML file at `path`; None: all defaults.

    Raises:
        ConfigError: The file cannot be read, is not TOML, or holds an unknown key or bad value.
    """
    if path is None:
        return Config()
    try:
        with Path(path).open("rb") as file:
            return from_dict(tomllib.load(file))
    except OSError as error:
        raise ConfigError(f"config {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path}: not TOML: {error}") from None


def from_dict(tables: dict[str, object]) -> Config:
    """The settings of a parsed file.

    Raises:
        ConfigError: An unknown key or a bad value.
    """
    config = build(Config, tables, "")
    sockets = (("node.socket", config.node.socket), ("worker.socket", config.worker.socket))
    for name, where in sockets:
        if len(where) > 100:  # sockaddr_un holds 107
            raise ConfigError(f"{name} is {len(where)} characters long, limit 100: {where}")
    for name, at in (("node", config.node.listen), ("worker", config.worker.listen),
                     ("router", config.router.listen)):  # fmt: skip
        parse_address(at, f"{name}.listen")
    for name, at in (("http", config.router.http), ("epp", config.router.epp)):
        if at:
            parse_address(at, f"router.{name}")
    if config.peers:
        check_peers(config.peers.members, "peers.members")
        if config.peers.listen:
            parse_address(config.peers.listen, "peers.listen")
    return config
