"""Where the servers are: what `redis.url` and the files beside it say."""

import ssl
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, NamedTuple
from urllib.parse import unquote, urlsplit

from kvtier.errors import ConfigError

_DEFAULT_PORT: Final = 6379
_SENTINEL_PORT: Final = 26379
_BAD_URL: Final = (
    "redis.url is not redis://[user:password@]host[:port][/db], rediss://... (TLS), "
    "redis+cluster://host:port,host:port, redis+sentinel://host:port,host:port/service[/db] or "
    "unix://[user:password@]/path[?db=N] (not shown: it may hold a password; '/', '@', ':', '#', "
    "',' and '?' in one are written as %2F, %40, %3A, %23, %2C and %3F)"
)


class Kind(StrEnum):
    """How the servers are arranged."""

    ALONE = "redis"
    CLUSTER = "redis cluster"
    SENTINEL = "redis sentinel"


class Address(NamedTuple):
    """One server: host and port, or the path of a Unix socket with port 0."""

    host: str
    port: int

    def __str__(self) -> str:
        if not self.port:
            return self.host
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Login:
    """What a connection says first. Not shown by repr."""

    user: str = field(default="", repr=False)
    password: str = field(default="", repr=False)
    db: int = 0


@dataclass(frozen=True, slots=True)
class Target:
    """What a URL names. `seeds` are the servers, or those to ask for them."""

    kind: Kind
    seeds: tuple[Address, ...]
    login: Login
    tls: bool = False
    service: str = ""

    def __str__(self) -> str:
        service = f"/{self.service}" if self.service else ""
        return f"{self.kind} {','.join(map(str, self.seeds))}{service}"


_SCHEMES: Final = {
    "redis": (Kind.ALONE, False),
    "rediss": (Kind.ALONE, True),
    "redis+cluster": (Kind.CLUSTER, False),
    "rediss+cluster": (Kind.CLUSTER, True),
    "redis+sentinel": (Kind.SENTINEL, False),
    "rediss+sentinel": (Kind.SENTINEL, True),
}


def parse(url: str) -> Target:
    """What `url` names.

    Raises:
        ConfigError: It is none of the forms that the message lists; it is not quoted there.
    """
    try:
        return _parse(url)
    except ValueError:
        # What these errors say may quote a piece of the password.
        raise ConfigError(_BAD_URL) from None


def _parse(url: str) -> Target:
    parts = urlsplit(url)
    login, at, hosts = parts.netloc.rpartition("@")
    user, _, password = login.partition(":")
    if parts.fragment or ("@" in login and at):
        raise ValueError("an unescaped character")
    if parts.scheme == "unix":
        if hosts or not parts.path.startswith("/") or len(parts.path) < 2:
            raise ValueError("no path")
        db = parts.query.removeprefix("db=") if parts.query else "0"
        entry = Login(unquote(user), unquote(password), _db(db))
        return Target(Kind.ALONE, (Address(unquote(parts.path), 0),), entry)
    if parts.scheme not in _SCHEMES or parts.query:
        raise ValueError("no such scheme")
    kind, tls = _SCHEMES[parts.scheme]
    path = parts.path.strip("/").split("/") if parts.path.strip("/") else []
    service = ""
    if kind is Kind.SENTINEL:
        if not path:
            raise ValueError("no service")
        service = unquote(path.pop(0))
    if len(path) > (0 if kind is Kind.CLUSTER else 1):
        raise ValueError("too long a path")
    entry = Login(unquote(user), unquote(password), _db(path[0]) if path else 0)
    port = _SENTINEL_PORT if kind is Kind.SENTINEL else _DEFAULT_PORT
    seeds = tuple(_address(each, port) for each in hosts.split(","))
    if kind is Kind.ALONE and len(seeds) > 1:
        raise ValueError("one server has one address")
    return Target(kind, seeds, entry, tls, service)


def _db(text: str) -> int:
    if not text.isdecimal() or len(text) > 5:
        raise ValueError("not a database number")
    return int(text)


def _address(text: str, port: int) -> Address:
    if text.startswith("["):
        host, _, rest = text[1:].partition("]")
    else:
        host, colon, rest = text.partition(":")
        rest = colon + rest
    if rest:
        if not rest.startswith(":") or not rest[1:].isdecimal():
            raise ValueError("not a port")
        port = int(rest[1:])
    if not host or not 1 <= port <= 65535:
        raise ValueError("not an address")
    return Address(host, port)


def tls_context(ca_file: str, cert_file: str, key_file: str) -> ssl.SSLContext:
    """A client's context that checks the server's certificate and name.

    Raises:
        ConfigError: A file cannot be read or is not what it should be.
    """
    try:
        context = ssl.create_default_context(cafile=ca_file or None)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"redis.ca_file {ca_file}: {error}") from None
    if cert_file:
        try:
            context.load_cert_chain(cert_file, key_file or None)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"redis.cert_file {cert_file}: {error}") from None
    return context
