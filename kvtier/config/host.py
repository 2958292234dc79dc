"""What this host says of itself: its name, memory, cache folder, and secrets in files."""

import os
import socket
from pathlib import Path
from typing import Final
from urllib.parse import quote, urlsplit, urlunsplit

from kvtier.config.settings import RedisConfig, WorkerConfig
from kvtier.errors import ConfigError

CGROUPS: Final = Path("/sys/fs/cgroup")
_MEMORY_FILES: Final = (  # limit, use, and what is counted there; version 2 and version 1
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)
_UNKNOWN: Final = 2**63
MAX_TENANTS: Final = 4096
MAX_TENANT: Final = 253  # characters of a name
MIN_SECRET: Final = 16  # bytes


def node_name(configured: str) -> str:
    """The configured name, or the host's."""
    return configured or socket.gethostname()


def memory_available(cgroups: Path = CGROUPS) -> int:
    """Bytes that the kernel could give without swapping; a very large number if it won't say.

    A container has what its limit leaves, where that is less than what the host has.
    """
    left = _left_in_container(cgroups)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return left
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return min(int(found[0]) * 1024, left) if found else left


def _left_in_container(cgroups: Path) -> int:
    for files in _MEMORY_FILES:
        try:
            limit, used, stat = ((cgroups / name).read_text() for name in files[:3])
            counts = dict(line.split() for line in stat.splitlines())
            if limit.strip() == "max":
                return _UNKNOWN
            # Pages of files that nobody has used lately go before anything is refused.
            return max(0, int(limit) - int(used) + int(counts.get(files[3], 0)))
        except (OSError, ValueError):  # no such version of cgroups
            continue
    return _UNKNOWN


def cores_available() -> int:
    """Processors that this process may keep busy, by affinity and cgroup quota; at least 1."""
    allowed = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(allowed, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup v2, or "max"
        return allowed


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
    password = _secret(redis.password_file, "redis.password_file")
    user, _, host = url.netloc.rpartition("@")
    netloc = f"{user}:{quote(password, safe='')}@{host}"
    return urlunsplit(url._replace(netloc=netloc))


def sentinel_password(redis: RedisConfig) -> str:
    """What `sentinel_password_file` holds, read anew at each call; empty without one.

    Raises:
        ConfigError: The file cannot be read.
    """
    if not redis.sentinel_password_file:
        return ""
    return _secret(redis.sentinel_password_file, "redis.sentinel_password_file")


def tenant_secrets(worker: WorkerConfig) -> dict[str, bytes]:
    """Every tenant's secret, by name, as its file holds it now (whitespace around it left out).

    Raises:
        ConfigError: A name is empty, too long or given twice, there are more than MAX_TENANTS, or
            a secret cannot be read or is shorter than MIN_SECRET bytes.
    """
    if len(worker.tenants) > MAX_TENANTS:
        raise ConfigError(f"worker.tenants has {len(worker.tenants)} entries, limit {MAX_TENANTS}")
    secrets: dict[str, bytes] = {}
    for i, tenant in enumerate(worker.tenants):
        where = f"worker.tenants[{i}]"
        if not 1 <= len(tenant.name) <= MAX_TENANT:
            raise ConfigError(
                f"{where}.name has {len(tenant.name)} characters, must have 1 to {MAX_TENANT}"
            )
        if tenant.name in secrets:
            raise ConfigError(f"{where}.name is {tenant.name!r}, which another tenant has too")
        secret = _secret(tenant.secret_file, f"{where}.secret_file").encode()
        if len(secret) < MIN_SECRET:
            raise ConfigError(
                f"{where}.secret_file holds {len(secret)} bytes, must hold at least {MIN_SECRET}"
            )
        secrets[tenant.name] = secret
    return secrets


def _secret(path: str, name: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name}: {error}") from None


def vllm_speaks_on_stderr() -> None:
    """To be called before vLLM is imported: our own standard output has lines that others read."""
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def cache_dir() -> Path:
    """Where converted models are kept: $KVTIER_CACHE, else kvtier in the user's cache folder."""
    if given := os.environ.get("KVTIER_CACHE"):
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "kvtier"
