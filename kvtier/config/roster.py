"""Which nodes a daemon may load blocks from: checked, and the file that tells of changes."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from kvtier.config.settings import Config, PeerConfig
from kvtier.config.values import build, parse_address
from kvtier.errors import ConfigError

MAX_PEERS: Final = 1024
MAX_NAME: Final = 253  # characters of a node's name
PORT: Final = 7461  # where blocks are lent, beside node.listen
MAX_NBYTES: Final = 1 << 20  # of the file


def peers_listen(config: Config) -> str:
    """`peers.listen`; where that is empty, PORT beside `node.listen`, any port beside any."""
    if config.peers and config.peers.listen:
        return config.peers.listen
    host, port = parse_address(config.node.listen, "node.listen")
    return f"{host}:{PORT if port else 0}"


def check_peers(members: Iterable[PeerConfig], where: str) -> None:
    """Refuse entries that cannot be; `where` begins the message.

    Raises:
        ConfigError: There are too many, or one has a bad name or address.
    """
    members = tuple(members)
    if len(members) > MAX_PEERS:
        raise ConfigError(f"{where}: {len(members)} of them, limit {MAX_PEERS}")
    seen: set[str] = set()
    for i, each in enumerate(members):
        at = f"{where}[{i}]"
        if not 1 <= len(each.node) <= MAX_NAME:
            raise ConfigError(
                f"{at}.node has {len(each.node)} characters, must have 1 to {MAX_NAME}"
            )
        if each.node in seen:
            raise ConfigError(f"{at}.node is {each.node}, which another member has too")
        seen.add(each.node)
        parse_address(each.address, f"{at}.address")


def parse_peers(data: bytes, name: str) -> tuple[PeerConfig, ...]:
    """What the file `name` says: a JSON array of objects with `node` and `address`.

    Raises:
        ConfigError: It is something else.
    """
    try:
        rows = json.loads(data) if len(data) <= MAX_NBYTES else None
    except (ValueError, RecursionError):
        rows = None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(
            f'{name}: must be a JSON array of {{"node": ..., "address": ...}}, '
            f"at most {MAX_NBYTES} bytes"
        )
    members = tuple(build(PeerConfig, row, f"{name}[{i}]") for i, row in enumerate(rows))
    check_peers(members, name)
    return members


def write_peers(path: str, members: Iterable[PeerConfig]) -> None:
    """Replace the file as a whole; nobody but our own user may read it.

    Raises:
        OSError: It cannot be written.
    """
    rows = [{"node": each.node, "address": each.address} for each in members]
    handle, made = tempfile.mkstemp(dir=Path(path).parent, prefix=f".{Path(path).name}.")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(rows, file)
        Path(made).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(made).unlink()
        raise
