"""Every setting, its default and its limits: one TOML file, read here and nowhere else.

A table that is absent keeps its defaults; `[disk]` and `[redis]` that are absent mean no such
tier. Sizes are bytes or text such as "512MiB". Unknown keys and bad values are refused in one
line that names the key, the value and the limit.
"""

import dataclasses
import os
import re
import socket
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar, get_args, get_origin
from urllib.parse import quote, urlsplit, urlunsplit

from kvtier.errors import ConfigError

_UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
          "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}  # fmt: skip
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")

Size = typing.Annotated[int, "size"]  # bytes


def parse_size(text: str | int) -> int:
    """Bytes meant by 1073741824, "1GiB" or "1.5 GB".

    Raises:
        ValueError: Not a size.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        return text
    match = _SIZE.fullmatch(text) if isinstance(text, str) else None
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise ValueError(f"{text!r} is not a size such as 1073741824 or '1GiB'")
    return int(float(match[1]) * unit)


def limits(low: float, high: float) -> dict[str, tuple[float, float]]:
    """Field metadata: the value is refused outside low..high."""
    return {"limits": (low, high)}


def one_of(*values: str) -> dict[str, tuple[str, ...]]:
    """Field metadata: the value is refused unless it is one of these."""
    return {"values": values}


_GIB = 2**30
_PORTS = limits(0, 65535)
_SHARE = limits(0.0, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeConfig:
    """`[node]`: the daemon of one host."""

    name: str = ""  # empty: the host's name
    socket: str = "/run/kvtier/kvtier.sock"  # where engines attach; at most 100 characters
    listen: str = "127.0.0.1:7460"  # gRPC: feed, status, admin
    max_clients: int = field(default=64, metadata=limits(1, 4096))
    max_layouts: int = field(default=1, metadata=limits(1, 16))  # share the host tier evenly
    allow_uids: tuple[int, ...] = ()  # besides the daemon's own
    metrics_port: int = field(default=0, metadata=_PORTS)  # 0: no metrics page


@dataclass(frozen=True, slots=True, kw_only=True)
class HostConfig:
    """`[host]`: tier 0, the arena of pinned memory."""

    bytes: Size = field(default=1 * _GIB, metadata=limits(2**20, 2**46))
    drain_at: float = field(default=0.5, metadata=_SHARE)  # used share above which copies go down


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskConfig:
    """`[disk]`: a folder on a local disk."""

    path: str
    bytes: Size = field(default=10 * _GIB, metadata=limits(2**20, 2**50))
    drain_at: float = field(default=0.8, metadata=_SHARE)
    codec: str = field(default="raw", metadata=one_of("raw", "lz4"))
    threads: int = field(default=2, metadata=limits(1, 64))
    queue: int = field(default=64, metadata=limits(1, 4096))  # demotions under way, in blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisConfig:
    """`[redis]`: one Redis or Valkey, shared by all nodes. Its own limits decide what it keeps."""

    url: str
    password_file: str = ""  # what it holds becomes the password of `url`, see redis_url()
    prefix: str = "kvtier"
    bytes: Size = field(default=64 * _GIB, metadata=limits(2**20, 2**50))  # tracked by this node
    ttl_s: int = field(default=86_400, metadata=limits(1, 10**8))
    timeout_s: float = field(default=1.0, metadata=limits(0.01, 60))  # of any one answer
    retry_s: float = field(default=1.0, metadata=limits(0.05, 600))  # after no answer
    codec: str = field(default="raw", metadata=one_of("raw", "lz4"))
    threads: int = field(default=2, metadata=limits(1, 64))
    queue: int = field(default=64, metadata=limits(1, 4096))


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """`[worker]`: one engine with one model."""

    model: str = "smollm2"  # a folder of a Transformers causal LM, or smollm2 for the built-in one
    name: str = ""  # what requests call the model; empty: the folder's name
    node: str = ""  # empty: the host's name
    socket: str = "/run/kvtier/kvtier.sock"  # the node daemon; empty: no lower tiers
    listen: str = "127.0.0.1:7470"
    device: str = field(default="auto", metadata=one_of("auto", "cpu", "cuda"))
    dtype: str = field(default="float32", metadata=one_of("float32", "bfloat16", "float16"))
    block_tokens: int = field(default=32, metadata=limits(1, 4096))
    vram_bytes: Size = field(default=512 * 2**20, metadata=limits(2**20, 2**46))
    save: str = field(default="fill", metadata=one_of("fill", "second-use", "evict"))
    prefill_tokens: int = field(default=512, metadata=limits(16, 65536))  # in one step
    max_running: int = field(default=4, metadata=limits(1, 256))
    max_waiting: int = field(default=64, metadata=limits(0, 65536))
    wait_s: float = field(default=2.0, metadata=limits(0.0, 60))  # for a load from lower tiers
    threads: int = field(default=0, metadata=limits(0, 1024))  # 0: torch decides


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberConfig:
    """One entry of `router.members`: a node's daemon, its worker, or both."""

    node: str
    daemon: str = ""  # host:port
    worker: str = ""  # host:port


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """`[router]`: the gRPC front."""

    listen: str = "127.0.0.1:7450"
    members: tuple[MemberConfig, ...] = ()  # besides those that the cluster announces
    behind: float = field(default=2.0, metadata=limits(0, 100))  # lambda of the score
    max_requests: int = field(default=256, metadata=limits(1, 65536))  # under way at once
    max_attempts: int = field(default=3, metadata=limits(1, 16))
    timeout_s: float = field(default=300.0, metadata=limits(0.1, 86400))  # where a caller set none
    stale_s: float = field(default=3.0, metadata=limits(0.2, 3600))  # silence that means trouble
    metrics_port: int = field(default=0, metadata=_PORTS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The whole file."""

    node: NodeConfig = field(default_factory=NodeConfig)
    host: HostConfig = field(default_factory=HostConfig)
    disk: DiskConfig | None = None
    redis: RedisConfig | None = None
    worker: WorkerConfig = field(default_factory=WorkerConfig)
    router: RouterConfig = field(default_factory=RouterConfig)


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
    config = _build(Config, tables, "")
    sockets = (("node.socket", config.node.socket), ("worker.socket", config.worker.socket))
    for name, where in sockets:
        if len(where) > 100:  # sockaddr_un holds 107
            raise ConfigError(f"{name} is {len(where)} characters long, limit 100: {where}")
    for name, at in (("node", config.node.listen), ("worker", config.worker.listen),
                     ("router", config.router.listen)):  # fmt: skip
        parse_address(at, f"{name}.listen")
    return config


def parse_address(text: str, name: str) -> tuple[str, int]:
    """Host and port of "host:port"; port 0 means any free one.

    Raises:
        ConfigError: Not such a text; the message begins with `name`.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"{name} is {text!r}, must be host:port with a port of 0 to 65535")
    return host, int(port)


def node_name(configured: str) -> str:
    """The configured name, or the host's."""
    return configured or socket.gethostname()


def memory_available() -> int:
    """Bytes that the kernel could give without swapping; a very large number if it won't say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 2**63
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else 2**63


def redis_url(redis: RedisConfig) -> str:
    """The URL with the password that `password_file` holds, read anew at each call.

    Raises:
        ConfigError: The file cannot be read, or the URL has a password already.
    """
    if not redis.password_file:
        return redis.url
    url = urlsplit(redis.url)
    if url.password:
        raise ConfigError("redis.password_file is set, and redis.url has a password in it too")
    try:
        password = Path(redis.password_file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"redis.password_file: {error}") from None
    user, _, host = url.netloc.rpartition("@")
    netloc = f"{user}:{quote(password, safe='')}@{host}"
    return urlunsplit(url._replace(netloc=netloc))


def cache_dir() -> Path:
    """Where converted models are kept: $KVTIER_CACHE, else kvtier in the user's cache folder."""
    if given := os.environ.get("KVTIER_CACHE"):
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "kvtier"


T = TypeVar("T")


def _build(cls: type[T], table: dict[str, object], where: str) -> T:
    assert dataclasses.is_dataclass(cls)
    hints = typing.get_type_hints(cls, include_extras=True)
    known = {f.name: f for f in dataclasses.fields(cls)}
    values: dict[str, object] = {}
    for key, value in table.items():
        name = f"{where}.{key}" if where else key
        if key not in known:
            raise ConfigError(f"{name}: no such setting; known here: {', '.join(known)}")
        values[key] = _value(hints[key], value, name)
        _check_limits(known[key].metadata, values[key], name)
    missing = [
        f.name
        for f in known.values()
        if f.name not in values
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{where}.{missing[0]} must be set")
    return cls(**values)


def _value(hint: object, value: object, name: str) -> object:
    if isinstance(hint, types.UnionType):
        hint = next(each for each in get_args(hint) if each is not type(None))
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, dict):
            raise ConfigError(f"{name} must be a table")
        return _build(hint, value, name)
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{name} must be a list")
        return tuple(_value(get_args(hint)[0], v, f"{name}[{i}]") for i, v in enumerate(value))
    if hint == Size:
        try:
            return parse_size(typing.cast("str | int", value))
        except ValueError as error:
            raise ConfigError(f"{name}: {error}") from None
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(hint, type) or type(value) is not hint:
        expected = getattr(hint, "__name__", str(hint))
        raise ConfigError(f"{name} is {value!r}, must be of type {expected}")
    return value


def _check_limits(metadata: typing.Mapping[str, object], value: object, name: str) -> None:
    if "limits" in metadata:
        low, high = typing.cast("tuple[float, float]", metadata["limits"])
        if not low <= typing.cast("float", value) <= high:
            raise ConfigError(f"{name} is {value}, must be {low} to {high}")
    if "values" in metadata:
        values = typing.cast("tuple[str, ...]", metadata["values"])
        if value not in values:
            raise ConfigError(f"{name} is {value!r}, must be one of {', '.join(values)}")
